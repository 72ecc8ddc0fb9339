//! The element types the interpreter computes in.

use crate::dtype::DType;
use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

/// A type of real arithmetic: `f64` for comparisons over the reals, `f32` where speed or the
/// arithmetic of a kernel matters.
pub trait Float:
    Copy
    + PartialOrd
    + Debug
    + Default
    + Send
    + Sync
    + 'static
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
{
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// Negative infinity.
    const NEG_INFINITY: Self;

    /// The nearest value of this type.
    fn from_f64(v: f64) -> Self;
    /// The value as f64.
    fn to_f64(self) -> f64;
    /// The value rounded to an element type (to nearest, ties to even; too large values become
    /// infinite). Only `bf16` and `f16` change the value.
    fn round_to(self, dtype: DType) -> Self;
    /// `|x|`.
    fn abs(self) -> Self;
    /// `e^x`.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Sine of an angle in radians.
    fn sin(self) -> Self;
    /// Cosine of an angle in radians.
    fn cos(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// `x^y`.
    fn powf(self, y: Self) -> Self;

    /// Dot product of two vectors of one length, in 16 interleaved partial sums.
    fn dot(a: &[Self], b: &[Self]) -> Self;

    /// `out += Σ_k a[k] · b[k,:]` with b `[K,N]`.
    fn combine_rows(a: &[Self], b: &[Self], out: &mut [Self]);

    /// Error function.
    fn erf(self) -> Self {
        Self::from_f64(erf(self.to_f64()))
    }

    /// `1 / (1 + e^-x)`.
    fn sigmoid(self) -> Self {
        Self::ONE / (Self::ONE + (-self).exp())
    }

    /// The larger of two values; NaN if one is.
    fn maximum(self, o: Self) -> Self {
        if self.partial_cmp(&self).is_none() || self > o {
            self
        } else {
            o
        }
    }

    /// The smaller of two values; NaN if one is.
    fn minimum(self, o: Self) -> Self {
        if self.partial_cmp(&self).is_none() || self < o {
            self
        } else {
            o
        }
    }
}

macro_rules! float {
    ($t:ident, $from_half:ident, $to_half:ident) => {
        impl Float for $t {
            const ZERO: $t = 0.0;
            const ONE: $t = 1.0;
            const NEG_INFINITY: $t = $t::NEG_INFINITY;

            fn from_f64(v: f64) -> $t {
                v as $t
            }
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            fn round_to(self, dtype: DType) -> $t {
                match dtype {
                    DType::BF16 => half::bf16::$from_half(self).$to_half(),
                    DType::F16 => half::f16::$from_half(self).$to_half(),
                    _ => self,
                }
            }
            fn abs(self) -> $t {
                $t::abs(self)
            }
            fn exp(self) -> $t {
                $t::exp(self)
            }
            fn ln(self) -> $t {
                $t::ln(self)
            }
            fn sqrt(self) -> $t {
                $t::sqrt(self)
            }
            fn sin(self) -> $t {
                $t::sin(self)
            }
            fn cos(self) -> $t {
                $t::cos(self)
            }
            fn tanh(self) -> $t {
                $t::tanh(self)
            }
            fn powf(self, y: $t) -> $t {
                $t::powf(self, y)
            }
            // The hot loops are methods of these impls so that they are compiled once, with this
            // crate's optimisation level, and not in every crate that runs programs.
            fn dot(a: &[$t], b: &[$t]) -> $t {
                dot(a, b)
            }
            fn combine_rows(a: &[$t], b: &[$t], out: &mut [$t]) {
                combine_rows(a, b, out);
            }
        }
    };
}

float!(f32, from_f32, to_f32);
float!(f64, from_f64, to_f64);

/// Error function to about 1e-15, by the series
/// `2/√π · e^(-x²) · Σ 2ⁿ x^(2n+1) / (1·3·…·(2n+1))` (Abramowitz and Stegun 7.1.6), whose terms
/// all have the same sign.
fn erf(x: f64) -> f64 {
    if x.abs() >= 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > sum.abs() * 1e-17 && n < 500.0 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// Dot product, in 16 interleaved partial sums.
fn dot<F: Float>(a: &[F], b: &[F]) -> F {
    let mut acc = [F::ZERO; 16];
    let (ca, cb) = (a.chunks_exact(16), b.chunks_exact(16));
    let (ra, rb) = (ca.remainder(), cb.remainder());
    for (x, y) in ca.zip(cb) {
        for i in 0..16 {
            acc[i] += x[i] * y[i];
        }
    }
    for (s, (&x, &y)) in acc.iter_mut().zip(ra.iter().zip(rb)) {
        *s += x * y;
    }
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            let v = acc[i + width];
            acc[i] += v;
        }
    }
    acc[0]
}

/// `out += Σ_k a[k] · b[k,:]` with b `[K,N]`, four rows of b at a time.
fn combine_rows<F: Float>(a: &[F], b: &[F], out: &mut [F]) {
    let n = out.len();
    if n == 0 {
        return;
    }
    let (ca, cb) = (a.chunks_exact(4), b.chunks_exact(4 * n));
    let (ra, rb) = (ca.remainder(), cb.remainder());
    for (w, rows) in ca.zip(cb) {
        let (r0, rest) = rows.split_at(n);
        let (r1, rest) = rest.split_at(n);
        let (r2, r3) = rest.split_at(n);
        for ((((o, &x0), &x1), &x2), &x3) in out.iter_mut().zip(r0).zip(r1).zip(r2).zip(r3) {
            *o += w[0] * x0 + w[1] * x1 + w[2] * x2 + w[3] * x3;
        }
    }
    for (&w, row) in ra.iter().zip(rb.chunks_exact(n)) {
        for (o, &x) in out.iter_mut().zip(row) {
            *o += w * x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_matches_tables() {
        // Abramowitz and Stegun, table 7.1.
        for (x, y) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_8),
            (1.0, 0.842_700_792_9),
            (1.5, 0.966_105_146_5),
            (2.0, 0.995_322_265_0),
        ] {
            assert!((Float::erf(x) - y).abs() < 1e-10, "erf({x})");
            assert!((Float::erf(-x) + y).abs() < 1e-10, "erf(-{x})");
        }
        assert_eq!(Float::erf(9.0_f64), 1.0);
        assert!(Float::erf(f64::NAN).is_nan());
    }

    #[test]
    fn rounding_keeps_eight_bits_for_bf16() {
        assert_eq!(1.003_f64.round_to(DType::BF16), 1.0);
        assert_eq!(1.006_f32.round_to(DType::BF16), 1.007_812_5);
        assert_eq!(1.0001_f64.round_to(DType::F16), 1.0);
        assert_eq!(1.0001_f64.round_to(DType::F32), 1.0001);
    }
}
