//! What a kernel has to compute and to move, for the rates of measured kernels: operations of the matrix products
//! (a multiply-add counts two) and bytes that must pass through memory once.

use crate::plan::{Operand, Step};
use lathe_ir::{Class, Heads, Op, Product, SymEnv, TensorType};
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

/// An attention over the cache in one launch; its work depends on the lengths of the sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AttnWork {
    /// Its sizes.
    pub heads: Heads,
    /// Bytes of a row's queries and outputs; 0 where [`Work::bytes`] has them.
    pub row_bytes: u32,
    /// Fewest and most new rows of the sequences that the launch attends for; the others belong to another launch.
    pub rows: (usize, usize),
}

impl AttnWork {
    /// Sequences with any number of new rows.
    pub const ALL_ROWS: (usize, usize) = (1, usize::MAX);

    /// Attention of all sequences.
    fn new(heads: Heads) -> AttnWork {
        AttnWork {
            heads,
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

    /// Bytes of the keys and values that some row of the step sees, each counted once.
    pub fn live_bytes(&self, spans: &[Span]) -> f64 {
        let live = |s: &Span| match self.heads.window {
            Some(w) => s.len.min(w as usize + s.rows.saturating_sub(1)),
            None => s.len,
        };
        self.heads.token_bytes() * self.mine(spans).map(live).sum::<usize>() as f64
    }

    /// Bytes of the queries and outputs of its rows.
    fn own_bytes(&self, spans: &[Span]) -> f64 {
        f64::from(self.row_bytes) * self.mine(spans).map(|s| s.rows).sum::<usize>() as f64
    }

    /// Operations under the causal mask, over each key that a row sees.
    pub fn flops(&self, spans: &[Span]) -> f64 {
        let keys = |s: &Span| {
            let first = s.len - s.rows.min(s.len);
            let seen = (first + 1..=s.len).map(|n| self.heads.seen(n));
            seen.sum::<usize>()
        };
        self.heads.pair_flops() * self.mine(spans).map(keys).sum::<usize>() as f64
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
                let h = a.heads;
                write!(f, "{}/{} heads of {}", h.heads, h.kv_heads, h.head_dim)?;
                h.window.map_or(Ok(()), |w| write!(f, ", window {w}"))
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
        let out = (0..step.results.len())
            .rev()
            .find_map(|i| step.result_type(i));
        let told = step.work(env);
        let shape = match (told.product, told.attention) {
            (_, Some(heads)) => WorkShape::Attention(AttnWork::new(heads)),
            (Some(Product { m, n, k }), None) if step.op.class() == Class::Gemm => {
                WorkShape::Gemm { m, n, k }
            }
            _ => rows_of(out, env),
        };
        Work {
            class: KernelClass::of(&step.op),
            shape,
            bytes: told.bytes() - unread(step, env) - unwritten(step, env),
            flops: told.matrix,
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

/// Bytes of operands that are nowhere in memory, or smaller there than in the program.
fn unread(step: &Step, env: &SymEnv) -> f64 {
    if matches!(step.op, Op::Embedding(_) | Op::Select(_)) {
        return 0.0;
    }
    let less = step.tensors().map(|(o, t)| match o {
        Operand::Const { .. } => t.bytes(env) as f64,
        // Inputs are 32-bit integers, whatever their type in the program.
        Operand::Input(_) => t.bytes(env) as f64 - 4.0 * t.elements(env) as f64,
        _ => 0.0,
    });
    less.sum()
}

/// Bytes of results that are not stored.
fn unwritten(step: &Step, env: &SymEnv) -> f64 {
    let results = step.results.iter().enumerate();
    let dropped = results.filter(|(_, r)| r.is_none());
    let types = dropped.filter_map(|(i, _)| step.result_type(i));
    types.map(|t| t.bytes(env)).sum::<usize>() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads {
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        element: 2,
        window: None,
    };
    const ATTN: AttnWork = AttnWork {
        heads: HEADS,
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
        let windowed = AttnWork::new(Heads {
            window: Some(3),
            ..HEADS
        });
        // Rows 3 to 6 see 3 keys each; together they see tokens 1 to 6.
        let chunk = [Span { rows: 4, len: 7 }];
        assert_eq!(windowed.flops(&chunk), 12.0 * 128.0);
        assert_eq!(windowed.live_bytes(&chunk), 6.0 * 64.0);
        let decode = [Span { rows: 1, len: 100 }];
        assert_eq!(windowed.live_bytes(&decode), 3.0 * 64.0);
    }
}
