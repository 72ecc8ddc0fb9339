//! The plans of the fixtures and everything that they are lowered to.

use crate::common::{self, UNFUSED, h100};
use lathe_codegen::cuda::{
    Choices, CudaOptions, CudaProgram, KernelSource, Sampling, Sizes, Variant, gemm_keys,
    lower_gemms, lower_program,
};
use lathe_codegen::{Plan, ProgramKind};
use lathe_ir::DType;
use lathe_runtime::device::cuda::steps;
use lathe_runtime::device::load::LoadOptions;

/// How a plan is spelled: `torch-compile` and `torch-opt` fuse; `torch-simple` and `torch-cudagraph` do
/// not, and run every operation as one kernel. With and without graphs the kernels are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    Fused,
    Unfused,
}

impl Spelling {
    fn off(self) -> &'static [&'static str] {
        match self {
            Spelling::Fused => &[],
            Spelling::Unfused => UNFUSED,
        }
    }
}

pub(crate) fn plan(name: &str, dtype: DType, spelling: Spelling) -> Plan {
    common::plan(name, dtype, spelling.off())
}

fn options(limits: &LoadOptions, spelling: Spelling) -> CudaOptions {
    CudaOptions {
        page_size: limits.page_size,
        max_pages: limits.max_pages(),
        per_op: spelling == Spelling::Unfused,
        ..h100()
    }
}

/// Limits of a run with up to `sequences` sequences and `tokens` rows a step.
pub(crate) fn limits(sequences: usize, tokens: usize) -> LoadOptions {
    LoadOptions {
        max_tokens: tokens,
        max_rows: sequences,
        max_sequences: sequences,
        max_seq_len: 4096,
        page_size: 64,
        pages: 4096,
    }
}

/// All steps of a plan within the limits, lowered: every bucket, greedy with and without logits, and
/// sampled by parameters.
pub(crate) fn programs(plan: &Plan, spelling: Spelling, limits: &LoadOptions) -> Vec<CudaProgram> {
    let options = options(limits, spelling);
    let mut all = Vec::new();
    for program in &plan.programs {
        for (sizes, sampling) in steps(program.kind, limits) {
            let mut samplings = vec![sampling];
            // Verification asks for the logits of greedy steps.
            if sampling == Sampling::GreedyOnly {
                samplings.push(Sampling::Greedy);
            }
            for sampling in samplings {
                let lowered = lower_program(plan, program, sizes, sampling, options);
                all.push(lowered.unwrap_or_else(|e| panic!("{}: {e}", plan.name)));
            }
        }
    }
    // What is computed while loading has kernels too.
    if let Some(once) = &plan.once {
        let options = CudaOptions {
            pdl: false,
            ..options
        };
        let sizes = Sizes { t: 1, b: 1, r: 1 };
        let lowered = lower_program(plan, &once.program, sizes, Sampling::Params, options);
        all.push(lowered.unwrap_or_else(|e| panic!("{}: {e}", plan.name)));
    }
    all
}

/// The kernels of all steps of a model.
pub(crate) fn kernels(
    name: &str,
    dtype: DType,
    spelling: Spelling,
    limits: &LoadOptions,
) -> Vec<KernelSource> {
    let plan = plan(name, dtype, spelling);
    let programs = programs(&plan, spelling, limits).into_iter();
    programs.flat_map(|p| p.kernels).collect()
}

/// The kernels that `torch-opt` may choose for the GEMMs of a fused plan, by rows of the step: all that
/// it times, and those of each family that need most registers.
pub(crate) fn candidates(name: &str, rows: &[usize]) -> Vec<KernelSource> {
    const GREEDIEST: [&str; 9] = [
        "skinny_w1_p4",
        "skinny_w2_p2",
        "tiled_64x192_c2x1",
        "tiled_64x256_c1x2",
        "tiled_128x256_c1x2",
        "tiled_192x160_c1x1",
        "tiled_192x192_c2x1",
        "tiled_64x64_c1x1",
        "tiled_128x192_t2_c2x1",
    ];
    let plan = plan(name, DType::BF16, Spelling::Fused);
    let program = plan.program(ProgramKind::General).unwrap();
    let options = options(&limits(512, 2048), Spelling::Fused);
    let sms = options.sms as usize;
    let mut all = Vec::new();
    for &t in rows {
        let sizes = Sizes { t, b: 4, r: 4 };
        let keys = gemm_keys(&plan, program, sizes, Sampling::Greedy, options).unwrap();
        for (key, steps) in keys {
            let mut variants = Variant::candidates(&key, sms);
            let greediest = GREEDIEST.iter().map(|v| v.parse::<Variant>().unwrap());
            // Not every tile takes every GEMM.
            variants.extend(greediest.filter(|v| v.check(&key, sms).is_ok()));
            for variant in variants {
                let mut choices = Choices::default();
                choices.insert(key, variant);
                let steps = &steps[..1];
                let lowered = lower_gemms(&plan, program, sizes, options, &choices, steps);
                all.extend(lowered.unwrap().kernels);
            }
        }
    }
    assert!(all.len() >= 20, "{}", all.len());
    all
}
