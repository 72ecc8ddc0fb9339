//! Operations on the rows of a value: softmax, norms, gates, rotary embedding and the composites
//! made of them.

use super::linalg::{add_bias, linear};
use super::value::broadcast_strides;
use super::{Float, Tensor, Value};
use crate::dtype::DType;
use crate::spec::{Epilogue, GemmSpec, ProjSpec, Prologue, Real, RopeSpec};

/// Softmax of one row in place. A row of `-inf` alone becomes zeros.
pub(super) fn softmax_row<F: Float>(row: &mut [F]) {
    let max = row.iter().fold(F::NEG_INFINITY, |m, &v| m.maximum(v));
    if max == F::NEG_INFINITY {
        row.fill(F::ZERO);
        return;
    }
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

pub(super) fn silu<F: Float>(v: F) -> F {
    v * v.sigmoid()
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
    spec: RopeSpec,
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

/// Required operand of a spec that asks for it.
pub(super) fn required<'a, F: Float>(v: &'a Value<F>, what: &str) -> Result<&'a Tensor<F>, String> {
    v.optional()?
        .ok_or_else(|| format!("{what} is absent, but the operation needs it"))
}

/// `(x, w, bias, gamma, positions, inv_freq)`.
pub(super) fn proj<F: Float>(spec: ProjSpec, inputs: &[&Value<F>]) -> Result<Tensor<F>, String> {
    let &[x, w, bias, gamma, pos, freq] = inputs else {
        return Err(format!("expected 6 operands, found {}", inputs.len()));
    };
    let mut y = linear(x.float()?, w.float()?)?;
    if let Some(b) = bias.optional()? {
        add_bias(&mut y, b)?;
    }
    let (heads, d) = (spec.heads as usize, spec.head_dim as usize);
    if y.last() != heads * d || d == 0 {
        return Err(format!("{} features for {heads} heads of {d}", y.last()));
    }
    y.shape.pop();
    let lead = y.shape.clone();
    y.shape.extend([heads, d]);
    if let Some(eps) = spec.head_norm {
        y = rmsnorm(&y, required(gamma, "the head norm")?, eps, None)?;
    }
    if let Some(r) = spec.rope {
        // Positions are given by token, or by token and head.
        let mut pos = pos.to_float()?;
        if pos.rank() <= lead.len() {
            pos.shape.push(1);
        }
        y = rope(r, &y, &pos, required(freq, "inv_freq")?)?;
    }
    Ok(y)
}

/// `(x, w, bias, residual, gamma, delta)`. Returns the sum of the prologue, if there is one, and
/// the result.
pub(super) fn gemm<F: Float>(
    spec: GemmSpec,
    inputs: &[&Value<F>],
    round: Option<DType>,
) -> Result<(Option<Tensor<F>>, Tensor<F>), String> {
    let &[x, w, bias, residual, gamma, delta] = inputs else {
        return Err(format!("expected 6 operands, found {}", inputs.len()));
    };
    let (x, w) = (x.float()?, w.float()?);
    let (sum, mut y) = match spec.prologue {
        Prologue::None => (None, linear(x, w)?),
        Prologue::Rms { eps } => {
            let h = match gamma.optional()? {
                Some(gamma) => rmsnorm(x, gamma, eps, None)?,
                None => rms_scaled(x, eps),
            };
            (None, linear(&h, w)?)
        }
        Prologue::AddRms { eps } => {
            let sum = add(x, required(delta, "delta")?, round)?;
            let h = rmsnorm(&sum, required(gamma, "gamma")?, eps, None)?;
            let y = linear(&h, w)?;
            (Some(sum), y)
        }
    };
    if let Some(b) = bias.optional()? {
        add_bias(&mut y, b)?;
    }
    let y = match spec.epilogue {
        Epilogue::None => y,
        Epilogue::Residual => add(&y, required(residual, "the residual")?, None)?,
        Epilogue::SwiGlu => swiglu_packed(&y)?,
    };
    Ok((sum, y))
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
    super::elementwise::zip(a, b, |x, y| rounded(x + y, round))
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
