//! Operations that only move elements.

use super::eval::{Call, Eval};
use super::value::{broadcast_strides, coalesce, strides, walk};
use super::{Float, StepMeta, Tensor, Value};
use crate::operands::Operands;
use crate::ops::{
    self, Concat, Embedding, Expand, Get, Pack, Permute, RepeatKv, Reshape, Select, Slice, Win, X,
};

/// Applies a function that is generic over the element type to a tensor value.
macro_rules! any {
    ($x:expr, $t:ident => $e:expr) => {
        match $x {
            Value::Float($t) => Ok(Value::Float($e)),
            Value::Int($t) => Ok(Value::Int($e)),
            Value::Bool($t) => Ok(Value::Bool($e)),
            other => Err(format!("expected a tensor, found {}", other.kind())),
        }
    };
}

/// Reads `src` from `base` on under extents and strides.
fn strided<T: Copy>(src: &[T], base: usize, shape: &[usize], st: &[usize], out: &mut Vec<T>) {
    let axes = coalesce(shape, [st]);
    let (n, [step]) = axes[axes.len() - 1];
    walk(&axes, |[i]| {
        let i = base + i;
        match step {
            1 => out.extend_from_slice(&src[i..i + n]),
            0 => out.extend(std::iter::repeat_n(src[i], n)),
            _ => out.extend((0..n).map(|k| src[i + k * step])),
        }
    });
}

pub(super) fn reshape<T: Copy>(x: &Tensor<T>, shape: &[usize]) -> Result<Tensor<T>, String> {
    if shape.iter().product::<usize>() != x.data.len() {
        return Err(format!("{:?} does not reshape to {shape:?}", x.shape));
    }
    Ok(Tensor::new(shape, x.data.clone()))
}

pub(super) fn permute<T: Copy>(x: &Tensor<T>, perm: &[u8]) -> Result<Tensor<T>, String> {
    let mut sorted: Vec<usize> = perm.iter().map(|&p| usize::from(p)).collect();
    sorted.sort_unstable();
    if !sorted.into_iter().eq(0..x.rank()) {
        return Err(format!("{perm:?} is no permutation of {} axes", x.rank()));
    }
    let own = strides(&x.shape);
    let shape: Vec<usize> = perm.iter().map(|&p| x.shape[usize::from(p)]).collect();
    let st: Vec<usize> = perm.iter().map(|&p| own[usize::from(p)]).collect();
    let mut data = Vec::with_capacity(x.data.len());
    strided(&x.data, 0, &shape, &st, &mut data);
    Ok(Tensor::new(shape, data))
}

pub(super) fn expand<T: Copy>(x: &Tensor<T>, shape: &[usize]) -> Result<Tensor<T>, String> {
    let st = broadcast_strides(&x.shape, shape)
        .ok_or_else(|| format!("{:?} does not stretch to {shape:?}", x.shape))?;
    let mut data = Vec::with_capacity(shape.iter().product());
    strided(&x.data, 0, shape, &st, &mut data);
    Ok(Tensor::new(shape, data))
}

pub(super) fn slice<T: Copy>(
    x: &Tensor<T>,
    axis: u8,
    start: i64,
    end: i64,
) -> Result<Tensor<T>, String> {
    let axis = usize::from(axis);
    let extent = *x.shape.get(axis).ok_or("axis out of range")?;
    let (Ok(start), Ok(end)) = (usize::try_from(start), usize::try_from(end)) else {
        return Err("negative slice bounds".to_string());
    };
    if start > end || end > extent {
        return Err(format!("{start}..{end} of an axis of {extent}"));
    }
    let inner: usize = x.shape[axis + 1..].iter().product();
    let mut shape = x.shape.clone();
    shape[axis] = end - start;
    let mut data = Vec::with_capacity(shape.iter().product());
    if extent * inner > 0 {
        for block in x.data.chunks_exact(extent * inner) {
            data.extend_from_slice(&block[start * inner..end * inner]);
        }
    }
    Ok(Tensor::new(shape, data))
}

pub(super) fn concat<F: Float>(a: &Value<F>, b: &Value<F>, axis: u8) -> Result<Value<F>, String> {
    Ok(match (a, b) {
        (Value::Float(a), Value::Float(b)) => Value::Float(join(a, b, usize::from(axis))?),
        (Value::Int(a), Value::Int(b)) => Value::Int(join(a, b, usize::from(axis))?),
        (Value::Bool(a), Value::Bool(b)) => Value::Bool(join(a, b, usize::from(axis))?),
        _ => return Err(format!("cannot join {} and {}", a.kind(), b.kind())),
    })
}

fn join<T: Copy>(a: &Tensor<T>, b: &Tensor<T>, axis: usize) -> Result<Tensor<T>, String> {
    let fits = a.rank() == b.rank()
        && axis < a.rank()
        && (0..a.rank()).all(|i| i == axis || a.shape[i] == b.shape[i]);
    if !fits {
        return Err(format!(
            "{:?} and {:?} do not join along axis {axis}",
            a.shape, b.shape
        ));
    }
    let outer: usize = a.shape[..axis].iter().product();
    let (na, nb): (usize, usize) = (
        a.shape[axis..].iter().product(),
        b.shape[axis..].iter().product(),
    );
    let mut shape = a.shape.clone();
    shape[axis] += b.shape[axis];
    let mut data = Vec::with_capacity(a.data.len() + b.data.len());
    for i in 0..outer {
        data.extend_from_slice(&a.data[i * na..(i + 1) * na]);
        data.extend_from_slice(&b.data[i * nb..(i + 1) * nb]);
    }
    Ok(Tensor::new(shape, data))
}

/// Rows of axis 0 by index.
pub(super) fn gather<T: Copy>(x: &Tensor<T>, ids: &Tensor<i64>) -> Result<Tensor<T>, String> {
    let n = *x.shape.first().ok_or("cannot take rows of a scalar")?;
    let row: usize = x.shape[1..].iter().product();
    let mut shape = ids.shape.clone();
    shape.extend_from_slice(&x.shape[1..]);
    let mut data = Vec::with_capacity(ids.data.len() * row);
    for &id in &ids.data {
        let i = usize::try_from(id)
            .ok()
            .filter(|&i| i < n)
            .ok_or_else(|| format!("row {id} of a table of {n} rows"))?;
        data.extend_from_slice(&x.data[i * row..(i + 1) * row]);
    }
    Ok(Tensor::new(shape, data))
}

/// `[B,H,…]` to `[B,H·groups,…]`, each head `groups` times in a row.
pub(super) fn repeat_heads<T: Copy>(x: &Tensor<T>, groups: usize) -> Result<Tensor<T>, String> {
    if x.rank() != 4 {
        return Err(format!("x has rank {}, expected 4", x.rank()));
    }
    let head = x.shape[2] * x.shape[3];
    let mut shape = x.shape.clone();
    shape[1] *= groups;
    let mut data = Vec::with_capacity(x.data.len() * groups);
    if head > 0 {
        for h in x.data.chunks_exact(head) {
            for _ in 0..groups {
                data.extend_from_slice(h);
            }
        }
    }
    Ok(Tensor::new(shape, data))
}

/// The rows of a full-sequence value that a step computes.
pub(super) fn window<T: Copy>(x: &Tensor<T>, w: Win, step: &StepMeta) -> Result<Tensor<T>, String> {
    let own = strides(&x.shape);
    let axis = |a: Option<u8>| -> Result<Option<(usize, usize)>, String> {
        a.map(|a| {
            let a = usize::from(a);
            x.shape
                .get(a)
                .map(|&n| (n, own[a]))
                .ok_or_else(|| format!("axis {a} of a value of rank {}", x.rank()))
        })
        .transpose()
    };
    let (batch, seq) = (axis(w.batch)?, axis(w.seq)?);
    let rest: Vec<usize> = (0..x.rank())
        .filter(|&i| {
            let i = Some(i as u8);
            i != w.batch && i != w.seq
        })
        .collect();
    let inner: Vec<usize> = rest.iter().map(|&i| x.shape[i]).collect();
    let st: Vec<usize> = rest.iter().map(|&i| own[i]).collect();
    let mut shape = vec![step.tokens()];
    shape.extend_from_slice(&inner);
    let mut data = Vec::with_capacity(shape.iter().product());
    for (b, pos) in step.rows() {
        let mut base = 0;
        for (what, axis, i) in [("sequence", batch, b), ("position", seq, pos)] {
            if let Some((n, stride)) = axis {
                if i >= n {
                    return Err(format!("{what} {i} of a value with {n}"));
                }
                base += i * stride;
            }
        }
        strided(&x.data, base, &inner, &st, &mut data);
    }
    Ok(Tensor::new(shape, data))
}

fn pack<F: Float>(kind: Pack, inputs: &Operands<&Value<F>>) -> Result<Value<F>, String> {
    let parts: Vec<&Tensor<F>> = inputs.iter().map(|v| v.float()).collect::<Result<_, _>>()?;
    let first = parts.first().ok_or("no operands")?;
    if parts
        .iter()
        .any(|p| p.rank() == 0 || p.shape[1..] != first.shape[1..])
    {
        return Err("operands have rows of different lengths".to_string());
    }
    let rows: Vec<usize> = parts.iter().map(|p| p.shape[0]).collect();
    let sources = kind
        .source_rows(&rows)
        .ok_or_else(|| format!("operands of {rows:?} rows do not fit {kind:?}"))?;
    let row: usize = first.shape[1..].iter().product();
    let mut shape = first.shape.clone();
    shape[0] = sources.len();
    let mut data = Vec::with_capacity(sources.len() * row);
    for (part, r) in sources {
        data.extend_from_slice(&parts[part].data[r * row..(r + 1) * row]);
    }
    Ok(Value::Float(Tensor::new(shape, data)))
}

type Out<F> = Result<Value<F>, String>;

impl Eval for Embedding {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        let ids = x.value(ops::embedding::IDS)?.int()?;
        any!(x.value(ops::embedding::TABLE)?, t => gather(t, ids)?)
    }
}

impl Eval for Select {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        let rows = x.value(ops::select::ROWS)?.int()?;
        any!(x.value(ops::select::X)?, t => gather(t, rows)?)
    }
}

impl Eval for Reshape {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, call: &mut Call<'_, '_, F>) -> Out<F> {
        let shape = call.extents()?;
        any!(x.value(X)?, t => reshape(t, &shape)?)
    }
}

impl Eval for Permute {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        any!(x.value(X)?, t => permute(t, &self.0)?)
    }
}

impl Eval for Expand {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, call: &mut Call<'_, '_, F>) -> Out<F> {
        let shape = call.extents()?;
        any!(x.value(X)?, t => expand(t, &shape)?)
    }
}

impl Eval for Slice {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        any!(x.value(X)?, t => slice(t, self.axis, self.start, self.end)?)
    }
}

impl Eval for Concat {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        concat(
            x.value(ops::concat::A)?,
            x.value(ops::concat::B)?,
            self.axis,
        )
    }
}

impl Eval for RepeatKv {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        any!(x.value(X)?, t => repeat_heads(t, self.groups as usize)?)
    }
}

impl Eval for Win {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, call: &mut Call<'_, '_, F>) -> Out<F> {
        let step = call.state.step()?;
        any!(x.value(X)?, t => window(t, *self, step)?)
    }
}

impl Eval for Get {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        let i = usize::from(self.0);
        match x.value(X)? {
            Value::Tuple(vs) if i < vs.len() => Ok(vs[i].clone()),
            other => Err(format!("no element {i} in {}", other.kind())),
        }
    }
}

impl Eval for Pack {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        pack(*self, x)
    }
}
