//! Values and references that tests of the interpreter share.
#![allow(dead_code)]

use lathe_ir::interp::{Interp, Tensor, Value};
use lathe_ir::*;

pub(crate) type V = Value<f64>;

pub(crate) fn no_weights(w: &WeightRef) -> Result<Vec<f64>, String> {
    Err(format!("no weight '{}'", w.name))
}

pub(crate) fn f(shape: &[usize], data: &[f64]) -> V {
    Value::Float(Tensor::new(shape, data.to_vec()))
}

pub(crate) fn ints(shape: &[usize], data: &[i64]) -> V {
    Value::Int(Tensor::new(shape, data.to_vec()))
}

pub(crate) fn bools(shape: &[usize], data: &[bool]) -> V {
    Value::Bool(Tensor::new(shape, data.to_vec()))
}

/// Deterministic values in (-1, 1).
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f64> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
        })
        .collect()
}

pub(crate) fn rand(shape: &[usize], seed: u64) -> V {
    f(shape, &noise(shape.iter().product(), seed))
}

pub(crate) fn data(v: &V) -> &[f64] {
    &v.as_float().expect("a float tensor").data
}

#[track_caller]
pub(crate) fn close(a: &V, b: &V) {
    assert_eq!(a.shape(), b.shape());
    for (i, (x, y)) in data(a).iter().zip(data(b)).enumerate() {
        assert!(
            (x - y).abs() <= 1e-12 * (1.0 + y.abs()),
            "element {i}: {x} and {y}"
        );
    }
}

/// The type of a value, with f32 for floats and i64 for integers.
pub(crate) fn type_of(v: &V) -> Type {
    let dims = |s: &[usize]| s.iter().map(|&n| Dim::from(n)).collect::<Vec<_>>();
    match v {
        Value::Float(t) => Type::tensor(DType::F32, dims(&t.shape)),
        Value::Int(t) => Type::tensor(DType::I64, dims(&t.shape)),
        Value::Bool(t) => Type::tensor(DType::Bool, dims(&t.shape)),
        Value::Cache(_) => Type::Cache,
        Value::Tuple(vs) => Type::Tuple(vs.iter().map(type_of).collect()),
    }
}

/// Derives the type and evaluates.
pub(crate) fn eval_in<'v>(
    state: &mut Interp<'_, f64>,
    op: impl Into<Op>,
    inputs: impl Into<Operands<&'v V>>,
) -> V {
    let (op, inputs) = (op.into(), inputs.into());
    let types = inputs.map(|v| type_of(v));
    let ty = infer(&op, types.map(|t| t)).expect("well typed");
    interp::eval_op(&op, inputs, &ty, state).expect("evaluates")
}

pub(crate) fn eval<'v>(op: impl Into<Op>, inputs: impl Into<Operands<&'v V>>) -> V {
    eval_in(&mut Interp::new(SymEnv::default(), &no_weights), op, inputs)
}

pub(crate) fn rms(x: &[f64], gamma: &[f64], eps: f64) -> Vec<f64> {
    let ms = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    x.iter()
        .zip(gamma)
        .map(|(v, g)| v / (ms + eps).sqrt() * g)
        .collect()
}

/// RoPE as Hugging Face writes it: `x·cos + rotate_half(x)·sin` with doubled angles.
pub(crate) fn hf_rope(x: &[f64], pos: f64, freq: &[f64], scaling: f64) -> Vec<f64> {
    let half = freq.len();
    (0..2 * half)
        .map(|i| {
            let a = pos * freq[i % half];
            let rotated = if i < half { -x[i + half] } else { x[i - half] };
            (x[i] * a.cos() + rotated * a.sin()) * scaling
        })
        .collect()
}
