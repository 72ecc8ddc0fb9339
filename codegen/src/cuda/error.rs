//! Why a step has no kernel.

use crate::plan::Program;

/// A step that no CUDA kernel executes.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("CUDA: {program} step {step} ({op} of {path}): {reason}")]
pub struct CudaError {
    /// Program.
    pub program: &'static str,
    /// Step of the program.
    pub step: usize,
    /// Operation.
    pub op: &'static str,
    /// Module path.
    pub path: String,
    /// Why.
    pub reason: String,
}

impl CudaError {
    /// The error that a step of a program has no kernel.
    pub(super) fn at(program: &Program, step: usize, reason: impl Into<String>) -> CudaError {
        let s = &program.steps[step];
        CudaError {
            program: program.kind.name(),
            step,
            op: s.op.name(),
            path: s.prov.path.to_string(),
            reason: reason.into(),
        }
    }
}
