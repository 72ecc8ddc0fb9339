//! CUDA C: kernel text and launch geometry. Nothing here knows the driver.
//!
//! [`lower_program`] turns a program of a plan into kernels and launches for one bucket of sizes.
//! Two stages: [`Fusions`] decides for every step which kernel runs it and what that kernel takes over from its
//! neighbours; then a file per family writes the launches, with the kernels of `kernels/` specialised for them. Equal
//! kernels are generated once.

mod attention;
mod bucket;
mod chain;
mod context;
mod elementwise;
mod error;
mod fusion;
mod gemm;
mod geo;
mod launch;
mod limits;
mod norm;
mod plain;
pub mod random_weights;
mod row_sums;
mod sample;
pub mod scale_columns;
mod source;

pub use error::CudaError;
pub use fusion::{
    AttentionFusion, AttentionKernel, FusionKind, Fusions, GemmFusion, NormFusion, OperandSums,
    Reason, ResultSums, StepFusion, Verdict,
};
pub use gemm::choices::Choices;
pub use gemm::kernel::GemmKernel;
pub use gemm::key::{GemmKey, Problem};
pub use gemm::variant::Variant;
pub use gemm::{SkinnyForm, Tile};
pub use launch::{
    Arg, CudaOptions, CudaProgram, Launch, LibraryGemm, MapArg, MapSwizzle, Meta, Ref, Sampling,
    Sizes, Workspace,
};
pub use source::{FAMILIES, KernelSource};

use crate::plan::{Operand, Plan, Program};
use bucket::Bucket;
use context::Context;
use lathe_ir::Op;
use std::collections::BTreeMap;

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
    let bucket = Bucket {
        plan,
        program,
        sizes,
        sampling,
        options,
    };
    let fusions = Fusions::decide(&bucket, choices, 0..program.steps.len())?;
    emit(&bucket, &fusions)
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
    let bucket = Bucket {
        plan,
        program,
        sizes,
        sampling: Sampling::Greedy,
        options,
    };
    let fusions = Fusions::decide(&bucket, choices, steps.iter().copied())?;
    emit(&bucket, &fusions)
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
    let bucket = Bucket {
        plan,
        program,
        sizes,
        sampling,
        options,
    };
    let mut keys: BTreeMap<GemmKey, Vec<usize>> = BTreeMap::new();
    for at in 0..program.steps.len() {
        if let Some(key) = fusion::gemm_key(&bucket, at)? {
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

/// What the kernels of a program do beside their own step, and why: what [`lower_tuned`] goes by.
///
/// # Errors
/// As [`lower_tuned`].
pub fn fusions(
    plan: &Plan,
    program: &Program,
    sizes: Sizes,
    sampling: Sampling,
    options: CudaOptions,
    choices: &Choices,
) -> Result<Fusions, CudaError> {
    let bucket = Bucket {
        plan,
        program,
        sizes,
        sampling,
        options,
    };
    Fusions::decide(&bucket, choices, 0..program.steps.len())
}

/// Kernels and launches of the steps that were decided on.
fn emit(bucket: &Bucket<'_>, fusions: &Fusions) -> Result<CudaProgram, CudaError> {
    let mut cx = Context::new(bucket);
    for s in &fusions.steps {
        cx.begin(s.step, s.early.is_made());
        match &s.kind {
            FusionKind::Taken { .. } => {}
            FusionKind::Gemm(fusion) => gemm::step::step(&mut cx, fusion)?,
            FusionKind::Attention(fusion) => attention::step(&mut cx, fusion)?,
            FusionKind::Alone => match &cx.step().op {
                Op::Embedding(_) => plain::embed(&mut cx)?,
                Op::RmsNorm(_) | Op::AddRms(_) => norm::step(&mut cx)?,
                Op::Rope(spec) => attention::rotate(&mut cx, *spec)?,
                Op::Chain(_) => chain::step(&mut cx)?,
                Op::Sample(_) => sample::step(&mut cx)?,
                Op::Cast(_)
                | Op::Unary(_)
                | Op::Binary(_)
                | Op::Where(_)
                | Op::Iota(_)
                | Op::Silu(_)
                | Op::SwiGlu(_)
                | Op::Angles(_) => elementwise::step(&mut cx)?,
                _ => plain::step(&mut cx)?,
            },
        }
    }
    let logits = match bucket.program.output("logits") {
        Some(Operand::Value(v)) if bucket.sampling != Sampling::GreedyOnly => Some(*v),
        _ => None,
    };
    Ok(CudaProgram {
        kind: bucket.program.kind,
        sizes: bucket.sizes,
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
