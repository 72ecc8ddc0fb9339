//! Matrix products, and the layouts of their weights.

use super::checks::{
    broadcast_of, linear_of, norm_operands, optional, same_dtype, same_type, want_float,
    want_min_rank,
};
use super::{Class, Fields, Level, Operation, Signature};
use crate::operands::{Operands, Slot};
use crate::shape::{Dim, format_shape};
use crate::{Real, TensorType, Type};

type Rule = Result<Type, String>;

/// `(a [..,M,K], b [..,K,N]) -> [..,M,N]`; leading axes broadcast.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Matmul;

/// Operands of [`Matmul`].
pub mod matmul {
    use super::Slot;
    /// The left matrices.
    pub const A: Slot = Slot::value(0, "a");
    /// The right matrices.
    pub const B: Slot = Slot::value(1, "b");
}

impl Operation for Matmul {
    const NAMES: &'static [&'static str] = &["matmul"];
    const SIGNATURE: Signature =
        Signature::new(Level::Primitive, Class::Matmul, &[matmul::A, matmul::B]);

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        product(x.tensor(matmul::A)?, x.tensor(matmul::B)?)
    }
}

/// The type of a matrix product.
pub(super) fn product(a: &TensorType, b: &TensorType) -> Rule {
    same_dtype(a, b)?;
    want_float(a, "a")?;
    want_min_rank(a, 2)?;
    want_min_rank(b, 2)?;
    let (ra, rb) = (a.rank(), b.rank());
    if a.shape[ra - 1] != b.shape[rb - 2] {
        return Err(format!(
            "inner extents differ: {} and {}",
            format_shape(&a.shape),
            format_shape(&b.shape)
        ));
    }
    let mut shape = broadcast_of(&a.shape[..ra - 2], &b.shape[..rb - 2])?;
    shape.push(a.shape[ra - 2]);
    shape.push(b.shape[rb - 1]);
    Ok(Type::tensor(a.dtype, shape))
}

/// `(x [..,K], w [N,K]) -> [..,N]`: `x·wᵀ`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Linear;

/// Operands of [`Linear`].
pub mod linear {
    use super::Slot;
    /// The rows.
    pub const X: Slot = Slot::value(0, "x");
    /// The weight, as it is stored.
    pub const W: Slot = Slot::weight(1, "w");
}

impl Operation for Linear {
    const NAMES: &'static [&'static str] = &["linear"];
    const SIGNATURE: Signature =
        Signature::new(Level::Composite, Class::Gemm, &[linear::X, linear::W]);

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        linear_of(x.tensor(linear::X)?, x.tensor(linear::W)?).map(Type::Tensor)
    }
}

/// What a GEMM does to its input rows first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub enum Prologue {
    /// Nothing.
    #[default]
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
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub enum Epilogue {
    /// Nothing.
    #[default]
    None,
    /// Adds a residual of the output's shape.
    Residual,
    /// `silu(gate)·up` of the gate and up rows interleaved by [`Pack::GateUp`]: halves the
    /// features.
    SwiGlu,
}

/// A GEMM `y = epilogue(prologue(x)·wᵀ + bias)` with x `[.., K]`, w `[N, K]`. With the
/// [`Prologue::AddRms`] prologue the result is a tuple `(x + delta, y)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Gemm {
    /// Applied to the rows of x.
    pub prologue: Prologue,
    /// Applied to the accumulators, after the bias.
    pub epilogue: Epilogue,
}

/// Operands of [`Gemm`].
pub mod gemm {
    use super::Slot;
    /// The rows.
    pub const X: Slot = Slot::value(0, "x");
    /// The weight, as it is laid out.
    pub const W: Slot = Slot::weight(1, "w");
    /// Added to the features.
    pub const BIAS: Slot = Slot::weight(2, "bias").optional();
    /// Added to the result, by [`super::Epilogue::Residual`].
    pub const RESIDUAL: Slot = Slot::value(3, "residual").optional();
    /// Factors of the columns of the norm; absent where the weight's columns hold them.
    pub const GAMMA: Slot = Slot::weight(4, "gamma").optional();
    /// Added to the rows before the norm, by [`super::Prologue::AddRms`].
    pub const DELTA: Slot = Slot::value(5, "delta").optional();
}

impl Gemm {
    /// `x·wᵀ (+ bias)`.
    pub const PLAIN: Gemm = Gemm {
        prologue: Prologue::None,
        epilogue: Epilogue::None,
    };

    /// Its name in lists of kernels, with what is fused into it.
    pub fn kernel_name(&self) -> String {
        let before = match self.prologue {
            Prologue::None => "",
            Prologue::Rms { .. } => "rmsnorm·",
            Prologue::AddRms { .. } => "add+rmsnorm·",
        };
        let after = match self.epilogue {
            Epilogue::None => "",
            Epilogue::Residual => "·residual",
            Epilogue::SwiGlu => "·swiglu",
        };
        format!("{before}gemm{after}")
    }
}

impl Operation for Gemm {
    const NAMES: &'static [&'static str] = &["gemm"];
    const SIGNATURE: Signature = Signature::new(
        Level::Lowered,
        Class::Gemm,
        &[
            gemm::X,
            gemm::W,
            gemm::BIAS,
            gemm::RESIDUAL,
            gemm::GAMMA,
            gemm::DELTA,
        ],
    );

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        // The kind of prologue, and the number that the kinds with a norm have.
        let (mut kind, mut eps) = match self.prologue {
            Prologue::None => (0_u8, Real::default()),
            Prologue::Rms { eps } => (1, eps),
            Prologue::AddRms { eps } => (2, eps),
        };
        v.opt_word(
            "prologue",
            &mut kind,
            &[("none", 0), ("rms", 1), ("addrms", 2)],
        )?;
        if kind > 0 {
            v.real("eps", &mut eps)?;
        }
        self.prologue = match kind {
            0 => Prologue::None,
            1 => Prologue::Rms { eps },
            _ => Prologue::AddRms { eps },
        };
        let epilogues = [
            ("none", Epilogue::None),
            ("residual", Epilogue::Residual),
            ("swiglu", Epilogue::SwiGlu),
        ];
        v.opt_word("epilogue", &mut self.epilogue, &epilogues)
    }

    fn ty(&self, ops: &Operands<&Type>) -> Rule {
        let (x, w) = (ops.tensor(gemm::X)?, ops.tensor(gemm::W)?);
        let mut y = linear_of(x, w)?;
        optional(ops, gemm::BIAS, &w.shape[..1])?;
        let last = y.rank() - 1;
        if self.epilogue == Epilogue::SwiGlu {
            let n = y.shape[last].known().unwrap_or(0);
            if n % 16 != 0 {
                return Err(format!("{n} interleaved rows are no multiple of 16"));
            }
            y.shape[last] = Dim::new(n / 2);
        }
        match (
            self.epilogue == Epilogue::Residual,
            ops.opt_tensor(gemm::RESIDUAL)?,
        ) {
            (true, Some(t)) => same_type(t, &y)?,
            (true, None) => return Err("the residual is absent".to_string()),
            (false, Some(_)) => return Err("a residual without its epilogue".to_string()),
            (false, None) => {}
        }
        let gamma = ops.opt_tensor(gemm::GAMMA)?;
        if let Some(gamma) = gamma {
            norm_operands(x, gamma)?;
        }
        match (self.prologue, gamma, ops.opt_tensor(gemm::DELTA)?) {
            (Prologue::None, None, None) | (Prologue::Rms { .. }, _, None) => Ok(Type::Tensor(y)),
            (Prologue::AddRms { .. }, Some(_), Some(d)) => {
                same_type(x, d)?;
                Ok(Type::Tuple(vec![Type::Tensor(x.clone()), Type::Tensor(y)]))
            }
            _ => Err("the prologue's operands do not fit".to_string()),
        }
    }
}

/// How weight tensors are laid out as one (see ARCHITECTURE.md, weight layout).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub enum Pack {
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
    #[default]
    GateUp,
}

impl Pack {
    /// The row count of the packed tensor, if the layout can hold operands of these row counts:
    /// the length of [`Pack::source_rows`].
    pub fn packed_rows(self, rows: &[usize]) -> Option<usize> {
        match (self, rows) {
            (Pack::GateUp, &[gate, up]) => {
                (gate == up && gate % 8 == 0).then(|| gate.checked_mul(2))?
            }
            (
                Pack::Qkv {
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
            (Pack::Head { head_dim }, &[n]) => {
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
            Pack::GateUp => out.extend((0..n).map(|r| ((r / 8) % 2, r / 16 * 8 + r % 8))),
            Pack::Qkv {
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
            Pack::Head { .. } => out.extend((0..n).map(|r| (0, interleaved_source(r, n)))),
        }
        Some(out)
    }
}

/// The natural row of a head that stands at `row` of the interleaved head of `d` rows.
pub fn interleaved_source(row: usize, d: usize) -> usize {
    let (block, within) = (row / 16, row % 16);
    block * 8 + within % 8 + if within >= 8 { d / 2 } else { 0 }
}

impl Operation for Pack {
    const NAMES: &'static [&'static str] = &["pack"];
    const SIGNATURE: Signature = Signature::variadic(Level::Lowered, Class::Movement);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        let (mut kind, mut head_dim, mut interleave) = match *self {
            Pack::Qkv {
                head_dim,
                interleave,
            } => (0_u8, head_dim, interleave),
            Pack::Head { head_dim } => (1, head_dim, true),
            Pack::GateUp => (2, 0, false),
        };
        v.word(
            "kind",
            &mut kind,
            &[("qkv", 0), ("head", 1), ("gate_up", 2)],
        )?;
        if kind < 2 {
            v.int("head_dim", &mut head_dim)?;
        }
        if kind == 0 {
            v.flag("interleave", &mut interleave)?;
        }
        *self = match kind {
            0 => Pack::Qkv {
                head_dim,
                interleave,
            },
            1 => Pack::Head { head_dim },
            _ => Pack::GateUp,
        };
        Ok(())
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let mut rows = Vec::new();
        let mut first: Option<&TensorType> = None;
        for t in x {
            let t = t.as_tensor().ok_or("an operand is not a tensor")?;
            want_min_rank(t, 1)?;
            let n = t.shape[0].known().ok_or("an operand has symbolic rows")?;
            rows.push(usize::try_from(n).map_err(|_| format!("an operand has {n} rows"))?);
            let f = *first.get_or_insert(t);
            same_dtype(f, t)?;
            if f.shape[1..] != t.shape[1..] {
                return Err("operands have rows of different lengths".to_string());
            }
        }
        let first = first.ok_or("no operands")?;
        let n = self
            .packed_rows(&rows)
            .ok_or_else(|| format!("operands of {rows:?} rows do not fit {self:?}"))?;
        let mut shape = first.shape.clone();
        shape[0] = Dim::from(n);
        Ok(Type::tensor(first.dtype, shape))
    }
}
