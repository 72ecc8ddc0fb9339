//! Products and reductions. The order of summation of an output element depends on the inner
//! extent alone, so a row's result does not depend on the other rows of a batch.

use super::eval::{Call, Eval};
use super::value::{broadcast_shape, broadcast_strides, coalesce, walk};
use super::{Float, Tensor, Value};
use crate::functions::ReduceFn;
use crate::operands::Operands;
use crate::ops::{self, Linear, Matmul, Reduce, X};

pub(super) fn matmul<F: Float>(a: &Tensor<F>, b: &Tensor<F>) -> Result<Tensor<F>, String> {
    if a.rank() < 2 || b.rank() < 2 {
        return Err("operands of rank below 2".to_string());
    }
    let (la, ma) = a.shape.split_at(a.rank() - 2);
    let (lb, mb) = b.shape.split_at(b.rank() - 2);
    let (m, k, n) = (ma[0], ma[1], mb[1]);
    if mb[0] != k {
        return Err(format!(
            "inner extents differ: {:?} and {:?}",
            a.shape, b.shape
        ));
    }
    let mut shape = broadcast_shape(la, lb)?;
    let stretch = "the shape of a broadcast fits its operands";
    let mut lead = shape.clone();
    lead.push(1);
    let with_end = |mut s: Vec<usize>| {
        s.push(0);
        s
    };
    let sa = with_end(broadcast_strides(la, &shape).expect(stretch));
    let sb = with_end(broadcast_strides(lb, &shape).expect(stretch));
    shape.extend([m, n]);
    let mut out = vec![F::ZERO; shape.iter().product()];
    if out.is_empty() {
        return Ok(Tensor::new(shape, out));
    }
    let mut matrices = out.chunks_exact_mut(m * n);
    // The innermost axis of a walk is left to the body, so all leading axes are outer ones here.
    let mut axes = coalesce(&lead, [&sa, &sb]);
    axes.push((1, [0, 0]));
    walk(&axes, |[i, j]| {
        let out = matrices.next().expect("one matrix for each leading index");
        let a = &a.data[i * m * k..(i + 1) * m * k];
        let b = &b.data[j * k * n..(j + 1) * k * n];
        for (r, out) in out.chunks_exact_mut(n).enumerate() {
            F::combine_rows(&a[r * k..(r + 1) * k], b, out);
        }
    });
    Ok(Tensor::new(shape, out))
}

/// `x·wᵀ`.
pub(super) fn linear<F: Float>(x: &Tensor<F>, w: &Tensor<F>) -> Result<Tensor<F>, String> {
    let &[n, k] = w.shape.as_slice() else {
        return Err(format!("weight has rank {}, expected 2", w.rank()));
    };
    if x.rank() == 0 || x.last() != k {
        return Err(format!(
            "x {:?} does not fit the weight {:?}",
            x.shape, w.shape
        ));
    }
    let mut shape = x.shape.clone();
    shape.pop();
    let m: usize = shape.iter().product();
    shape.push(n);
    let mut out = vec![F::ZERO; m * n];
    // A tile of rows of x stays in the cache while all of w streams by.
    for first in (0..m).step_by(32) {
        let last = (first + 32).min(m);
        for j in 0..n {
            let row = &w.data[j * k..(j + 1) * k];
            for i in first..last {
                out[i * n + j] = F::dot(&x.data[i * k..(i + 1) * k], row);
            }
        }
    }
    Ok(Tensor::new(shape, out))
}

/// Adds a vector to each row.
pub(super) fn add_bias<F: Float>(x: &mut Tensor<F>, bias: &Tensor<F>) -> Result<(), String> {
    let n = x.last();
    if bias.shape != [n] {
        return Err(format!("bias {:?} for rows of {n} features", bias.shape));
    }
    if n > 0 {
        for row in x.data.chunks_exact_mut(n) {
            for (y, &b) in row.iter_mut().zip(&bias.data) {
                *y += b;
            }
        }
    }
    Ok(())
}

pub(super) fn reduce<F: Float>(
    f: ReduceFn,
    axis: u8,
    keepdim: bool,
    x: &Tensor<F>,
) -> Result<Value<F>, String> {
    let axis = usize::from(axis);
    let n = *x
        .shape
        .get(axis)
        .ok_or_else(|| format!("axis {axis} of a value of rank {}", x.rank()))?;
    let outer: usize = x.shape[..axis].iter().product();
    let inner: usize = x.shape[axis + 1..].iter().product();
    let mut shape = x.shape.clone();
    if keepdim {
        shape[axis] = 1;
    } else {
        shape.remove(axis);
    }
    let lane = |o: usize, i: usize| (0..n).map(move |k| x.data[(o * n + k) * inner + i]);
    if f == ReduceFn::Argmax {
        if n == 0 && outer * inner > 0 {
            return Err("argmax of an empty axis".to_string());
        }
        let mut out = Vec::with_capacity(outer * inner);
        for o in 0..outer {
            for i in 0..inner {
                out.push(argmax(lane(o, i)));
            }
        }
        return Ok(Value::Int(Tensor::new(shape, out)));
    }
    let mut out = Vec::with_capacity(outer * inner);
    for o in 0..outer {
        for i in 0..inner {
            out.push(match f {
                ReduceFn::Amax => lane(o, i).fold(F::NEG_INFINITY, F::maximum),
                ReduceFn::Sum if inner == 1 => sum(&x.data[o * n..(o + 1) * n]),
                ReduceFn::Mean if inner == 1 => {
                    sum(&x.data[o * n..(o + 1) * n]) / F::from_f64(n as f64)
                }
                ReduceFn::Mean => lane(o, i).fold(F::ZERO, |s, v| s + v) / F::from_f64(n as f64),
                _ => lane(o, i).fold(F::ZERO, |s, v| s + v),
            });
        }
    }
    Ok(Value::Float(Tensor::new(shape, out)))
}

/// Sum, in 8 interleaved partial sums.
pub(super) fn sum<F: Float>(x: &[F]) -> F {
    let mut acc = [F::ZERO; 8];
    let chunks = x.chunks_exact(8);
    let rest = chunks.remainder();
    for c in chunks {
        for i in 0..8 {
            acc[i] += c[i];
        }
    }
    for (s, &v) in acc.iter_mut().zip(rest) {
        *s += v;
    }
    ((acc[0] + acc[4]) + (acc[2] + acc[6])) + ((acc[1] + acc[5]) + (acc[3] + acc[7]))
}

/// Index of the largest element, the lowest one on ties.
pub(super) fn argmax<F: Float>(x: impl IntoIterator<Item = F>) -> i64 {
    let (mut best, mut at) = (F::NEG_INFINITY, 0);
    for (i, v) in x.into_iter().enumerate() {
        if v > best {
            (best, at) = (v, i as i64);
        }
    }
    at
}

type Out<F> = Result<Value<F>, String>;

impl Eval for Reduce {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        reduce(self.f, self.axis, self.keepdim, x.float(X)?)
    }
}

impl Eval for Matmul {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        matmul(x.float(ops::matmul::A)?, x.float(ops::matmul::B)?).map(Value::Float)
    }
}

impl Eval for Linear {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        linear(x.float(ops::linear::X)?, x.float(ops::linear::W)?).map(Value::Float)
    }
}
