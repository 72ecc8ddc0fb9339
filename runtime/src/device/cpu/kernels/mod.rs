//! CPU kernels: pure functions on slices, the references of the CUDA kernels and the fast CPU path.
//!
//! Activations are row-major `[T, features]`; weights are `[N, K]` with K contiguous; `T` counts the tokens
//! of all sequences of a step (see [`StepMeta`]). Storage is f32 or bf16 ([`Elem`]), arithmetic is f32, and a
//! value is rounded only where it is written to memory.
//!
//! **Invariant: batch invariance.** A row's result depends bitwise on that row's inputs alone (and on the
//! instruction set): not on how many rows a call has, on the row's place among them, on the number of threads,
//! and for attention not on the page size or on how the sequence was cut into steps. Every reduction therefore
//! has one order, whatever tile it is computed in.
//!
//! Buffers are best aligned to 64 bytes; no kernel needs it.

// Register tiles are arrays indexed by lane, row and column, as their formulas are.
#![allow(clippy::needless_range_loop)]

pub mod attention;
pub mod chain;
mod dot;
mod elem;
pub mod linear;
mod math;
mod meta;
pub mod norm;
pub mod pointwise;
pub mod pool;
pub mod rope;
pub mod rows;
mod simd;
#[cfg(test)]
mod tests;

pub use elem::Elem;
pub use math::{Activation, activate};
pub use meta::{CacheShape, StepMeta};
pub use simd::Isa;

/// Why a kernel refused its operands. Nothing has been written when one is returned.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum KernelError {
    /// A caller's bug: a slice does not have the length that the shapes give.
    #[error("{kernel}: {operand} has {got} elements, its shape needs {want}")]
    Length {
        /// Kernel family.
        kernel: &'static str,
        /// Operand's name.
        operand: &'static str,
        /// Length passed.
        got: usize,
        /// Length needed.
        want: usize,
    },
    /// A combination this kernel does not implement.
    #[error("{kernel}: {what}")]
    Unsupported {
        /// Kernel family.
        kernel: &'static str,
        /// The combination.
        what: String,
    },
    /// An index operand points outside the buffer it indexes.
    #[error("{kernel}: {index} of row {row} is {got}, outside 0..{limit}")]
    Index {
        /// Kernel family.
        kernel: &'static str,
        /// What the index selects.
        index: &'static str,
        /// Row (of the step, or of the table named by `index`) that has it.
        row: usize,
        /// The index.
        got: i64,
        /// One past the largest index allowed.
        limit: usize,
    },
}

/// Checks that `slice` has `want` elements.
fn check_len<T>(
    kernel: &'static str,
    operand: &'static str,
    slice: &[T],
    want: usize,
) -> Result<(), KernelError> {
    if slice.len() == want {
        Ok(())
    } else {
        Err(KernelError::Length {
            kernel,
            operand,
            got: slice.len(),
            want,
        })
    }
}

/// The largest multiple of `k` up to `len`; 0 for k = 0.
fn whole_rows(len: usize, k: usize) -> usize {
    len.checked_div(k).unwrap_or(0) * k
}

/// Checks that `got` is in `0..limit` and returns it.
fn check_index(
    kernel: &'static str,
    index: &'static str,
    row: usize,
    got: i32,
    limit: usize,
) -> Result<usize, KernelError> {
    match usize::try_from(got) {
        Ok(i) if i < limit => Ok(i),
        _ => Err(KernelError::Index {
            kernel,
            index,
            row,
            got: i64::from(got),
            limit,
        }),
    }
}
