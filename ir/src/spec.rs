//! Payloads of composite and lowered operations: plain data that decides what a kernel computes.

use crate::shape::Dim;
use std::fmt;

/// A real constant with total order and hash, so that payloads can be e-graph keys. NaN is not
/// representable in practice: constants come from configurations and masks.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Real(u64);

impl Real {
    /// Wraps a value; `-0.0` becomes `0.0` so that equal reals are equal keys.
    pub fn new(v: f64) -> Real {
        Real(if v == 0.0 { 0 } else { v.to_bits() })
    }

    /// The value.
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }
}

impl PartialOrd for Real {
    fn partial_cmp(&self, o: &Real) -> Option<std::cmp::Ordering> {
        Some(self.cmp(o))
    }
}

impl Ord for Real {
    fn cmp(&self, o: &Real) -> std::cmp::Ordering {
        self.get().total_cmp(&o.get())
    }
}

impl fmt::Debug for Real {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Real {
    /// The shortest text that reads back as the same f64.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v = self.get();
        if v != 0.0 && (v.abs() < 1e-4 || v.abs() >= 1e16) {
            write!(f, "{v:e}")
        } else {
            write!(f, "{v:?}")
        }
    }
}

/// Which keys a query may see. Key `j` is visible to query `i` (positions in one sequence) iff
/// `(!causal || j <= i) && (window is none || j > i - window)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Mask {
    /// Later keys are hidden.
    pub causal: bool,
    /// Only the `window` most recent keys (itself included) are visible.
    pub window: Option<u32>,
}

impl Mask {
    /// Every key is visible.
    pub const ALL: Mask = Mask {
        causal: false,
        window: None,
    };
    /// Key `j` is visible to query `i` iff `j <= i`.
    pub const CAUSAL: Mask = Mask {
        causal: true,
        window: None,
    };

    /// Keys visible under both masks.
    pub fn and(self, o: Mask) -> Mask {
        Mask {
            causal: self.causal || o.causal,
            window: match (self.window, o.window) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
        }
    }

    /// Whether key position `j` is visible to query position `i`.
    pub fn visible(self, i: i64, j: i64) -> bool {
        (!self.causal || j <= i) && self.window.is_none_or(|w| j > i - i64::from(w))
    }
}

/// `softmax(cap(scale · q·kᵀ) + mask) · v`, with `cap(s) = softcap · tanh(s / softcap)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct AttnSpec {
    /// Factor of the scores.
    pub scale: Real,
    /// Soft cap of the scores (Gemma 2), applied after the scale.
    pub softcap: Option<Real>,
    /// Visible keys.
    pub mask: Mask,
    /// Query heads per KV head: query head `h` attends with KV head `h / groups`.
    pub groups: u32,
    /// How far a still open attention ([`crate::Op::Sdpa`]) has been peeled; `Closed` in
    /// [`crate::Op::Attn`].
    pub stage: SdpaStage,
}

impl AttnSpec {
    /// An open attention whose scores have not been looked at yet.
    pub fn open() -> AttnSpec {
        AttnSpec {
            scale: Real::new(1.0),
            softcap: None,
            mask: Mask::ALL,
            groups: 1,
            stage: SdpaStage::Mask,
        }
    }
}

/// Modifiers are peeled from the scores from outside in: masks, then a soft cap, then scales.
/// An order that no kernel implements is never reached, because a stage only advances.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum SdpaStage {
    /// Nothing but masks has been peeled.
    Mask,
    /// A soft cap has been peeled.
    Cap,
    /// A scale has been peeled.
    Scale,
    /// The scores were `q·kᵀ`: the attention is closed.
    Closed,
}

/// Rotary position embedding in the rotate-half form of Hugging Face: for `i < D/2`,
/// `y[i] = x[i]·c − x[i+D/2]·s` and `y[i+D/2] = x[i+D/2]·c + x[i]·s` with
/// `c, s = scaling · cos, sin(position · inv_freq[i])`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct RopeSpec {
    /// `attention_scaling` of yarn and longrope; 1 otherwise.
    pub scaling: Real,
}

/// The sequence window of one step: which axes of a full-sequence value are batch and sequence.
/// The windowed value has the token axis `T` first and the other axes in order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct WinSpec {
    /// Axis of extent `B`, if the value has one.
    pub batch: Option<u8>,
    /// Axis of extent `S`, if the value has one.
    pub seq: Option<u8>,
}

/// One projection into heads: `rope(head_norm(reshape(x·wᵀ + bias, [T, heads, head_dim])))`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ProjSpec {
    /// Number of heads.
    pub heads: u32,
    /// Features per head.
    pub head_dim: u32,
    /// RMSNorm over each head with this epsilon (Qwen 3).
    pub head_norm: Option<Real>,
    /// Rotary embedding after the norm.
    pub rope: Option<RopeSpec>,
}

/// Attention on a packed projection: splits `qkv`, applies head norms and RoPE, appends k and v
/// to the cache and attends.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct QkvSpec {
    /// The attention proper.
    pub attn: AttnSpec,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Features per head.
    pub head_dim: u32,
    /// Epsilon of the RMSNorm of query and key heads.
    pub head_norm: Option<Real>,
    /// Rotary embedding of queries and keys.
    pub rope: Option<RopeSpec>,
}

impl QkvSpec {
    /// Features of a packed row: `(heads + 2·kv_heads) · head_dim`.
    pub fn features(&self) -> u32 {
        (self.kv_heads.saturating_mul(2))
            .saturating_add(self.heads)
            .saturating_mul(self.head_dim)
    }
}

/// What a GEMM does to its input rows first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Prologue {
    /// Nothing.
    None,
    /// `rmsnorm(x)·gamma`; without gamma `rmsnorm(x)`: the columns of the weight are multiplied by it.
    Rms {
        /// Added to the mean square.
        eps: Real,
    },
    /// `rmsnorm(x + delta)·gamma`; the sum is a second result.
    AddRms {
        /// Added to the mean square.
        eps: Real,
    },
}

/// What a GEMM does to its accumulators last.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Epilogue {
    /// Nothing.
    None,
    /// Adds a residual of the output's shape.
    Residual,
    /// `silu(gate)·up` of the gate and up rows interleaved by [`PackKind::GateUp`]: halves the
    /// features.
    SwiGlu,
}

/// A GEMM `y = epilogue(prologue(x)·wᵀ + bias)` with x `[.., K]`, w `[N, K]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct GemmSpec {
    /// Applied to the rows of x.
    pub prologue: Prologue,
    /// Applied to the accumulators, after the bias.
    pub epilogue: Epilogue,
}

impl GemmSpec {
    /// `x·wᵀ (+ bias)`.
    pub const PLAIN: GemmSpec = GemmSpec {
        prologue: Prologue::None,
        epilogue: Epilogue::None,
    };
}

/// How weight tensors are laid out as one (see ARCHITECTURE.md, weight layout).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum PackKind {
    /// Rows of q, k and v one after the other. With `interleave`, the rows of each q and k head
    /// are ordered in blocks of 16: 8 rows of the head's first half, then their RoPE partners.
    Qkv {
        /// Features per head.
        head_dim: u32,
        /// Whether RoPE partners are interleaved.
        interleave: bool,
    },
    /// A vector over one head (a head norm's gamma) in the order of an interleaved head.
    Head {
        /// Features per head.
        head_dim: u32,
    },
    /// Rows of gate and up in blocks of 16: 8 gate rows, then the 8 up rows of the same features.
    GateUp,
}

impl PackKind {
    /// The row count of the packed tensor, if the layout can hold operands of these row counts:
    /// the length of [`PackKind::source_rows`].
    pub fn packed_rows(self, rows: &[usize]) -> Option<usize> {
        match (self, rows) {
            (PackKind::GateUp, &[gate, up]) => {
                (gate == up && gate % 8 == 0).then(|| gate.checked_mul(2))?
            }
            (
                PackKind::Qkv {
                    head_dim,
                    interleave,
                },
                &[q, k, v],
            ) => {
                let d = head_dim as usize;
                let whole = q.checked_rem(d)? == 0 && k.checked_rem(d)? == 0 && k == v;
                (whole && (!interleave || d.is_multiple_of(16)))
                    .then(|| q.checked_add(k)?.checked_add(v))?
            }
            (PackKind::Head { head_dim }, &[n]) => {
                (n == head_dim as usize && n.is_multiple_of(16)).then_some(n)
            }
            _ => None,
        }
    }

    /// For each row of the packed tensor, which operand and which of its rows it comes from.
    /// `rows[i]` is the row count of operand `i`. `None` if the layout cannot hold such operands
    /// (a half head or an intermediate size that is not a multiple of 8).
    pub fn source_rows(self, rows: &[usize]) -> Option<Vec<(usize, usize)>> {
        let n = self.packed_rows(rows)?;
        let mut out = Vec::with_capacity(n);
        match self {
            PackKind::GateUp => out.extend((0..n).map(|r| ((r / 8) % 2, r / 16 * 8 + r % 8))),
            PackKind::Qkv {
                head_dim,
                interleave,
            } => {
                let d = head_dim as usize;
                for (part, &n) in rows[..2].iter().enumerate() {
                    out.extend((0..n).map(|r| {
                        let local = if interleave {
                            interleaved_source(r % d, d)
                        } else {
                            r % d
                        };
                        (part, r / d * d + local)
                    }));
                }
                out.extend((0..rows[2]).map(|r| (2, r)));
            }
            PackKind::Head { .. } => out.extend((0..n).map(|r| (0, interleaved_source(r, n)))),
        }
        Some(out)
    }
}

/// The natural row of a head that stands at `row` of the interleaved head of `d` rows.
pub fn interleaved_source(row: usize, d: usize) -> usize {
    let (block, within) = (row / 16, row % 16);
    block * 8 + within % 8 + if within >= 8 { d / 2 } else { 0 }
}

/// A named tensor of the checkpoint.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct WeightRef {
    /// Name in the checkpoint, e.g. `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Extents; always constants.
    pub shape: Vec<i64>,
}

impl WeightRef {
    /// The extents as dims.
    pub fn dims(&self) -> Vec<Dim> {
        self.shape.iter().map(|&n| Dim::new(n)).collect()
    }
}
