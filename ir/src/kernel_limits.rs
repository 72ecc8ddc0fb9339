//! What the kernels of a device take. The cost model chooses programs by it and the code generator makes kernels to
//! it; neither sees the other, so it lies below both.

/// Limits of a device's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelLimits {
    /// Multiprocessors or other units, each of which repeats a GEMM's prologue.
    pub units: u32,
    /// Memory that a unit shares out among its threads, in bytes.
    pub shared_bytes: usize,
    /// Most rows of a GEMM whose kernel normalises them, adds to them before that, or picks the largest output.
    /// Above it a norm is a factor a row, if its gain is in the weight, or a kernel of its own.
    pub prologue_rows: usize,
    /// Most rows of a GEMM whose weights are read once, by kernels that stream them.
    pub streaming_rows: usize,
    /// Most features of an attention head.
    pub head_dim: usize,
}

impl KernelLimits {
    /// An H100 SXM or an H200.
    pub const HOPPER: KernelLimits = KernelLimits {
        units: 132,
        shared_bytes: 232_448,
        prologue_rows: 4,
        streaming_rows: 128,
        head_dim: 256,
    };

    /// A CPU, whose kernels take anything.
    pub const CPU: KernelLimits = KernelLimits {
        units: 1,
        shared_bytes: usize::MAX,
        prologue_rows: usize::MAX,
        streaming_rows: usize::MAX,
        head_dim: usize::MAX,
    };
}
