//! The operations: primitives (each one core ATen operator), composites that the passes
//! recognise, and lowered operations that have a kernel.

use crate::chain::Chain;
use crate::dtype::DType;
use crate::shape::Dim;
use crate::spec::{
    AttnSpec, GemmSpec, PackKind, ProjSpec, QkvSpec, Real, RopeSpec, WeightRef, WinSpec,
};

/// Elementwise functions of one operand.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[allow(missing_docs)]
pub enum UnaryFn {
    Neg,
    Abs,
    Exp,
    Log,
    Sqrt,
    Rsqrt,
    Sin,
    Cos,
    Tanh,
    Sigmoid,
    Erf,
    Relu,
    Not,
}

impl UnaryFn {
    /// All functions, in declaration order.
    pub const ALL: [UnaryFn; 13] = [
        UnaryFn::Neg,
        UnaryFn::Abs,
        UnaryFn::Exp,
        UnaryFn::Log,
        UnaryFn::Sqrt,
        UnaryFn::Rsqrt,
        UnaryFn::Sin,
        UnaryFn::Cos,
        UnaryFn::Tanh,
        UnaryFn::Sigmoid,
        UnaryFn::Erf,
        UnaryFn::Relu,
        UnaryFn::Not,
    ];

    /// The operation's name.
    pub fn name(self) -> &'static str {
        [
            "neg", "abs", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "erf",
            "relu", "not",
        ][self as usize]
    }
}

/// Elementwise functions of two operands, with NumPy broadcasting.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[allow(missing_docs)]
pub enum BinaryFn {
    Add,
    Sub,
    Mul,
    Div,
    Pow,
    Maximum,
    Minimum,
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    And,
    Or,
}

impl BinaryFn {
    /// All functions, in declaration order.
    pub const ALL: [BinaryFn; 15] = [
        BinaryFn::Add,
        BinaryFn::Sub,
        BinaryFn::Mul,
        BinaryFn::Div,
        BinaryFn::Pow,
        BinaryFn::Maximum,
        BinaryFn::Minimum,
        BinaryFn::Eq,
        BinaryFn::Ne,
        BinaryFn::Lt,
        BinaryFn::Le,
        BinaryFn::Gt,
        BinaryFn::Ge,
        BinaryFn::And,
        BinaryFn::Or,
    ];

    /// The operation's name.
    pub fn name(self) -> &'static str {
        [
            "add", "sub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt",
            "ge", "and", "or",
        ][self as usize]
    }

    /// Whether the result is `bool` whatever the operands are.
    pub fn is_comparison(self) -> bool {
        matches!(
            self,
            BinaryFn::Eq | BinaryFn::Ne | BinaryFn::Lt | BinaryFn::Le | BinaryFn::Gt | BinaryFn::Ge
        )
    }
}

/// Reductions over one axis.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[allow(missing_docs)]
pub enum ReduceFn {
    Sum,
    Mean,
    Amax,
    Argmax,
}

impl ReduceFn {
    /// All functions, in declaration order.
    pub const ALL: [ReduceFn; 4] = [
        ReduceFn::Sum,
        ReduceFn::Mean,
        ReduceFn::Amax,
        ReduceFn::Argmax,
    ];

    /// The operation's name.
    pub fn name(self) -> &'static str {
        ["sum", "mean", "amax", "argmax"][self as usize]
    }
}

/// An operation without its operands. Operand order is given with each variant; types are
/// checked and derived by [`crate::infer()`].
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Op {
    // ---- leaves ----
    /// A value given at run time, by name (`tokens`, `positions`, `rows`, region boundaries).
    Input {
        /// Name of the input.
        name: String,
        /// Element type.
        dtype: DType,
        /// Extents.
        shape: Vec<Dim>,
    },
    /// A tensor of the checkpoint, in the graph's element type.
    Weight {
        /// Which tensor.
        weight: WeightRef,
        /// Element type in memory.
        dtype: DType,
    },
    /// A rank-0 constant; broadcasting does the rest.
    Const {
        /// The value.
        value: Real,
        /// Element type.
        dtype: DType,
    },
    /// A small f32 vector known at compile time (rotary frequencies).
    Table {
        /// What it is, for readers.
        name: String,
        /// The elements.
        data: Vec<Real>,
    },
    /// `[0, 1, …, n-1]`.
    Iota {
        /// The extent.
        len: Dim,
        /// Element type.
        dtype: DType,
    },
    /// The KV cache of a layer. Holds rows `0..s_b` of k and v of each sequence when a step starts.
    Cache {
        /// Layer index; also the index of the cache.
        layer: u32,
        /// Key and value heads.
        kv_heads: u32,
        /// Features per head.
        head_dim: u32,
    },
    /// Filler of an absent optional operand.
    None,

    // ---- primitives ----
    /// `(x)`: conversion to another element type.
    Cast(DType),
    /// `(x)`.
    Unary(UnaryFn),
    /// `(a, b)` with broadcasting.
    Binary(BinaryFn),
    /// `(cond, a, b)` with broadcasting.
    Where,
    /// `(x)`: reduces `axis`, which keeps extent 1 with `keepdim`.
    Reduce {
        /// What is computed.
        f: ReduceFn,
        /// Which axis.
        axis: u8,
        /// Whether the axis stays, with extent 1.
        keepdim: bool,
    },
    /// `(a [..,M,K], b [..,K,N]) -> [..,M,N]`; leading axes broadcast.
    Matmul,
    /// `(table [V,H], ids [..]) -> [..,H]`.
    Embedding,
    /// `(x)`: same elements in row-major order under other extents.
    Reshape(Vec<Dim>),
    /// `(x)`: output axis `i` is input axis `perm[i]`.
    Permute(Vec<u8>),
    /// `(x)`: extents of 1 are stretched to the given ones.
    Expand(Vec<Dim>),
    /// `(x)`: elements `start..end` of an axis.
    Slice {
        /// Which axis.
        axis: u8,
        /// First element.
        start: i64,
        /// One past the last element.
        end: i64,
    },
    /// `(a, b)`: one after the other along an axis.
    Concat {
        /// Which axis.
        axis: u8,
    },

    // ---- composites ----
    /// `(x [..,K], w [N,K]) -> [..,N]`: `x·wᵀ`.
    Linear,
    /// `(x)`: over the last axis, in f32, rounded to x's element type.
    Softmax,
    /// `(x, gamma [H])`: `x / sqrt(mean(x²) + eps) · gamma` over the last axis, in f32.
    RmsNorm {
        /// Added to the mean square.
        eps: Real,
    },
    /// `(x)`: `x·sigmoid(x)`.
    Silu,
    /// `(gate, up)`: `silu(gate)·up`.
    SwiGlu,
    /// `(positions [..], inv_freq [F]) -> f32 [..,F]`: their outer product.
    Angles,
    /// `(x [..,D], positions, inv_freq [D/2])`: positions broadcast against x's leading axes.
    Rope(RopeSpec),
    /// `(x [B,H,S,D]) -> [B,H·groups,S,D]`: each head `groups` times in a row.
    RepeatKv {
        /// Copies of each head.
        groups: u32,
    },
    /// `(scores [B,H,S,S], v [B,H,S,D]) -> [B,H,S,D]`: attention whose scores are still a term.
    Sdpa(AttnSpec),
    /// `(q [B,H,S,D], k [B,Hkv,S,D], v [B,Hkv,S,D]) -> [B,H,S,D]`.
    Attn(AttnSpec),
    /// `(x)`: the rows of a full-sequence value that this step computes (egraph.md 5.2).
    Win(WinSpec),
    /// `(x [T,..], rows i32[R]) -> [R,..]`.
    Select,
    /// `(tuple)`: one element.
    Get(u8),
    /// `(q [T,H,D], k [T,Hkv,D], v [T,Hkv,D], cache) -> ([T,H,D], cache)`: appends k and v, then
    /// attends.
    AttnStep(AttnSpec),
    /// `(x, w, bias, gamma, positions, inv_freq) -> [T,heads,head_dim]`; absent operands are
    /// [`Op::None`].
    Proj(ProjSpec),

    // ---- lowered ----
    /// `(w, …)`: weights laid out as one.
    Pack(PackKind),
    /// `(r, d, gamma) -> (r + d, rmsnorm(r + d)·gamma)`.
    AddRms {
        /// Added to the mean square.
        eps: Real,
    },
    /// `(x, w, bias, residual, gamma, delta)`; absent operands are [`Op::None`]. With the
    /// [`crate::Prologue::AddRms`] prologue the result is a tuple `(x + delta, y)`.
    Gemm(GemmSpec),
    /// `(qkv [T,(H+2Hkv)·D], gamma_q, gamma_k, positions, inv_freq, cache) -> ([T,H,D], cache)`.
    AttnQkv(QkvSpec),
    /// `(operands…)`: pointwise operations and row reductions as one kernel. Several results are a
    /// tuple.
    Chain(Chain),
    /// `(logits [R,V]) -> i32[R]`: the next token of each row, by the request's sampling parameters.
    Sample,
}

impl Op {
    /// The operation's name in IR text, patterns and dumps.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Input { .. } => "input",
            Op::Weight { .. } => "weight",
            Op::Const { .. } => "const",
            Op::Table { .. } => "table",
            Op::Iota { .. } => "iota",
            Op::Cache { .. } => "cache",
            Op::None => "none",
            Op::Cast(_) => "cast",
            Op::Unary(f) => f.name(),
            Op::Binary(f) => f.name(),
            Op::Where => "where",
            Op::Reduce { f, .. } => f.name(),
            Op::Matmul => "matmul",
            Op::Embedding => "embedding",
            Op::Reshape(_) => "reshape",
            Op::Permute(_) => "permute",
            Op::Expand(_) => "expand",
            Op::Slice { .. } => "slice",
            Op::Concat { .. } => "concat",
            Op::Linear => "linear",
            Op::Softmax => "softmax",
            Op::RmsNorm { .. } => "rmsnorm",
            Op::Silu => "silu",
            Op::SwiGlu => "swiglu",
            Op::Angles => "angles",
            Op::Rope(_) => "rope",
            Op::RepeatKv { .. } => "repeat_kv",
            Op::Sdpa(_) => "sdpa",
            Op::Attn(_) => "attn",
            Op::Win(_) => "win",
            Op::Select => "select",
            Op::Get(_) => "get",
            Op::AttnStep(_) => "attn_step",
            Op::Proj(_) => "proj",
            Op::Pack(_) => "pack",
            Op::AddRms { .. } => "addrms",
            Op::Gemm(_) => "gemm",
            Op::AttnQkv(_) => "attn_qkv",
            Op::Chain(_) => "chain",
            Op::Sample => "sample",
        }
    }

    /// Whether the operation carries a payload beyond its name.
    pub fn has_payload(&self) -> bool {
        !matches!(
            self,
            Op::None
                | Op::Unary(_)
                | Op::Binary(_)
                | Op::Where
                | Op::Matmul
                | Op::Embedding
                | Op::Linear
                | Op::Softmax
                | Op::Silu
                | Op::SwiGlu
                | Op::Angles
                | Op::Select
                | Op::Sample
        )
    }

    /// The operation of a name that has no payload.
    pub fn plain(name: &str) -> Option<Op> {
        if let Some(&f) = UnaryFn::ALL.iter().find(|f| f.name() == name) {
            return Some(Op::Unary(f));
        }
        if let Some(&f) = BinaryFn::ALL.iter().find(|f| f.name() == name) {
            return Some(Op::Binary(f));
        }
        Some(match name {
            "none" => Op::None,
            "where" => Op::Where,
            "matmul" => Op::Matmul,
            "embedding" => Op::Embedding,
            "linear" => Op::Linear,
            "softmax" => Op::Softmax,
            "silu" => Op::Silu,
            "swiglu" => Op::SwiGlu,
            "angles" => Op::Angles,
            "select" => Op::Select,
            "sample" => Op::Sample,
            _ => return None,
        })
    }

    /// Whether an importer may emit the operation.
    pub fn is_primitive(&self) -> bool {
        matches!(
            self,
            Op::Input { .. }
                | Op::Weight { .. }
                | Op::Const { .. }
                | Op::Table { .. }
                | Op::Iota { .. }
                | Op::Cast(_)
                | Op::Unary(_)
                | Op::Binary(_)
                | Op::Where
                | Op::Reduce { .. }
                | Op::Matmul
                | Op::Embedding
                | Op::Reshape(_)
                | Op::Permute(_)
                | Op::Expand(_)
                | Op::Slice { .. }
                | Op::Concat { .. }
        )
    }

    /// Whether the operation has no operands.
    pub fn is_leaf(&self) -> bool {
        matches!(
            self,
            Op::Input { .. }
                | Op::Weight { .. }
                | Op::Const { .. }
                | Op::Table { .. }
                | Op::Iota { .. }
                | Op::Cache { .. }
                | Op::None
        )
    }
}

/// A name for one kernel in lists: the operation, with what is fused into it.
pub fn kernel_name(op: &Op) -> String {
    match op {
        Op::Gemm(spec) => {
            let mut parts = Vec::new();
            match spec.prologue {
                crate::Prologue::None => {}
                crate::Prologue::Rms { .. } => parts.push("rmsnorm"),
                crate::Prologue::AddRms { .. } => parts.push("add+rmsnorm"),
            }
            parts.push("gemm");
            match spec.epilogue {
                crate::Epilogue::None => {}
                crate::Epilogue::Residual => parts.push("residual"),
                crate::Epilogue::SwiGlu => parts.push("swiglu"),
            }
            parts.join("·")
        }
        // A long chain is told by what is in it beside sums and products.
        Op::Chain(c) => {
            let mut names = c.names();
            if names.len() > 3 {
                names.retain(|n| !matches!(*n, "add" | "sub" | "mul" | "div"));
            }
            format!("chain{}({})", c.statements.len(), names.join("·"))
        }
        op => op.name().to_string(),
    }
}
