//! Every kernel of the fixtures' plans compiles to a cubin without spills and without serialised
//! tensor-core pipelines. Needs NVRTC, no GPU; without NVRTC the test says so and passes, unless
//! LATHE_REQUIRE_NVRTC is set.

use lathe_codegen::cuda::{
    Choices, CudaOptions, CudaProgram, Sampling, Sizes, Variant, gemm_keys, lower_gemms,
    lower_program,
};
use lathe_codegen::{Plan, ProgramKind, Programs, lower};
use lathe_ir::import::{HfConfig, ImportOptions, import};
use lathe_ir::{DType, Epilogue};
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{PassConfig, compile};
use lathe_runtime::cuda::library::{self, Library};
use lathe_runtime::cuda::nvrtc::{Source, compile_all};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name)
        .join("config.json")
}

fn plan(name: &str, dtype: DType, disabled: &[&str]) -> Plan {
    let config = HfConfig::from_file(&fixture(name)).unwrap();
    let options = ImportOptions {
        dtype,
        max_seq_len: None,
    };
    let model = import(&config, &options).unwrap();
    let passes = PassConfig::new(DeviceModel::H100)
        .disable(disabled)
        .unwrap();
    let compiled = compile(&model.graph, &passes).unwrap();
    let programs = Programs {
        decode: compiled.decode.as_ref(),
        general: compiled.general.as_ref(),
        full: None,
    };
    // The programs of torch-simple.
    let unfused = if disabled == ["fuse"] { " unfused" } else { "" };
    lower(&format!("{name}{unfused}"), dtype, &programs).unwrap()
}

fn options(plan: &Plan) -> CudaOptions {
    CudaOptions {
        pdl: true,
        sms: 132,
        page_size: 64,
        max_pages: 64,
        plain: false,
        per_op: plan.name.ends_with("unfused"),
    }
}

fn programs(plan: &Plan, decode: &[usize], general: &[usize]) -> Vec<CudaProgram> {
    let options = options(plan);
    let mut all = Vec::new();
    for (kind, buckets) in [
        (ProgramKind::Decode, decode),
        (ProgramKind::General, general),
    ] {
        let program = plan.program(kind).unwrap();
        for (i, &t) in buckets.iter().enumerate() {
            let sizes = match kind {
                ProgramKind::Decode => Sizes { t, b: t, r: t },
                _ => Sizes { t, b: 4, r: 4 },
            };
            let sampling = [Sampling::GreedyOnly, Sampling::Params][i % 2];
            let lowered = lower_program(plan, program, sizes, sampling, options)
                .unwrap_or_else(|e| panic!("{}: {e}", plan.name));
            all.push(lowered);
        }
    }
    // What is computed while loading has kernels too.
    if let Some(once) = &plan.once {
        let (sizes, options) = (
            Sizes { t: 1, b: 1, r: 1 },
            CudaOptions {
                pdl: false,
                ..options
            },
        );
        let lowered = lower_program(plan, &once.program, sizes, Sampling::Params, options);
        all.push(lowered.unwrap_or_else(|e| panic!("{}: {e}", plan.name)));
    }
    all
}

/// What the plans of the golden models must not lose on the way to kernels: the bias of gated MLPs,
/// and waiting for weights that the step itself would compute.
#[test]
fn biases_are_kept_and_no_step_waits_for_weights() {
    let biased = plan("golden/llama-mha-bias", DType::BF16, &[]);
    for p in programs(&biased, &[1, 8], &[64, 512]) {
        let program = biased
            .program(p.kind)
            .expect("nothing is computed while loading");
        for l in &p.launches {
            let name = &p.kernels[l.kernel].name;
            let has_bias = !matches!(
                program.steps[l.step].operands.get(2),
                None | Some(lathe_codegen::Operand::None)
            );
            let is_gemm = matches!(program.steps[l.step].op, lathe_ir::Op::Gemm(_));
            if is_gemm && has_bias && !name.starts_with("norm") {
                assert!(name.contains("bias"), "{name} drops a bias");
            }
        }
    }
    // Weights that need arithmetic or a pack are ready when a step starts: it never waits for them.
    for golden in ["falcon", "gemma", "gpt2"] {
        let folded = plan(&format!("golden/{golden}"), DType::BF16, &[]);
        for p in programs(&folded, &[1, 8], &[64]) {
            if p.kind == ProgramKind::Once {
                continue;
            }
            for l in &p.launches {
                assert!(l.pdl, "{golden}: {} waits", p.kernels[l.kernel].name);
            }
        }
    }
}

#[test]
fn every_kernel_compiles_without_spills() {
    let required = std::env::var_os("LATHE_REQUIRE_NVRTC").is_some();
    if let Err(error) = library::ensure(Library::Nvrtc) {
        assert!(!required, "{error}");
        eprintln!("skipped: {error}");
        return;
    }
    let golden = |m: &str| format!("golden/{m}");
    let config = |m: &str| format!("configs/{m}");
    let mut all = Vec::new();
    for m in ["llama-3.1-8b", "llama-3.2-1b"] {
        let plan = plan(&config(m), DType::BF16, &[]);
        all.extend(programs(&plan, &[1, 4, 8, 64], &[8, 512, 2048]));
    }
    for m in ["qwen3-0.6b", "qwen2.5-7b"] {
        all.extend(programs(
            &plan(&config(m), DType::BF16, &[]),
            &[1, 8],
            &[512],
        ));
    }
    for m in [
        "llama-rope3-tied",
        "mistral-window",
        "qwen3",
        "llama-mha-bias",
        "gemma",
        "gemma2",
        "gemma3",
        "falcon",
        "gpt2",
        "gpt-neox",
        "phi",
    ] {
        all.extend(programs(
            &plan(&golden(m), DType::BF16, &[]),
            &[1, 8],
            &[64],
        ));
    }
    for m in ["llama-rope3-tied", "qwen3", "gpt-neox", "falcon"] {
        for dtype in [DType::BF16, DType::F32] {
            let unfused = plan(&golden(m), dtype, &["fuse"]);
            all.extend(programs(&unfused, &[1, 8], &[64]));
        }
    }
    for m in ["llama-rope3-tied", "qwen2"] {
        all.extend(programs(&plan(&golden(m), DType::F32, &[]), &[1, 8], &[64]));
    }
    compile_without_spills(&all);
}

/// Tiles and slots that autotuning may choose: those that need most registers of each family, and
/// clusters both ways.
#[test]
fn kernels_that_tuning_may_choose_compile_without_spills() {
    let required = std::env::var_os("LATHE_REQUIRE_NVRTC").is_some();
    if let Err(error) = library::ensure(Library::Nvrtc) {
        assert!(!required, "{error}");
        eprintln!("skipped: {error}");
        return;
    }
    let plan = plan("configs/llama-3.1-8b", DType::BF16, &[]);
    let program = plan.program(ProgramKind::General).unwrap();
    let mut all = Vec::new();
    for (m, variants) in [
        (16, &["skinny_w1_p4", "skinny_w2_p2"][..]),
        (
            64,
            &["skinny_w1_p1", "skinny_w1_p2_even", "tiled_64x96_c1x1"],
        ),
        (128, &["skinny_w1_p2", "skinny_w1_p1"]),
        (
            384,
            &[
                "tiled_64x64_c1x1",
                "tiled_64x192_c2x1",
                "tiled_64x256_c1x2",
                "tiled_128x256_c1x2",
                "tiled_192x160_c1x1",
                "tiled_192x192_c2x1",
            ],
        ),
    ] {
        let sizes = Sizes { t: m, b: 4, r: 4 };
        let sampling = Sampling::GreedyOnly;
        let options = options(&plan);
        let keys = gemm_keys(&plan, program, sizes, sampling, options).unwrap();
        for (key, steps) in keys.iter().filter(|(k, _)| k.epilogue != Epilogue::None) {
            for variant in variants {
                let variant: Variant = variant.parse().unwrap();
                // Not every tile takes SwiGLU.
                if variant.check(key, options.sms as usize).is_err() {
                    continue;
                }
                let mut choices = Choices::default();
                choices.insert(*key, variant);
                all.push(
                    lower_gemms(&plan, program, sizes, options, &choices, &steps[..1]).unwrap(),
                );
            }
        }
    }
    assert!(all.len() >= 20, "{}", all.len());
    compile_without_spills(&all);
}

fn compile_without_spills(all: &[CudaProgram]) {
    let mut sources: BTreeMap<String, String> = BTreeMap::new();
    for kernel in all.iter().flat_map(|p| &p.kernels) {
        // Comments name the ops that a kernel came from and may differ between models.
        let code = kernel.text.split_once("#define").unwrap().1;
        sources
            .entry(code.to_owned())
            .or_insert_with(|| kernel.name.clone());
    }
    let sources: Vec<Source> = sources
        .into_iter()
        .map(|(code, name)| Source::new(name, format!("#define{code}")))
        .collect();
    println!("{} kernels", sources.len());
    let dir = tempfile::tempdir().unwrap();
    let start = std::time::Instant::now();
    let compiled = compile_all(&sources, None, dir.path(), 2, &|_| {});
    println!("compiled in {:?}", start.elapsed());
    let mut bad = Vec::new();
    for (source, outcome) in sources.iter().zip(compiled) {
        match outcome {
            Err(e) => bad.push(e.to_string()),
            Ok(c) => {
                for line in c.serialisation_lines() {
                    bad.push(format!("{}: {line}", source.name));
                }
                for r in &c.resources {
                    if std::env::var_os("LATHE_SHOW_KERNELS").is_some() {
                        println!(
                            "{:60} {:4} registers, {:5.1} s",
                            r.kernel,
                            r.registers,
                            c.duration.as_secs_f64()
                        );
                    }
                    if r.spill_stores > 0 || r.stack_bytes > 0 {
                        bad.push(format!("{}: {r:?}", source.name));
                    }
                }
            }
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}
