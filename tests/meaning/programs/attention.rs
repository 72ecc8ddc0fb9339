//! Attention in its eager spelling: projections, head norms, rotation, scores, softmax, values.

use super::build::{Build, Built, NUMBERS, b, n, s};
use super::mask::masked;
use super::norm::norm;
use super::rope::{Waves, rope};
use lathe_ir::{BinaryFn, DType, NodeId, ReduceFn, UnaryFn};

/// Sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    /// Key and value heads.
    pub(crate) kv: i64,
    /// Query heads a KV head.
    pub(crate) groups: i64,
    /// Features of a head.
    pub(crate) dim: i64,
}

/// Self-attention on x `[B,S,H]`.
pub(crate) fn attention(g: &mut Build, x: NodeId, heads: Heads, waves: Option<Waves>) -> Built {
    let hidden = g.features(x);
    let source = x;
    let normed = g.rng.one_in(4);
    let project = |g: &mut Build, count: i64, rotated: bool| {
        let y = g.linear(source, count * heads.dim)?;
        let y = g.maybe_casts(y)?;
        let mut y = g.reshape(y, &[b(), s(), n(count), n(heads.dim)])?;
        if normed && rotated {
            y = norm(g, y)?;
        }
        let perm = g.usual([0, 2, 1, 3], &[[0, 1, 2, 3], [0, 2, 3, 1]]);
        let y = g.permute(y, &perm)?;
        match waves {
            Some(w) if rotated || g.odd() => rope(g, y, w),
            _ => Some(y),
        }
    };
    let q = project(g, heads.kv * heads.groups, true)?;
    let k = project(g, heads.kv, true)?;
    let v = match g.odd() {
        true => k,
        false => project(g, heads.kv, false)?,
    };
    let o = attend(g, [q, k, v], heads)?;
    let out = g.linear(o, hidden)?;
    Some(out)
}

/// Each KV head for the query heads of its group.
fn repeated(g: &mut Build, x: NodeId, h: Heads) -> Built {
    if h.groups == 1 && !g.odd() {
        return Some(x);
    }
    let (kv, groups, d) = (n(h.kv), n(h.groups), n(h.dim));
    if g.odd() {
        // Whole sets of heads in turn, which is another grouping.
        let x = g.reshape(x, &[b(), n(1), kv, s(), d])?;
        let x = g.expand(x, &[b(), groups, kv, s(), d])?;
        return g.reshape(x, &[b(), n(h.kv * h.groups), s(), d]);
    }
    let x = g.reshape(x, &[b(), kv, n(1), s(), d])?;
    let x = g.expand(x, &[b(), kv, groups, s(), d])?;
    g.reshape(x, &[b(), n(h.kv * h.groups), s(), d])
}

/// Attention of heads, `[B,S,heads·D]`.
fn attend(g: &mut Build, [q, k, v]: [NodeId; 3], heads: Heads) -> Built {
    let k = repeated(g, k, heads)?;
    let v = repeated(g, v, heads)?;
    let perm = g.usual([0, 1, 3, 2], &[[0, 1, 2, 3], [1, 0, 3, 2]]);
    let k = g.permute(k, &perm)?;
    let scale = g.usual((heads.dim as f64).powf(-0.5), &NUMBERS);
    let early = g.rng.one_in(4);
    let q = match early {
        true => g.with(BinaryFn::Mul, q, scale)?,
        false => q,
    };
    let mut scores = g.matmul(q, k)?;
    if !early {
        scores = match g.rng.one_in(3) {
            true => g.with(BinaryFn::Div, scores, 1.0 / scale)?,
            false => g.with(BinaryFn::Mul, scores, scale)?,
        };
    }
    if g.rng.one_in(4) {
        scores = capped(g, scores)?;
    }
    if !g.odd() {
        scores = masked(g, scores)?;
    }
    if g.odd() {
        scores = g.with(BinaryFn::Mul, scores, 0.5)?;
    }
    let p = softmax(g, scores)?;
    let o = g.matmul(p, v)?;
    let o = g.permute(o, &[0, 2, 1, 3])?;
    g.reshape(o, &[b(), s(), n(heads.kv * heads.groups * heads.dim)])
}

/// `cap·tanh(x / cap)`.
fn capped(g: &mut Build, x: NodeId) -> Built {
    let cap = g.rng.pick(&[0.5, 2.0, 30.0]);
    let cap = g.usual(cap, &NUMBERS);
    let mut y = match g.rng.coin() {
        true => g.with(BinaryFn::Div, x, cap)?,
        false => g.with(BinaryFn::Mul, x, 1.0 / cap)?,
    };
    y = g.un(UnaryFn::Tanh, y)?;
    let outer = g.usual(cap, &[1.0, 3.0]);
    g.with(BinaryFn::Mul, y, outer)
}

/// Softmax of rows in f32.
fn softmax(g: &mut Build, x: NodeId) -> Built {
    let dtype = g.dtype_of(x);
    let inner = g.usual(DType::F32, &[DType::BF16, DType::F16]);
    let x = match g.rng.one_in(4) {
        true => x,
        false => g.cast(x, inner)?,
    };
    let f = g.usual(ReduceFn::Amax, &[ReduceFn::Mean, ReduceFn::Sum]);
    let max = g.reduce(f, x)?;
    let y = g.bin(BinaryFn::Sub, x, max)?;
    let e = g.un(UnaryFn::Exp, y)?;
    let sum = g.reduce(ReduceFn::Sum, e)?;
    let y = match g.odd() {
        true => g.bin(BinaryFn::Mul, e, sum)?,
        false => g.bin(BinaryFn::Div, e, sum)?,
    };
    g.cast(y, dtype)
}
