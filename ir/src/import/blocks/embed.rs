//! Token and position embeddings.

use crate::import::ImportError;
use crate::import::builder::{Builder, Built, batch, seq};
use crate::ops::{Embedding, Input, Iota};
use crate::{DType, Dim, NodeId};

/// The program's input: `tokens i64[B,S]`.
pub(crate) fn tokens(b: &mut Builder) -> Built {
    b.add(
        Input {
            name: "tokens".to_string(),
            dtype: DType::I64,
            shape: vec![batch(), seq()],
        },
        &[],
    )
}

/// The embedding module `name` with its weight `[vocab, hidden]`. Returns the weight, which a
/// tied lm_head uses again, and the rows of the ids.
pub(crate) fn embedding(
    b: &mut Builder,
    name: &str,
    ids: NodeId,
    shape: [u32; 2],
) -> Result<(NodeId, NodeId), ImportError> {
    b.within(name, |b| {
        let table = b.weight("weight", &shape)?;
        let rows = b.add(Embedding, &[table, ids])?;
        Ok((table, rows))
    })
}

/// `[0, 1, …, S-1]` as `i64` of these extents.
pub(crate) fn positions(b: &mut Builder, shape: &[Dim]) -> Built {
    let iota = b.add(
        Iota {
            len: seq(),
            dtype: DType::I64,
        },
        &[],
    )?;
    b.reshape(iota, shape)
}
