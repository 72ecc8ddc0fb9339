//! What a kernel has to compute and to move, for the rates of measured kernels: operations of the matrix products
//! (a multiply-add counts two) and bytes that must pass through memory once.

use crate::plan::{Operand, Step};
use lathe_ir::Class;
use lathe_ir::ops::AttnStep;
use lathe_ir::ops::{attn_qkv, attn_step, gemm, matmul};
use lathe_ir::{Op, SymEnv, TensorType};
use serde::Serialize;
use std::fmt;

/// Kinds of kernels, for tables of where a step's time goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelClass {
    /// Attention with all that it needs: rotation, append to the cache, work lists.
    Attention,
    /// Matrix products, with whatever is fused into them.
    Gemm,
    /// Norms, reductions and elementwise functions.
    Pointwise,
    /// Sampling, lookups and changes of layout.
    Other,
}

impl KernelClass {
    /// All kinds, in the order of tables.
    pub const ALL: [KernelClass; 4] = [
        KernelClass::Attention,
        KernelClass::Gemm,
        KernelClass::Pointwise,
        KernelClass::Other,
    ];

    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            KernelClass::Attention => "attention",
            KernelClass::Gemm => "gemm",
            KernelClass::Pointwise => "norm, elementwise",
            KernelClass::Other => "sampling, other",
        }
    }

    /// The kind of the kernel that computes an operation.
    pub fn of(op: &Op) -> KernelClass {
        match op.class() {
            Class::Attention => KernelClass::Attention,
            Class::Gemm | Class::Matmul => KernelClass::Gemm,
            Class::Norm | Class::Elementwise => KernelClass::Pointwise,
            Class::Sample | Class::Movement => KernelClass::Other,
        }
    }
}

/// New rows of a sequence in a step, and its cached tokens once they are appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// New rows.
    pub rows: usize,
    /// Cached tokens after the step.
    pub len: usize,
}

/// Sizes of an attention over the cache; its work depends on the lengths of the sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AttnWork {
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Features of a head.
    pub head_dim: u32,
    /// Bytes of a cached element.
    pub element: u32,
    /// Keys that a row sees at most, its own among them.
    pub window: Option<u32>,
    /// Bytes of a row's queries and outputs; 0 where [`Work::bytes`] has them.
    pub row_bytes: u32,
    /// Fewest and most new rows of the sequences that the launch attends for; the others belong to another launch.
    pub rows: (usize, usize),
}

impl AttnWork {
    /// Sequences with any number of new rows.
    pub const ALL_ROWS: (usize, usize) = (1, usize::MAX);

    /// Attention of all sequences; `heads` are query heads, KV heads and the features of a head.
    fn new([heads, kv_heads, head_dim]: [u32; 3], element: u32, window: Option<u32>) -> AttnWork {
        AttnWork {
            heads,
            kv_heads,
            head_dim,
            element,
            window,
            row_bytes: 0,
            rows: AttnWork::ALL_ROWS,
        }
    }

    fn mine<'a>(&'a self, spans: &'a [Span]) -> impl Iterator<Item = &'a Span> {
        let (least, most) = self.rows;
        spans
            .iter()
            .filter(move |s| (least..=most).contains(&s.rows))
    }

    fn seen(&self, keys: usize) -> usize {
        self.window.map_or(keys, |w| keys.min(w as usize))
    }

    /// Bytes of the keys and values that some row of the step sees, each counted once.
    pub fn live_bytes(&self, spans: &[Span]) -> f64 {
        let token = 2 * self.kv_heads * self.head_dim * self.element;
        let live = |s: &Span| match self.window {
            Some(w) => s.len.min(w as usize + s.rows.saturating_sub(1)),
            None => s.len,
        };
        f64::from(token) * self.mine(spans).map(live).sum::<usize>() as f64
    }

    /// Bytes of the queries and outputs of its rows.
    fn own_bytes(&self, spans: &[Span]) -> f64 {
        f64::from(self.row_bytes) * self.mine(spans).map(|s| s.rows).sum::<usize>() as f64
    }

    /// Operations of `Q·Kᵀ` and `P·V` under the causal mask: 4 · heads · head_dim for each key that a row sees.
    pub fn flops(&self, spans: &[Span]) -> f64 {
        let keys = |s: &Span| {
            let first = s.len - s.rows.min(s.len);
            (first + 1..=s.len).map(|n| self.seen(n)).sum::<usize>()
        };
        let pairs = self.mine(spans).map(keys).sum::<usize>() as f64;
        4.0 * f64::from(self.heads * self.head_dim) * pairs
    }
}

/// What tells launches of one kernel apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WorkShape {
    /// `y[M, N] = x[M, K] · w[N, K]ᵀ`.
    Gemm {
        /// Rows of x.
        m: usize,
        /// Rows of w.
        n: usize,
        /// Columns of both.
        k: usize,
    },
    /// Attention over the cache.
    Attention(AttnWork),
    /// Any other result, as a matrix.
    Rows {
        /// Rows.
        rows: usize,
        /// Elements of a row.
        cols: usize,
    },
}

impl fmt::Display for WorkShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WorkShape::Gemm { m, n, k } => write!(f, "{m}x{n}x{k}"),
            WorkShape::Attention(a) => {
                write!(f, "{}/{} heads of {}", a.heads, a.kv_heads, a.head_dim)?;
                a.window.map_or(Ok(()), |w| write!(f, ", window {w}"))
            }
            WorkShape::Rows { rows, cols } => write!(f, "{rows}x{cols}"),
        }
    }
}

/// The work of one launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Kind of kernel.
    pub class: KernelClass,
    /// Its sizes.
    pub shape: WorkShape,
    /// Bytes of operands and results, without what attention reads of the cache.
    pub bytes: f64,
    /// Operations of matrix products, without attention's.
    pub flops: f64,
}

impl Work {
    /// The work of a step whose kernel does all of it, at given sizes.
    pub fn of_step(step: &Step, env: &SymEnv) -> Work {
        let tensor = |slot| step.tensor(slot);
        let out = (0..step.results.len())
            .rev()
            .find_map(|i| step.result_type(i));
        let (mut flops, mut shape) = (0.0, rows_of(out, env));
        match &step.op {
            // The two have their first operands in common.
            Op::Linear(_) | Op::Gemm(_) => {
                if let (Some(x), Some(w)) = (tensor(gemm::X), tensor(gemm::W)) {
                    let k = last(w, env);
                    let (m, n) = (x.elements(env) / k.max(1), w.elements(env) / k.max(1));
                    flops = gemm_flops(m, n, k);
                    shape = WorkShape::Gemm { m, n, k };
                }
            }
            Op::Matmul(_) => {
                let k = tensor(matmul::A).map_or(0, |a| last(a, env));
                flops = 2.0 * out.map_or(0, |o| o.elements(env)) as f64 * k as f64;
            }
            Op::AttnQkv(s) => {
                let element = tensor(attn_qkv::QKV).map_or(0, |t| t.dtype.size() as u32);
                let heads = [s.heads, s.kv_heads, s.head_dim];
                shape = WorkShape::Attention(AttnWork::new(heads, element, s.attn.mask.window));
            }
            Op::AttnStep(AttnStep(s)) => {
                let extent = |slot, axis: usize| {
                    let dim = tensor(slot).and_then(|t| t.shape.get(axis));
                    dim.map_or(0, |d| d.eval(env) as u32)
                };
                let element = tensor(attn_step::Q).map_or(0, |t| t.dtype.size() as u32);
                let (q, k) = (attn_step::Q, attn_step::K);
                let heads = [extent(q, 1), extent(k, 1), extent(q, 2)];
                shape = WorkShape::Attention(AttnWork::new(heads, element, s.mask.window));
            }
            _ => {}
        }
        let gathered = matches!(step.op, Op::Embedding(_) | Op::Select(_));
        Work {
            class: KernelClass::of(&step.op),
            shape,
            bytes: match (gathered, out) {
                // Only the rows that are picked are read.
                (true, Some(out)) => 2.0 * out.bytes(env) as f64,
                _ => step_bytes(step, env),
            },
            flops,
        }
    }

    /// Work on rows: nothing but memory traffic.
    pub fn rows(class: KernelClass, rows: usize, cols: usize, bytes: usize) -> Work {
        Work {
            class,
            shape: WorkShape::Rows { rows, cols },
            bytes: bytes as f64,
            flops: 0.0,
        }
    }

    /// Bytes and operations in a step over these sequences.
    pub fn on(&self, spans: &[Span]) -> (f64, f64) {
        match &self.shape {
            WorkShape::Attention(a) => (
                self.bytes + a.own_bytes(spans) + a.live_bytes(spans),
                self.flops + a.flops(spans),
            ),
            _ => (self.bytes, self.flops),
        }
    }
}

/// Operations of `[M, K] · [N, K]ᵀ`.
pub fn gemm_flops(m: usize, n: usize, k: usize) -> f64 {
    2.0 * m as f64 * n as f64 * k as f64
}

fn last(t: &TensorType, env: &SymEnv) -> usize {
    t.shape.last().map_or(1, |d| d.eval(env)) as usize
}

fn rows_of(t: Option<&TensorType>, env: &SymEnv) -> WorkShape {
    let elements = t.map_or(0, |t| t.elements(env));
    // A vector has a value for each row of the step.
    let cols = t.filter(|t| t.shape.len() > 1).map_or(1, |t| last(t, env));
    WorkShape::Rows {
        rows: elements / cols.max(1),
        cols,
    }
}

/// Bytes of the operands in memory and of the results that are stored.
fn step_bytes(step: &Step, env: &SymEnv) -> f64 {
    let read = step.tensors().map(|(o, t)| match o {
        Operand::Const { .. } => 0,
        // Inputs are 32-bit integers, whatever their type in the program.
        Operand::Input(_) => 4 * t.elements(env),
        _ => t.bytes(env),
    });
    let written = step
        .results
        .iter()
        .enumerate()
        .filter(|(_, r)| r.is_some())
        .filter_map(|(i, _)| step.result_type(i))
        .map(|t| t.bytes(env));
    read.chain(written).sum::<usize>() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const ATTN: AttnWork = AttnWork {
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        element: 2,
        window: None,
        row_bytes: 0,
        rows: AttnWork::ALL_ROWS,
    };

    /// By hand: 64 bytes a token (2 tensors of 2 heads of 8 features of 2 bytes), 128 operations a pair (2 products
    /// of 4 heads of 8 multiply-adds).
    #[test]
    fn attention_by_hand() {
        let decode = [Span { rows: 1, len: 10 }, Span { rows: 1, len: 3 }];
        assert_eq!(ATTN.live_bytes(&decode), 13.0 * 64.0);
        assert_eq!(ATTN.flops(&decode), 13.0 * 128.0);
        // Four rows on two earlier tokens see 3 + 4 + 5 + 6 keys.
        let chunk = [Span { rows: 4, len: 6 }];
        assert_eq!(ATTN.live_bytes(&chunk), 6.0 * 64.0);
        assert_eq!(ATTN.flops(&chunk), 18.0 * 128.0);
    }

    /// A mixed step in two launches: together they do what one does.
    #[test]
    fn launches_share_the_sequences_out() {
        let spans = [
            Span { rows: 1, len: 10 },
            Span { rows: 4, len: 6 },
            Span { rows: 1, len: 3 },
        ];
        let work = |rows| Work {
            class: KernelClass::Attention,
            shape: WorkShape::Attention(AttnWork {
                row_bytes: 100,
                rows,
                ..ATTN
            }),
            bytes: 0.0,
            flops: 0.0,
        };
        let single = work((1, 1)).on(&spans);
        assert_eq!(single, (200.0 + 13.0 * 64.0, 13.0 * 128.0));
        let tiled = work((2, usize::MAX)).on(&spans);
        let all = work(AttnWork::ALL_ROWS).on(&spans);
        assert_eq!((single.0 + tiled.0, single.1 + tiled.1), all);
    }

    #[test]
    fn windows_limit_both() {
        let windowed = AttnWork {
            window: Some(3),
            ..ATTN
        };
        // Rows 3 to 6 see 3 keys each; together they see tokens 1 to 6.
        let chunk = [Span { rows: 4, len: 7 }];
        assert_eq!(windowed.flops(&chunk), 12.0 * 128.0);
        assert_eq!(windowed.live_bytes(&chunk), 6.0 * 64.0);
        let decode = [Span { rows: 1, len: 100 }];
        assert_eq!(windowed.live_bytes(&decode), 3.0 * 64.0);
    }
}
