//! Norms over the last axis, in f32 whatever the model's element type is.

use crate::import::builder::{Builder, Built};
use crate::{BinaryFn, DType, NodeId, ReduceFn, UnaryFn};

/// A root mean square norm.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct RmsNorm {
    /// Added to the mean square.
    pub(crate) eps: f64,
    /// Gemma: the factor is `1 + weight`, applied in f32 before rounding.
    pub(crate) unit_offset: bool,
}

/// The module `name` with a weight of `n` elements: `LlamaRMSNorm` rounds to the input's element
/// type and then multiplies with the weight; `GemmaRMSNorm` rounds last.
pub(crate) fn rms_norm(b: &mut Builder, name: &str, x: NodeId, n: u32, norm: RmsNorm) -> Built {
    b.within(name, |b| {
        let dtype = b.dtype_of(x);
        let x32 = b.cast(x, DType::F32)?;
        let square = b.scalar(BinaryFn::Pow, x32, 2.0)?;
        let mean = b.reduce_last(ReduceFn::Mean, square)?;
        let mean = b.scalar(BinaryFn::Add, mean, norm.eps)?;
        let inverse = b.unary(UnaryFn::Rsqrt, mean)?;
        let h = b.binary(BinaryFn::Mul, x32, inverse)?;
        if norm.unit_offset {
            let weight = b.weight("weight", &[n])?;
            let weight = b.cast(weight, DType::F32)?;
            let one = b.konst(1.0, DType::F32)?;
            let factor = b.binary(BinaryFn::Add, one, weight)?;
            let y = b.binary(BinaryFn::Mul, h, factor)?;
            b.cast(y, dtype)
        } else {
            let h = b.cast(h, dtype)?;
            let weight = b.weight("weight", &[n])?;
            b.binary(BinaryFn::Mul, weight, h)
        }
    })
}

/// `nn.LayerNorm` at `name` with weight and bias of `n` elements.
pub(crate) fn layer_norm(b: &mut Builder, name: &str, x: NodeId, n: u32, eps: f64) -> Built {
    b.within(name, |b| {
        let dtype = b.dtype_of(x);
        let x32 = b.cast(x, DType::F32)?;
        let mean = b.reduce_last(ReduceFn::Mean, x32)?;
        let centred = b.binary(BinaryFn::Sub, x32, mean)?;
        let square = b.scalar(BinaryFn::Pow, centred, 2.0)?;
        let variance = b.reduce_last(ReduceFn::Mean, square)?;
        let variance = b.scalar(BinaryFn::Add, variance, eps)?;
        let inverse = b.unary(UnaryFn::Rsqrt, variance)?;
        let h = b.binary(BinaryFn::Mul, centred, inverse)?;
        let weight = b.weight("weight", &[n])?;
        let weight = b.cast(weight, DType::F32)?;
        let h = b.binary(BinaryFn::Mul, h, weight)?;
        let bias = b.weight("bias", &[n])?;
        let bias = b.cast(bias, DType::F32)?;
        let y = b.binary(BinaryFn::Add, h, bias)?;
        b.cast(y, dtype)
    })
}
