//! Paged attention of any mix of prefill and decode rows, by online softmax.
//!
//! **Order of one row's sums.** Positions are cut at absolute multiples of 32 into blocks and of 512
//! into parts. Within a part, blocks are added in ascending order with one running maximum; the parts' results are
//! merged in ascending order. Both cuts depend on the position alone, so a row's result does not depend on the
//! page size, on how the sequence was cut into steps, on the other rows, or on the threads. A block or a part in
//! which a row sees nothing leaves that row's sums as they are.
//!
//! A task is a tile of rows of one sequence with all query heads of one kv head; long contexts with few tiles are
//! also split by parts.

use super::dot::{BLOCK_N, Block};
use super::math::{exp, tanh};
use super::norm::with_scratch;
use super::pool::{SharedMut, parallel_for, threads};
use super::simd::{Isa, Kernel, Simd, dispatch, prefetch};
use super::{CacheShape, Elem, KernelError, StepMeta, check_len};

/// An `attention` kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Factor of q·k, usually 1/√D.
    pub scale: f32,
    /// Position p sees positions <= p; otherwise every position of its sequence.
    pub causal: bool,
    /// Position p sees positions > p - window only. Needs `causal`.
    pub window: Option<u32>,
    /// s becomes c · tanh(s / c).
    pub softcap: Option<f32>,
    /// Query heads of a kv head: head h reads kv head h / groups.
    pub groups: usize,
}

/// Operands of [`attention`].
#[derive(Debug)]
pub struct AttentionArgs<'a, E> {
    /// Hkv; there are `groups` times as many query heads.
    pub kv_heads: usize,
    /// D, a multiple of 16.
    pub head_dim: usize,
    /// `[T, Hq · D]`, in the cache's element order.
    pub q: &'a [E],
    /// One layer's cache, see [`CacheShape`]; holds the step's own tokens already.
    pub cache: &'a [E],
    /// The step.
    pub meta: StepMeta<'a>,
    /// `[T, Hq · D]`; overwritten.
    pub out: &'a mut [E],
}

const NAME: &str = "attention";
/// Positions scored at once.
const BLOCK: usize = 32;
/// Positions with one running maximum; a multiple of `BLOCK`.
const PART: usize = 512;
/// (row, query head) pairs of a tile that share each block of keys and values, where the step has that many.
const TILE_QUERIES: usize = 32;
/// Queries up to which a tile is bound by memory.
const FEW_QUERIES: usize = 16;

/// out = softmax(mask(cap(scale · q kᵀ))) v per row and query head; scores and sums are f32.
///
/// # Errors
/// Operands that do not fit the shapes, rows or pages outside their buffers, an unsupported spec.
pub fn attention<E: Elem>(
    spec: &AttentionSpec,
    args: AttentionArgs<'_, E>,
) -> Result<(), KernelError> {
    let AttentionArgs {
        kv_heads,
        head_dim,
        q,
        cache,
        meta,
        out,
    } = args;
    let unsupported = |what: String| Err(KernelError::Unsupported { kernel: NAME, what });
    if head_dim == 0 || !head_dim.is_multiple_of(16) {
        return unsupported(format!("a head of {head_dim}, not a multiple of 16"));
    }
    if spec.groups == 0 {
        return unsupported("0 query heads a kv head".into());
    }
    if spec.window.is_some() && !spec.causal {
        return unsupported("a window without causality".into());
    }
    let features = kv_heads * spec.groups * head_dim;
    check_len(NAME, "q", q, meta.rows() * features)?;
    check_len(NAME, "out", out, meta.rows() * features)?;
    let shape = CacheShape::of(NAME, cache.len(), kv_heads, meta.page_size, head_dim)?;
    meta.check(NAME, shape.pages)?;

    let tiles = tiles(spec, &meta);
    let tasks = tiles.len() * kv_heads;
    let parts = tiles.iter().map(|t| t.parts().len()).max().unwrap_or(0);
    let call = Call {
        isa: Isa::current(),
        spec,
        kv_heads,
        head_dim,
        q,
        cache,
        meta,
        shape,
        out: SharedMut::new(out),
    };
    if parts > 1 && tasks < 4 * threads() {
        call.split(&tiles, parts);
    } else {
        // The last tiles of a prompt see the most positions; they start first.
        parallel_for(tasks, |i| {
            call.whole(&tiles[tiles.len() - 1 - i / kv_heads], i % kv_heads)
        });
    }
    Ok(())
}

/// Consecutive rows of one sequence and the positions that any of them sees.
#[derive(Clone, Copy, Debug)]
struct Tile {
    sequence: usize,
    row: usize,
    rows: usize,
    /// A multiple of `BLOCK`.
    low: usize,
    high: usize,
}

impl Tile {
    /// Numbers of the parts that hold its positions.
    fn parts(&self) -> std::ops::Range<usize> {
        self.low / PART..self.high.div_ceil(PART)
    }
}

/// Positions that a row at `position` sees.
#[inline(always)]
fn visible(spec: &AttentionSpec, position: usize, kv_len: usize) -> std::ops::Range<usize> {
    let high = if spec.causal { position + 1 } else { kv_len };
    spec.window
        .map_or(0, |w| (position + 1).saturating_sub(w as usize))..high
}

fn tiles(spec: &AttentionSpec, meta: &StepMeta) -> Vec<Tile> {
    let height = (TILE_QUERIES / spec.groups).max(1);
    let mut tiles = Vec::new();
    for b in 0..meta.sequences() {
        let (start, end) = (meta.cu_seqlens[b] as usize, meta.cu_seqlens[b + 1] as usize);
        for row in (start..end).step_by(height) {
            let rows = height.min(end - row);
            let seen = meta.positions[row..row + rows]
                .iter()
                .map(|&p| visible(spec, p as usize, meta.kv_lens[b] as usize));
            let low = seen.clone().map(|s| s.start).min().unwrap_or(0) / BLOCK * BLOCK;
            let high = seen.map(|s| s.end).max().unwrap_or(0);
            tiles.push(Tile {
                sequence: b,
                row,
                rows,
                low,
                high,
            });
        }
    }
    tiles
}

struct Call<'a, E> {
    isa: Isa,
    spec: &'a AttentionSpec,
    kv_heads: usize,
    head_dim: usize,
    q: &'a [E],
    cache: &'a [E],
    meta: StepMeta<'a>,
    shape: CacheShape,
    out: SharedMut<E>,
}

/// Running softmax of a tile's queries.
struct State<'a> {
    /// `[queries]`: largest score.
    max: &'a mut [f32],
    /// `[queries]`: Σ exp(score - max).
    sum: &'a mut [f32],
    /// `[queries, D]`: Σ exp(score - max) v.
    acc: &'a mut [f32],
}

impl State<'_> {
    fn len(queries: usize, head_dim: usize) -> usize {
        queries * (head_dim + 2)
    }

    fn split(buffer: &mut [f32], queries: usize) -> State<'_> {
        let (max, rest) = buffer.split_at_mut(queries);
        let (sum, acc) = rest.split_at_mut(queries);
        State { max, sum, acc }
    }
}

impl<E: Elem> Call<'_, E> {
    fn queries(&self, tile: &Tile) -> usize {
        tile.rows * self.spec.groups
    }

    /// f32 words of scratch that a part needs beside its state: scores, rescalings, q, and gathered k and v.
    fn scratch(&self, tile: &Tile) -> usize {
        let queries = self.queries(tile);
        let elements = queries * self.head_dim + 2 * BLOCK * self.head_dim;
        queries * (BLOCK + 1) + 16 + elements * size_of::<E>() / 4
    }

    /// All parts of a tile, and its rows of `out`.
    fn whole(&self, tile: &Tile, kv_head: usize) {
        let queries = self.queries(tile);
        let state_len = State::len(queries, self.head_dim);
        with_scratch(
            2 * state_len + self.scratch(tile),
            |buffer: &mut [f32]| {
                let (total, rest) = buffer.split_at_mut(state_len);
                let (next, scratch) = rest.split_at_mut(state_len);
                let mut total = State::split(total, queries);
                let mut parts = tile.parts();
                self.part(
                    tile,
                    kv_head,
                    parts.next().unwrap_or(0),
                    &mut total,
                    scratch,
                );
                for part in parts {
                    let mut next = State::split(next, queries);
                    self.part(tile, kv_head, part, &mut next, scratch);
                    dispatch(
                        self.isa,
                        Merge {
                            total: &mut total,
                            next: &next,
                        },
                    );
                }
                self.finish(tile, kv_head, &total);
            },
        );
    }

    /// All tiles, with their parts as tasks of their own.
    fn split(&self, tiles: &[Tile], parts: usize) {
        let queries = tiles.iter().map(|t| self.queries(t)).max().unwrap_or(0);
        let stride = State::len(queries, self.head_dim);
        let mut states = vec![0.0f32; tiles.len() * self.kv_heads * parts * stride];
        let shared = SharedMut::new(&mut states);
        parallel_for(tiles.len() * self.kv_heads * parts, |i| {
            let (tile, kv_head) = (&tiles[i / parts / self.kv_heads], i / parts % self.kv_heads);
            let Some(part) = tile.parts().nth(i % parts) else {
                return;
            };
            // SAFETY: state i belongs to this task alone.
            let state = unsafe { std::slice::from_raw_parts_mut(shared.at(i * stride), stride) };
            let queries = self.queries(tile);
            let state = &mut state[..State::len(queries, self.head_dim)];
            with_scratch(self.scratch(tile), |scratch: &mut [f32]| {
                self.part(
                    tile,
                    kv_head,
                    part,
                    &mut State::split(state, queries),
                    scratch,
                );
            });
        });
        for (i, group) in states.chunks_exact_mut(parts * stride).enumerate() {
            let (tile, kv_head) = (&tiles[i / self.kv_heads], i % self.kv_heads);
            let queries = self.queries(tile);
            let len = State::len(queries, self.head_dim);
            let mut group = group.chunks_exact_mut(stride).take(tile.parts().len());
            let Some(first) = group.next() else { continue };
            let mut total = State::split(&mut first[..len], queries);
            for next in group {
                dispatch(
                    self.isa,
                    Merge {
                        total: &mut total,
                        next: &State::split(&mut next[..len], queries),
                    },
                );
            }
            self.finish(tile, kv_head, &total);
        }
    }

    fn part(
        &self,
        tile: &Tile,
        kv_head: usize,
        part: usize,
        state: &mut State,
        scratch: &mut [f32],
    ) {
        let queries = self.queries(tile);
        let d = self.head_dim;
        let (scores, rest) = scratch.split_at_mut(queries * BLOCK);
        let (rescale, rest) = rest.split_at_mut(queries);
        // SAFETY: any bit pattern is a value of the storage types, whose alignment is at most that of f32.
        let elements = unsafe {
            let len = rest.len() * 4 / size_of::<E>();
            std::slice::from_raw_parts_mut(rest.as_mut_ptr().cast::<E>(), len)
        };
        let (q, gathered) = elements.split_at_mut(queries * d);
        let (keys, values) = gathered.split_at_mut(BLOCK * d);
        let groups = self.spec.groups;
        for r in 0..tile.rows {
            let from = ((tile.row + r) * self.kv_heads + kv_head) * groups * d;
            q[r * groups * d..][..groups * d].copy_from_slice(&self.q[from..][..groups * d]);
        }
        state.max.fill(f32::NEG_INFINITY);
        state.sum.fill(0.0);
        state.acc.fill(0.0);
        let low = tile.low.max(part * PART);
        let high = tile.high.min((part + 1) * PART);
        for base in (low..high).step_by(BLOCK) {
            let count = BLOCK.min(high - base);
            let (k, v) = self.rows(tile.sequence, kv_head, base, count, keys, values);
            let ahead = if queries <= FEW_QUERIES && base + BLOCK < high {
                self.ahead(tile.sequence, kv_head, base + BLOCK)
            } else {
                [&[][..]; 2]
            };
            for n in (0..count).step_by(BLOCK_N) {
                let operands = Block {
                    x: q.as_ptr(),
                    x_stride: d,
                    x_packed: false,
                    m: queries,
                    w: k.wrapping_add(n * d),
                    w_stride: d,
                    n: BLOCK_N.min(count - n),
                    k: d,
                    goes_on: false,
                    c: scores[n..].as_mut_ptr(),
                    c_stride: BLOCK,
                };
                // SAFETY: q has `queries` rows of d, `rows` returned `count` rows of d, scores are [queries, BLOCK].
                unsafe { E::dot_block(self.isa, &operands) };
            }
            dispatch(
                self.isa,
                Step {
                    call: self,
                    tile,
                    base,
                    count,
                    v,
                    ahead,
                    scores,
                    rescale,
                    state,
                },
            );
        }
    }

    /// Keys and values of the block at `base`, as far as they lie in its first page.
    fn ahead(&self, sequence: usize, kv_head: usize, base: usize) -> [&[E]; 2] {
        let (page, slot) = self.meta.place(sequence, base);
        let count = BLOCK.min(self.meta.page_size - slot);
        [false, true].map(|value| {
            let from = self.shape.offset(page, value, kv_head, slot);
            &self.cache[from..from + count * self.head_dim]
        })
    }

    /// Pointers to `count` rows of keys and of values, D elements apart, for positions from `base`: into the
    /// cache where they lie in one page, else copied together.
    fn rows(
        &self,
        sequence: usize,
        kv_head: usize,
        base: usize,
        count: usize,
        keys: &mut [E],
        values: &mut [E],
    ) -> (*const E, *const E) {
        let d = self.head_dim;
        let (page, slot) = self.meta.place(sequence, base);
        if slot + count <= self.meta.page_size {
            let k = &self.cache[self.shape.offset(page, false, kv_head, slot)..][..count * d];
            let v = &self.cache[self.shape.offset(page, true, kv_head, slot)..][..count * d];
            return (k.as_ptr(), v.as_ptr());
        }
        for j in 0..count {
            let (page, slot) = self.meta.place(sequence, base + j);
            let (k, v) = (
                self.shape.offset(page, false, kv_head, slot),
                self.shape.offset(page, true, kv_head, slot),
            );
            keys[j * d..][..d].copy_from_slice(&self.cache[k..][..d]);
            values[j * d..][..d].copy_from_slice(&self.cache[v..][..d]);
        }
        (keys.as_ptr(), values.as_ptr())
    }

    fn finish(&self, tile: &Tile, kv_head: usize, state: &State) {
        let groups = self.spec.groups;
        for r in 0..tile.rows {
            let first = ((tile.row + r) * self.kv_heads + kv_head) * groups * self.head_dim;
            let from = r * groups;
            dispatch(
                self.isa,
                Finish {
                    state,
                    from,
                    groups,
                    head_dim: self.head_dim,
                    out: self.out.at(first),
                },
            );
        }
    }
}

/// One block's scores into a tile's state.
struct Step<'a, 'b, 'c, E> {
    call: &'a Call<'b, E>,
    tile: &'a Tile,
    base: usize,
    count: usize,
    /// `[count, D]`.
    v: *const E,
    /// Keys and values of the next block, to prefetch row by row while this one's values are summed: with few
    /// queries the memory is the limit, and a page's two runs are too short for the hardware to foresee.
    ahead: [&'a [E]; 2],
    /// `[queries, BLOCK]`: q·k; becomes exp(score - max).
    scores: &'a mut [f32],
    /// `[queries]`: factor of the old sums.
    rescale: &'a mut [f32],
    state: &'a mut State<'c>,
}

/// exp(x) of one value by the vectors' arithmetic.
#[inline(always)]
fn exp_one<S: Simd>(x: f32) -> f32 {
    let mut out = [0.0f32; 16];
    // SAFETY: LANES <= 16.
    unsafe { S::store(out.as_mut_ptr(), exp::<S>(S::splat(x))) };
    out[0]
}

impl<E: Elem> Kernel for Step<'_, '_, '_, E> {
    #[inline(always)]
    fn run<S: Simd>(mut self) {
        self.softmax::<S>();
        let queries = self.rescale.len();
        let mut i = 0;
        // SAFETY: i + QT <= queries.
        unsafe {
            if S::LANES == 16 {
                while i + 4 <= queries {
                    self.accumulate::<S, 4>(i);
                    i += 4;
                }
            }
            while i < queries {
                match queries - i {
                    1 => self.accumulate::<S, 1>(i),
                    3 if S::LANES == 16 => self.accumulate::<S, 3>(i),
                    _ => self.accumulate::<S, 2>(i),
                }
                i += match queries - i {
                    3 if S::LANES == 16 => 3,
                    left => left.min(2),
                };
            }
        }
    }
}

impl<E: Elem> Step<'_, '_, '_, E> {
    /// Scales, caps and masks the scores, and replaces them by exp(score - max).
    #[inline(always)]
    fn softmax<S: Simd>(&mut self) {
        let Call { spec, meta, .. } = self.call;
        let kv_len = meta.kv_lens[self.tile.sequence] as usize;
        for i in 0..self.rescale.len() {
            let position = meta.positions[self.tile.row + i / spec.groups] as usize;
            let seen = visible(spec, position, kv_len);
            let low = seen.start.saturating_sub(self.base).min(BLOCK);
            let high = seen.end.saturating_sub(self.base).min(self.count).max(low);
            let row = &mut self.scores[i * BLOCK..][..BLOCK];
            if low == high {
                row.fill(0.0);
                self.rescale[i] = 1.0;
                continue;
            }
            let p = row.as_mut_ptr();
            // SAFETY: the row has BLOCK values, a multiple of LANES.
            unsafe {
                let mut largest = S::splat(f32::NEG_INFINITY);
                for j in (0..BLOCK).step_by(S::LANES) {
                    let mut s = S::mul(S::load(p.add(j)), S::splat(spec.scale));
                    if let Some(cap) = spec.softcap {
                        s = S::mul(tanh::<S>(S::mul(s, S::splat(1.0 / cap))), S::splat(cap));
                    }
                    S::store(p.add(j), s);
                }
                row[..low].fill(f32::NEG_INFINITY);
                row[high..].fill(f32::NEG_INFINITY);
                let p = row.as_mut_ptr();
                for j in (0..BLOCK).step_by(S::LANES) {
                    largest = S::max(largest, S::load(p.add(j)));
                }
                let old = self.state.max[i];
                let new = old.max(S::hmax(largest));
                // All scores -inf: exp(-inf - 0) is the 0 that exp(-inf + inf) is not.
                let reference = if new == f32::NEG_INFINITY { 0.0 } else { new };
                let mut sum = S::splat(0.0);
                for j in (0..BLOCK).step_by(S::LANES) {
                    let e = exp::<S>(S::sub(S::load(p.add(j)), S::splat(reference)));
                    S::store(p.add(j), e);
                    sum = S::add(sum, e);
                }
                let rescale = if old == new {
                    1.0
                } else {
                    exp_one::<S>(old - reference)
                };
                self.rescale[i] = rescale;
                self.state.max[i] = new;
                self.state.sum[i] = self.state.sum[i] * rescale + S::sum(sum);
            }
        }
    }

    /// acc = acc · rescale + p v for queries i..i + QT.
    ///
    /// # Safety
    /// There are that many queries.
    #[inline(always)]
    unsafe fn accumulate<S: Simd, const QT: usize>(&mut self, i: usize) {
        let d = self.call.head_dim;
        let mut column = 0;
        // SAFETY: the columns are below d, a multiple of LANES.
        unsafe {
            while column + 4 * S::LANES <= d {
                self.columns::<S, QT, 4>(i, column);
                column += 4 * S::LANES;
            }
            while column < d {
                self.columns::<S, QT, 1>(i, column);
                column += S::LANES;
            }
        }
    }

    /// # Safety
    /// Queries i..i + QT exist, and DV vectors from `column` lie in the head.
    #[inline(always)]
    unsafe fn columns<S: Simd, const QT: usize, const DV: usize>(
        &mut self,
        i: usize,
        column: usize,
    ) {
        let d = self.call.head_dim;
        let acc = self.state.acc[i * d + column..].as_mut_ptr();
        let p = self.scores[i * BLOCK..].as_ptr();
        // SAFETY: the caller's guarantee; scores have BLOCK >= count values a query, v has count rows.
        unsafe {
            let mut sums = [[S::splat(0.0); DV]; QT];
            for q in 0..QT {
                let factor = S::splat(self.rescale[i + q]);
                for c in 0..DV {
                    sums[q][c] = S::mul(S::load(acc.add(q * d + c * S::LANES)), factor);
                }
            }
            let ahead = if i == 0 && column == 0 {
                self.ahead
            } else {
                [&[][..]; 2]
            };
            for j in 0..self.count {
                for rows in ahead {
                    if let Some(row) = rows.get(j * d..(j + 1) * d) {
                        prefetch(row);
                    }
                }
                let mut v = [S::splat(0.0); DV];
                for c in 0..DV {
                    v[c] = E::load::<S>(self.v.add(j * d + column + c * S::LANES));
                }
                for q in 0..QT {
                    let weight = S::splat(*p.add(q * BLOCK + j));
                    for c in 0..DV {
                        sums[q][c] = S::fma(weight, v[c], sums[q][c]);
                    }
                }
            }
            for q in 0..QT {
                for c in 0..DV {
                    S::store(acc.add(q * d + c * S::LANES), sums[q][c]);
                }
            }
        }
    }
}

/// Adds the part `next` to `total`. An empty side (max -inf) leaves the other as it is.
struct Merge<'a, 'b, 'c> {
    total: &'a mut State<'b>,
    next: &'a State<'c>,
}

impl Kernel for Merge<'_, '_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let d = self.total.acc.len() / self.total.max.len();
        for i in 0..self.total.max.len() {
            let (old, part) = (self.total.max[i], self.next.max[i]);
            if part == f32::NEG_INFINITY {
                continue;
            }
            let new = old.max(part);
            let (keep, add) = (exp_one::<S>(old - new), exp_one::<S>(part - new));
            self.total.max[i] = new;
            self.total.sum[i] = self.total.sum[i] * keep + self.next.sum[i] * add;
            let (acc, next) = (
                &mut self.total.acc[i * d..][..d],
                &self.next.acc[i * d..][..d],
            );
            for j in (0..d).step_by(S::LANES) {
                // SAFETY: both rows have d values, a multiple of LANES.
                unsafe {
                    let a = acc.as_mut_ptr().add(j);
                    let part = S::mul(S::load(next.as_ptr().add(j)), S::splat(add));
                    S::store(a, S::fma(S::load(a), S::splat(keep), part));
                }
            }
        }
    }
}

/// out = acc / sum for the query heads of one row.
struct Finish<'a, 'b, E> {
    state: &'a State<'b>,
    from: usize,
    groups: usize,
    head_dim: usize,
    /// `[groups, D]`.
    out: *mut E,
}

impl<E: Elem> Kernel for Finish<'_, '_, E> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let d = self.head_dim;
        for g in 0..self.groups {
            let sum = self.state.sum[self.from + g];
            // A row that saw nothing is 0.
            let factor = if sum > 0.0 { 1.0 / sum } else { 0.0 };
            let acc = &self.state.acc[(self.from + g) * d..][..d];
            for j in (0..d).step_by(S::LANES) {
                // SAFETY: this task alone writes the heads of one kv head of these rows of `out`.
                unsafe {
                    let v = S::mul(S::load(acc.as_ptr().add(j)), S::splat(factor));
                    E::store::<S>(self.out.add(g * d + j), v);
                }
            }
        }
    }
}
