//! `linear`: y = epilogue(prologue(x) · Wᵀ + bias), the projections of a transformer block.
//!
//! The columns of y are cut into blocks of 16, which are shared out over the threads; a block's f32 results stay
//! in a small buffer until the epilogue has rounded them into y. The rows are cut into chunks whose operand fits
//! the second-level cache; a weight block is read once per chunk.

use super::dot::{BLOCK_N, Block, pack};
use super::math::{Activation, act_v, silu};
use super::pool::{SharedMut, parallel_for, threads};
use super::simd::{Isa, Kernel, Simd, dispatch};
use super::{Elem, KernelError, check_len, norm};

/// What is applied to x before the product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Prologue {
    /// Nothing.
    None,
    /// h = rms_norm(x), see [`norm::rms_norm`].
    RmsNorm {
        /// Added to the mean square.
        eps: f32,
    },
    /// s = x + delta, written to `sum` in the storage type; h = rms_norm(s).
    AddRmsNorm {
        /// Added to the mean square.
        eps: f32,
    },
}

/// What is applied to the product and its bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// Nothing.
    None,
    /// Adds `residual`.
    Residual,
    /// silu(gate) · up for gate|up weights interleaved by 8 rows: y has N/2 features, N is a multiple of 16.
    SwiGlu,
    /// A pointwise activation.
    Act(Activation),
}

/// A `linear` kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinearSpec {
    /// Applied to x.
    pub prologue: Prologue,
    /// Applied to the product.
    pub epilogue: Epilogue,
}

/// Operands of [`linear`]; optional ones must be present exactly where the spec needs them.
#[derive(Debug)]
pub struct LinearArgs<'a, E> {
    /// Rows.
    pub m: usize,
    /// Rows of the weight.
    pub n: usize,
    /// Features of x.
    pub k: usize,
    /// `[M, K]`.
    pub x: &'a [E],
    /// `[M, K]`, for `AddRmsNorm`.
    pub delta: Option<&'a [E]>,
    /// `[M, K]`, output of `AddRmsNorm`.
    pub sum: Option<&'a mut [E]>,
    /// `[K]`, for the norms; `RmsNorm` does without it.
    pub gamma: Option<&'a [E]>,
    /// `[N, K]`.
    pub w: &'a [E],
    /// `[N]`, always optional.
    pub bias: Option<&'a [E]>,
    /// `[M, N]`, for `Residual`.
    pub residual: Option<&'a [E]>,
    /// `[M, N]`, or `[M, N/2]` for `SwiGlu`; overwritten.
    pub y: &'a mut [E],
}

impl<'a, E> LinearArgs<'a, E> {
    /// A product of these sizes, `[m, n, k]`, with nothing around it.
    pub fn new([m, n, k]: [usize; 3], x: &'a [E], w: &'a [E], y: &'a mut [E]) -> Self {
        LinearArgs {
            m,
            n,
            k,
            x,
            delta: None,
            sum: None,
            gamma: None,
            w,
            bias: None,
            residual: None,
            y,
        }
    }
}

const NAME: &str = "linear";

/// Computes y = epilogue(prologue(x) · Wᵀ + bias) with f32 accumulation; h is rounded to the storage type.
///
/// # Errors
/// Operands that do not fit the shapes or the spec.
pub fn linear<E: Elem>(spec: &LinearSpec, args: LinearArgs<'_, E>) -> Result<(), KernelError> {
    let LinearArgs {
        m,
        n,
        k,
        x,
        delta,
        sum,
        gamma,
        w,
        bias,
        residual,
        y,
    } = args;
    let swiglu = spec.epilogue == Epilogue::SwiGlu;
    check_len(NAME, "x", x, m * k)?;
    check_len(NAME, "w", w, n * k)?;
    check_len(NAME, "y", y, m * if swiglu { n / 2 } else { n })?;
    if swiglu && !n.is_multiple_of(BLOCK_N) {
        return Err(KernelError::Unsupported {
            kernel: NAME,
            what: format!("SwiGlu over {n} rows, not a multiple of 16"),
        });
    }
    if let Some(bias) = bias {
        check_len(NAME, "bias", bias, n)?;
    }
    if spec.epilogue == Epilogue::Residual {
        check_len(NAME, "residual", residual.unwrap_or(&[]), m * n)?;
    }
    let epilogue = EpilogueOperands {
        kind: spec.epilogue,
        n,
        bias,
        residual: residual.filter(|_| spec.epilogue == Epilogue::Residual),
        y: SharedMut::new(y),
    };
    let emit = |isa: Isa, tile: &mut TileResult| {
        dispatch(
            isa,
            Emit {
                operands: &epilogue,
                tile,
            },
        )
    };
    match spec.prologue {
        Prologue::None => product(m, n, k, x, w, &emit),
        Prologue::RmsNorm { eps } => norm::with_scratch(m * k, |h| {
            norm::rms_norm(x, gamma, eps, k, h)?;
            product(m, n, k, h, w, &emit);
            Ok(())
        })?,
        Prologue::AddRmsNorm { eps } => norm::with_scratch(m * k, |h| {
            let (delta, sum) = (delta.unwrap_or(&[]), sum.unwrap_or(&mut []));
            norm::add_rms_norm(x, delta, gamma.unwrap_or(&[]), eps, k, sum, h)?;
            product(m, n, k, h, w, &emit);
            Ok(())
        })?,
    }
    Ok(())
}

/// Ids of the largest of the N results of each row of x · Wᵀ, rounded to the storage type before they are
/// compared; the smallest id among equals. The logits are not written anywhere.
///
/// `x`: `[M, K]`, `w`: `[N, K]`, `ids`: `[M]`.
///
/// # Errors
/// Operands that do not fit the shapes; N = 0.
pub fn lm_head_argmax<E: Elem>(
    m: usize,
    n: usize,
    k: usize,
    x: &[E],
    w: &[E],
    ids: &mut [i32],
) -> Result<(), KernelError> {
    const NAME: &str = "lm_head_argmax";
    check_len(NAME, "x", x, m * k)?;
    check_len(NAME, "w", w, n * k)?;
    check_len(NAME, "ids", ids, m)?;
    if n == 0 || i32::try_from(n).is_err() {
        return Err(KernelError::Unsupported {
            kernel: NAME,
            what: format!("a vocabulary of {n}"),
        });
    }
    // Per row the best value so far and its id, replaced under the order (larger value, then smaller id), which
    // gives one answer in whatever order the blocks arrive.
    let best = std::sync::Mutex::new(vec![(f32::NEG_INFINITY, i32::MAX); m]);
    product(m, n, k, x, w, &|_, tile: &mut TileResult| {
        let mut found = [(f32::NEG_INFINITY, i32::MAX); MAX_CHUNK];
        for r in 0..tile.rows {
            for j in 0..tile.cols {
                let value = E::from_f32(tile.c[r * BLOCK_N + j]).to_f32();
                if value > found[r].0 || (value == found[r].0 && found[r].1 == i32::MAX) {
                    found[r] = (value, (tile.n0 + j) as i32);
                }
            }
        }
        let mut best = best.lock().unwrap_or_else(|e| e.into_inner());
        for r in 0..tile.rows {
            let (old, new) = (&mut best[tile.m0 + r], found[r]);
            if new.0 > old.0 || (new.0 == old.0 && new.1 < old.1) {
                *old = new;
            }
        }
    });
    let best = best.into_inner().unwrap_or_else(|e| e.into_inner());
    for (id, (_, found)) in ids.iter_mut().zip(best) {
        // A row of NaN has no largest value; 0 keeps the id inside the vocabulary.
        *id = if found == i32::MAX { 0 } else { found };
    }
    Ok(())
}

/// Bytes of the operand of a row chunk: most of a second-level cache of 1 MiB is left to the weights that stream
/// through it. With long rows only the current span of K has to stay, so a chunk has `MIN_CHUNK` rows at least.
const CHUNK_BYTES: usize = 384 << 10;
const MIN_CHUNK: usize = 96;
const MAX_CHUNK: usize = 192;
/// Rows of the tallest register tile.
const TILE_M: usize = 6;
/// Weight bytes below which a task is not worth its start.
const TASK_BYTES: usize = 24 << 10;

/// f32 results of rows m0.. and columns n0.. of the product.
struct TileResult<'a> {
    m0: usize,
    rows: usize,
    n0: usize,
    cols: usize,
    /// `[rows, BLOCK_N]`.
    c: &'a mut [f32],
}

/// Computes x · Wᵀ block by block and hands each block to `emit`, once, from any thread.
fn product<E: Elem>(
    m: usize,
    n: usize,
    k: usize,
    x: &[E],
    w: &[E],
    emit: &(impl Fn(Isa, &mut TileResult) + Sync),
) {
    debug_assert!(
        x.len() == m * k && w.len() == n * k,
        "invariant product-lengths"
    );
    if m == 0 || n == 0 {
        return;
    }
    let isa = Isa::current();
    let fitting =
        (CHUNK_BYTES / (k.max(1) * size_of::<E>())).clamp(MIN_CHUNK, MAX_CHUNK) / TILE_M * TILE_M;
    let chunks = m.div_ceil(fitting);
    let chunk = m
        .div_ceil(chunks)
        .next_multiple_of(TILE_M.min(m))
        .min(MAX_CHUNK);
    let chunks = m.div_ceil(chunk);
    let blocks = n.div_ceil(BLOCK_N);
    let block_bytes = BLOCK_N * k.max(1) * size_of::<E>() * chunk.div_ceil(TILE_M);
    let grain = (blocks / (threads() * 8))
        .max(TASK_BYTES.div_ceil(block_bytes))
        .max(1);
    let spans = blocks.div_ceil(grain);
    let packing = E::packing(isa, m, k);
    let run = |x: &[E]| {
        run_tasks(
            Tasks {
                isa,
                m,
                n,
                k,
                x,
                packed: packing.is_some(),
                w,
                chunk,
                chunks,
                grain,
                spans,
            },
            emit,
        )
    };
    match packing {
        None => run(x),
        Some(span) => norm::with_scratch(m * k, |packed| {
            let out = SharedMut::new(packed);
            parallel_for(chunks, |c| {
                let (first, rows) = (c * chunk, chunk.min(m - c * chunk));
                // SAFETY: the chunk's rows of `packed`, which this task alone writes.
                let out = unsafe { std::slice::from_raw_parts_mut(out.at(first * k), rows * k) };
                pack(&x[first * k..][..rows * k], rows, k, span, out);
            });
            run(packed);
        }),
    }
}

/// How a product is cut: task i computes span i % spans of `grain` column blocks of row chunk i / spans.
struct Tasks<'a, E> {
    isa: Isa,
    m: usize,
    n: usize,
    k: usize,
    /// Row chunks one after the other, each row-major or packed.
    x: &'a [E],
    packed: bool,
    w: &'a [E],
    chunk: usize,
    chunks: usize,
    grain: usize,
    spans: usize,
}

fn run_tasks<E: Elem>(tasks: Tasks<'_, E>, emit: &(impl Fn(Isa, &mut TileResult) + Sync)) {
    let Tasks {
        isa,
        m,
        n,
        k,
        x,
        packed,
        w,
        chunk,
        chunks,
        grain,
        spans,
    } = tasks;
    let blocks = n.div_ceil(BLOCK_N);
    let (x, w) = (SharedConst(x.as_ptr()), SharedConst(w.as_ptr()));
    parallel_for(chunks * spans, |task| {
        let m0 = task / spans * chunk;
        let rows = chunk.min(m - m0);
        let mut buffer = [std::mem::MaybeUninit::<f32>::uninit(); MAX_CHUNK * BLOCK_N];
        let first = task % spans * grain;
        for b in first..(first + grain).min(blocks) {
            let n0 = b * BLOCK_N;
            let cols = BLOCK_N.min(n - n0);
            let len = rows * BLOCK_N;
            if cols < BLOCK_N || b == first {
                // Columns that the block does not compute are read (and dropped) by the epilogue's vectors.
                buffer[..len].fill(std::mem::MaybeUninit::new(0.0));
            }
            let c = buffer.as_mut_ptr().cast::<f32>();
            // SAFETY: rows m0..m0 + rows of x and n0..n0 + cols of w lie inside the slices, by the lengths
            // checked by the callers; the buffer holds MAX_CHUNK >= rows rows; its first `len` values are set.
            let c = unsafe {
                let operands = Block {
                    x: x.at(m0 * k),
                    x_stride: k,
                    x_packed: packed,
                    m: rows,
                    w: w.at(n0 * k),
                    w_stride: k,
                    n: cols,
                    k,
                    goes_on: true,
                    c,
                    c_stride: BLOCK_N,
                };
                E::dot_block(isa, &operands);
                std::slice::from_raw_parts_mut(c, len)
            };
            emit(
                isa,
                &mut TileResult {
                    m0,
                    rows,
                    n0,
                    cols,
                    c,
                },
            );
        }
    });
}

/// A shared base pointer of an input slice that outlives the loop.
struct SharedConst<T>(*const T);
// SAFETY: only read through.
unsafe impl<T: Sync> Sync for SharedConst<T> {}

impl<T> SharedConst<T> {
    fn at(&self, i: usize) -> *const T {
        self.0.wrapping_add(i)
    }
}

struct EpilogueOperands<'a, E> {
    kind: Epilogue,
    n: usize,
    bias: Option<&'a [E]>,
    residual: Option<&'a [E]>,
    y: SharedMut<E>,
}

/// Applies the epilogue to one block and writes its part of y.
struct Emit<'a, 'b, E> {
    operands: &'a EpilogueOperands<'a, E>,
    tile: &'a mut TileResult<'b>,
}

impl<E: Elem> Kernel for Emit<'_, '_, E> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let TileResult {
            m0,
            rows,
            n0,
            cols,
            ref mut c,
        } = *self.tile;
        let o = self.operands;
        if let Some(bias) = o.bias {
            for r in 0..rows {
                for j in 0..cols {
                    c[r * BLOCK_N + j] += bias[n0 + j].to_f32();
                }
            }
        }
        for r in 0..rows {
            let mut out = [E::default(); BLOCK_N];
            let row = &c[r * BLOCK_N..][..BLOCK_N];
            let written = if o.kind == Epilogue::SwiGlu {
                BLOCK_N / 2
            } else {
                cols
            };
            let mut extra = [E::default(); BLOCK_N];
            let extra = match o.residual {
                Some(residual) if cols == BLOCK_N => &residual[(m0 + r) * o.n + n0..][..BLOCK_N],
                Some(residual) => {
                    extra[..cols].copy_from_slice(&residual[(m0 + r) * o.n + n0..][..cols]);
                    &extra[..]
                }
                None => &extra[..],
            };
            // SAFETY: the vectors read and write BLOCK_N values of arrays of that length, or 8 from either half.
            unsafe {
                if o.kind == Epilogue::SwiGlu {
                    let mut gate = [0.0f32; BLOCK_N];
                    S::store(gate.as_mut_ptr(), silu::<S>(S::load(row.as_ptr())));
                    for j in 0..BLOCK_N / 2 {
                        out[j] = E::from_f32(gate[j] * row[BLOCK_N / 2 + j]);
                    }
                } else {
                    for j in (0..BLOCK_N).step_by(S::LANES) {
                        let v = S::load(row.as_ptr().add(j));
                        let v = match o.kind {
                            Epilogue::Act(act) => act_v::<S>(act, v),
                            Epilogue::Residual => S::add(v, E::load::<S>(extra.as_ptr().add(j))),
                            Epilogue::None | Epilogue::SwiGlu => v,
                        };
                        E::store::<S>(out.as_mut_ptr().add(j), v);
                    }
                }
                let (stride, column) = if o.kind == Epilogue::SwiGlu {
                    (o.n / 2, n0 / 2)
                } else {
                    (o.n, n0)
                };
                // SAFETY: this block alone writes these columns of these rows of y, which has the length checked.
                let y = o.y.at((m0 + r) * stride + column);
                y.copy_from_nonoverlapping(out.as_ptr(), written);
            }
        }
    }
}
