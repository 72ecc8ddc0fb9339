//! Storage types of activations, weights and the KV cache.

use half::bf16;

use super::dot::DotElem;
use super::simd::{self, Simd};

/// A storage type: f32 or bf16. Sealed.
pub trait Elem:
    Copy + Send + Sync + Default + std::fmt::Debug + PartialEq + 'static + DotElem + Lanes
{
    /// The type's name as in safetensors headers, in lower case.
    const NAME: &'static str;
    /// The exact f32 value.
    fn to_f32(self) -> f32;
    /// The nearest value, ties to even.
    fn from_f32(x: f32) -> Self;
}

/// Vector loads and stores of a storage type.
#[allow(unreachable_pub)] // a supertrait of the public, sealed `Elem`
pub trait Lanes: Sized {
    /// # Safety
    /// Callable below `dispatch`; `p` is readable for `LANES` values.
    #[doc(hidden)]
    #[allow(private_bounds, private_interfaces)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
    /// # Safety
    /// Callable below `dispatch`; `p` is writable for `LANES` values.
    #[doc(hidden)]
    #[allow(private_bounds, private_interfaces)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V);
    /// `v` rounded to this type.
    #[doc(hidden)]
    #[allow(private_bounds, private_interfaces)]
    fn round<S: Simd>(v: S::V) -> S::V;
}

impl Elem for f32 {
    const NAME: &'static str = "f32";
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
}

#[allow(private_bounds, private_interfaces)]
impl Lanes for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S::V {
        // SAFETY: the caller's guarantee.
        unsafe { S::load(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut f32, v: S::V) {
        // SAFETY: the caller's guarantee.
        unsafe { S::store(p, v) }
    }
    #[inline(always)]
    fn round<S: Simd>(v: S::V) -> S::V {
        v
    }
}

impl Elem for bf16 {
    const NAME: &'static str = "bf16";
    #[inline(always)]
    fn to_f32(self) -> f32 {
        simd::bf16_to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> bf16 {
        simd::f32_to_bf16(x)
    }
}

#[allow(private_bounds, private_interfaces)]
impl Lanes for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const bf16) -> S::V {
        // SAFETY: the caller's guarantee.
        unsafe { S::load_bf16(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut bf16, v: S::V) {
        // SAFETY: the caller's guarantee.
        unsafe { S::store_bf16(p, v) }
    }
    #[inline(always)]
    fn round<S: Simd>(v: S::V) -> S::V {
        S::round_bf16(v)
    }
}
