//! Feed-forward networks, and loose arithmetic on features.

use super::build::{Build, Built, NUMBERS, b, n, s};
use super::rope::positions;
use lathe_ir::{BinaryFn, DType, NodeId, ReduceFn, UnaryFn};

/// A gated or plain feed-forward network on x `[B,S,H]`.
pub(crate) fn mlp(g: &mut Build, x: NodeId) -> Built {
    let hidden = g.features(x);
    let wide = g.rng.pick(&[8, 16, 24]);
    let wide = g.usual(wide, &[1, 3, 7]);
    let gate = g.linear(x, wide)?;
    let gate = g.maybe_casts(gate)?;
    let act = activation(g, gate)?;
    let y = match g.rng.one_in(4) {
        true => act,
        false => {
            let up = match g.odd() {
                true => gate,
                false => g.linear(x, wide)?,
            };
            let f = g.usual(BinaryFn::Mul, &[BinaryFn::Add, BinaryFn::Sub]);
            g.either(f, act, up)?
        }
    };
    g.linear(y, hidden)
}

fn activation(g: &mut Build, x: NodeId) -> Built {
    match g.rng.below(5) {
        0 => {
            let cube = g.with(BinaryFn::Pow, x, 3.0)?;
            let t = g.with(BinaryFn::Mul, cube, 0.044_715)?;
            let t = g.bin(BinaryFn::Add, x, t)?;
            let t = g.with(BinaryFn::Mul, t, 0.797_884_6)?;
            let t = g.un(UnaryFn::Tanh, t)?;
            let half = g.with(BinaryFn::Mul, x, 0.5)?;
            let t = g.with(BinaryFn::Add, t, 1.0)?;
            g.bin(BinaryFn::Mul, half, t)
        }
        1 => g.un(UnaryFn::Relu, x),
        _ => {
            let f = g.usual(UnaryFn::Sigmoid, &[UnaryFn::Tanh, UnaryFn::Erf]);
            let y = g.un(f, x)?;
            let y = g.maybe_casts(y)?;
            g.either(BinaryFn::Mul, x, y)
        }
    }
}

/// Something on features `[B,S,H]` that no family does.
pub(crate) fn loose(g: &mut Build, x: NodeId) -> Built {
    let h = g.features(x);
    match g.rng.below(12) {
        0 => {
            let f = g.rng.pick(&[
                UnaryFn::Abs,
                UnaryFn::Neg,
                UnaryFn::Tanh,
                UnaryFn::Sin,
                UnaryFn::Cos,
                UnaryFn::Sigmoid,
                UnaryFn::Erf,
                UnaryFn::Relu,
            ]);
            g.un(f, x)
        }
        1 => {
            let f = g.rng.pick(&[
                BinaryFn::Add,
                BinaryFn::Sub,
                BinaryFn::Mul,
                BinaryFn::Div,
                BinaryFn::Maximum,
                BinaryFn::Minimum,
            ]);
            let usual = g.rng.pick(&[0.0, 1.0, 0.5, -1.0, 2.0]);
            let value = match usual == 0.0 && f == BinaryFn::Div {
                true => 3.0,
                false => usual,
            };
            let value = g.usual(value, &NUMBERS);
            g.with(f, x, value)
        }
        2 => {
            let middle = 1 + g.rng.below((h - 1).max(1) as usize) as i64;
            let (a, c) = (g.slice(x, middle, h)?, g.slice(x, 0, middle)?);
            g.concat(a, c)
        }
        // Of the features, or of the positions, which no step can do.
        3 => {
            let f = g.rng.pick(&[ReduceFn::Mean, ReduceFn::Amax, ReduceFn::Sum]);
            let r = g.reduce(f, x)?;
            g.bin(BinaryFn::Sub, x, r)
        }
        4 => {
            let zero = g.konst(0.0, g.dtype_of(x))?;
            let f = g.rng.pick(&[BinaryFn::Gt, BinaryFn::Le, BinaryFn::Ne]);
            let c = g.bin(f, x, zero)?;
            let other = g.with(BinaryFn::Mul, x, 0.25)?;
            g.choose(c, x, other)
        }
        5 => {
            let old = std::mem::replace(&mut g.oddity, 1);
            let y = g.maybe_casts(x);
            g.oddity = old;
            y
        }
        // A learned or computed value of the position.
        6 => {
            let p = positions(g, &[n(1), s()])?;
            let table = g.weight(&[8, h])?;
            let y = g.embedding(table, p)?;
            g.bin(BinaryFn::Add, x, y)
        }
        7 => {
            let p = positions(g, &[n(1), s(), n(1)])?;
            let p = g.cast(p, g.dtype_of(x))?;
            let p = g.with(BinaryFn::Mul, p, 0.125)?;
            g.either(BinaryFn::Add, x, p)
        }
        8 => {
            let w = g.weight(&[h])?;
            let f = g
                .rng
                .pick(&[BinaryFn::Mul, BinaryFn::Add, BinaryFn::Maximum]);
            g.either(f, x, w)
        }
        9 => {
            let x4 = g.reshape(x, &[b(), s(), n(1), n(h)])?;
            let x4 = g.permute(x4, &[0, 2, 1, 3])?;
            let x4 = g.permute(x4, &[0, 2, 1, 3])?;
            g.reshape(x4, &[b(), s(), n(h)])
        }
        10 => {
            let p = g.cast(x, DType::I32)?;
            let q = g
                .rng
                .pick(&[BinaryFn::Add, BinaryFn::Mul, BinaryFn::Maximum]);
            let p = g.with(q, p, 2.0)?;
            let p = g.cast(p, g.dtype_of(x))?;
            g.bin(BinaryFn::Add, x, p)
        }
        // A gate over all features of a row.
        _ => {
            let old = std::mem::replace(&mut g.oddity, 1000);
            let m = g.reduce(ReduceFn::Mean, x);
            g.oddity = old;
            let m = g.un(UnaryFn::Sigmoid, m?)?;
            g.either(BinaryFn::Mul, x, m)
        }
    }
}
