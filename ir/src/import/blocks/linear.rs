//! `nn.Linear`.

use crate::import::builder::{Builder, Built};
use crate::{BinaryFn, NodeId};

/// The module `name`: `x·wᵀ (+ bias)` with w `[n, k]`, bias `[n]`, x `[.., k]`.
pub(crate) fn linear(
    b: &mut Builder,
    name: &str,
    x: NodeId,
    [n, k]: [u32; 2],
    bias: bool,
) -> Built {
    b.within(name, |b| {
        let w = b.weight("weight", &[n, k])?;
        let y = matmul_t(b, x, w)?;
        if !bias {
            return Ok(y);
        }
        let bias = b.weight("bias", &[n])?;
        b.binary(BinaryFn::Add, y, bias)
    })
}

/// `x·wᵀ`.
pub(crate) fn matmul_t(b: &mut Builder, x: NodeId, w: NodeId) -> Built {
    let wt = b.permute(w, &[1, 0])?;
    b.matmul(x, wt)
}
