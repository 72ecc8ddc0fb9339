//! [`Dot`] for AVX2 and AVX-512.
//!
//! SAFETY of this file: the types are used only in the functions below that have their target features, whose
//! callers checked the instruction set; loads pass their caller's guarantee on to the unaligned intrinsics.

use std::arch::x86_64::*;

use half::bf16;

use super::{Block, Dot, block};

/// vdpbf16ps: 32 products a step.
struct Bf16Dot512;
/// f32 FMA, 16 products a step; bf16 operands are widened.
struct Fma512;
/// f32 FMA, 8 products a step; bf16 operands are widened.
struct Fma256;

/// # Safety
/// As [`block`], and the machine has the features named.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub(crate) unsafe fn bf16_avx512bf16(b: &Block<bf16>) {
    // SAFETY: the caller's guarantee; so below.
    unsafe { block::<Bf16Dot512, bf16>(b) }
}

/// # Safety
/// As above.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(crate) unsafe fn bf16_avx512(b: &Block<bf16>) {
    unsafe { block::<Fma512, bf16>(b) }
}

/// # Safety
/// As above.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(crate) unsafe fn f32_avx512(b: &Block<f32>) {
    unsafe { block::<Fma512, f32>(b) }
}

/// # Safety
/// As above.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn bf16_avx2(b: &Block<bf16>) {
    unsafe { block::<Fma256, bf16>(b) }
}

/// # Safety
/// As above.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn f32_avx2(b: &Block<f32>) {
    unsafe { block::<Fma256, f32>(b) }
}

/// Lane sums by (0+2)+(1+3) within 128-bit groups, then the groups by halves: the same tree for all four.
#[inline(always)]
fn reduce_512(acc: [__m512; 4]) -> [f32; 4] {
    unsafe {
        let [a, b, c, d] = acc;
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
        let all = _mm512_add_ps(low, high);
        let half = _mm256_add_ps(
            _mm512_castps512_ps256(all),
            _mm512_extractf32x8_ps::<1>(all),
        );
        let quarter = _mm_add_ps(
            _mm256_castps256_ps128(half),
            _mm256_extractf128_ps::<1>(half),
        );
        std::mem::transmute::<__m128, [f32; 4]>(quarter)
    }
}

/// As `reduce_512`.
#[inline(always)]
fn reduce_256(acc: [__m256; 4]) -> [f32; 4] {
    unsafe {
        let [a, b, c, d] = acc;
        let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
        let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
        let high = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
        let all = _mm256_add_ps(low, high);
        let quarter = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
        std::mem::transmute::<__m128, [f32; 4]>(quarter)
    }
}

/// Into the second-level cache: it has twice the outstanding misses of the first, and a first-level cache that holds
/// x has no room for lines that come early. With batch 8 this is the difference between adding and overlapping
/// memory and arithmetic time.
#[inline(always)]
fn prefetch_line<E>(p: *const E) {
    // SAFETY: a prefetch does not fault, wherever it points.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
}

impl Dot<bf16> for Bf16Dot512 {
    type Acc = __m512;
    type Op = __m512bh;
    const STEP: usize = 32;
    const TILE_M: usize = 6;
    const ACCUMULATORS: usize = 24;

    #[inline(always)]
    fn zero() -> __m512 {
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(p: *const bf16) -> __m512bh {
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const bf16, n: usize) -> __m512bh {
        unsafe {
            let mask = (1u32 << n) - 1;
            std::mem::transmute::<__m512i, __m512bh>(_mm512_maskz_loadu_epi16(mask, p.cast()))
        }
    }
    #[inline(always)]
    fn prefetch(p: *const bf16) {
        prefetch_line(p);
    }
    #[inline(always)]
    fn dot(acc: __m512, a: __m512bh, b: __m512bh) -> __m512 {
        unsafe { _mm512_dpbf16_ps(acc, a, b) }
    }
    #[inline(always)]
    fn reduce(acc: [__m512; 4]) -> [f32; 4] {
        reduce_512(acc)
    }
}

/// The even and the odd elements of 32 bf16 values as f32: widening without a shuffle.
#[inline(always)]
fn widen_512(v: __m512i) -> [__m512; 2] {
    unsafe {
        let even = _mm512_slli_epi32::<16>(v);
        let odd = _mm512_and_si512(v, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        [_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)]
    }
}

impl Dot<bf16> for Fma512 {
    type Acc = __m512;
    type Op = [__m512; 2];
    const STEP: usize = 32;
    const TILE_M: usize = 4;
    const ACCUMULATORS: usize = 16;

    #[inline(always)]
    fn zero() -> __m512 {
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(p: *const bf16) -> [__m512; 2] {
        unsafe { widen_512(_mm512_loadu_si512(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const bf16, n: usize) -> [__m512; 2] {
        unsafe { widen_512(_mm512_maskz_loadu_epi16((1u32 << n) - 1, p.cast())) }
    }
    #[inline(always)]
    fn prefetch(p: *const bf16) {
        prefetch_line(p);
    }
    #[inline(always)]
    fn dot(acc: __m512, a: [__m512; 2], b: [__m512; 2]) -> __m512 {
        unsafe { _mm512_fmadd_ps(a[1], b[1], _mm512_fmadd_ps(a[0], b[0], acc)) }
    }
    #[inline(always)]
    fn reduce(acc: [__m512; 4]) -> [f32; 4] {
        reduce_512(acc)
    }
}

impl Dot<f32> for Fma512 {
    type Acc = __m512;
    type Op = __m512;
    const STEP: usize = 16;
    const TILE_M: usize = 6;
    const ACCUMULATORS: usize = 24;

    #[inline(always)]
    fn zero() -> __m512 {
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps((1u16 << n) - 1, p) }
    }
    #[inline(always)]
    fn prefetch(p: *const f32) {
        prefetch_line(p);
    }
    #[inline(always)]
    fn dot(acc: __m512, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, acc) }
    }
    #[inline(always)]
    fn reduce(acc: [__m512; 4]) -> [f32; 4] {
        reduce_512(acc)
    }
}

impl Dot<bf16> for Fma256 {
    type Acc = __m256;
    type Op = [__m256; 2];
    const STEP: usize = 16;
    const TILE_M: usize = 2;
    const ACCUMULATORS: usize = 8;

    #[inline(always)]
    fn zero() -> __m256 {
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(p: *const bf16) -> [__m256; 2] {
        unsafe {
            let v = _mm256_loadu_si256(p.cast());
            let odd = _mm256_and_si256(v, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(v)),
                _mm256_castsi256_ps(odd),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const bf16, n: usize) -> [__m256; 2] {
        let mut buffer = [bf16::ZERO; 16];
        unsafe {
            p.copy_to_nonoverlapping(buffer.as_mut_ptr(), n);
            <Fma256 as Dot<bf16>>::load(buffer.as_ptr())
        }
    }
    #[inline(always)]
    fn prefetch(p: *const bf16) {
        prefetch_line(p);
    }
    #[inline(always)]
    fn dot(acc: __m256, a: [__m256; 2], b: [__m256; 2]) -> __m256 {
        unsafe { _mm256_fmadd_ps(a[1], b[1], _mm256_fmadd_ps(a[0], b[0], acc)) }
    }
    #[inline(always)]
    fn reduce(acc: [__m256; 4]) -> [f32; 4] {
        reduce_256(acc)
    }
}

impl Dot<f32> for Fma256 {
    type Acc = __m256;
    type Op = __m256;
    const STEP: usize = 8;
    const TILE_M: usize = 2;
    const ACCUMULATORS: usize = 8;

    #[inline(always)]
    fn zero() -> __m256 {
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> __m256 {
        let mut buffer = [0.0f32; 8];
        unsafe {
            p.copy_to_nonoverlapping(buffer.as_mut_ptr(), n);
            <Fma256 as Dot<f32>>::load(buffer.as_ptr())
        }
    }
    #[inline(always)]
    fn prefetch(p: *const f32) {
        prefetch_line(p);
    }
    #[inline(always)]
    fn dot(acc: __m256, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, acc) }
    }
    #[inline(always)]
    fn reduce(acc: [__m256; 4]) -> [f32; 4] {
        reduce_256(acc)
    }
}
