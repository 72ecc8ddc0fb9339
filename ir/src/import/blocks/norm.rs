//! Root mean square norms.

use crate::import::builder::{Builder, Built};
use crate::{BinaryFn, DType, NodeId, ReduceFn, UnaryFn};

/// `LlamaRMSNorm` at `name` over the last axis of extent `n`: in f32, rounded to the input's
/// element type, then times the weight.
pub(crate) fn rms_norm(b: &mut Builder, name: &str, x: NodeId, n: u32, eps: f64) -> Built {
    b.within(name, |b| {
        let dtype = b.dtype_of(x);
        let x32 = b.cast(x, DType::F32)?;
        let square = b.scalar(BinaryFn::Pow, x32, 2.0)?;
        let mean = b.reduce_last(ReduceFn::Mean, square)?;
        let mean = b.scalar(BinaryFn::Add, mean, eps)?;
        let inverse = b.unary(UnaryFn::Rsqrt, mean)?;
        let h = b.binary(BinaryFn::Mul, x32, inverse)?;
        let h = b.cast(h, dtype)?;
        let weight = b.weight("weight", &[n])?;
        b.binary(BinaryFn::Mul, weight, h)
    })
}
