//! Elementary functions on vectors.

use super::simd::{Scalar8, Simd};

/// Pointwise activation functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// x · Φ(x), with erf.
    Gelu,
    /// The tanh approximation of gelu, 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))).
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// max(x, 0)².
    Relu2,
}

/// The activation of one value, by the same arithmetic as the kernels' portable path.
pub fn activate(act: Activation, x: f32) -> f32 {
    act_v::<Scalar8>(act, [x; 8])[0]
}

/// e^x to about 1 ulp; 0 below -87. Range reduction by ln 2 in two parts and the degree-5 minimax
/// polynomial of Cephes' `expf`. e^0 is exactly 1.
#[inline(always)]
pub(crate) fn exp<S: Simd>(x: S::V) -> S::V {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let floor = S::splat(-87.0);
    let clamped = S::max(x, floor);
    let n = S::round(S::mul(clamped, S::splat(std::f32::consts::LOG2_E)));
    // The largest finite results lie below 2^128 = 2 · 2^127.
    let n = S::sub(
        S::splat(0.0),
        S::max(S::sub(S::splat(0.0), n), S::splat(-127.0)),
    );
    let r = S::fma(n, S::splat(-LN2_HIGH), clamped);
    let r = S::fma(n, S::splat(-LN2_LOW), r);
    let mut p = S::splat(1.987_569_1e-4);
    for c in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = S::fma(p, r, S::splat(c));
    }
    let p = S::add(S::fma(p, S::mul(r, r), r), S::splat(1.0));
    S::keep_if_gt(S::scale2(p, n), x, floor)
}

#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(x: S::V) -> S::V {
    let e = exp::<S>(S::sub(S::splat(0.0), x));
    S::div(S::splat(1.0), S::add(S::splat(1.0), e))
}

#[inline(always)]
pub(crate) fn silu<S: Simd>(x: S::V) -> S::V {
    S::mul(x, sigmoid::<S>(x))
}

/// tanh(x) = 2 sigmoid(2x) - 1.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(x: S::V) -> S::V {
    S::sub(
        S::mul(S::splat(2.0), sigmoid::<S>(S::add(x, x))),
        S::splat(1.0),
    )
}

/// x within ±20, where tanh and erf are ±1 in f32: polynomials of an infinite x are no numbers. What is no
/// number stays so.
#[inline(always)]
fn limited<S: Simd>(x: S::V) -> S::V {
    let (zero, least) = (S::splat(0.0), S::splat(-20.0));
    let x = S::max(least, x);
    S::sub(zero, S::max(least, S::sub(zero, x)))
}

/// `small(x)` where |x| <= 0.5, else `large`.
#[inline(always)]
fn near_zero<S: Simd>(x: S::V, magnitude: S::V, odd: &[f32], large: S::V) -> S::V {
    let half = S::splat(0.5);
    let square = S::mul(x, x);
    let mut p = S::splat(odd[0]);
    for &c in &odd[1..] {
        p = S::fma(p, square, S::splat(c));
    }
    let small = S::mul(x, p);
    let inside = S::sub(small, S::keep_if_gt(small, magnitude, half));
    S::add(inside, S::keep_if_gt(large, magnitude, half))
}

/// tanh(x) with a small relative error everywhere: its Taylor series to x^15 up to 1/2, beyond that
/// 2 sigmoid(2x) - 1, which cancels near 0.
#[inline(always)]
pub(crate) fn tanh_relative<S: Simd>(x: S::V) -> S::V {
    const ODD: [f32; 8] = [
        -929_569.0 / 638_512_875.0,
        21_844.0 / 6_081_075.0,
        -1_382.0 / 155_925.0,
        62.0 / 2_835.0,
        -17.0 / 315.0,
        2.0 / 15.0,
        -1.0 / 3.0,
        1.0,
    ];
    let x = limited::<S>(x);
    let magnitude = S::max(x, S::sub(S::splat(0.0), x));
    near_zero::<S>(x, magnitude, &ODD, tanh::<S>(x))
}

/// erf(x): its Taylor series, 2/√π Σ (-1)^n x^(2n+1) / (n! (2n+1)), up to 1/2, beyond that
/// 1 - erfc(|x|) with the sign of x.
#[inline(always)]
pub(crate) fn erf<S: Simd>(x: S::V) -> S::V {
    const C: f32 = std::f32::consts::FRAC_2_SQRT_PI;
    const ODD: [f32; 8] = [
        -C / 75_600.0,
        C / 9_360.0,
        -C / 1_320.0,
        C / 216.0,
        -C / 42.0,
        C / 10.0,
        -C / 3.0,
        C,
    ];
    let x = limited::<S>(x);
    let magnitude = S::max(x, S::sub(S::splat(0.0), x));
    let sign = S::div(x, S::max(magnitude, S::splat(f32::MIN_POSITIVE)));
    let large = S::mul(sign, S::sub(S::splat(1.0), erfc::<S>(magnitude)));
    near_zero::<S>(x, magnitude, &ODD, large)
}

/// erfc(z) of z >= 0 as t exp(-z² + P(t)), t = 1 / (1 + z/2), relative error 1.2e-7 (the Chebyshev
/// fit of Press et al., Numerical Recipes, section 6.2).
#[allow(clippy::excessive_precision)] // the coefficients as published
#[inline(always)]
fn erfc<S: Simd>(z: S::V) -> S::V {
    let zero = S::splat(0.0);
    let t = S::div(S::splat(1.0), S::fma(S::splat(0.5), z, S::splat(1.0)));
    let mut p = S::splat(0.170_872_77);
    for c in [
        -0.822_152_23,
        1.488_515_87,
        -1.135_203_98,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_68,
        -1.265_512_23,
    ] {
        p = S::fma(p, t, S::splat(c));
    }
    S::mul(t, exp::<S>(S::fma(S::sub(zero, z), z, p)))
}

/// x Φ(x), with Φ from erfc(|x|/√2).
#[inline(always)]
fn gelu_erf<S: Simd>(x: S::V) -> S::V {
    let zero = S::splat(0.0);
    let magnitude = S::max(x, S::sub(zero, x));
    let z = S::mul(magnitude, S::splat(std::f32::consts::FRAC_1_SQRT_2));
    let tail = S::mul(S::splat(0.5), erfc::<S>(z));
    // x Φ(x) = x - x tail for x > 0, x tail otherwise.
    S::sub(S::max(x, zero), S::mul(magnitude, tail))
}

#[inline(always)]
pub(crate) fn act_v<S: Simd>(act: Activation, x: S::V) -> S::V {
    let zero = S::splat(0.0);
    match act {
        Activation::Silu => silu::<S>(x),
        Activation::Gelu => gelu_erf::<S>(x),
        Activation::GeluTanh => {
            let cubic = S::mul(S::mul(x, x), S::mul(x, S::splat(0.044_715)));
            let inner = S::mul(S::splat(0.797_884_6), S::add(x, cubic));
            // 0.5 x (1 + tanh(u)) = x sigmoid(2u).
            S::mul(x, sigmoid::<S>(S::add(inner, inner)))
        }
        Activation::Relu => S::max(x, zero),
        Activation::Relu2 => {
            let positive = S::max(x, zero);
            S::mul(positive, positive)
        }
    }
}
