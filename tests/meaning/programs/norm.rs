//! Norms as models spell them, and norms that are none.

use super::build::{Build, Built, NUMBERS};
use lathe_ir::{BinaryFn, DType, NodeId, ReduceFn, UnaryFn};

/// A norm of rows: RMSNorm, or LayerNorm with its mean.
pub(crate) fn norm(g: &mut Build, x: NodeId) -> Built {
    let dtype = g.dtype_of(x);
    let upcast = dtype != DType::F32 || g.odd();
    let mut y = match upcast {
        true => {
            let to = g.usual(DType::F32, &[DType::BF16, DType::I32, DType::F16]);
            g.cast(x, to)?
        }
        false => x,
    };
    if g.rng.one_in(5) {
        let mean = g.reduce(ReduceFn::Mean, y)?;
        y = g.bin(BinaryFn::Sub, y, mean)?;
    }
    let source = y;
    let two = g.usual(2.0, &[1.0, 3.0, 2.5]);
    let square = match g.rng.one_in(6) {
        true => g.bin(BinaryFn::Mul, y, y)?,
        false => g.with(BinaryFn::Pow, y, two)?,
    };
    let f = g.usual(ReduceFn::Mean, &[ReduceFn::Sum, ReduceFn::Amax]);
    let mean = g.reduce(f, square)?;
    let eps = g.rng.pick(&[1e-6, 1e-5, 1e-2, 0.5]);
    let eps = g.usual(eps, &NUMBERS);
    let mean = g.with(BinaryFn::Add, mean, eps)?;
    let root = g.usual(UnaryFn::Rsqrt, &[UnaryFn::Sqrt, UnaryFn::Abs]);
    let factor = g.un(root, mean)?;
    let factor = g.maybe_casts(factor)?;
    y = match g.odd() {
        // The factor of one value for the rows of another.
        true => g.bin(BinaryFn::Mul, x, factor)?,
        false => g.either(BinaryFn::Mul, source, factor)?,
    };
    let inside = g.rng.one_in(3);
    if inside {
        y = gamma(g, y)?;
    }
    y = g.cast(y, dtype)?;
    if !inside {
        y = gamma(g, y)?;
    }
    Some(y)
}

/// Times the weight of the norm, which may be an offset from one.
fn gamma(g: &mut Build, x: NodeId) -> Built {
    let k = g.features(x);
    let extent = g.usual(k, &[1]);
    let mut w = g.weight(&[extent])?;
    w = g.cast(w, g.dtype_of(x))?;
    if g.rng.one_in(4) {
        w = g.with(BinaryFn::Add, w, 1.0)?;
    }
    if g.odd() {
        w = g.un(UnaryFn::Tanh, w)?;
    }
    g.either(BinaryFn::Mul, x, w)
}
