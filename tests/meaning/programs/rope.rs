//! Rotary embeddings: the spelling of Hugging Face, with what can go wrong in it.

use super::build::{Build, Built, b, n, s};
use lathe_ir::ops::Table;
use lathe_ir::{BinaryFn, DType, Dim, NodeId, Real, UnaryFn};

/// Cos and sin of `[B,1,S,D]`, or of other extents that broadcast.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waves {
    cos: NodeId,
    sin: NodeId,
}

/// Cos and sin for heads of `d` features, made once and used by all layers, mostly.
pub(crate) fn waves(g: &mut Build, d: i64) -> Option<Waves> {
    let angles = angles(g, d / 2)?;
    let whole = match g.odd() {
        true => {
            let half = g.with(BinaryFn::Mul, angles, 0.5)?;
            g.concat(angles, half)?
        }
        false => g.concat(angles, angles)?,
    };
    let scaling = g.rng.pick(&[1.0, 1.0, 1.25, 0.5]);
    let functions = g.usual(
        [UnaryFn::Cos, UnaryFn::Sin],
        &[[UnaryFn::Sin, UnaryFn::Cos], [UnaryFn::Cos, UnaryFn::Cos]],
    );
    let head = [b(), n(1), s(), n(d)];
    let shape = g.usual(head, &[[n(1), b(), s(), n(d)], [b(), s(), n(1), n(d)]]);
    let mut made = Vec::new();
    for f in functions {
        let mut y = g.un(f, whole)?;
        let factor = g.usual(scaling, &[2.0, 0.0, f64::INFINITY]);
        if factor != 1.0 || g.rng.coin() {
            y = g.with(BinaryFn::Mul, y, factor)?;
        }
        y = g.maybe_casts(y)?;
        y = g.cast(y, g.dtype)?;
        let shape = g.usual(shape, &[head, [n(1), b(), s(), n(d)]]);
        made.push(g.reshape(y, &shape)?);
    }
    Some(Waves {
        cos: made[0],
        sin: made[1],
    })
}

/// Positions times frequencies, `[B,S,F]`.
fn angles(g: &mut Build, half: i64) -> Built {
    let data: Vec<Real> = (0..half)
        .map(|i| Real::new(f64::from(0.5_f32.powi(i as i32))))
        .collect();
    let name = "inv_freq".to_string();
    let freq = g.op(Table { name, data }, &[])?;
    let freq = g.reshape(freq, &[n(1), n(half), n(1)])?;
    let freq = g.expand(freq, &[b(), n(half), n(1)])?;
    let positions = positions(g, &[n(1), s()])?;
    let positions = g.expand(positions, &[b(), s()])?;
    let positions = g.reshape(positions, &[b(), n(1), s()])?;
    let positions = g.cast(positions, DType::F32)?;
    let product = g.matmul(freq, positions)?;
    let perm = g.usual([0, 2, 1], &[[0, 1, 2], [2, 1, 0]]);
    g.permute(product, &perm)
}

/// The row index of each position, of some element type and from some source.
pub(crate) fn positions(g: &mut Build, shape: &[Dim]) -> Built {
    let dtype = g.usual(DType::I64, &DType::ALL);
    let mut p = g.iota(s(), dtype)?;
    if g.odd() {
        p = g.with(BinaryFn::Add, p, 1.0)?;
    }
    p = g.reshape(p, shape)?;
    p = g.maybe_casts(p)?;
    if g.odd() {
        let name = g
            .rng
            .pick(&["positions", "rows", "step.positions", "position_ids"]);
        p = g.input(name, DType::I64, &[b(), s()])?;
    }
    Some(p)
}

/// `x·cos + rotate_half(x)·sin` for heads `[B,H,S,D]`.
pub(crate) fn rope(g: &mut Build, x: NodeId, w: Waves) -> Built {
    let d = g.features(x);
    let middle = g.usual(d / 2, &[1, d / 2 + 1]);
    let high = g.slice(x, middle, d)?;
    let low = g.slice(x, 0, middle)?;
    let high = match g.odd() {
        true => high,
        false => g.un(UnaryFn::Neg, high)?,
    };
    let rotated = match g.odd() {
        true => g.concat(low, high)?,
        false => g.concat(high, low)?,
    };
    let a = g.bin(BinaryFn::Mul, x, w.cos)?;
    let c = g.bin(BinaryFn::Mul, rotated, w.sin)?;
    let f = g.usual(BinaryFn::Add, &[BinaryFn::Sub, BinaryFn::Mul]);
    g.bin(f, a, c)
}
