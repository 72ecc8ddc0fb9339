//! The kernel that multiplies the columns of a loaded weight ([`crate::plan::WeightBuffer::scaled_by`]). Its CPU twin
//! is in `lathe-runtime`'s CPU executor.

/// CUDA C, without headers. Entry [`KERNEL`]; parameters and launch are described at its top.
pub const SOURCE: &str = include_str!("kernels/scale_columns.cu");

/// Name of the entry.
pub const KERNEL: &str = "scale_columns";

/// Threads of a block.
pub const THREADS: u32 = 256;
