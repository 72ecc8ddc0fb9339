//! Limits of the generated kernels and of the GPUs that they are written for. Whoever predicts or plans kernels reads
//! them here.

/// What the kernels of a GPU can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Multiprocessors.
    pub sms: u32,
    /// Shared memory that a block may have, in bytes.
    pub shared_bytes: usize,
    /// Most rows of a GEMM whose kernel normalises them, adds to them before that, or picks the largest output.
    /// Above it a norm is a factor a row, if its gain is in the weight, or a kernel of its own.
    pub prologue_rows: usize,
    /// Most rows of a GEMM whose weights are read once, by kernels that stream them.
    pub streaming_rows: usize,
    /// Most features of an attention head.
    pub head_dim: usize,
}

impl Capabilities {
    /// An H100 SXM or an H200.
    pub const HOPPER: Capabilities = Capabilities {
        sms: 132,
        shared_bytes: SHARED_BYTES,
        prologue_rows: GEMV_ROWS,
        streaming_rows: SKINNY_ROWS,
        head_dim: HEAD_DIM,
    };
}

/// Shared memory that a block may have on Hopper.
pub(super) const SHARED_BYTES: usize = 232_448;

/// Most rows of the weight-streaming GEMV.
pub(super) const GEMV_ROWS: usize = 4;

/// Most rows of the tensor-core GEMM with swapped operands.
pub(super) const SKINNY_ROWS: usize = 128;

/// Most features of a head that an attention kernel takes.
pub(super) const HEAD_DIM: usize = 256;
