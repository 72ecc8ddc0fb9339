//! Operations on the rows of a value: softmax, norms, gates, rotary embedding and the composites
//! made of them.

use super::elementwise::{silu, zip};
use super::eval::{Call, Eval};
use super::linalg::{add_bias, argmax, linear};
use super::value::broadcast_strides;
use super::{Float, Tensor, Value};
use crate::Real;
use crate::dtype::DType;
use crate::operands::Operands;
use crate::ops::{
    AddRms, Angles, Epilogue, Gemm, Proj, Prologue, RmsNorm, Rope, Sample, Softmax, X, addrms,
    angles as angle, gemm, proj, rmsnorm as norm, rope as rotary,
};

/// Softmax of one row in place. A row of `-inf` alone becomes zeros.
pub(super) fn softmax_row<F: Float>(row: &mut [F]) {
    let max = row.iter().fold(F::NEG_INFINITY, |m, &v| m.maximum(v));
    let mut sum = F::ZERO;
    for v in row.iter_mut() {
        *v = (*v - max).exp();
        sum += *v;
    }
    for v in row.iter_mut() {
        *v = *v / sum;
    }
}

pub(super) fn softmax<F: Float>(x: &Tensor<F>) -> Result<Tensor<F>, String> {
    if x.rank() == 0 {
        return Err("softmax of a scalar".to_string());
    }
    let mut y = x.clone();
    for row in y.data.chunks_exact_mut(x.last().max(1)) {
        softmax_row(row);
    }
    Ok(y)
}

/// RMSNorm of one row in place. `round` is applied to `x/rms` before gamma, where Hugging Face
/// returns to the element type.
pub(super) fn rms_row<F: Float>(row: &mut [F], gamma: &[F], eps: f64, round: Option<DType>) {
    let mean = F::dot(row, row) / F::from_f64(row.len() as f64);
    let rstd = F::ONE / (mean + F::from_f64(eps)).sqrt();
    for (v, &g) in row.iter_mut().zip(gamma) {
        *v = rounded(*v * rstd, round) * g;
    }
}

pub(super) fn rounded<F: Float>(v: F, round: Option<DType>) -> F {
    match round {
        Some(d) => v.round_to(d),
        None => v,
    }
}

pub(super) fn rmsnorm<F: Float>(
    x: &Tensor<F>,
    gamma: &Tensor<F>,
    eps: Real,
    round: Option<DType>,
) -> Result<Tensor<F>, String> {
    if x.rank() == 0 || gamma.shape != x.shape[x.rank() - 1..] {
        return Err(format!(
            "gamma {:?} does not fit x {:?}",
            gamma.shape, x.shape
        ));
    }
    let mut y = x.clone();
    for row in y.data.chunks_exact_mut(x.last().max(1)) {
        rms_row(row, &gamma.data, eps.get(), round);
    }
    Ok(y)
}

/// Each row over its root mean square.
fn rms_scaled<F: Float>(x: &Tensor<F>, eps: Real) -> Tensor<F> {
    let cols = x.last().max(1);
    let ones = vec![F::from_f64(1.0); cols];
    let mut y = x.clone();
    for row in y.data.chunks_exact_mut(cols) {
        rms_row(row, &ones, eps.get(), None);
    }
    y
}

/// `positions ⊗ inv_freq`.
pub(super) fn angles<F: Float>(pos: &Tensor<F>, freq: &Tensor<F>) -> Result<Tensor<F>, String> {
    if freq.rank() != 1 {
        return Err(format!("inv_freq has rank {}, expected 1", freq.rank()));
    }
    let mut shape = pos.shape.clone();
    shape.push(freq.data.len());
    let data = pos
        .data
        .iter()
        .flat_map(|&p| freq.data.iter().map(move |&f| p * f))
        .collect();
    Ok(Tensor::new(shape, data))
}

/// Where the two elements of RoPE pair `i` stand in a row of `d` elements.
fn pair(i: usize, d: usize, interleaved: bool) -> (usize, usize) {
    if interleaved {
        let at = i / 8 * 16 + i % 8;
        (at, at + 8)
    } else {
        (i, i + d / 2)
    }
}

/// Rotates one row in place.
pub(super) fn rope_row<F: Float>(
    row: &mut [F],
    pos: F,
    freq: &[F],
    scaling: f64,
    interleaved: bool,
) {
    let scaling = F::from_f64(scaling);
    let d = row.len();
    for (i, &f) in freq.iter().enumerate() {
        let angle = pos * f;
        let (c, s) = (angle.cos() * scaling, angle.sin() * scaling);
        let (lo, hi) = pair(i, d, interleaved);
        let (x, y) = (row[lo], row[hi]);
        row[lo] = x * c - y * s;
        row[hi] = y * c + x * s;
    }
}

pub(super) fn rope<F: Float>(
    spec: Rope,
    x: &Tensor<F>,
    pos: &Tensor<F>,
    freq: &Tensor<F>,
) -> Result<Tensor<F>, String> {
    let d = x.last();
    if x.rank() == 0 || freq.rank() != 1 || freq.data.len() * 2 != d {
        return Err(format!(
            "frequencies {:?} for rows of {d} features",
            freq.shape
        ));
    }
    let lead = &x.shape[..x.rank() - 1];
    let pos = stretched(pos, lead)?;
    let mut y = x.clone();
    for (row, p) in y.data.chunks_exact_mut(d.max(1)).zip(pos) {
        rope_row(row, p, &freq.data, spec.scaling.get(), false);
    }
    Ok(y)
}

/// The elements of a tensor broadcast to `shape`, in row-major order.
fn stretched<F: Float>(x: &Tensor<F>, shape: &[usize]) -> Result<Vec<F>, String> {
    let st = broadcast_strides(&x.shape, shape)
        .ok_or_else(|| format!("{:?} does not stretch to {shape:?}", x.shape))?;
    let n: usize = shape.iter().product();
    let mut out = Vec::with_capacity(n);
    for flat in 0..n {
        let (mut rest, mut at) = (flat, 0);
        for axis in (0..shape.len()).rev() {
            at += rest % shape[axis] * st[axis];
            rest /= shape[axis];
        }
        out.push(x.data[at]);
    }
    Ok(out)
}

/// The sum of two tensors of one shape, rounded where it is materialised.
pub(super) fn add<F: Float>(
    a: &Tensor<F>,
    b: &Tensor<F>,
    round: Option<DType>,
) -> Result<Tensor<F>, String> {
    if a.shape != b.shape {
        return Err(format!("shapes differ: {:?} and {:?}", a.shape, b.shape));
    }
    zip(a, b, |x, y| rounded(x + y, round))
}

/// SwiGLU of rows whose gate and up features alternate in blocks of 8.
fn swiglu_packed<F: Float>(y: &Tensor<F>) -> Result<Tensor<F>, String> {
    if !y.last().is_multiple_of(16) {
        return Err(format!("{} features are no multiple of 16", y.last()));
    }
    let mut data = Vec::with_capacity(y.data.len() / 2);
    for block in y.data.chunks_exact(16) {
        let (gate, up) = block.split_at(8);
        data.extend(gate.iter().zip(up).map(|(&g, &u)| silu(g) * u));
    }
    let mut shape = y.shape.clone();
    *shape.last_mut().ok_or("a scalar has no features")? /= 2;
    Ok(Tensor::new(shape, data))
}

type Out<F> = Result<Value<F>, String>;

impl Eval for Softmax {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        softmax(x.float(X)?).map(Value::Float)
    }
}

impl Eval for RmsNorm {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, call: &mut Call<'_, '_, F>) -> Out<F> {
        let (rows, gamma) = (x.float(norm::X)?, x.float(norm::GAMMA)?);
        rmsnorm(rows, gamma, self.eps, call.round).map(Value::Float)
    }
}

impl Eval for AddRms {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, call: &mut Call<'_, '_, F>) -> Out<F> {
        let sum = add(x.float(addrms::X)?, x.float(addrms::DELTA)?, call.round)?;
        let y = rmsnorm(&sum, x.float(addrms::GAMMA)?, self.eps, call.round)?;
        Ok(Value::Tuple(vec![Value::Float(sum), Value::Float(y)]))
    }
}

impl Eval for Angles {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        let positions = x.value(angle::POSITIONS)?.to_float()?;
        angles(&positions, x.float(angle::INV_FREQ)?).map(Value::Float)
    }
}

impl Eval for Rope {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        let positions = x.value(rotary::POSITIONS)?.to_float()?;
        let (rows, freq) = (x.float(rotary::X)?, x.float(rotary::INV_FREQ)?);
        rope(*self, rows, &positions, freq).map(Value::Float)
    }
}

impl Eval for Proj {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        let mut y = linear(x.float(proj::X)?, x.float(proj::W)?)?;
        if let Some(bias) = x.opt_float(proj::BIAS)? {
            add_bias(&mut y, bias)?;
        }
        let (heads, d) = (self.heads as usize, self.head_dim as usize);
        if y.last() != heads * d || d == 0 {
            return Err(format!("{} features for {heads} heads of {d}", y.last()));
        }
        y.shape.pop();
        let lead = y.shape.clone();
        y.shape.extend([heads, d]);
        if let Some(eps) = self.head_norm {
            y = rmsnorm(&y, x.float(proj::GAMMA)?, eps, None)?;
        }
        if let Some(r) = self.rope {
            // Positions are given by token, or by token and head.
            let mut positions = x.value(proj::POSITIONS)?.to_float()?;
            if positions.rank() <= lead.len() {
                positions.shape.push(1);
            }
            y = rope(r, &y, &positions, x.float(proj::INV_FREQ)?)?;
        }
        Ok(Value::Float(y))
    }
}

impl Eval for Gemm {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, call: &mut Call<'_, '_, F>) -> Out<F> {
        let (rows, w) = (x.float(gemm::X)?, x.float(gemm::W)?);
        let gamma = x.opt_float(gemm::GAMMA)?;
        let (sum, mut y) = match (self.prologue, gamma) {
            (Prologue::None, _) => (None, linear(rows, w)?),
            (Prologue::Rms { eps }, Some(gamma)) => {
                (None, linear(&rmsnorm(rows, gamma, eps, None)?, w)?)
            }
            (Prologue::Rms { eps }, None) => (None, linear(&rms_scaled(rows, eps), w)?),
            (Prologue::AddRms { eps }, _) => {
                let sum = add(rows, x.float(gemm::DELTA)?, call.round)?;
                let h = rmsnorm(&sum, x.float(gemm::GAMMA)?, eps, None)?;
                (Some(sum), linear(&h, w)?)
            }
        };
        if let Some(bias) = x.opt_float(gemm::BIAS)? {
            add_bias(&mut y, bias)?;
        }
        let y = Value::Float(match self.epilogue {
            Epilogue::None => y,
            Epilogue::Residual => add(&y, x.float(gemm::RESIDUAL)?, None)?,
            Epilogue::SwiGlu => swiglu_packed(&y)?,
        });
        Ok(match sum {
            None => y,
            Some(sum) => Value::Tuple(vec![Value::Float(sum), y]),
        })
    }
}

impl Eval for Sample {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, call: &mut Call<'_, '_, F>) -> Out<F> {
        let x = x.float(X)?;
        if x.rank() != 2 || x.last() == 0 {
            return Err(format!("logits {:?}", x.shape));
        }
        let rows = x.data.chunks_exact(x.last());
        let ids = match call.state.sampler {
            Some(pick) => rows.enumerate().map(|(i, row)| pick(i, row)).collect(),
            None => rows.map(|row| argmax(row.iter().copied())).collect(),
        };
        Ok(Value::Int(Tensor::new([x.shape[0]], ids)))
    }
}
