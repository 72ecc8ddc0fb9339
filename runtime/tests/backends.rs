//! What the four values of `compile_backend` promise of kernels and launches, held by the lowered
//! programs: no GPU is needed.

mod common;

use common::{UNFUSED, h100, models, plan};
use lathe_codegen::cuda::{
    Choices, CudaOptions, CudaProgram, Sampling, Sizes, Tile, Variant, gemm_keys, lower_gemms,
    lower_program, lower_tuned,
};
use lathe_codegen::{Plan, Program, ProgramKind};
use lathe_ir::{DType, Op};
use std::collections::BTreeSet;

fn options(per_op: bool) -> CudaOptions {
    CudaOptions { per_op, ..h100() }
}

fn sizes(program: &Program, rows: usize) -> Sizes {
    match program.kind {
        ProgramKind::Decode => Sizes::decode(rows),
        _ => Sizes {
            t: rows,
            b: 4,
            r: 4,
        },
    }
}

fn lowered(plan: &Plan, program: &Program, rows: usize, per_op: bool) -> CudaProgram {
    let sizes = sizes(program, rows);
    lower_program(plan, program, sizes, Sampling::GreedyOnly, options(per_op))
        .unwrap_or_else(|e| panic!("{}: {e}", plan.name))
}

#[test]
fn torch_simple_launches_each_op_once() {
    let mut names = models("golden");
    assert!(names.len() >= 14, "{names:?}");
    names.extend(["configs/llama-3.2-1b", "configs/llama-3.1-8b"].map(str::to_owned));
    let mut wrong = BTreeSet::new();
    for name in names {
        for dtype in [DType::F32, DType::BF16] {
            let plan = plan(&name, dtype, UNFUSED);
            for program in &plan.programs {
                let fused = |s: &lathe_codegen::plan::Step| {
                    matches!(s.op, Op::Gemm(_) | Op::AttnQkv(_) | Op::AddRms(_))
                };
                let found: Vec<&str> = program
                    .steps
                    .iter()
                    .filter(|s| fused(s))
                    .map(|s| s.op.name())
                    .collect();
                assert!(found.is_empty(), "{}: {found:?} are fused", plan.name);
                for rows in [1, 8, 64, 512] {
                    let cuda = lowered(&plan, program, rows, true);
                    let steps: Vec<usize> = cuda.launches.iter().map(|l| l.step).collect();
                    let all: Vec<usize> = (0..program.steps.len()).collect();
                    if steps != all {
                        let named = |s: &usize| program.steps[*s].op.name();
                        let twice = steps
                            .windows(2)
                            .filter(|w| w[0] == w[1])
                            .map(|w| named(&w[0]));
                        let absent = all.iter().filter(|s| !steps.contains(s)).map(named);
                        wrong.insert(format!(
                            "{} {} {rows} {dtype}: several launches for {:?}, none for {:?}",
                            plan.name,
                            program.kind.name(),
                            twice.collect::<BTreeSet<_>>(),
                            absent.collect::<BTreeSet<_>>()
                        ));
                    }
                }
            }
        }
    }
    let lines: Vec<String> = wrong.into_iter().collect();
    assert!(lines.is_empty(), "{}", lines.join("\n"));
}

#[test]
fn fused_backends_have_few_kernels_a_layer() {
    for config in ["llama-3.2-1b", "llama-3.1-8b"] {
        let plan = plan(&format!("configs/{config}"), DType::BF16, &[]);
        for program in &plan.programs {
            for (rows, most) in [(1, 6), (4, 6), (8, 8), (64, 8), (512, 8), (2048, 8)] {
                let cuda = lowered(&plan, program, rows, false);
                let n = cuda.kernels_per_layer(&plan, program);
                let kind = program.kind.name();
                if program.kind == ProgramKind::Decode {
                    assert!(n <= most, "{config} {kind} {rows}: {n} kernels a layer");
                } else {
                    assert!(n <= 8, "{config} {kind} {rows}: {n} kernels a layer");
                }
            }
        }
    }
}

/// A choice changes the kernels of its GEMMs and no others, and keeps what a load has planned.
#[test]
fn lowering_honours_choices() {
    let plan = plan("configs/llama-3.2-1b", DType::BF16, &[]);
    for (kind, rows) in [
        (ProgramKind::Decode, 2),
        (ProgramKind::Decode, 16),
        (ProgramKind::Decode, 96),
        (ProgramKind::General, 384),
    ] {
        let program = plan.program(kind).unwrap();
        let sizes = sizes(program, rows);
        let sampling = Sampling::GreedyOnly;
        let before = lower_program(&plan, program, sizes, sampling, options(false)).unwrap();
        let keys = gemm_keys(&plan, program, sizes, sampling, options(false)).unwrap();
        assert!(keys.len() >= 4, "{keys:?}");
        for (key, steps) in &keys {
            for variant in Variant::candidates(key, 132) {
                let mut choices = Choices::default();
                choices.insert(*key, variant);
                let after =
                    lower_tuned(&plan, program, sizes, sampling, options(false), &choices).unwrap();
                let of_step = |p: &CudaProgram, step: usize| -> Vec<String> {
                    let launches = p.launches.iter().filter(|l| l.step == step);
                    launches
                        .map(|l| {
                            let name = &p.kernels[l.kernel].name;
                            format!("{name} {:?} {} {:?}", l.grid, l.cluster, l.args)
                        })
                        .collect()
                };
                for step in 0..program.steps.len() {
                    let new = of_step(&after, step);
                    if !steps.contains(&step) {
                        // The weights' prefetch of a GEMV may differ, the kernels do not.
                        assert_eq!(new.len(), of_step(&before, step).len());
                        continue;
                    }
                    let family = match variant {
                        Variant::Gemv => "gemv_",
                        Variant::Skinny { .. } => "skinny_",
                        _ => "gemm_",
                    };
                    let last = new.last().unwrap();
                    assert!(last.starts_with(family), "{variant}: {last}");
                    let same = variant == Variant::heuristic(key, 132);
                    assert_eq!(new == of_step(&before, step), same, "{key}: {variant}");
                }
                for w in &after.workspaces {
                    if let Some(planned) = before.workspaces.iter().find(|x| x.name == w.name) {
                        assert!(
                            w.bytes <= planned.bytes,
                            "{key}: {variant} wants more {}",
                            w.name
                        );
                    }
                }
                let alone =
                    lower_gemms(&plan, program, sizes, options(false), &choices, &steps[..1])
                        .unwrap();
                assert!(alone.launches.iter().all(|l| l.step == steps[0]));
            }
            let mut choices = Choices::default();
            let nonsense = Variant::Tiled(Tile {
                rows: 100,
                cols: 64,
                teams: 1,
                cluster: [1, 1],
            });
            choices.insert(*key, nonsense);
            let refused = lower_tuned(&plan, program, sizes, sampling, options(false), &choices);
            let message = refused.unwrap_err().to_string();
            assert!(
                message.contains("tiled_100x64_c1x1 does not compute m"),
                "{message}"
            );
        }
    }
}

/// The library's GEMM stands beside an own kernel and only where it computes the same.
#[test]
fn library_gemms_have_a_kernel_beside_them() {
    let plan = plan("configs/llama-3.2-1b", DType::BF16, &[]);
    let program = plan.program(ProgramKind::General).unwrap();
    let sizes = sizes(program, 384);
    let keys = gemm_keys(&plan, program, sizes, Sampling::GreedyOnly, options(false)).unwrap();
    let library = Variant::CublasLt { algorithm: 3 };
    let mut choices = Choices::default();
    for key in keys.keys().filter(|k| library.check(k, 132).is_ok()) {
        choices.insert(*key, library);
    }
    let sampling = Sampling::GreedyOnly;
    let cuda = lower_tuned(&plan, program, sizes, sampling, options(false), &choices).unwrap();
    let mut n_library = 0;
    for l in &cuda.launches {
        let name = &cuda.kernels[l.kernel].name;
        assert!(l.library.is_none() || name.starts_with("gemm_") || name.starts_with("skinny_"));
        // SwiGLU is no epilogue of the library.
        assert!(!(name.contains("swiglu") && l.library.is_some()), "{name}");
        if let Some(g) = &l.library {
            assert_eq!(
                (g.algorithm, g.residual.is_some()),
                (3, name.contains("residual"))
            );
            n_library += 1;
        }
    }
    assert!(n_library >= 3 * 16, "{n_library}");
}
