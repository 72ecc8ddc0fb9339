//! The heads of an attention step, and which kernels take them.

use crate::cuda::launch::CudaOptions;
use crate::cuda::limits::LIMITS;
use crate::plan::Step;
use crate::work::{AttnWork, KernelClass, Work, WorkShape};
use lathe_ir::ops::{AttnStep, attn_qkv, attn_step};
use lathe_ir::{AttnSpec, DType, Op, Slot, SymEnv, TensorType};

/// One attention over keys and values that are in the cache.
pub(in crate::cuda) struct Heads {
    pub(in crate::cuda) spec: AttnSpec,
    pub(in crate::cuda) hq: usize,
    pub(in crate::cuda) hkv: usize,
    pub(in crate::cuda) d: usize,
    pub(in crate::cuda) dtype: DType,
}

impl Heads {
    /// The heads of an attention step, of separate q, k and v or of a packed projection; `None` if it is no attention.
    ///
    /// # Errors
    /// An operand is not what it should be.
    pub(in crate::cuda) fn of(step: &Step, env: &SymEnv) -> Option<Result<Heads, String>> {
        let tensor = |operand: Slot| {
            let ty = step.tensor(operand);
            ty.ok_or_else(|| format!("operand '{}' is no tensor", operand.name()))
        };
        match &step.op {
            Op::AttnStep(AttnStep(spec)) => Some((|| {
                let (q, k) = (tensor(attn_step::Q)?, tensor(attn_step::K)?);
                let extent = |t: &TensorType, axis: usize| {
                    t.shape.get(axis).map_or(0, |d| d.eval(env)) as usize
                };
                Ok(Heads {
                    spec: *spec,
                    hq: extent(q, 1),
                    hkv: extent(k, 1),
                    d: extent(q, 2),
                    dtype: q.dtype,
                })
            })()),
            Op::AttnQkv(spec) => Some(tensor(attn_qkv::QKV).map(|qkv| Heads {
                spec: spec.attn,
                hq: spec.heads as usize,
                hkv: spec.kv_heads as usize,
                d: spec.head_dim as usize,
                dtype: qkv.dtype,
            })),
            _ => None,
        }
    }

    /// Query heads of a key head.
    pub(in crate::cuda) fn group(&self) -> usize {
        self.hq / self.hkv.max(1)
    }

    /// Whether the decode kernel takes them.
    pub(in crate::cuda) fn decode_takes(&self, options: &CudaOptions) -> bool {
        let (group, d) = (self.group(), self.d);
        let types = self.dtype == DType::BF16 || self.dtype == DType::F32;
        // The plain form keeps a warp's outputs of all heads in registers.
        let fits = self.dtype == DType::BF16 || group * d.div_ceil(32) <= 64;
        types && fits && group <= 16 && d % 16 == 0 && d <= LIMITS.head_dim && !options.plain
    }

    /// Whether the tensor-core prefill takes them.
    pub(in crate::cuda) fn prefill_takes(&self, options: &CudaOptions) -> bool {
        let page = options.page_size;
        let page_box = page.min(64);
        let pages = matches!(page_box, 8 | 16 | 32 | 64) && page.is_multiple_of(page_box);
        let heads = self.d.is_multiple_of(8) && self.d <= LIMITS.head_dim && self.group() <= 64;
        self.dtype == DType::BF16 && pages && heads && !options.plain
    }

    /// Consumer warpgroups of the prefill kernel. Three leave too few registers for a soft cap.
    pub(in crate::cuda) fn prefill_groups(&self) -> usize {
        if self.d <= 64 && self.spec.softcap.is_none() {
            3
        } else {
            2
        }
    }

    /// Query rows of a tile of the prefill kernel.
    pub(in crate::cuda) fn prefill_rows(&self) -> usize {
        64 * self.prefill_groups() / self.group().max(1)
    }

    /// A launch that moves rows of so many heads from one place to another.
    pub(in crate::cuda) fn copied(&self, rows: usize, heads: usize) -> Work {
        let cols = heads * self.d;
        let bytes = 2 * rows * cols * self.dtype.size();
        Work::rows(KernelClass::Attention, rows, cols, bytes)
    }

    /// A launch that attends for the sequences with so many new rows: it reads `read` heads of a row and the cache,
    /// and writes its outputs.
    pub(in crate::cuda) fn attended(&self, read: usize, rows: (usize, usize)) -> Work {
        let element = self.dtype.size();
        Work {
            class: KernelClass::Attention,
            shape: WorkShape::Attention(AttnWork {
                heads: lathe_ir::Heads {
                    heads: self.hq as u32,
                    kv_heads: self.hkv as u32,
                    head_dim: self.d as u32,
                    element: element as u32,
                    window: self.spec.mask.window,
                },
                row_bytes: ((read + self.hq) * self.d * element) as u32,
                rows,
            }),
            bytes: 0.0,
            flops: 0.0,
        }
    }
}
