//! f32 vectors of one instruction set, and run-time dispatch to them.
//!
//! A kernel is written once, generic over [`Simd`], as a [`Kernel`] whose `run` is `#[inline(always)]`.
//! [`dispatch`] calls it from a function compiled with the instruction set's target features, so that the
//! intrinsics inline. Below `dispatch` no closure may be handed to another thread or to a non-inlined function.
//!
//! The methods of [`Simd`] are safe to call only below `dispatch`, which has checked that the machine has
//! the features; the types are private to the kernels for that reason.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::cell::Cell;
use std::sync::OnceLock;

use half::bf16;

/// Instruction sets the CPU kernels are specialised for, from the least to the most capable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust (matrix products go through the `matrixmultiply` crate).
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// `Avx512` and AVX512-BF16 (`vdpbf16ps`).
    Avx512Bf16,
}

impl Isa {
    /// Every instruction set, the most capable last.
    pub const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];

    /// The most capable instruction set of this machine; detected once.
    pub fn detected() -> Isa {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            Isa::ALL
                .into_iter()
                .rev()
                .find(|isa| isa.available())
                .unwrap_or(Isa::Portable)
        })
    }

    /// Whether this machine can execute the instruction set.
    pub fn available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            match self {
                Isa::Portable => true,
                Isa::Avx2 => avx2,
                Isa::Avx512 => avx512,
                Isa::Avx512Bf16 => avx512 && is_x86_feature_detected!("avx512bf16"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Isa::Portable
        }
    }

    /// The instruction set that kernels called from this thread use.
    pub fn current() -> Isa {
        OVERRIDE.get().unwrap_or_else(Isa::detected)
    }

    /// Runs `f` with the kernels that this thread calls bound to `self`, for tests and benches.
    /// Returns `None`, without running `f`, where the machine lacks the instruction set.
    pub fn with<R>(self, f: impl FnOnce() -> R) -> Option<R> {
        struct Restore(Option<Isa>);
        impl Drop for Restore {
            fn drop(&mut self) {
                OVERRIDE.set(self.0);
            }
        }
        if !self.available() {
            return None;
        }
        let _restore = Restore(OVERRIDE.replace(Some(self)));
        Some(f())
    }
}

thread_local! {
    static OVERRIDE: Cell<Option<Isa>> = const { Cell::new(None) };
}

/// Asks for the cache lines of `slice`.
#[inline(always)]
pub(crate) fn prefetch<T>(slice: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of_val(slice)).step_by(64) {
        // SAFETY: SSE is part of the x86-64 baseline, and a prefetch does not fault.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T1>(slice.as_ptr().cast::<i8>().wrapping_add(line));
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = slice;
}

/// Computation written once for all instruction sets.
pub(crate) trait Kernel {
    /// Implementations are `#[inline(always)]`.
    fn run<S: Simd>(self);
}

/// Runs `kernel` with the vectors of `isa`, which must be available on this machine.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) {
    debug_assert!(isa.available(), "invariant isa-available: {isa:?}");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` other than `Portable` is only obtained from `detected` or `with`, which checked the features.
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe { x86::run_avx512(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::run_avx2(kernel) },
        _ => kernel.run::<Scalar8>(),
    }
}

/// Vectors of `LANES` f32 values of one instruction set.
pub(crate) trait Simd: Copy + 'static {
    /// A vector register.
    type V: Copy;
    /// Values in a register: 8 or 16.
    const LANES: usize;

    fn splat(x: f32) -> Self::V;
    /// # Safety
    /// `p` is readable for `LANES` values; no alignment needed. So for the other loads and stores.
    unsafe fn load(p: *const f32) -> Self::V;
    /// # Safety
    /// See `load`.
    unsafe fn load_bf16(p: *const bf16) -> Self::V;
    /// # Safety
    /// See `load`; `p` is writable.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Rounds to nearest even. NaN stays NaN.
    /// # Safety
    /// See `load`; `p` is writable.
    unsafe fn store_bf16(p: *mut bf16, v: Self::V);
    /// The f32 values of `v` rounded to bf16.
    fn round_bf16(v: Self::V) -> Self::V;
    fn add(a: Self::V, b: Self::V) -> Self::V;
    fn sub(a: Self::V, b: Self::V) -> Self::V;
    fn mul(a: Self::V, b: Self::V) -> Self::V;
    fn div(a: Self::V, b: Self::V) -> Self::V;
    fn max(a: Self::V, b: Self::V) -> Self::V;
    /// a·b + c, in one rounding where the instruction set has it.
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Nearest integer, as f32.
    fn round(a: Self::V) -> Self::V;
    /// p · 2^n for integral n in -126..=127.
    fn scale2(p: Self::V, n: Self::V) -> Self::V;
    /// `x` where `a > b`, else 0.
    fn keep_if_gt(x: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// Sum of the lanes in a fixed order.
    fn sum(v: Self::V) -> f32;
    /// Largest lane.
    fn hmax(v: Self::V) -> f32;
}

/// The portable stand-in for a register.
#[derive(Clone, Copy)]
pub(crate) struct Scalar8;

#[inline(always)]
fn zip(a: [f32; 8], b: [f32; 8], f: impl Fn(f32, f32) -> f32) -> [f32; 8] {
    let mut out = [0.0; 8];
    for i in 0..8 {
        out[i] = f(a[i], b[i]);
    }
    out
}

/// f32 bits of a bf16 value, branch-free.
#[inline(always)]
pub(crate) fn bf16_to_f32(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// bf16 nearest to `x`, ties to even, NaN kept.
#[inline(always)]
pub(crate) fn f32_to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    bf16::from_bits(if x.is_nan() {
        (bits >> 16) as u16 | 0x40
    } else {
        rounded as u16
    })
}

impl Simd for Scalar8 {
    type V = [f32; 8];
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(x: f32) -> Self::V {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the caller guarantees LANES readable values.
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self::V {
        // SAFETY: the caller guarantees LANES readable values.
        unsafe { p.cast::<[bf16; 8]>().read_unaligned() }.map(bf16_to_f32)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the caller guarantees LANES writable values.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut bf16, v: Self::V) {
        // SAFETY: the caller guarantees LANES writable values.
        unsafe { p.cast::<[bf16; 8]>().write_unaligned(v.map(f32_to_bf16)) }
    }
    #[inline(always)]
    fn round_bf16(v: Self::V) -> Self::V {
        v.map(|x| bf16_to_f32(f32_to_bf16(x)))
    }
    #[inline(always)]
    fn add(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        zip(zip(a, b, |a, b| a * b), c, |a, b| a + b)
    }
    #[inline(always)]
    fn round(a: Self::V) -> Self::V {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn scale2(p: Self::V, n: Self::V) -> Self::V {
        zip(p, n, |p, n| {
            p * f32::from_bits(((n as i32 + 127) as u32) << 23)
        })
    }
    #[inline(always)]
    fn keep_if_gt(x: Self::V, a: Self::V, b: Self::V) -> Self::V {
        zip(x, zip(a, b, |a, b| f32::from(a > b)), |x, keep| {
            if keep > 0.0 { x } else { 0.0 }
        })
    }
    #[inline(always)]
    fn sum(v: Self::V) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }
    #[inline(always)]
    fn hmax(v: Self::V) -> f32 {
        v.into_iter()
            .fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
    }
}
