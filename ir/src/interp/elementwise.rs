//! Elementwise operations with broadcasting, and conversions.

use super::eval::{Call, Eval};
use super::value::{broadcast_shape, broadcast_strides, coalesce, walk};
use super::{Float, Tensor, Value};
use crate::dtype::DType;
use crate::functions::{BinaryFn, UnaryFn};
use crate::operands::Operands;
use crate::ops::swiglu as gated;
use crate::ops::{Cast, Silu, SwiGlu, Where, X, binary as args, select_where};

/// Applies `f` to each pair of elements.
pub(super) fn zip<A: Copy, B: Copy, O>(
    a: &Tensor<A>,
    b: &Tensor<B>,
    f: impl Fn(A, B) -> O,
) -> Result<Tensor<O>, String> {
    if a.shape == b.shape {
        let data = a.data.iter().zip(&b.data).map(|(&x, &y)| f(x, y)).collect();
        return Ok(Tensor::new(a.shape.clone(), data));
    }
    let shape = broadcast_shape(&a.shape, &b.shape)?;
    let stretch = "the shape of a broadcast fits its operands";
    let sa = broadcast_strides(&a.shape, &shape).expect(stretch);
    let sb = broadcast_strides(&b.shape, &shape).expect(stretch);
    let axes = coalesce(&shape, [&sa, &sb]);
    let (n, inner) = axes[axes.len() - 1];
    let mut data = Vec::with_capacity(shape.iter().product());
    walk(&axes, |[i, j]| match inner {
        [1, 1] => data.extend(
            a.data[i..i + n]
                .iter()
                .zip(&b.data[j..j + n])
                .map(|(&x, &y)| f(x, y)),
        ),
        [1, 0] => {
            let y = b.data[j];
            data.extend(a.data[i..i + n].iter().map(|&x| f(x, y)));
        }
        [0, 1] => {
            let x = a.data[i];
            data.extend(b.data[j..j + n].iter().map(|&y| f(x, y)));
        }
        [da, db] => data.extend((0..n).map(|k| f(a.data[i + k * da], b.data[j + k * db]))),
    });
    Ok(Tensor::new(shape, data))
}

pub(super) fn unary<F: Float>(f: UnaryFn, x: &Value<F>) -> Result<Value<F>, String> {
    let unfit = || format!("does not apply to {}", x.kind());
    Ok(match x {
        Value::Float(t) => Value::Float(match f {
            UnaryFn::Neg => t.map(|v| -v),
            UnaryFn::Abs => t.map(F::abs),
            UnaryFn::Exp => t.map(F::exp),
            UnaryFn::Log => t.map(F::ln),
            UnaryFn::Sqrt => t.map(F::sqrt),
            UnaryFn::Rsqrt => t.map(|v| F::ONE / v.sqrt()),
            UnaryFn::Sin => t.map(F::sin),
            UnaryFn::Cos => t.map(F::cos),
            UnaryFn::Tanh => t.map(F::tanh),
            UnaryFn::Sigmoid => t.map(F::sigmoid),
            UnaryFn::Erf => t.map(F::erf),
            UnaryFn::Relu => t.map(|v| v.maximum(F::ZERO)),
            UnaryFn::Not => return Err(unfit()),
        }),
        Value::Int(t) => Value::Int(match f {
            UnaryFn::Neg => t.map(i64::wrapping_neg),
            UnaryFn::Abs => t.map(i64::wrapping_abs),
            UnaryFn::Relu => t.map(|v| v.max(0)),
            _ => return Err(unfit()),
        }),
        Value::Bool(t) if f == UnaryFn::Not => Value::Bool(t.map(|v| !v)),
        _ => return Err(unfit()),
    })
}

pub(super) fn binary<F: Float>(
    f: BinaryFn,
    a: &Value<F>,
    b: &Value<F>,
) -> Result<Value<F>, String> {
    let unfit = || format!("does not apply to {} and {}", a.kind(), b.kind());
    Ok(match (a, b) {
        (Value::Float(a), Value::Float(b)) => match f {
            BinaryFn::Add => Value::Float(zip(a, b, |x, y| x + y)?),
            BinaryFn::Sub => Value::Float(zip(a, b, |x, y| x - y)?),
            BinaryFn::Mul => Value::Float(zip(a, b, |x, y| x * y)?),
            BinaryFn::Div => Value::Float(zip(a, b, |x, y| x / y)?),
            BinaryFn::Pow => Value::Float(zip(a, b, F::powf)?),
            BinaryFn::Maximum => Value::Float(zip(a, b, F::maximum)?),
            BinaryFn::Minimum => Value::Float(zip(a, b, F::minimum)?),
            _ => Value::Bool(compare(f, a, b)?.ok_or_else(unfit)?),
        },
        (Value::Int(a), Value::Int(b)) => match f {
            BinaryFn::Add => Value::Int(zip(a, b, i64::wrapping_add)?),
            BinaryFn::Sub => Value::Int(zip(a, b, i64::wrapping_sub)?),
            BinaryFn::Mul => Value::Int(zip(a, b, i64::wrapping_mul)?),
            BinaryFn::Div => {
                if b.data.contains(&0) {
                    return Err("integer division by zero".to_string());
                }
                Value::Int(zip(a, b, i64::wrapping_div)?)
            }
            BinaryFn::Pow => {
                if b.data.iter().any(|&e| u32::try_from(e).is_err()) {
                    return Err("integer power with a negative or huge exponent".to_string());
                }
                Value::Int(zip(a, b, |x, y| x.wrapping_pow(y as u32))?)
            }
            BinaryFn::Maximum => Value::Int(zip(a, b, i64::max)?),
            BinaryFn::Minimum => Value::Int(zip(a, b, i64::min)?),
            _ => Value::Bool(compare(f, a, b)?.ok_or_else(unfit)?),
        },
        (Value::Bool(a), Value::Bool(b)) => Value::Bool(match f {
            BinaryFn::And => zip(a, b, |x, y| x && y)?,
            BinaryFn::Or => zip(a, b, |x, y| x || y)?,
            _ => compare(f, a, b)?.ok_or_else(unfit)?,
        }),
        _ => return Err(unfit()),
    })
}

fn compare<T: Copy + PartialOrd>(
    f: BinaryFn,
    a: &Tensor<T>,
    b: &Tensor<T>,
) -> Result<Option<Tensor<bool>>, String> {
    Ok(Some(match f {
        BinaryFn::Eq => zip(a, b, |x, y| x == y)?,
        BinaryFn::Ne => zip(a, b, |x, y| x != y)?,
        BinaryFn::Lt => zip(a, b, |x, y| x < y)?,
        BinaryFn::Le => zip(a, b, |x, y| x <= y)?,
        BinaryFn::Gt => zip(a, b, |x, y| x > y)?,
        BinaryFn::Ge => zip(a, b, |x, y| x >= y)?,
        _ => return Ok(None),
    }))
}

pub(super) fn select<F: Float>(
    c: &Tensor<bool>,
    a: &Value<F>,
    b: &Value<F>,
) -> Result<Value<F>, String> {
    Ok(match (a, b) {
        (Value::Float(a), Value::Float(b)) => Value::Float(choose(c, a, b)?),
        (Value::Int(a), Value::Int(b)) => Value::Int(choose(c, a, b)?),
        (Value::Bool(a), Value::Bool(b)) => Value::Bool(choose(c, a, b)?),
        _ => {
            return Err(format!(
                "cannot choose between {} and {}",
                a.kind(),
                b.kind()
            ));
        }
    })
}

fn choose<T: Copy>(c: &Tensor<bool>, a: &Tensor<T>, b: &Tensor<T>) -> Result<Tensor<T>, String> {
    let shape = broadcast_shape(&c.shape, &broadcast_shape(&a.shape, &b.shape)?)?;
    let stretch = "the shape of a broadcast fits its operands";
    let sc = broadcast_strides(&c.shape, &shape).expect(stretch);
    let sa = broadcast_strides(&a.shape, &shape).expect(stretch);
    let sb = broadcast_strides(&b.shape, &shape).expect(stretch);
    let axes = coalesce(&shape, [&sc, &sa, &sb]);
    let (n, [dc, da, db]) = axes[axes.len() - 1];
    let mut data = Vec::with_capacity(shape.iter().product());
    walk(&axes, |[i, j, k]| {
        data.extend((0..n).map(|e| {
            if c.data[i + e * dc] {
                a.data[j + e * da]
            } else {
                b.data[k + e * db]
            }
        }));
    });
    Ok(Tensor::new(shape, data))
}

/// Conversion. Floats are truncated towards zero when they become integers.
pub(super) fn cast<F: Float>(x: &Value<F>, to: DType) -> Result<Value<F>, String> {
    Ok(match (x, to) {
        (Value::Float(t), DType::Bool) => Value::Bool(t.map(|v| v != F::ZERO)),
        (Value::Float(t), DType::I32 | DType::I64) => Value::Int(t.map(|v| v.to_f64() as i64)),
        (Value::Float(t), _) => Value::Float(t.clone()),
        (Value::Int(t), DType::Bool) => Value::Bool(t.map(|v| v != 0)),
        (Value::Int(t), DType::I32 | DType::I64) => Value::Int(t.clone()),
        (Value::Int(t), _) => Value::Float(t.map(|v| F::from_f64(v as f64))),
        (Value::Bool(t), DType::Bool) => Value::Bool(t.clone()),
        (Value::Bool(t), DType::I32 | DType::I64) => Value::Int(t.map(i64::from)),
        (Value::Bool(t), _) => Value::Float(t.map(|v| if v { F::ONE } else { F::ZERO })),
        _ => return Err(format!("cannot convert {}", x.kind())),
    })
}

pub(super) fn silu<F: Float>(v: F) -> F {
    v * v.sigmoid()
}

/// `silu(gate)·up`.
pub(super) fn swiglu<F: Float>(gate: &Tensor<F>, up: &Tensor<F>) -> Out<F> {
    zip(gate, up, |g, u| silu(g) * u).map(Value::Float)
}

type Out<F> = Result<Value<F>, String>;

impl Eval for Cast {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        cast(x.value(X)?, self.0)
    }
}

impl Eval for UnaryFn {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        unary(*self, x.value(X)?)
    }
}

impl Eval for BinaryFn {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        binary(*self, x.value(args::A)?, x.value(args::B)?)
    }
}

impl Eval for Where {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        let cond = x.value(select_where::COND)?.bool()?;
        select(cond, x.value(select_where::A)?, x.value(select_where::B)?)
    }
}

impl Eval for Silu {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        Ok(Value::Float(x.float(X)?.map(silu)))
    }
}

impl Eval for SwiGlu {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        swiglu(x.float(gated::GATE)?, x.float(gated::UP)?)
    }
}
