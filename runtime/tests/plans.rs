//! What the plans of the golden families launch in a decode step, and what they no longer compute
//! in it.

use lathe_codegen::{Operand, Plan, Program, ProgramKind, Programs, lower};
use lathe_ir::import::{HfConfig, ImportOptions, import};
use lathe_ir::{DType, Op};
use lathe_passes::chains;
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{PassConfig, compile};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// All families of which there is a golden model.
const GOLDENS: [&str; 14] = [
    "llama-rope3-tied",
    "llama-mha-bias",
    "llama-linear",
    "mistral-window",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt-neox",
    "falcon",
    "phi",
];

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn plan(golden: &str, off: &[&str]) -> Plan {
    let folder = top().join("tests/fixtures/golden").join(golden);
    let config = HfConfig::from_file(&folder).expect("a configuration");
    let options = ImportOptions {
        dtype: DType::BF16,
        max_seq_len: None,
    };
    let model = import(&config, &options).expect("imports");
    let passes = PassConfig::new(DeviceModel::H100)
        .disable(off)
        .expect("passes");
    let compiled = compile(&model.graph, &passes).expect("compiles");
    let programs = Programs {
        decode: compiled.decode.as_ref(),
        general: compiled.general.as_ref(),
        full: None,
    };
    lower(golden, DType::BF16, &programs).expect("lowers")
}

fn decode(plan: &Plan) -> &Program {
    plan.program(ProgramKind::Decode).expect("a decode program")
}

/// ARCHITECTURE.md has the table that this test computes.
#[test]
fn kernels_of_a_layer() {
    let mut table =
        String::from("| family | unfused | without chains | all |\n|---|---|---|---|\n");
    for golden in GOLDENS {
        let steps = |off: &[&str]| decode(&plan(golden, off)).steps_of_layer(1);
        let (all, single, unfused) = (steps(&[]), steps(&[chains::NAME]), steps(&["fuse"]));
        assert!(
            all <= single && single <= unfused,
            "{golden}: {all}, {single}, {unfused}"
        );
        let _ = writeln!(table, "| {golden} | {unfused} | {single} | {all} |");
    }
    let text = std::fs::read_to_string(top().join("ARCHITECTURE.md")).expect("the document");
    assert!(
        text.contains(&table),
        "ARCHITECTURE.md needs this table:\n{table}"
    );
}

#[test]
fn nothing_that_depends_on_weights_alone_is_left_in_a_step() {
    for golden in GOLDENS {
        for off in [&[][..], &["fuse"]] {
            let plan = plan(golden, off);
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
            let offset = golden.starts_with("gemma");
            assert!(
                !offset || computed > 0,
                "{golden} adds 1 to the weights of its norms"
            );
            let bytes: usize = plan.weights.iter().map(|w| w.recipe.bytes()).sum();
            assert_eq!(plan.weight_bytes(), bytes);
        }
    }
}
