//! Tiles of dot products of two K-contiguous matrices, c[m][n] = Σ_k x[m][k] w[n][k] in f32.
//!
//! Both operands are read along K in whole vectors, so nothing is repacked; a tile keeps M x N vector
//! accumulators in registers. **Invariant: one order per dot product.** Whatever the tile, an element has one
//! vector accumulator that walks K upwards, and accumulators are summed by one tree, so c[m][n] depends bitwise
//! on the two rows and K alone.

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::dot_x86;
use super::simd::{Isa, bf16_to_f32};

/// Rows of `w` a block has at most; also the layouts' interleaving unit (8 rows of each partner).
pub(crate) const BLOCK_N: usize = 16;

/// Operands of a block: `m` rows of x against at most [`BLOCK_N`] rows of w.
#[derive(Clone, Copy)]
pub(crate) struct Block<E> {
    /// `[m, k]`, rows `x_stride` elements apart.
    pub(crate) x: *const E,
    pub(crate) x_stride: usize,
    pub(crate) m: usize,
    /// `[n, k]`, rows `w_stride` elements apart.
    pub(crate) w: *const E,
    pub(crate) w_stride: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// `[m, n]`, rows `c_stride` elements apart; overwritten.
    pub(crate) c: *mut f32,
    pub(crate) c_stride: usize,
}

/// Storage types that have dot-product blocks.
#[allow(unreachable_pub)] // a supertrait of the public, sealed `Elem`
pub trait DotElem: Sized {
    /// Computes a block with the arithmetic of `isa`.
    /// # Safety
    /// The pointers of `b` are valid for the extents its fields give.
    #[doc(hidden)]
    #[allow(private_interfaces)]
    unsafe fn dot_block(isa: Isa, b: &Block<Self>);
}

#[allow(private_interfaces)]
impl DotElem for bf16 {
    unsafe fn dot_block(isa: Isa, b: &Block<bf16>) {
        // SAFETY: the caller's guarantee; an `Isa` is only in use where it is available.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512Bf16 => dot_x86::bf16_avx512bf16(b),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => dot_x86::bf16_avx512(b),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => dot_x86::bf16_avx2(b),
                _ => portable_block(b, bf16_to_f32),
            }
        }
    }
}

#[allow(private_interfaces)]
impl DotElem for f32 {
    unsafe fn dot_block(isa: Isa, b: &Block<f32>) {
        // SAFETY: as above.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 => dot_x86::f32_avx512(b),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => dot_x86::f32_avx2(b),
                _ => portable_block(b, |x| x),
            }
        }
    }
}

/// Dot-product arithmetic of an instruction set on a storage type. As with `Simd`, the methods may be called
/// only where the instruction set is known to be present.
pub(crate) trait Dot<E> {
    /// Partial sums of one dot product.
    type Acc: Copy;
    /// `STEP` loaded elements.
    type Op: Copy;
    const STEP: usize;
    /// Rows of x in the largest tile.
    const TILE_M: usize;
    /// Accumulators the register file holds.
    const ACCUMULATORS: usize;

    fn zero() -> Self::Acc;
    /// # Safety
    /// `p` is readable for `STEP` elements.
    unsafe fn load(p: *const E) -> Self::Op;
    /// Loads `n < STEP` elements, the rest zero.
    /// # Safety
    /// `p` is readable for `n` elements.
    unsafe fn load_part(p: *const E, n: usize) -> Self::Op;
    fn prefetch(p: *const E);
    fn dot(acc: Self::Acc, a: Self::Op, b: Self::Op) -> Self::Acc;
    /// Sums of four accumulators, each by the same tree.
    fn reduce(acc: [Self::Acc; 4]) -> [f32; 4];
}

/// Computes a block.
///
/// # Safety
/// The pointers of `b` are valid for the extents its fields give, and the instruction set of `D` is present.
#[inline(always)]
pub(crate) unsafe fn block<D: Dot<E>, E>(b: &Block<E>) {
    let mut n = 0;
    // SAFETY: n + N <= b.n in each call.
    unsafe {
        // Few rows: more rows of w at once give the memory system more independent streams.
        if b.m * 8 <= D::ACCUMULATORS {
            while n + 8 <= b.n {
                row_tiles::<D, E, 8>(b, n);
                n += 8;
            }
        }
        while n + 4 <= b.n {
            row_tiles::<D, E, 4>(b, n);
            n += 4;
        }
        while n < b.n {
            row_tiles::<D, E, 1>(b, n);
            n += 1;
        }
    }
}

/// # Safety
/// As `block`, and n + N <= b.n.
#[inline(always)]
unsafe fn row_tiles<D: Dot<E>, E, const N: usize>(b: &Block<E>, n: usize) {
    let mut m = 0;
    while m < b.m {
        let left = b.m - m;
        // Equal tiles rather than full ones and a small rest.
        let rows = left.div_ceil(left.div_ceil(D::TILE_M));
        // SAFETY: m + rows <= b.m.
        unsafe {
            match rows {
                1 => tile::<D, E, 1, N>(b, m, n),
                2 => tile::<D, E, 2, N>(b, m, n),
                3 => tile::<D, E, 3, N>(b, m, n),
                4 => tile::<D, E, 4, N>(b, m, n),
                5 => tile::<D, E, 5, N>(b, m, n),
                _ => tile::<D, E, 6, N>(b, m, n),
            }
        }
        m += rows;
    }
}

/// # Safety
/// As `block`, with m + M <= b.m and n + N <= b.n.
#[inline(always)]
unsafe fn tile<D: Dot<E>, E, const M: usize, const N: usize>(b: &Block<E>, m: usize, n: usize) {
    if M > D::TILE_M || (N == 8 && M * N > D::ACCUMULATORS) {
        unreachable!("invariant tile-fits: {M} x {N} accumulators");
    }
    let x = b.x.wrapping_add(m * b.x_stride);
    let w = b.w.wrapping_add(n * b.w_stride);
    let mut acc = [[D::zero(); N]; M];
    let mut k = 0;
    // SAFETY: rows m..m + M of x and n..n + N of w have b.k elements, and c has the elements written.
    unsafe {
        while k + D::STEP <= b.k {
            let mut wv = [D::load(w.add(k)); N];
            for j in 1..N {
                wv[j] = D::load(w.add(j * b.w_stride + k));
            }
            if M <= 4 {
                // The tile is bound by memory: ask for the next N rows while this one is computed.
                for j in 0..N {
                    D::prefetch(w.wrapping_add((N + j) * b.w_stride + k));
                }
            }
            for i in 0..M {
                let xv = D::load(x.add(i * b.x_stride + k));
                for j in 0..N {
                    acc[i][j] = D::dot(acc[i][j], xv, wv[j]);
                }
            }
            k += D::STEP;
        }
        if k < b.k {
            let rest = b.k - k;
            for j in 0..N {
                let wv = D::load_part(w.add(j * b.w_stride + k), rest);
                for i in 0..M {
                    let xv = D::load_part(x.add(i * b.x_stride + k), rest);
                    acc[i][j] = D::dot(acc[i][j], xv, wv);
                }
            }
        }
        for i in 0..M {
            let c = b.c.add((m + i) * b.c_stride + n);
            if N == 1 {
                *c = D::reduce([acc[i][0], D::zero(), D::zero(), D::zero()])[0];
            } else {
                for j in (0..N).step_by(4) {
                    let four = [
                        acc[i][j],
                        acc[i][(j + 1) % N],
                        acc[i][(j + 2) % N],
                        acc[i][(j + 3) % N],
                    ];
                    c.add(j).cast::<[f32; 4]>().write_unaligned(D::reduce(four));
                }
            }
        }
    }
}

/// Columns of x in a call of the `gemm` crate on the portable path.
const PORTABLE_M: usize = 8;

/// Computes a block without vector intrinsics, by the `gemm` crate.
///
/// The crate's order of accumulation may depend on the shape, so every call has `PORTABLE_M` rows of x
/// (padded with zeros) and sees them as columns of its right operand.
///
/// # Safety
/// The pointers of `b` are valid for the extents its fields give.
pub(crate) unsafe fn portable_block<E: Copy>(b: &Block<E>, to_f32: impl Fn(E) -> f32) {
    let k = b.k;
    let mut w = vec![0.0f32; b.n * k];
    let mut x = vec![0.0f32; PORTABLE_M * k];
    let mut c = [0.0f32; PORTABLE_M * BLOCK_N];
    // SAFETY: all indices are below the extents of `b`, and the vectors have the extents given to `gemm`.
    unsafe {
        for j in 0..b.n {
            for i in 0..k {
                w[j * k + i] = to_f32(*b.w.add(j * b.w_stride + i));
            }
        }
        for m in (0..b.m).step_by(PORTABLE_M) {
            let rows = PORTABLE_M.min(b.m - m);
            x[rows * k..].fill(0.0);
            for r in 0..rows {
                for i in 0..k {
                    x[r * k + i] = to_f32(*b.x.add((m + r) * b.x_stride + i));
                }
            }
            gemm::gemm(
                b.n,
                PORTABLE_M,
                k,
                c.as_mut_ptr(),
                BLOCK_N as isize,
                1,
                false,
                w.as_ptr(),
                1,
                k as isize,
                x.as_ptr(),
                k as isize,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
            for r in 0..rows {
                for j in 0..b.n {
                    *b.c.add((m + r) * b.c_stride + j) = c[r * BLOCK_N + j];
                }
            }
        }
    }
}
