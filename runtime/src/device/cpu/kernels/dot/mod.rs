//! Tiles of dot products of two K-contiguous matrices, c[m][n] = Σ_k x[m][k] w[n][k] in f32.
//!
//! Both operands are read along K in whole vectors, so nothing is repacked; a tile keeps M x N vector
//! accumulators in registers. **Invariant: one order per dot product.** Whatever the tile, an element has one
//! vector accumulator that walks a span of K upwards, accumulators are summed by one tree, and the spans depend on
//! K alone, so c[m][n] depends bitwise on the two rows and K alone.

#[cfg(target_arch = "x86_64")]
mod x86;

use half::bf16;

use super::simd::{Isa, bf16_to_f32};

/// Rows of `w` a block has at most; also the layouts' interleaving unit (8 rows of each partner).
pub(crate) const BLOCK_N: usize = 16;

/// Operands of a block: `m` rows of x against at most [`BLOCK_N`] rows of w.
#[derive(Clone, Copy)]
pub(crate) struct Block<E> {
    /// `[m, k]`, rows `x_stride` elements apart; or, where `x_packed`, span by span `[m, span]` without gaps.
    pub(crate) x: *const E,
    pub(crate) x_stride: usize,
    pub(crate) x_packed: bool,
    pub(crate) m: usize,
    /// `[n, k]`, rows `w_stride` elements apart.
    pub(crate) w: *const E,
    pub(crate) w_stride: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// Whether the rows after the block's will be wanted soon, and are to be prefetched.
    pub(crate) goes_on: bool,
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

    /// Span for packing `m` rows of `k` elements, where that is of use to `dot_block`.
    #[doc(hidden)]
    #[allow(private_interfaces)]
    fn packing(isa: Isa, m: usize, k: usize) -> Option<usize>;
}

/// The span if there is more than one and more than one row.
fn useful_span(m: usize, k: usize, step: usize) -> Option<usize> {
    Some(span_len(k, step)).filter(|&span| m > 1 && span < k)
}

#[allow(private_interfaces)]
impl DotElem for bf16 {
    unsafe fn dot_block(isa: Isa, b: &Block<bf16>) {
        // SAFETY: the caller's guarantee; an `Isa` is only in use where it is available.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512Bf16 => x86::bf16_avx512bf16(b),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => x86::bf16_avx512(b),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => x86::bf16_avx2(b),
                _ => portable_block(b, bf16_to_f32),
            }
        }
    }

    fn packing(isa: Isa, m: usize, k: usize) -> Option<usize> {
        match isa {
            Isa::Avx512Bf16 | Isa::Avx512 => useful_span(m, k, 32),
            Isa::Avx2 => useful_span(m, k, 16),
            Isa::Portable => None,
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
                Isa::Avx512 | Isa::Avx512Bf16 => x86::f32_avx512(b),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => x86::f32_avx2(b),
                _ => portable_block(b, |x| x),
            }
        }
    }

    fn packing(isa: Isa, m: usize, k: usize) -> Option<usize> {
        match isa {
            Isa::Avx512Bf16 | Isa::Avx512 => useful_span(m, k, 16),
            Isa::Avx2 => useful_span(m, k, 8),
            Isa::Portable => None,
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

/// Vector steps of a K span: a row's span is then 2 KiB, so that a weight tile and the rows of x it meets
/// stay in the first-level cache together.
const SPAN_STEPS: usize = 32;

/// Elements of each span but the last, for K = k and vectors of `step`. Depends on nothing else.
#[inline(always)]
fn span_len(k: usize, step: usize) -> usize {
    let steps = k.div_ceil(step);
    let spans = ((steps + SPAN_STEPS / 2) / SPAN_STEPS).max(1);
    (steps.div_ceil(spans) * step).max(1)
}

/// Copies `m` rows of x into the packed order: rows a power of two apart would fall into the same few sets of the
/// first-level cache.
pub(crate) fn pack<E: Copy>(x: &[E], m: usize, k: usize, span: usize, out: &mut [E]) {
    let mut from = 0;
    while from < k {
        let width = span.min(k - from);
        for r in 0..m {
            out[m * from + r * width..][..width].copy_from_slice(&x[r * k + from..][..width]);
        }
        from += span;
    }
}

/// Computes a block. K is cut into equal spans; c adds up the spans' sums in order.
///
/// # Safety
/// The pointers of `b` are valid for the extents its fields give, and the instruction set of `D` is present.
#[inline(always)]
pub(crate) unsafe fn block<D: Dot<E>, E>(b: &Block<E>) {
    let span = span_len(b.k, D::STEP);
    let tiles = b.m.div_ceil(D::TILE_M);
    // Few tiles are bound by memory: whole rows of w, one after the other. Many are bound by arithmetic: x's span stays
    // in the second-level cache for all columns. Both go through one call, which inlines every tile.
    let part = if tiles <= 2 { b.k.max(1) } else { span };
    let mut from = 0;
    loop {
        // SAFETY: the parts cover 0..b.k.
        unsafe { all_columns::<D, E>(b, from..b.k.min(from + part), span) };
        from += part;
        if from >= b.k {
            break;
        }
    }
}

/// # Safety
/// As `block`; `k` begins at a multiple of `span`.
#[inline(always)]
unsafe fn all_columns<D: Dot<E>, E>(b: &Block<E>, k: std::ops::Range<usize>, span: usize) {
    let mut n = 0;
    // SAFETY: n + N <= b.n in each call.
    unsafe {
        // Few rows: more rows of w at once give the memory system more independent streams.
        if b.m * 8 <= D::ACCUMULATORS {
            while n + 8 <= b.n {
                row_tiles::<D, E, 8>(b, n, k.clone(), span);
                n += 8;
            }
        }
        while n + 4 <= b.n {
            row_tiles::<D, E, 4>(b, n, k.clone(), span);
            n += 4;
        }
        while n < b.n {
            row_tiles::<D, E, 1>(b, n, k.clone(), span);
            n += 1;
        }
    }
}

/// Bytes of w between a load and the prefetch that is issued with it, where a tile's rows are shorter.
const AHEAD_BYTES: usize = 16 << 10;

/// # Safety
/// As `all_columns`, and n + N <= b.n.
#[inline(always)]
unsafe fn row_tiles<D: Dot<E>, E, const N: usize>(
    b: &Block<E>,
    n: usize,
    k: std::ops::Range<usize>,
    span: usize,
) {
    let tiles = b.m.div_ceil(D::TILE_M);
    let distance = (AHEAD_BYTES / (N * b.w_stride * size_of::<E>()).max(1)).max(1) * N;
    let mut from = k.start;
    loop {
        let part = from..k.end.min(from + span);
        let width = part.end - part.start;
        let mut m = 0;
        for t in 0..tiles {
            // Equal tiles rather than full ones and a small rest.
            let rows = (b.m - m).div_ceil(tiles - t);
            // The tiles share out the prefetch of N rows, so that memory is busy while they compute.
            let rows_ahead = t * N / tiles..(t + 1) * N / tiles;
            let ahead = Ahead::new(b, n + distance, rows_ahead, from, width, D::STEP);
            let (x, x_stride) = if b.x_packed {
                (b.x.wrapping_add(b.m * from + m * width), width)
            } else {
                (b.x.wrapping_add(m * b.x_stride + from), b.x_stride)
            };
            let place = Place {
                x,
                x_stride,
                m,
                n,
                k: part.clone(),
                ahead,
            };
            // SAFETY: m + rows <= b.m.
            unsafe {
                match rows {
                    1 => tile::<D, E, 1, N>(b, place),
                    2 => tile::<D, E, 2, N>(b, place),
                    3 => tile::<D, E, 3, N>(b, place),
                    4 => tile::<D, E, 4, N>(b, place),
                    5 => tile::<D, E, 5, N>(b, place),
                    _ => tile::<D, E, 6, N>(b, place),
                }
            }
            m += rows;
        }
        from += span;
        if from >= k.end {
            return;
        }
    }
}

/// Where a tile lies in its block.
struct Place<E> {
    /// Row m at the span's start.
    x: *const E,
    x_stride: usize,
    m: usize,
    n: usize,
    /// Its span; later spans add to c.
    k: std::ops::Range<usize>,
    ahead: Ahead<E>,
}

/// What a tile prefetches: in each step `count` vectors from `next`, `stride` elements apart.
struct Ahead<E> {
    next: *const E,
    count: usize,
    stride: usize,
    advance: usize,
}

impl<E> Ahead<E> {
    /// Elements `from..from + width` of `rows` of w, counted from row `first`.
    #[inline(always)]
    fn new(
        b: &Block<E>,
        first: usize,
        rows: std::ops::Range<usize>,
        from: usize,
        width: usize,
        step: usize,
    ) -> Ahead<E> {
        let next = b.w.wrapping_add((first + rows.start) * b.w_stride + from);
        let count = if b.goes_on { rows.len() } else { 0 };
        if width == b.w_stride {
            // Whole contiguous rows: in the order of addresses, which the hardware then runs ahead of by itself.
            Ahead {
                next,
                count,
                stride: step,
                advance: count * step,
            }
        } else {
            Ahead {
                next,
                count,
                stride: b.w_stride,
                advance: step,
            }
        }
    }
}

/// # Safety
/// As `block`, with m + M <= b.m and n + N <= b.n.
#[inline(always)]
unsafe fn tile<D: Dot<E>, E, const M: usize, const N: usize>(b: &Block<E>, place: Place<E>) {
    if M > D::TILE_M || (N == 8 && M * N > D::ACCUMULATORS) {
        unreachable!("invariant tile-fits: {M} x {N} accumulators");
    }
    let Place {
        x,
        x_stride,
        m,
        n,
        k: span,
        mut ahead,
    } = place;
    let w = b.w.wrapping_add(n * b.w_stride);
    let mut acc = [[D::zero(); N]; M];
    let mut k = span.start;
    // SAFETY: rows m..m + M of x and n..n + N of w have b.k elements, and c has the elements written.
    unsafe {
        while k + D::STEP <= span.end {
            let mut wv = [D::load(w.add(k)); N];
            for j in 1..N {
                wv[j] = D::load(w.add(j * b.w_stride + k));
            }
            for j in 0..ahead.count {
                D::prefetch(ahead.next.wrapping_add(j * ahead.stride));
            }
            ahead.next = ahead.next.wrapping_add(ahead.advance);
            for i in 0..M {
                let xv = D::load(x.add(i * x_stride + k - span.start));
                for j in 0..N {
                    acc[i][j] = D::dot(acc[i][j], xv, wv[j]);
                }
            }
            k += D::STEP;
        }
        if k < span.end {
            let rest = span.end - k;
            for j in 0..N {
                let wv = D::load_part(w.add(j * b.w_stride + k), rest);
                for i in 0..M {
                    let xv = D::load_part(x.add(i * x_stride + k - span.start), rest);
                    acc[i][j] = D::dot(acc[i][j], xv, wv);
                }
            }
        }
        let first = span.start == 0;
        for i in 0..M {
            let c = b.c.add((m + i) * b.c_stride + n);
            for j in (0..N).step_by(4) {
                let zero = D::zero();
                let sums = D::reduce(if N == 1 {
                    [acc[i][0], zero, zero, zero]
                } else {
                    [
                        acc[i][j],
                        acc[i][(j + 1) % N],
                        acc[i][(j + 2) % N],
                        acc[i][(j + 3) % N],
                    ]
                });
                let c = c.add(j);
                if N == 1 {
                    *c = if first { sums[0] } else { *c + sums[0] };
                } else {
                    let c = c.cast::<[f32; 4]>();
                    let mut out = sums;
                    if !first {
                        let old = c.read_unaligned();
                        for l in 0..4 {
                            out[l] += old[l];
                        }
                    }
                    c.write_unaligned(out);
                }
            }
        }
    }
}

/// Columns of x in a call of `matrixmultiply` on the portable path.
const PORTABLE_M: usize = 8;

/// Computes a block without vector intrinsics of ours, by the `matrixmultiply` crate.
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
    // SAFETY: all indices are below the extents of `b`, and the vectors have the extents given to `sgemm`.
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
            matrixmultiply::sgemm(
                b.n,
                k,
                PORTABLE_M,
                1.0,
                w.as_ptr(),
                k as isize,
                1,
                x.as_ptr(),
                1,
                k as isize,
                0.0,
                c.as_mut_ptr(),
                1,
                BLOCK_N as isize,
            );
            for r in 0..rows {
                for j in 0..b.n {
                    *b.c.add((m + r) * b.c_stride + j) = c[r * BLOCK_N + j];
                }
            }
        }
    }
}
