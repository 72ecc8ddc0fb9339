//! CUDA C: kernel text and launch geometry. Nothing here knows the driver.
//!
//! [`lower_program`] turns a program of a plan into kernels and launches for one bucket of sizes.
//! A file a kernel family decides by op, element type and rows which kernel of `kernels/` runs a
//! step and how it is specialised; equal kernels are generated once.

mod attention;
mod chain;
mod choice;
mod context;
mod elementwise;
mod gemm;
mod gemv;
mod launch;
mod norm;
mod plain;
pub mod random_weights;
mod row_sums;
mod sample;
pub mod scale_columns;
mod skinny;
mod source;
mod tiled;

pub use choice::{Choices, GemmKey, Tile, Variant};
pub use launch::{
    Arg, CudaOptions, CudaProgram, Launch, LibraryGemm, MapArg, MapSwizzle, Meta, Ref, Sampling,
    Sizes, Workspace,
};
pub use source::{FAMILIES, KernelSource};

use crate::plan::{Operand, Plan, Program};
use context::Context;
use lathe_ir::Op;
use lathe_ir::ops::{Angles, Embedding, Linear, Sample, Silu, SwiGlu, Where};
use std::collections::BTreeMap;

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

/// Kernels and launches of a program for one bucket, by the families' heuristics.
///
/// # Errors
/// A step has no kernel.
pub fn lower_program(
    plan: &Plan,
    program: &Program,
    sizes: Sizes,
    sampling: Sampling,
    options: CudaOptions,
) -> Result<CudaProgram, CudaError> {
    lower_tuned(plan, program, sizes, sampling, options, &Choices::default())
}

/// As [`lower_program`], with the kernels that `choices` names.
///
/// # Errors
/// A step has no kernel, or not the chosen one.
pub fn lower_tuned(
    plan: &Plan,
    program: &Program,
    sizes: Sizes,
    sampling: Sampling,
    options: CudaOptions,
    choices: &Choices,
) -> Result<CudaProgram, CudaError> {
    let cx = Context::new(plan, program, sizes, sampling, options, choices);
    lower_steps(cx, 0..program.steps.len())
}

/// Only the launches of some steps of a program, for timing them alone; `steps` ascend.
///
/// # Errors
/// As [`lower_tuned`].
pub fn lower_gemms(
    plan: &Plan,
    program: &Program,
    sizes: Sizes,
    options: CudaOptions,
    choices: &Choices,
    steps: &[usize],
) -> Result<CudaProgram, CudaError> {
    let cx = Context::new(plan, program, sizes, Sampling::Greedy, options, choices);
    lower_steps(cx, steps.iter().copied())
}

/// The GEMMs of a program whose kernel can be chosen, with the steps that have each.
///
/// # Errors
/// A GEMM's operands are not what they should be.
pub fn gemm_keys(
    plan: &Plan,
    program: &Program,
    sizes: Sizes,
    sampling: Sampling,
    options: CudaOptions,
) -> Result<BTreeMap<GemmKey, Vec<usize>>, CudaError> {
    let choices = Choices::default();
    let mut cx = Context::new(plan, program, sizes, sampling, options, &choices);
    let mut keys: BTreeMap<GemmKey, Vec<usize>> = BTreeMap::new();
    for at in 0..program.steps.len() {
        cx.begin(at);
        if matches!(cx.step().op, Op::Linear(Linear) | Op::Gemm(_))
            && let Some(key) = gemm::key(&mut cx)?
        {
            keys.entry(key).or_default().push(at);
        }
    }
    Ok(keys)
}

/// The text of all kernels that [`Variant`] chooses between, with those before them: measured times hold for
/// it alone.
pub fn gemm_text() -> String {
    use source::Body;
    let bodies = [
        Body::Gemv,
        Body::Skinny,
        Body::Gemm,
        Body::Norm,
        Body::RowSums,
    ];
    source::text_of(&bodies)
}

fn lower_steps(
    mut cx: Context<'_>,
    steps: impl Iterator<Item = usize>,
) -> Result<CudaProgram, CudaError> {
    let (program, sampling) = (cx.program, cx.sampling);
    let mut skip = None;
    for at in steps {
        cx.begin(at);
        if skip == Some(at) {
            continue;
        }
        match &cx.step().op {
            Op::Embedding(Embedding) => plain::embed(&mut cx)?,
            Op::RmsNorm(_) | Op::AddRms(_) => norm::step(&mut cx)?,
            Op::Linear(Linear) | Op::Gemm(_) => {
                let argmax = gemm::argmax_follows(&cx);
                gemm::step(&mut cx, argmax)?;
                skip = argmax.then_some(at + 1);
            }
            Op::Rope(_) | Op::AttnStep(_) | Op::AttnQkv(_) => attention::step(&mut cx)?,
            Op::Chain(_) => chain::step(&mut cx)?,
            Op::Sample(Sample) => sample::step(&mut cx)?,
            Op::Cast(_)
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Where(Where)
            | Op::Iota(_)
            | Op::Silu(Silu)
            | Op::SwiGlu(SwiGlu)
            | Op::Angles(Angles) => elementwise::step(&mut cx)?,
            _ => plain::step(&mut cx)?,
        }
    }
    let logits = match program.output("logits") {
        Some(Operand::Value(v)) if sampling != Sampling::GreedyOnly => Some(*v),
        _ => None,
    };
    Ok(CudaProgram {
        kind: program.kind,
        sizes: cx.sizes,
        kernels: cx.kernels.finish(),
        launches: cx.launches,
        workspaces: cx.workspaces,
        logits,
    })
}

/// What a probe does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Nothing: the cost of a launch.
    Empty,
    /// Nothing, with programmatic dependent launch.
    EmptyPdl,
    /// Reads a stream.
    Read,
    /// Copies a stream.
    Copy,
}

/// The kernel that measures a ceiling (parameters and geometry: `probe.cu`).
pub fn probe_kernel(probe: Probe) -> KernelSource {
    let (kind, label) = match probe {
        Probe::Empty => (0, "empty"),
        Probe::EmptyPdl => (0, "empty_pdl"),
        Probe::Read => (1, "read"),
        Probe::Copy => (2, "copy"),
    };
    let mut kernels = source::Kernels::default();
    let defines = source::Defines::new(lathe_ir::DType::F32)
        .def("LATHE_PDL", u8::from(probe == Probe::EmptyPdl))
        .def("LATHE_KIND", kind);
    kernels.get(source::Body::Probe, label, defines, "ceilings".into());
    kernels.finish().remove(0)
}

/// The kernel that replaces references to sampled tokens by the tokens (parameters and geometry:
/// `tokens.cu`).
pub fn tokens_kernel() -> KernelSource {
    let mut kernels = source::Kernels::default();
    let defines = source::Defines::new(lathe_ir::DType::F32);
    kernels.get(source::Body::Tokens, "", defines, "step.tokens".into());
    kernels.finish().remove(0)
}
