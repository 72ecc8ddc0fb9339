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
    /// D, a multiple of 16.
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
/// Rows between RoPE partners, and lanes of the vectors used.
const HALF: usize = 8;
/// Elements below which heads are not shared out over threads.
const PARALLEL_ELEMENTS: usize = 16 << 10;
/// Rows of q in a task.
const ROWS: usize = 16;

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
    if head_dim == 0 || !head_dim.is_multiple_of(2 * HALF) {
        let what = format!("a head of {head_dim}, not a multiple of 16");
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

    // 8 lanes on every instruction set, so that a pair of vectors holds the pairs of a block.
    let isa = Isa::current().min(Isa::Avx2);
    let inputs = Inputs {
        q_heads,
        kv_heads,
        head_dim,
        qkv: args.qkv,
        bias: args.bias,
        q_norm: args.q_norm,
        k_norm: args.k_norm,
        eps: args.eps,
        tables: args.tables,
        meta,
        shape,
        q: SharedMut::new(args.q),
        cache: SharedMut::new(args.cache),
    };
    if rows * heads * head_dim < PARALLEL_ELEMENTS {
        dispatch(
            isa,
            Heads {
                inputs: &inputs,
                heads: 0..heads,
                rows: 0..rows,
            },
        );
        return Ok(());
    }
    // q is cut by rows. Keys and values are cut by heads, so that no two tasks can write one cache slot
    // whatever the positions are.
    let spans = rows.div_ceil(ROWS);
    parallel_for(spans + 2 * kv_heads, |task| {
        let (heads, rows) = match task.checked_sub(spans) {
            None => (0..q_heads, task * ROWS..rows.min((task + 1) * ROWS)),
            Some(h) => (q_heads + h..q_heads + h + 1, 0..rows),
        };
        dispatch(
            isa,
            Heads {
                inputs: &inputs,
                heads,
                rows,
            },
        );
    });
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
    tables: Option<(&'a [f32], &'a [f32])>,
    meta: StepMeta<'a>,
    shape: CacheShape,
    q: SharedMut<E>,
    cache: SharedMut<E>,
}

/// Some heads of some rows.
struct Heads<'a, 'b, E> {
    inputs: &'a Inputs<'b, E>,
    heads: std::ops::Range<usize>,
    rows: std::ops::Range<usize>,
}

impl<E: Elem> Kernel for Heads<'_, '_, E> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        for row in self.rows {
            for head in self.heads.clone() {
                one_head::<S, E>(self.inputs, row, head);
            }
        }
    }
}

/// A head as the rotation sees it: with its bias, and normalised once `gamma` is set.
struct Projected<E> {
    source: *const E,
    bias: Option<*const E>,
    gamma: Option<*const E>,
    rstd: f32,
}

impl<E: Elem> Projected<E> {
    /// # Safety
    /// Callable below `dispatch`; the vector at `j` lies inside the head.
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, j: usize) -> S::V {
        // SAFETY: the caller's guarantee; all pointers are to heads.
        unsafe {
            let mut v = E::load::<S>(self.source.add(j));
            if let Some(bias) = self.bias {
                v = S::add(v, E::load::<S>(bias.add(j)));
            }
            if let Some(gamma) = self.gamma {
                let g = E::load::<S>(gamma.add(j));
                v = S::mul(S::mul(v, S::splat(self.rstd)), g);
            }
            v
        }
    }
}

#[inline(always)]
fn one_head<S: Simd, E: Elem>(i: &Inputs<'_, E>, row: usize, head: usize) {
    let d = i.head_dim;
    let heads = i.q_heads + 2 * i.kv_heads;
    let (gamma, rotated) = match head {
        h if h < i.q_heads => (i.q_norm, true),
        h if h < i.q_heads + i.kv_heads => (i.k_norm, true),
        _ => (None, false),
    };
    let position = i.meta.positions[row] as usize;
    let out = if head < i.q_heads {
        i.q.at((row * i.q_heads + head) * d)
    } else {
        let kv = head - i.q_heads;
        let (page, slot) = i.meta.place(i.meta.row_seq[row] as usize, position);
        i.cache.at(i
            .shape
            .offset(page, kv >= i.kv_heads, kv % i.kv_heads, slot))
    };
    let source = i.qkv[(row * heads + head) * d..][..d].as_ptr();
    let bias = i.bias.map(|b| b[head * d..][..d].as_ptr());
    debug_assert!(
        S::LANES == HALF,
        "invariant rope-lanes: a vector holds half a block"
    );
    let mut projected = Projected {
        source,
        bias,
        gamma: None,
        rstd: 1.0,
    };
    // SAFETY: blocks lie inside the head of d values. A task alone writes its heads of its rows of
    // q, or its (k or v, head) planes of the cache; `check` showed pages and positions to be inside.
    unsafe {
        if let Some(gamma) = gamma {
            let mut squares = S::splat(0.0);
            for j in (0..d).step_by(HALF) {
                let v = projected.load::<S>(j);
                squares = S::fma(v, v, squares);
            }
            projected.rstd = 1.0 / (S::sum(squares) / d as f32 + i.eps).sqrt();
            projected.gamma = Some(gamma.as_ptr());
        }
        let angles = i.tables.filter(|_| rotated).map(|(cos, sin)| {
            let at = position * (d / 2);
            (cos[at..][..d / 2].as_ptr(), sin[at..][..d / 2].as_ptr())
        });
        for j in (0..d).step_by(2 * HALF) {
            let (mut first, mut second) = (projected.load::<S>(j), projected.load::<S>(j + HALF));
            if let Some((cos, sin)) = angles {
                let (c, s) = (S::load(cos.add(j / 2)), S::load(sin.add(j / 2)));
                let (a, b) = (first, second);
                first = S::sub(S::mul(a, c), S::mul(b, s));
                second = S::fma(b, c, S::mul(a, s));
            }
            E::store::<S>(out.add(j), first);
            E::store::<S>(out.add(j + HALF), second);
        }
    }
}
