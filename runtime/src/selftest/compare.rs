//! When two results of one operation are equal.
//!
//! The error of element `i` of a row is `|a_i - b_i| / (|b_i| + rms(row b) + floor)`: relative for large
//! elements, and for small ones relative to the size of their row, since a sum that cancels has the
//! error of its terms. Integers and booleans must be equal, and so must infinities.

use super::{Outcome, POISON};
use half::{bf16, f16};
use lathe_codegen::Step;
use lathe_ir::Slot;
use lathe_ir::ops::Reduce;
use lathe_ir::ops::gemm;
use lathe_ir::ops::{X, attn_step};
use lathe_ir::{DType, Epilogue, Op, Prologue, ReduceFn, SymEnv};

/// How large an error may be, and what is added to the scale of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Largest error.
    pub relative: f64,
    /// Added to the scale, where the row alone does not give it.
    pub floor: f64,
}

/// Standard deviations of the rounding errors of a sum that are allowed.
const DEVIATIONS: f64 = 16.0;

/// The tolerance for `roundings` roundings to `dtype` on the way and f32 sums of `length` terms.
///
/// Two implementations that round the same number to `dtype` may differ by one spacing, `eps(dtype)`
/// (2^-23 for f32, 2^-7 for bf16). The errors of a sum in f32 grow as a random walk: after `n` terms of
/// size `s / sqrt(n)`, which give a result of size `s`, by about `sqrt(n) 2^-24 s` (Higham & Mary, "A new
/// approach to probabilistic rounding error analysis", 2019), of which `DEVIATIONS` are allowed.
pub fn bound(roundings: usize, dtype: DType, length: usize) -> f64 {
    roundings as f64 * epsilon(dtype) + DEVIATIONS * (length.max(1) as f64).sqrt() / 16_777_216.0
}

/// Distance from 1 to the next larger number.
fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => f64::from(f32::EPSILON),
        DType::F16 => f16::EPSILON.to_f64(),
        DType::BF16 => bf16::EPSILON.to_f64(),
        _ => 0.0,
    }
}

/// What a device's results are held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reference {
    /// Arithmetic that rounds nothing: every rounding inside the operation shows.
    Exact,
    /// Another device that rounds at the same places: most of its roundings go the same way.
    Device,
}

/// The tolerance for a result of a step. `longest` is the longest sequence of the batch, `operand` the
/// root mean square of the first operand.
pub fn tolerance(
    step: &Step,
    dtype: DType,
    env: &SymEnv,
    longest: usize,
    operand: f64,
    reference: Reference,
) -> Tolerance {
    let extent = |operand: Slot, axis: usize| {
        let dim = step.tensor(operand).and_then(|t| t.shape.get(axis));
        dim.map_or(1, |d| d.eval(env).max(1) as usize)
    };
    let last = |operand: Slot| {
        let rank = step.tensor(operand).map_or(0, |t| t.shape.len());
        extent(operand, rank.saturating_sub(1))
    };
    let mut floor = 0.0;
    // Roundings against exact arithmetic, and against a device.
    let (exact, device, length) = match &step.op {
        // The two have their rows in common.
        Op::Linear(_) | Op::Matmul(_) => (1, 1, last(X)),
        // The normed row is rounded twice before it meets the weights; SwiGLU multiplies the error of
        // each factor by the other, which is up to four times the size of its row.
        // Without gamma the norm may be a factor of the accumulators instead, not rounded at all.
        Op::Gemm(spec) => {
            let normed = spec.prologue != Prologue::None;
            let factor =
                matches!(spec.prologue, Prologue::Rms { .. }) && step.get(gemm::GAMMA).is_none();
            match spec.epilogue {
                Epilogue::SwiGlu => (
                    if normed { 8 } else { 1 },
                    if factor { 5 } else { 2 },
                    16 * last(gemm::X),
                ),
                _ => (
                    if normed { 3 } else { 1 },
                    if factor { 2 } else { 1 },
                    last(gemm::X),
                ),
            }
        }
        // As Hugging Face's: once before and once after gamma.
        Op::RmsNorm(_) | Op::AddRms(_) => (2, 2, last(X)),
        Op::Softmax(_) => (1, 1, last(X)),
        Op::Reduce(Reduce { f, axis, .. }) => {
            let n = extent(X, usize::from(*axis));
            floor = match f {
                ReduceFn::Sum => operand * (n as f64).sqrt(),
                ReduceFn::Mean => operand / (n as f64).sqrt(),
                ReduceFn::Amax | ReduceFn::Argmax => 0.0,
            };
            (1, 1, n)
        }
        // The probabilities are rounded for tensor cores.
        Op::AttnStep(_) => (2, 2, longest + last(attn_step::Q)),
        // Rotated queries and keys are rounded, and scores of up to 10 enlarge that.
        Op::AttnQkv(spec) => (8, 2, longest + spec.head_dim as usize),
        // Each operation may enlarge the error of the one before, and sums are over a row.
        Op::Chain(c) => {
            let width = (0..step.operands.len())
                .map(|i| last(Slot::nth(i)))
                .max()
                .unwrap_or(1);
            let sums = if c.reduces() { width } else { 1 };
            (2, 2, 16 * (c.statements.len() + sums))
        }
        _ => (1, 1, 1),
    };
    let roundings = match reference {
        Reference::Exact => exact,
        Reference::Device => device,
    };
    Tolerance {
        relative: bound(roundings, dtype, length),
        floor,
    }
}

/// The elements as numbers.
pub fn numbers(bytes: &[u8], dtype: DType) -> Vec<f64> {
    fn all<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        bytes.as_chunks::<N>().0.iter().map(|&b| f(b)).collect()
    }
    match dtype {
        DType::Bool => bytes.iter().map(|&b| f64::from(b)).collect(),
        DType::I32 => all(bytes, |b| f64::from(i32::from_le_bytes(b))),
        DType::I64 => all(bytes, |b| i64::from_le_bytes(b) as f64),
        DType::F32 => all(bytes, |b| f64::from(f32::from_le_bytes(b))),
        DType::F16 => all(bytes, |b| f16::from_le_bytes(b).to_f64()),
        DType::BF16 => all(bytes, |b| bf16::from_le_bytes(b).to_f64()),
    }
}

/// Root mean square of the finite numbers.
pub fn rms(values: &[f64]) -> f64 {
    let finite = values.iter().filter(|v| v.is_finite());
    let (n, sum) = finite.fold((0, 0.0), |(n, sum), v| (n + 1, sum + v * v));
    (sum / f64::from(n.max(1))).sqrt()
}

/// Whether the bytes of an element are those that lay there before.
fn is_poison(bytes: &[u8], at: usize) -> bool {
    let poison = POISON.to_le_bytes();
    bytes
        .iter()
        .enumerate()
        .all(|(i, b)| *b == poison[(at + i) % 4])
}

/// Compares what a kernel wrote, elements of `dtype` in rows of `row`, with what it should be.
pub fn compare(
    expected: &[f64],
    found: &[u8],
    dtype: DType,
    row: usize,
    tolerance: Tolerance,
) -> Outcome {
    let mut outcome = Outcome {
        tolerance: if dtype.is_float() {
            tolerance.relative
        } else {
            0.0
        },
        ..Outcome::default()
    };
    let size = dtype.size();
    if found.len() != expected.len() * size {
        outcome.fault = Some(format!(
            "{} bytes for {} elements",
            found.len(),
            expected.len()
        ));
        return outcome;
    }
    let values = numbers(found, dtype);
    let row = row.max(1);
    for (r, (want, got)) in expected.chunks(row).zip(values.chunks(row)).enumerate() {
        let scale = rms(want) + tolerance.floor;
        for (i, (w, g)) in want.iter().zip(got).enumerate() {
            let at = r * row + i;
            if is_poison(&found[at * size..][..size], at * size) {
                outcome.error = f64::INFINITY;
                outcome.fault = Some(format!("element {at} was not written, {w:e} expected"));
                return outcome;
            }
            let same = w == g || (w.is_nan() && g.is_nan());
            let error = match same {
                true => 0.0,
                false if dtype.is_float() && w.is_finite() && g.is_finite() => {
                    (w - g).abs() / (w.abs() + scale)
                }
                false => f64::INFINITY,
            };
            if error > outcome.error {
                outcome.error = error;
                if error > outcome.tolerance {
                    outcome.fault = Some(format!(
                        "element {i} of row {r} is {g:e}, {w:e} expected: error {error:.1e}, \
                         tolerance {:.1e}",
                        outcome.tolerance
                    ));
                }
            }
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLERANCE: Tolerance = Tolerance {
        relative: 1e-6,
        floor: 0.0,
    };

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn check(found: &[u8]) -> Outcome {
        compare(&[1.0, -2.0, 3.0, 0.0], found, DType::F32, 4, TOLERANCE)
    }

    #[test]
    fn equal_results_pass_and_a_perturbed_one_is_caught() {
        let good = [1.0, -2.0, 3.0, 0.0];
        assert_eq!(check(&bytes(&good)).fault, None);
        for i in 0..4 {
            let mut bad = good;
            bad[i] += 1e-4;
            let fault = check(&bytes(&bad)).fault.expect("it is caught");
            assert!(fault.contains(&format!("element {i} of row 0")), "{fault}");
        }
    }

    #[test]
    fn elements_that_were_not_written_are_caught() {
        let mut found = bytes(&[1.0, -2.0, 3.0, 0.0]);
        found[8..12].copy_from_slice(&POISON.to_le_bytes());
        let fault = check(&found).fault.expect("it is caught");
        assert!(fault.contains("element 2 was not written"), "{fault}");
        let half = [
            bf16::ONE.to_le_bytes(),
            (POISON as u16).to_le_bytes(),
            bf16::ONE.to_le_bytes(),
        ]
        .concat();
        let outcome = compare(&[1.0; 3], &half, DType::BF16, 3, TOLERANCE);
        assert!(outcome.fault.is_some_and(|f| f.contains("element 1")));
    }

    #[test]
    fn poison_is_no_value_of_any_type() {
        let word = POISON.to_le_bytes();
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            assert!(numbers(&word, dtype).iter().all(|v| v.is_nan()));
        }
        assert!(numbers(&word, DType::Bool).iter().all(|&v| v > 1.0));
        assert!(numbers(&word, DType::I32)[0] < 0.0);
        assert!(numbers(&[word, word].concat(), DType::I64)[0] < 0.0);
    }

    #[test]
    fn nan_infinity_and_integers_must_agree() {
        let inf = f32::INFINITY;
        let judge = |w: f64, g: f32| compare(&[w], &bytes(&[g]), DType::F32, 1, TOLERANCE).fault;
        assert_eq!(judge(f64::NEG_INFINITY, -inf), None);
        assert_eq!(judge(f64::NAN, f32::NAN), None);
        assert!(judge(f64::INFINITY, -inf).is_some());
        assert!(judge(0.0, f32::NAN).is_some());
        assert!(judge(f64::NAN, 0.0).is_some());
        let ids = 7i32.to_le_bytes();
        let judge = |w: f64| compare(&[w], &ids, DType::I32, 1, TOLERANCE).fault;
        assert!(judge(7.0).is_none() && judge(8.0).is_some());
    }

    #[test]
    fn the_tolerance_grows_with_the_sum_and_the_roundings() {
        assert!(bound(1, DType::F32, 64) < bound(1, DType::F32, 4096));
        assert!(bound(1, DType::BF16, 64) < bound(2, DType::BF16, 64));
        // Even long sums leave a lost term of 1 in 10,000 visible in f32.
        assert!(bound(2, DType::F32, 4096) < 1e-4);
    }
}
