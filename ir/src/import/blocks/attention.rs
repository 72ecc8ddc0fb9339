//! Self-attention in the eager form: scores, mask and softmax as separate values.

use super::linear::{Part, linear, linear_part};
use super::norm::{RmsNorm, rms_norm};
use super::rope::{CosSin, apply};
use crate::import::ImportError;
use crate::import::builder::{Builder, Built, batch, seq};
use crate::{BinaryFn, DType, Dim, NodeId, ReduceFn, UnaryFn};

/// Where the projections of q, k and v of `self_attn` lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Qkv {
    /// In three tensors.
    Apart,
    /// In one, `qkv_proj` (Phi-3).
    Fused,
}

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
    /// Cap of the scores (Gemma 2).
    pub(crate) softcap: Option<f64>,
    /// Where q, k and v lie.
    pub(crate) qkv: Qkv,
    /// Whether q, k and v have a bias.
    pub(crate) qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub(crate) o_bias: bool,
    /// Norm of each query and key head.
    pub(crate) head_norm: Option<RmsNorm>,
}

impl Attention {
    /// Separate projections without biases, head norms and caps; scores over √head_dim.
    pub(crate) fn plain(hidden: u32, heads: u32, kv_heads: u32, head_dim: u32) -> Attention {
        Attention {
            hidden,
            heads,
            kv_heads,
            head_dim,
            scaling: f64::from(head_dim).powf(-0.5),
            softcap: None,
            qkv: Qkv::Apart,
            qkv_bias: false,
            o_bias: false,
            head_norm: None,
        }
    }

    /// Features of all query heads.
    pub(crate) fn q_width(&self) -> u32 {
        self.heads * self.head_dim
    }

    /// Features of all key heads.
    pub(crate) fn kv_width(&self) -> u32 {
        self.kv_heads * self.head_dim
    }
}

/// The module `self_attn` on x `[B,S,hidden]` with the additive mask `[1,1,S,S]`; `out` names the
/// output projection.
pub(crate) fn self_attention(
    b: &mut Builder,
    a: &Attention,
    out: &str,
    x: NodeId,
    rope: CosSin,
    mask: NodeId,
) -> Built {
    b.within("self_attn", |b| {
        let qkv = projections(b, a, x)?;
        let o = attend(b, a, qkv, Some(rope), mask)?;
        linear(b, out, o, [a.hidden, a.q_width()], a.o_bias)
    })
}

/// q, k and v of x, heads side by side: `[B,S,heads·D]`.
fn projections(b: &mut Builder, a: &Attention, x: NodeId) -> Result<[NodeId; 3], ImportError> {
    let (q, kv, k) = (a.q_width(), a.kv_width(), a.hidden);
    if a.qkv == Qkv::Fused {
        let shape = [q + 2 * kv, k];
        let mut part = |from, to| {
            let part = Part {
                groups: 1,
                from,
                to,
            };
            linear_part(b, "qkv_proj", x, shape, a.qkv_bias, part)
        };
        return Ok([part(0, q)?, part(q, q + kv)?, part(q + kv, q + 2 * kv)?]);
    }
    Ok([
        linear(b, "q_proj", x, [q, k], a.qkv_bias)?,
        linear(b, "k_proj", x, [kv, k], a.qkv_bias)?,
        linear(b, "v_proj", x, [kv, k], a.qkv_bias)?,
    ])
}

/// Attention of projected q, k, v `[B,S,heads·D]`, with head norms and rotary embeddings where
/// the model has them: `[B,S,H·D]`.
pub(crate) fn attend(
    b: &mut Builder,
    a: &Attention,
    [q, k, v]: [NodeId; 3],
    rope: Option<CosSin>,
    mask: NodeId,
) -> Built {
    let mut heads_of = |x: NodeId, heads: u32, norm: Option<&str>| {
        let mut y = b.reshape(x, &[batch(), seq(), dim(heads), dim(a.head_dim)])?;
        if let (Some(name), Some(norm)) = (norm, a.head_norm) {
            y = rms_norm(b, name, y, a.head_dim, norm)?;
        }
        b.permute(y, &[0, 2, 1, 3])
    };
    let mut q = heads_of(q, a.heads, Some("q_norm"))?;
    let mut k = heads_of(k, a.kv_heads, Some("k_norm"))?;
    let v = heads_of(v, a.kv_heads, None)?;
    if let Some(rope) = rope {
        let rope = rope.per_head(b)?;
        q = apply(b, q, rope)?;
        k = apply(b, k, rope)?;
    }
    eager_attention(b, a, [q, k, v], mask)
}

/// `eager_attention_forward`: q `[B,H,S,D]`, k and v `[B,Hkv,S,D]` to `[B,S,H·D]`.
fn eager_attention(b: &mut Builder, a: &Attention, [q, k, v]: [NodeId; 3], mask: NodeId) -> Built {
    let k = repeat_kv(b, a, k)?;
    let v = repeat_kv(b, a, v)?;
    let kt = b.permute(k, &[0, 1, 3, 2])?;
    let scores = b.matmul(q, kt)?;
    let mut scores = b.scalar(BinaryFn::Mul, scores, a.scaling)?;
    if let Some(cap) = a.softcap {
        scores = softcap(b, scores, cap)?;
    }
    let scores = b.binary(BinaryFn::Add, scores, mask)?;
    let weights = softmax(b, scores)?;
    let o = b.matmul(weights, v)?;
    let o = b.permute(o, &[0, 2, 1, 3])?;
    b.reshape(o, &[batch(), seq(), dim(a.q_width())])
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

/// `cap·tanh(x / cap)`.
pub(crate) fn softcap(b: &mut Builder, x: NodeId, cap: f64) -> Built {
    let x = b.scalar(BinaryFn::Div, x, cap)?;
    let x = b.unary(UnaryFn::Tanh, x)?;
    b.scalar(BinaryFn::Mul, x, cap)
}

/// Softmax over the last axis in f32, rounded to the element type of x.
fn softmax(b: &mut Builder, x: NodeId) -> Built {
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
