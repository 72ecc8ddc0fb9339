//! Self-attention in the eager form: scores, mask and softmax as separate values.

use super::linear::linear;
use super::norm::rms_norm;
use super::rope::{CosSin, apply};
use crate::import::builder::{Builder, Built, batch, seq};
use crate::{BinaryFn, DType, Dim, NodeId, ReduceFn, UnaryFn};

/// Sizes and options of an attention module.
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    /// Features of the residual stream.
    pub(crate) hidden: u32,
    /// Query heads.
    pub(crate) heads: u32,
    /// Key and value heads.
    pub(crate) kv_heads: u32,
    /// Features per head.
    pub(crate) head_dim: u32,
    /// Factor of the scores.
    pub(crate) scaling: f64,
    /// Whether q, k and v have a bias.
    pub(crate) qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub(crate) o_bias: bool,
    /// Epsilon of an RMSNorm of each query and key head.
    pub(crate) head_norm: Option<f64>,
}

/// The module `self_attn` on x `[B,S,hidden]` with the additive mask `[1,1,S,S]`.
pub(crate) fn self_attention(
    b: &mut Builder,
    a: &Attention,
    x: NodeId,
    rope: CosSin,
    mask: NodeId,
) -> Built {
    b.within("self_attn", |b| {
        let q = projection(b, a, x, ["q_proj", "q_norm"], a.heads)?;
        let k = projection(b, a, x, ["k_proj", "k_norm"], a.kv_heads)?;
        let v = linear(
            b,
            "v_proj",
            x,
            [a.kv_heads * a.head_dim, a.hidden],
            a.qkv_bias,
        )?;
        let v = split_heads(b, v, a.kv_heads, a.head_dim)?;
        let v = b.permute(v, &[0, 2, 1, 3])?;
        let (cos, sin) = rope.per_head(b)?;
        let q = apply(b, q, cos, sin)?;
        let k = apply(b, k, cos, sin)?;
        let o = eager_attention(b, a, [q, k, v], mask)?;
        let width = a.heads * a.head_dim;
        linear(b, "o_proj", o, [a.hidden, width], a.o_bias)
    })
}

/// Query or key heads `[B,heads,S,D]`, normed if the model norms heads.
fn projection(
    b: &mut Builder,
    a: &Attention,
    x: NodeId,
    [proj, norm]: [&str; 2],
    heads: u32,
) -> Built {
    let y = linear(b, proj, x, [heads * a.head_dim, a.hidden], a.qkv_bias)?;
    let mut y = split_heads(b, y, heads, a.head_dim)?;
    if let Some(eps) = a.head_norm {
        y = rms_norm(b, norm, y, a.head_dim, eps)?;
    }
    b.permute(y, &[0, 2, 1, 3])
}

/// `[B,S,heads·D] -> [B,S,heads,D]`.
fn split_heads(b: &mut Builder, x: NodeId, heads: u32, head_dim: u32) -> Built {
    b.reshape(x, &[batch(), seq(), dim(heads), dim(head_dim)])
}

/// `eager_attention_forward`: q `[B,H,S,D]`, k and v `[B,Hkv,S,D]` to `[B,S,H·D]`.
pub(crate) fn eager_attention(
    b: &mut Builder,
    a: &Attention,
    [q, k, v]: [NodeId; 3],
    mask: NodeId,
) -> Built {
    let k = repeat_kv(b, a, k)?;
    let v = repeat_kv(b, a, v)?;
    let kt = b.permute(k, &[0, 1, 3, 2])?;
    let scores = b.matmul(q, kt)?;
    let scores = b.scalar(BinaryFn::Mul, scores, a.scaling)?;
    let scores = b.binary(BinaryFn::Add, scores, mask)?;
    let weights = softmax(b, scores)?;
    let o = b.matmul(weights, v)?;
    let o = b.permute(o, &[0, 2, 1, 3])?;
    b.reshape(o, &[batch(), seq(), dim(a.heads * a.head_dim)])
}

/// Each KV head once for every query head that attends with it; nothing for equal counts.
fn repeat_kv(b: &mut Builder, a: &Attention, x: NodeId) -> Built {
    let groups = a.heads / a.kv_heads;
    if groups == 1 {
        return Ok(x);
    }
    let (kv, d) = (dim(a.kv_heads), dim(a.head_dim));
    let x = b.reshape(x, &[batch(), kv, Dim::new(1), seq(), d])?;
    let x = b.expand(x, &[batch(), kv, dim(groups), seq(), d])?;
    b.reshape(x, &[batch(), dim(a.heads), seq(), d])
}

/// Softmax over the last axis in f32, rounded to the element type of x.
pub(crate) fn softmax(b: &mut Builder, x: NodeId) -> Built {
    let dtype = b.dtype_of(x);
    let x = b.cast(x, DType::F32)?;
    let max = b.reduce_last(ReduceFn::Amax, x)?;
    let shifted = b.binary(BinaryFn::Sub, x, max)?;
    let e = b.unary(UnaryFn::Exp, shifted)?;
    let sum = b.reduce_last(ReduceFn::Sum, e)?;
    let y = b.binary(BinaryFn::Div, e, sum)?;
    b.cast(y, dtype)
}

/// A count as an extent.
pub(crate) fn dim(n: u32) -> Dim {
    Dim::new(i64::from(n))
}
