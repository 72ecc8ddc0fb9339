//! What the plans of the golden families launch in a decode step, and what they no longer compute
//! in it.

mod common;

use common::{UNFUSED, models, plan};
use lathe_codegen::{Operand, Plan, Program, ProgramKind};
use lathe_ir::{DType, Op};
use lathe_passes::chains;
use std::fmt::Write;

/// All families of which there is a golden model.
fn goldens() -> Vec<String> {
    let all = models("golden");
    assert!(all.len() >= 14, "{all:?}");
    all
}

fn decode(plan: &Plan) -> &Program {
    plan.program(ProgramKind::Decode).expect("a decode program")
}

/// Steps of a middle layer of the decode program at batch 1.
#[test]
fn kernels_of_a_layer() {
    let mut table = String::from("family            unfused  without chains  all\n");
    for golden in goldens() {
        let steps = |off: &[&str]| decode(&plan(&golden, DType::BF16, off)).steps_of_layer(1);
        let (all, single, unfused) = (steps(&[]), steps(&[chains::NAME]), steps(UNFUSED));
        assert!(
            all <= single && single <= unfused,
            "{golden}: {all}, {single}, {unfused}"
        );
        let family = golden.trim_start_matches("golden/");
        let _ = writeln!(table, "{family:16}  {unfused:7}  {single:14}  {all:3}");
    }
    insta::with_settings!({
        snapshot_path => "../../snapshots",
        prepend_module_to_snapshot => false,
        omit_expression => true,
    }, {
        insta::assert_snapshot!("steps_per_layer", table);
    });
}

/// Weights are computed before there are workspaces for anything but steps.
#[test]
fn weights_are_computed_without_workspaces() {
    use lathe_codegen::cuda::{Sampling, Sizes, lower_program};
    let mut programs = 0;
    for golden in goldens() {
        for (off, dtype) in [(&[][..], DType::BF16), (UNFUSED, DType::F16)] {
            let plan = plan(&golden, dtype, off);
            let Some(once) = &plan.once else {
                continue;
            };
            let sizes = Sizes { t: 1, b: 1, r: 1 };
            let sampling = Sampling::Params;
            let lowered = lower_program(&plan, &once.program, sizes, sampling, common::h100());
            assert_eq!(lowered.unwrap().workspaces, [], "{golden}");
            programs += 1;
        }
    }
    assert!(programs > 0);
}

#[test]
fn nothing_that_depends_on_weights_alone_is_left_in_a_step() {
    for golden in goldens() {
        for off in [&[][..], UNFUSED] {
            let plan = plan(&golden, DType::BF16, off);
            for program in &plan.programs {
                for step in &program.steps {
                    let varies = |o: &Operand| {
                        matches!(o, Operand::Value(_) | Operand::Input(_) | Operand::Cache(_))
                    };
                    assert!(
                        step.operands.iter().any(varies),
                        "{golden}: {} of {} depends on weights alone",
                        step.op.name(),
                        step.prov.path
                    );
                }
            }
            let computed = plan.weights.iter().filter(|w| w.is_computed()).count();
            let results = plan.once.as_ref().map_or(0, |o| o.results.len());
            assert_eq!(computed, results, "{golden}");
            // Slices, transposes and packs of files are the loader's: only arithmetic is computed.
            let steps = plan.once.iter().flat_map(|o| &o.program.steps);
            for step in steps {
                let arithmetic = matches!(step.op, Op::Cast(_) | Op::Binary(_));
                assert!(arithmetic, "{golden}: {} is computed", step.op.name());
            }
            let offset = golden.starts_with("golden/gemma");
            assert!(
                !offset || computed > 0,
                "{golden} adds 1 to the weights of its norms"
            );
            let bytes: usize = plan.weights.iter().map(|w| w.recipe.bytes()).sum();
            assert_eq!(plan.weight_bytes(), bytes);
        }
    }
}
