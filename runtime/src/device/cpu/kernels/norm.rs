//! Row normalisations.

use std::cell::RefCell;

use super::pool::{SharedMut, parallel_for};
use super::simd::{Isa, Kernel, Simd, dispatch};
use super::{Elem, KernelError, check_len, whole_rows};

/// Elements below which rows are not shared out over threads.
const PARALLEL_ELEMENTS: usize = 32 << 10;

/// h = x · rsqrt(mean(x²) + eps) · gamma, per row; without gamma that factor is 1.
///
/// Rounds as the Hugging Face module of Llama does: the normalised value is rounded to the storage type before it
/// meets gamma.
/// `x`, `h`: `[M, K]` with `k` = K, `gamma`: `[K]`.
///
/// # Errors
/// Lengths that do not match.
pub fn rms_norm<E: Elem>(
    x: &[E],
    gamma: Option<&[E]>,
    eps: f32,
    k: usize,
    h: &mut [E],
) -> Result<(), KernelError> {
    const NAME: &str = "rms_norm";
    if let Some(gamma) = gamma {
        check_len(NAME, "gamma", gamma, k)?;
    }
    check_len(NAME, "x", x, whole_rows(x.len(), k))?;
    check_len(NAME, "h", h, x.len())?;
    rms_rows(Rows {
        x,
        delta: None,
        gamma,
        eps,
        k,
        sum: None,
        h: SharedMut::new(h),
    });
    Ok(())
}

/// sum = x + delta, rounded; h = rms_norm(sum). `x`, `delta`, `sum`, `h`: `[M, K]`, `gamma`: `[K]`.
///
/// # Errors
/// Lengths that do not match.
#[allow(clippy::too_many_arguments)] // four tensors and the norm's two parameters
pub fn add_rms_norm<E: Elem>(
    x: &[E],
    delta: &[E],
    gamma: &[E],
    eps: f32,
    k: usize,
    sum: &mut [E],
    h: &mut [E],
) -> Result<(), KernelError> {
    const NAME: &str = "add_rms_norm";
    check_len(NAME, "gamma", gamma, k)?;
    check_len(NAME, "x", x, whole_rows(x.len(), k))?;
    check_len(NAME, "delta", delta, x.len())?;
    check_len(NAME, "sum", sum, x.len())?;
    check_len(NAME, "h", h, x.len())?;
    let (sum, h) = (Some(SharedMut::new(sum)), SharedMut::new(h));
    rms_rows(Rows {
        x,
        delta: Some(delta),
        gamma: Some(gamma),
        eps,
        k,
        sum,
        h,
    });
    Ok(())
}

/// y = (x - mean) / sqrt(var + eps) · gamma + beta, per row, with the biased variance, rounded once.
/// `x`, `y`: `[M, K]`, `gamma`: `[K]`, `beta`: `[K]` if there is one.
///
/// # Errors
/// Lengths that do not match.
pub fn layer_norm<E: Elem>(
    x: &[E],
    gamma: &[E],
    beta: Option<&[E]>,
    eps: f32,
    k: usize,
    y: &mut [E],
) -> Result<(), KernelError> {
    const NAME: &str = "layer_norm";
    check_len(NAME, "gamma", gamma, k)?;
    check_len(NAME, "x", x, whole_rows(x.len(), k))?;
    check_len(NAME, "y", y, x.len())?;
    if let Some(beta) = beta {
        check_len(NAME, "beta", beta, k)?;
    }
    let isa = Isa::current();
    let out = SharedMut::new(y);
    over_rows(x.len(), k, |first, rows| {
        dispatch(
            isa,
            LayerNormRows {
                x: &x[first * k..][..rows * k],
                first,
                gamma,
                beta,
                eps,
                k,
                y: &out,
            },
        );
    });
    Ok(())
}

struct Rows<'a, E> {
    x: &'a [E],
    delta: Option<&'a [E]>,
    gamma: Option<&'a [E]>,
    eps: f32,
    k: usize,
    sum: Option<SharedMut<E>>,
    h: SharedMut<E>,
}

fn rms_rows<E: Elem>(rows: Rows<'_, E>) {
    let isa = Isa::current();
    over_rows(rows.x.len(), rows.k, |first, count| {
        dispatch(
            isa,
            RmsRows {
                rows: &rows,
                first,
                count,
            },
        )
    });
}

/// Calls `body(first, count)` for ranges that cover the rows of a `[len / k, k]` matrix.
fn over_rows(len: usize, k: usize, body: impl Fn(usize, usize) + Sync) {
    if len == 0 {
        return;
    }
    let rows = len / k;
    let grain = if len < PARALLEL_ELEMENTS {
        rows
    } else {
        (PARALLEL_ELEMENTS / 4).div_ceil(k)
    };
    parallel_for(rows.div_ceil(grain), |i| {
        body(i * grain, grain.min(rows - i * grain))
    });
}

struct RmsRows<'a, 'b, E> {
    rows: &'a Rows<'b, E>,
    first: usize,
    count: usize,
}

impl<E: Elem> Kernel for RmsRows<'_, '_, E> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Rows {
            x,
            delta,
            gamma,
            eps,
            k,
            ref sum,
            ref h,
        } = *self.rows;
        let whole = k / S::LANES * S::LANES;
        for row in self.first..self.first + self.count {
            let start = row * k;
            let x = &x[start..][..k];
            let mut source = x.as_ptr();
            if let (Some(delta), Some(sum)) = (delta, sum) {
                let delta = &delta[start..][..k];
                let out = sum.at(start);
                // SAFETY: `out` is this row of `sum`, which this task alone writes; all reads are inside rows.
                unsafe {
                    for i in (0..whole).step_by(S::LANES) {
                        let v = S::add(
                            E::load::<S>(x.as_ptr().add(i)),
                            E::load::<S>(delta.as_ptr().add(i)),
                        );
                        E::store::<S>(out.add(i), v);
                    }
                    for i in whole..k {
                        *out.add(i) = E::from_f32(x[i].to_f32() + delta[i].to_f32());
                    }
                }
                source = out;
            }
            let out = h.at(start);
            // SAFETY: `source` has k values; `out` is this row of h, which this task alone writes.
            unsafe {
                let mut squares = S::splat(0.0);
                for i in (0..whole).step_by(S::LANES) {
                    let v = E::load::<S>(source.add(i));
                    squares = S::fma(v, v, squares);
                }
                let mut square_sum = S::sum(squares);
                for i in whole..k {
                    let v = (*source.add(i)).to_f32();
                    square_sum += v * v;
                }
                let rstd = 1.0 / (square_sum / k as f32 + eps).sqrt();
                let Some(gamma) = gamma else {
                    for i in (0..whole).step_by(S::LANES) {
                        let v = S::mul(E::load::<S>(source.add(i)), S::splat(rstd));
                        E::store::<S>(out.add(i), v);
                    }
                    for i in whole..k {
                        *out.add(i) = E::from_f32((*source.add(i)).to_f32() * rstd);
                    }
                    continue;
                };
                for i in (0..whole).step_by(S::LANES) {
                    let v = E::round::<S>(S::mul(E::load::<S>(source.add(i)), S::splat(rstd)));
                    E::store::<S>(out.add(i), S::mul(v, E::load::<S>(gamma.as_ptr().add(i))));
                }
                for i in whole..k {
                    let v = E::from_f32((*source.add(i)).to_f32() * rstd).to_f32();
                    *out.add(i) = E::from_f32(v * gamma[i].to_f32());
                }
            }
        }
    }
}

struct LayerNormRows<'a, E> {
    x: &'a [E],
    first: usize,
    gamma: &'a [E],
    beta: Option<&'a [E]>,
    eps: f32,
    k: usize,
    y: &'a SharedMut<E>,
}

impl<E: Elem> Kernel for LayerNormRows<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let k = self.k;
        let whole = k / S::LANES * S::LANES;
        for (r, x) in self.x.chunks_exact(k).enumerate() {
            let out = self.y.at((self.first + r) * k);
            let source = x.as_ptr();
            // SAFETY: reads are inside the row; `out` is a row of y that this task alone writes.
            unsafe {
                let mut total = S::splat(0.0);
                for i in (0..whole).step_by(S::LANES) {
                    total = S::add(total, E::load::<S>(source.add(i)));
                }
                let mean =
                    (S::sum(total) + x[whole..].iter().map(|v| v.to_f32()).sum::<f32>()) / k as f32;
                let mut squares = S::splat(0.0);
                for i in (0..whole).step_by(S::LANES) {
                    let v = S::sub(E::load::<S>(source.add(i)), S::splat(mean));
                    squares = S::fma(v, v, squares);
                }
                let rest: f32 = x[whole..]
                    .iter()
                    .map(|v| (v.to_f32() - mean) * (v.to_f32() - mean))
                    .sum();
                let rstd = 1.0 / ((S::sum(squares) + rest) / k as f32 + self.eps).sqrt();
                for i in (0..whole).step_by(S::LANES) {
                    let v = S::mul(
                        S::sub(E::load::<S>(source.add(i)), S::splat(mean)),
                        S::splat(rstd),
                    );
                    let g = E::load::<S>(self.gamma.as_ptr().add(i));
                    let b = match self.beta {
                        Some(beta) => E::load::<S>(beta.as_ptr().add(i)),
                        None => S::splat(0.0),
                    };
                    E::store::<S>(out.add(i), S::fma(v, g, b));
                }
                for i in whole..k {
                    let beta = self.beta.map_or(0.0, |b| b[i].to_f32());
                    *out.add(i) =
                        E::from_f32((x[i].to_f32() - mean) * rstd * self.gamma[i].to_f32() + beta);
                }
            }
        }
    }
}

thread_local! {
    /// Buffers that no call on this thread is using; nested calls take one each.
    static SCRATCH: RefCell<Vec<Vec<u64>>> = const { RefCell::new(Vec::new()) };
}

/// Lends `f` a buffer of `len` elements of unspecified value that this thread keeps for later calls.
pub(crate) fn with_scratch<E: Elem, R>(len: usize, f: impl FnOnce(&mut [E]) -> R) -> R {
    let mut words = SCRATCH
        .with_borrow_mut(|free| free.pop())
        .unwrap_or_default();
    let need = (len * size_of::<E>()).div_ceil(8) + 8;
    if words.len() < need {
        words.resize(need, 0);
    }
    let base = words.as_mut_ptr().cast::<u8>();
    // SAFETY: at most 56 bytes are skipped to reach a 64-byte boundary, which `need` allows for;
    // any bit pattern is a value of the two storage types.
    let slice =
        unsafe { std::slice::from_raw_parts_mut(base.add(base.align_offset(64)).cast::<E>(), len) };
    let result = f(slice);
    SCRATCH.with_borrow_mut(|free| free.push(words));
    result
}
