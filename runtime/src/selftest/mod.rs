//! The self-test: every step of a plan against another implementation, on random inputs.
//!
//! A *subject* is a compiled model with random weights and a list of batches of odd sizes. The CPU
//! device runs each batch step by step ([`crate::device::cpu`]); what a step read and wrote is then the case of
//! a comparison:
//!
//! - on a GPU ([`cuda::CudaTester`]) the operands are uploaded, everything else is filled with
//!   [`POISON`], the launches of the step run, and the whole memory is compared: results within
//!   [`compare::tolerance`], every element written, nothing else touched, and a second run bit for bit
//!   the same;
//! - on the CPU ([`CpuTester`]) the interpreter evaluates the operation in f64.
//!
//! As every step starts from the CPU's operands, errors do not add up along the model and each kernel
//! is judged on its own.

pub mod cases;
pub mod compare;
pub mod cpu;
pub mod cuda;
mod region;
mod report;
mod tester;
mod twin;

pub use cases::{Case, Shape};
pub(crate) use region::{extents, gather, spread};
pub use report::{Failure, Outcome, Report, Row};
pub use tester::{CpuTester, Tester};

use crate::device::cpu::CpuLoadError;
use crate::device::cuda::CudaError;
use crate::device::load::LoadOptions;
use crate::device::step::StepError;
use crate::weights::RandomWeights;
use lathe_codegen::Plan;

/// What memory holds before a kernel writes it, in 32-bit words: NaN as f32, bf16 and f16, negative as
/// an integer, neither 0 nor 1 as a bool.
pub const POISON: u32 = 0xFFF5_FFF5;

/// A compiled model and what is to be run on it.
pub struct Subject {
    /// What reports call it.
    pub name: String,
    /// The programs.
    pub plan: Plan,
    /// Their weights.
    pub weights: RandomWeights,
    /// Vocabulary size.
    pub vocab: usize,
    /// On a GPU every operation is one launch.
    pub per_op: bool,
    /// Limits and the shape of the cache.
    pub options: LoadOptions,
    /// The batches.
    pub cases: Vec<Case>,
}

/// The self-test cannot go on. A wrong result is none of these: it is counted in the [`Report`].
#[derive(Debug, thiserror::Error)]
pub enum SelftestError {
    /// The CPU twin cannot be loaded.
    #[error(transparent)]
    Load(#[from] CpuLoadError),
    /// A batch is invalid or a device failed.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The CPU twin or the interpreter refuses a step.
    #[error("CPU: {0}")]
    Cpu(String),
    /// The GPU failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The GPU failed in a step: its kernels did not come to their end.
    #[error("{place}: {kernels}: {error}")]
    Kernel {
        /// Model, batch and step.
        place: String,
        /// The kernels of the step.
        kernels: String,
        /// What the driver says.
        error: Box<CudaError>,
    },
}
