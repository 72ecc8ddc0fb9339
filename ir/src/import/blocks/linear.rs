//! Projections: `nn.Linear`, GPT-2's `Conv1D`, parts of fused ones.

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
fn matmul_t(b: &mut Builder, x: NodeId, w: NodeId) -> Built {
    let wt = b.permute(w, &[1, 0])?;
    b.matmul(x, wt)
}

/// Where one projection lies in a weight that fuses several: the rows are `groups` groups of
/// equally many, and `from..to` of each group belong to the projection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// Number of groups.
    pub(crate) groups: u32,
    /// First row in each group.
    pub(crate) from: u32,
    /// One past the last row in each group.
    pub(crate) to: u32,
}

/// One projection of the module `name`, whose weight `[n, k]` fuses several. Slicing the weight
/// equals slicing the result, and leaves each projection a matmul of its own.
pub(crate) fn linear_part(
    b: &mut Builder,
    name: &str,
    x: NodeId,
    [n, k]: [u32; 2],
    bias: bool,
    part: Part,
) -> Built {
    b.within(name, |b| {
        let w = b.weight("weight", &[n, k])?;
        let w = rows(b, w, part)?;
        let y = matmul_t(b, x, w)?;
        if !bias {
            return Ok(y);
        }
        let bias = b.weight("bias", &[n])?;
        let bias = rows(b, bias, part)?;
        b.binary(BinaryFn::Add, y, bias)
    })
}

/// The rows of a part, in order.
fn rows(b: &mut Builder, w: NodeId, part: Part) -> Built {
    if part.groups == 1 {
        return b.slice(w, 0, part.from, part.to);
    }
    let shape = b.shape(w);
    let groups = i64::from(part.groups);
    let per_group = shape[0].known().unwrap_or(0) / groups;
    let mut grouped = vec![groups.into(), per_group.into()];
    grouped.extend_from_slice(&shape[1..]);
    let w = b.reshape(w, &grouped)?;
    let w = b.slice(w, 1, part.from, part.to)?;
    let mut flat = shape;
    flat[0] = (groups * i64::from(part.to - part.from)).into();
    b.reshape(w, &flat)
}

/// GPT-2's `Conv1D` at `name`: `x·w + bias` with w `[k, n]`.
pub(crate) fn conv1d(b: &mut Builder, name: &str, x: NodeId, [k, n]: [u32; 2]) -> Built {
    conv1d_columns(b, name, x, [k, n], [0, n])
}

/// Columns `from..to` of a `Conv1D` that fuses several projections.
pub(crate) fn conv1d_columns(
    b: &mut Builder,
    name: &str,
    x: NodeId,
    [k, n]: [u32; 2],
    [from, to]: [u32; 2],
) -> Built {
    b.within(name, |b| {
        let mut w = b.weight("weight", &[k, n])?;
        let mut bias = b.weight("bias", &[n])?;
        if (from, to) != (0, n) {
            w = b.slice(w, 1, from, to)?;
            bias = b.slice(bias, 0, from, to)?;
        }
        let y = b.matmul(x, w)?;
        b.binary(BinaryFn::Add, y, bias)
    })
}

/// Logits by the module `name`, or by the embedding's weight `[vocab, hidden]` where it is tied.
pub(crate) fn lm_head(
    b: &mut Builder,
    name: &str,
    h: NodeId,
    tied: Option<NodeId>,
    [vocab, hidden]: [u32; 2],
    bias: bool,
) -> Built {
    match tied {
        None => linear(b, name, h, [vocab, hidden], bias),
        Some(table) => b.within(name, |b| {
            let y = matmul_t(b, h, table)?;
            if !bias {
                return Ok(y);
            }
            let bias = b.weight("bias", &[vocab])?;
            b.binary(BinaryFn::Add, y, bias)
        }),
    }
}
