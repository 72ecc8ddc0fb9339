//! The kernel that makes random weights on the device. The formula belongs to `lathe-runtime`'s `RandomWeights`,
//! its CPU twin.

/// CUDA C, without headers. Entry [`KERNEL`]; parameters and launch are described at its top.
pub const SOURCE: &str = include_str!("kernels/random_weights.cu");

/// Name of the entry.
pub const KERNEL: &str = "random_weights";

/// Threads of a block.
pub const THREADS: u32 = 256;
