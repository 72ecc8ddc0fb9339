//! Launches as data: which kernel, on what grid, with which arguments. The runtime turns the
//! references into addresses; argument lists are generated from the plan and typed nowhere else.

use super::source::KernelSource;
use crate::plan::{Plan, Program, ProgramKind, ValueId};
use crate::work::Work;
use lathe_ir::{Real, Sym, SymEnv};

/// Arrays that describe a step, written by the host before it. All are i32 unless noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Meta {
    /// Token ids `[T]`.
    Tokens,
    /// Position of each row `[T]`.
    Positions,
    /// Sequence of each row `[T]`, -1 for padding.
    RowSeq,
    /// Row ranges of the sequences `[B+1]`.
    CuSeqlens,
    /// Cached tokens of each sequence after the step `[B]`, 0 for padding.
    KvLens,
    /// Sampled rows `[R]`.
    Rows,
    /// Sampling temperatures, f32 `[R]`.
    Temperature,
    /// Top-k, u32 `[R]`.
    TopK,
    /// Top-p, f32 `[R]`.
    TopP,
    /// Position before that of the sampled token `[R]`.
    SamplePositions,
    /// Seeds, u64 `[R]`.
    Seed,
    /// Requests, u64 `[R]`.
    Request,
    /// Pages of the sequences `[B, max_pages]`.
    BlockTable,
}

/// Memory on the device.
#[derive(Clone, Debug, PartialEq)]
pub enum Ref {
    /// The slot of a value.
    Value(ValueId),
    /// A packed weight.
    Weight(usize),
    /// A constant f32 vector of the plan.
    Table(usize),
    /// Cosines or sines `f32 [max_seq_len, D/2]` of the angles `position · table`.
    Rope {
        /// The frequencies.
        table: usize,
        /// Factor of both.
        scaling: Real,
        /// Sines rather than cosines.
        sine: bool,
    },
    /// The cache of a layer.
    Cache(usize),
    /// An array of the step.
    Meta(Meta),
    /// A workspace, by index into [`CudaProgram::workspaces`].
    Work(usize),
    /// The sampled tokens, i32 `[R]`.
    Sampled,
    /// A null pointer.
    Null,
}

/// Swizzle of a tensor map, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapSwizzle {
    /// None.
    None,
    /// 32 bytes.
    B32,
    /// 64 bytes.
    B64,
    /// 128 bytes.
    B128,
}

/// A tensor map of bf16 elements; dimensions are innermost first.
#[derive(Clone, Debug, PartialEq)]
pub struct MapArg {
    /// First element.
    pub base: Ref,
    /// Elements in each dimension. A 0 stands for the rows of the cache
    /// (`pages · 2 · kv_heads · page_size`), which only the runtime knows.
    pub dims: Vec<u64>,
    /// Bytes between neighbours in each dimension but the innermost.
    pub strides: Vec<u64>,
    /// Elements of a box in each dimension.
    pub block: Vec<u32>,
    /// How rows of a box lie in shared memory.
    pub swizzle: MapSwizzle,
}

/// One kernel argument.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// A pointer.
    Ptr(Ref),
    /// A 32-bit integer.
    I32(i32),
    /// A float.
    F32(f32),
    /// A structure of 8-byte integers, by value.
    Words(Vec<i64>),
    /// A tensor map, by value.
    Map(MapArg),
}

/// One launch.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// Index into [`CudaProgram::kernels`].
    pub kernel: usize,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Blocks of a cluster as a launch attribute; 1 also where the source fixes them.
    pub cluster: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Arguments in order.
    pub args: Vec<Arg>,
    /// Whether the kernel may start before its predecessor has ended.
    pub pdl: bool,
    /// Step of the plan's program.
    pub step: usize,
    /// What it computes and moves at the bucket's sizes.
    pub work: Work,
    /// The vendor's library in place of the kernel, where it is there.
    pub library: Option<LibraryGemm>,
}

/// `y[M, N] = x[M, K] · w[N, K]ᵀ (+ residual[M, N])` in bf16 by cuBLASLt.
#[derive(Clone, Debug, PartialEq)]
pub struct LibraryGemm {
    /// Rows of x.
    pub m: usize,
    /// Rows of w.
    pub n: usize,
    /// Columns of both.
    pub k: usize,
    /// x.
    pub x: Ref,
    /// w.
    pub w: Ref,
    /// What is added.
    pub residual: Option<Ref>,
    /// y.
    pub y: Ref,
    /// Place of the algorithm in the list that the library proposes.
    pub algorithm: usize,
}

/// Memory that kernels share among themselves; of all programs the largest of a name is allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// Its name.
    pub name: String,
    /// Its bytes.
    pub bytes: usize,
    /// 32-bit word with which it is filled once.
    pub fill: Option<u32>,
}

/// Sizes for which a program is lowered: a bucket that holds the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sizes {
    /// Token rows.
    pub t: usize,
    /// Sequences.
    pub b: usize,
    /// Sampled rows.
    pub r: usize,
}

impl Sizes {
    /// Of a decode step of `n` sequences.
    pub fn decode(n: usize) -> Sizes {
        Sizes { t: n, b: n, r: n }
    }

    /// The values of the symbols. There are no whole sequences: S is 0.
    pub fn env(self) -> SymEnv {
        SymEnv::new(&[
            (Sym::B, self.b as i64),
            (Sym::S, 0),
            (Sym::T, self.t as i64),
            (Sym::R, self.r as i64),
        ])
    }
}

/// How next tokens are chosen in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Sampling {
    /// All rows are greedy and nobody wants the logits.
    GreedyOnly,
    /// All rows are greedy; logits are kept.
    Greedy,
    /// By each row's parameters.
    Params,
}

/// What the kernels are generated for beside the sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Programmatic dependent launch.
    pub pdl: bool,
    /// Multiprocessors.
    pub sms: u32,
    /// Tokens of a cache page.
    pub page_size: usize,
    /// Columns of the block table.
    pub max_pages: usize,
    /// No tensor cores, no fused attention: the kernels that others are compared with.
    pub plain: bool,
    /// Every operation is one launch, also where two kernels would be faster.
    pub per_op: bool,
}

/// A program of the plan as kernels and launches for one bucket.
#[derive(Clone, Debug, PartialEq)]
pub struct CudaProgram {
    /// Which program.
    pub kind: ProgramKind,
    /// For which sizes.
    pub sizes: Sizes,
    /// Distinct kernels.
    pub kernels: Vec<KernelSource>,
    /// Launches in order.
    pub launches: Vec<Launch>,
    /// Workspaces.
    pub workspaces: Vec<Workspace>,
    /// Where the logits are, if they were asked for.
    pub logits: Option<ValueId>,
}

impl CudaProgram {
    /// Launches of the layer in the middle, where nothing of the model's ends is.
    pub fn kernels_per_layer(&self, plan: &Plan, program: &Program) -> usize {
        let middle = plan.caches.get(plan.caches.len() / 2).map(|c| c.layer);
        self.launches
            .iter()
            .filter(|l| middle.is_some() && program.steps[l.step].prov.layer == middle)
            .count()
    }
}
