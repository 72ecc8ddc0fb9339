//! `rope_append`: splits the packed q|k|v projection, rotates q and k, and writes k and v into the paged cache.
//!
//! Head rows of q and k are permuted so that RoPE partners lie 8 apart: in each block of 16, row j is element
//! i = 8b + j of the head's first half and row 8 + j its partner i + D/2. Biases and q/k norm gammas are permuted
//! alike, q·k does not change, and the cache keeps k in this order.

use super::pool::{SharedMut, parallel_for};
use super::simd::{Isa, Kernel, Simd, dispatch};
use super::{CacheShape, Elem, KernelError, StepMeta, check_index, check_len};

/// Operands of [`rope_append`].
#[derive(Debug)]
pub struct RopeAppend<'a, E> {
    /// Hq.
    pub q_heads: usize,
    /// Hkv.
    pub kv_heads: usize,
    /// D, a multiple of 16, at most 512.
    pub head_dim: usize,
    /// `[T, (Hq + 2 Hkv) · D]`: raw projections, q heads, k heads, v heads.
    pub qkv: &'a [E],
    /// `[(Hq + 2 Hkv) · D]`.
    pub bias: Option<&'a [E]>,
    /// `[D]`: gamma of an RMSNorm over each q head, before the rotation.
    pub q_norm: Option<&'a [E]>,
    /// `[D]`: the same for k heads.
    pub k_norm: Option<&'a [E]>,
    /// Added to the mean square in both norms.
    pub eps: f32,
    /// Added to the gammas: 0, or 1 for the Gemma family.
    pub weight_offset: f32,
    /// `[max_pos, D/2]` each, the cosines and sines of position · inv_freq; `None` for layers without positions.
    pub tables: Option<(&'a [f32], &'a [f32])>,
    /// The step.
    pub meta: StepMeta<'a>,
    /// `[T, Hq · D]`, rotated q; overwritten.
    pub q: &'a mut [E],
    /// One layer's cache, see [`CacheShape`]; the slots of the step's tokens are overwritten.
    pub cache: &'a mut [E],
}

const NAME: &str = "rope_append";
/// Largest head: the working copy of a head is on the stack.
const MAX_HEAD: usize = 512;
/// Elements below which heads are not shared out over threads.
const PARALLEL_ELEMENTS: usize = 16 << 10;

/// Adds biases, normalises and rotates q and k heads in f32, and appends k and v; each result is rounded once.
///
/// # Errors
/// Operands that do not fit the shapes, positions or pages outside their buffers, an unsupported head size.
pub fn rope_append<E: Elem>(args: RopeAppend<'_, E>) -> Result<(), KernelError> {
    let RopeAppend {
        q_heads,
        kv_heads,
        head_dim,
        meta,
        ..
    } = args;
    let rows = meta.rows();
    let heads = q_heads + 2 * kv_heads;
    if head_dim == 0 || head_dim % 16 != 0 || head_dim > MAX_HEAD {
        let what =
            format!("a head of {head_dim}; it must be a multiple of 16 and at most {MAX_HEAD}");
        return Err(KernelError::Unsupported { kernel: NAME, what });
    }
    check_len(NAME, "qkv", args.qkv, rows * heads * head_dim)?;
    check_len(NAME, "q", args.q, rows * q_heads * head_dim)?;
    if let Some(bias) = args.bias {
        check_len(NAME, "bias", bias, heads * head_dim)?;
    }
    for (operand, gamma) in [("q_norm", args.q_norm), ("k_norm", args.k_norm)] {
        if let Some(gamma) = gamma {
            check_len(NAME, operand, gamma, head_dim)?;
        }
    }
    if let Some((cos, sin)) = args.tables {
        check_len(NAME, "sin", sin, cos.len())?;
        for (r, &position) in meta.positions.iter().enumerate() {
            check_index(
                NAME,
                "position in the rotary table",
                r,
                position,
                cos.len() / (head_dim / 2),
            )?;
        }
    }
    let shape = CacheShape::of(NAME, args.cache.len(), kv_heads, meta.page_size, head_dim)?;
    meta.check(NAME, shape.pages)?;

    let isa = Isa::current();
    let inputs = Inputs {
        q_heads,
        kv_heads,
        head_dim,
        qkv: args.qkv,
        bias: args.bias,
        q_norm: args.q_norm,
        k_norm: args.k_norm,
        eps: args.eps,
        weight_offset: args.weight_offset,
        tables: args.tables,
        meta,
        shape,
        q: SharedMut::new(args.q),
        cache: SharedMut::new(args.cache),
    };
    // A task is a head, so that no two tasks can write one cache slot whatever the positions are.
    if rows * heads * head_dim < PARALLEL_ELEMENTS {
        for head in 0..heads {
            dispatch(
                isa,
                Head {
                    inputs: &inputs,
                    head,
                },
            );
        }
    } else {
        parallel_for(heads, |head| {
            dispatch(
                isa,
                Head {
                    inputs: &inputs,
                    head,
                },
            )
        });
    }
    Ok(())
}

struct Inputs<'a, E> {
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    qkv: &'a [E],
    bias: Option<&'a [E]>,
    q_norm: Option<&'a [E]>,
    k_norm: Option<&'a [E]>,
    eps: f32,
    weight_offset: f32,
    tables: Option<(&'a [f32], &'a [f32])>,
    meta: StepMeta<'a>,
    shape: CacheShape,
    q: SharedMut<E>,
    cache: SharedMut<E>,
}

/// One head of all rows.
struct Head<'a, 'b, E> {
    inputs: &'a Inputs<'b, E>,
    head: usize,
}

impl<E: Elem> Kernel for Head<'_, '_, E> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let (i, head, d) = (self.inputs, self.head, self.inputs.head_dim);
        let heads = i.q_heads + 2 * i.kv_heads;
        let (gamma, rotated) = match head {
            h if h < i.q_heads => (i.q_norm, true),
            h if h < i.q_heads + i.kv_heads => (i.k_norm, true),
            _ => (None, false),
        };
        let mut buffer = [0.0f32; MAX_HEAD];
        let x = &mut buffer[..d];
        for row in 0..i.meta.rows() {
            let source = &i.qkv[(row * heads + head) * d..][..d];
            for (x, s) in x.iter_mut().zip(source) {
                *x = s.to_f32();
            }
            if let Some(bias) = i.bias {
                for (x, b) in x.iter_mut().zip(&bias[head * d..][..d]) {
                    *x += b.to_f32();
                }
            }
            if let Some(gamma) = gamma {
                let mut squares = [0.0f32; 16];
                for block in x.chunks_exact(16) {
                    for j in 0..16 {
                        squares[j] += block[j] * block[j];
                    }
                }
                let rstd = 1.0 / (squares.iter().sum::<f32>() / d as f32 + i.eps).sqrt();
                for (x, g) in x.iter_mut().zip(gamma) {
                    *x = *x * rstd * (g.to_f32() + i.weight_offset);
                }
            }
            let position = i.meta.positions[row] as usize;
            if let (Some((cos, sin)), true) = (i.tables, rotated) {
                let angles = position * (d / 2);
                let (cos, sin) = (&cos[angles..][..d / 2], &sin[angles..][..d / 2]);
                for (b, pair) in x.chunks_exact_mut(16).enumerate() {
                    for j in 0..8 {
                        let (c, s) = (cos[8 * b + j], sin[8 * b + j]);
                        let (first, second) = (pair[j], pair[8 + j]);
                        pair[j] = first * c - second * s;
                        pair[8 + j] = second * c + first * s;
                    }
                }
            }
            let out = if head < i.q_heads {
                i.q.at((row * i.q_heads + head) * d)
            } else {
                let kv = head - i.q_heads;
                let (page, slot) = i.meta.place(i.meta.row_seq[row] as usize, position);
                i.cache.at(i
                    .shape
                    .offset(page, kv >= i.kv_heads, kv % i.kv_heads, slot))
            };
            // SAFETY: a task alone writes its head of q and its (k or v, head) planes of the cache; `check`
            // showed pages and positions to be inside.
            unsafe {
                for j in (0..d).step_by(S::LANES) {
                    E::store::<S>(out.add(j), S::load(x.as_ptr().add(j)));
                }
            }
        }
    }
}
