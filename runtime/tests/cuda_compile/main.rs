//! Every kernel of the fixtures' plans compiles to a cubin without spills and without serialised
//! tensor-core pipelines; what registers the kernels of some models take is a snapshot; and the
//! machine code issues loads and waits in the order that the sources mean. Needs NVRTC and for the
//! last part nvdisasm, but no GPU; `make nvrtc` installs both. These tests are ignored
//! unless `--include-ignored` asks for them, as `make test` does where there is an NVRTC.
//!
//! After a change to kernels, `make nvrtc` and then
//! `INSTA_UPDATE=always LD_LIBRARY_PATH=target/nvrtc/nvidia/cu13/lib cargo test --workspace --test cuda_compile -- --include-ignored`
//! brings the snapshots up to date, for review.

#[path = "../common/mod.rs"]
mod common;
mod order;
mod plans;
mod sass;

use common::{family, models};
use lathe_codegen::ProgramKind;
use lathe_codegen::cuda::KernelSource;
use lathe_ir::DType;
use lathe_runtime::device::cuda::compile::compile_all;
use lathe_runtime::device::cuda::cubin_cache::{CubinCache, DEFAULT_LIMIT};
use lathe_runtime::device::cuda::library::{self, Library};
use lathe_runtime::device::cuda::nvrtc::{Compiled, Source, version};
use lathe_runtime::device::load::LoadOptions;
use plans::{Spelling, candidates, kernels, limits, plan, programs};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::sync::OnceLock;

/// Configurations whose operations have no kernels yet.
const NOT_YET: [&str; 1] = ["configs/mixtral-8x7b"];

/// The models whose kernels are in the snapshot: of every family the last of its golden models.
fn of_families() -> Vec<String> {
    let mut of_family: BTreeMap<String, String> = BTreeMap::new();
    for model in models("golden") {
        of_family.insert(family(&model), model);
    }
    let mut models: Vec<String> = of_family.into_values().collect();
    models.sort();
    models
}

/// Tests that compile are ignored unless asked for (`--include-ignored`), which `make test` does where there is an NVRTC.
fn ensure_nvrtc() {
    if let Err(error) = library::ensure(Library::Nvrtc) {
        panic!("{error}");
    }
}

/// Compiled kernels by their code.
struct Kernels {
    /// The plans' kernels, with the models that have them.
    all: BTreeMap<String, (KernelSource, Compiled)>,
    failed: Vec<String>,
}

/// All kernels of all plans, compiled once for all tests.
fn compiled() -> &'static Kernels {
    static KERNELS: OnceLock<Kernels> = OnceLock::new();
    KERNELS.get_or_init(|| {
        let mut distinct: BTreeMap<String, KernelSource> = BTreeMap::new();
        let mut add = |name: &str, dtype, limits: LoadOptions| {
            for spelling in [Spelling::Fused, Spelling::Unfused] {
                for kernel in kernels(name, dtype, spelling, &limits) {
                    distinct.entry(kernel.code().to_owned()).or_insert(kernel);
                }
            }
        };
        for m in models("configs") {
            if !NOT_YET.contains(&&*m) {
                add(&m, DType::BF16, limits(512, 8192));
            }
        }
        for m in models("golden") {
            for dtype in [DType::BF16, DType::F32] {
                add(&m, dtype, limits(16, 256));
            }
        }
        for kernel in candidates("configs/llama-3.1-8b", &[8, 16, 64, 128, 384, 512]) {
            distinct.entry(kernel.code().to_owned()).or_insert(kernel);
        }
        let sources: Vec<Source> = distinct
            .iter()
            .map(|(code, k)| Source::new(k.name.clone(), code.clone()))
            .collect();
        println!("{} kernels", sources.len());
        // Kept between runs, so that a changed kernel is the only one to be compiled again.
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cubins");
        let cache = CubinCache::open(&dir, DEFAULT_LIMIT).unwrap();
        let threads = std::thread::available_parallelism().map_or(2, |n| n.get());
        let start = std::time::Instant::now();
        let outcomes = compile_all(&sources, Some(&cache), &dir, threads, &|_| {});
        println!("compiled in {:?}", start.elapsed());
        let mut kernels = Kernels {
            all: BTreeMap::new(),
            failed: Vec::new(),
        };
        for ((code, source), outcome) in distinct.into_iter().zip(outcomes) {
            match outcome {
                Ok(compiled) => {
                    kernels.all.insert(code, (source, compiled));
                }
                Err(e) => kernels.failed.push(e.to_string()),
            }
        }
        kernels
    })
}

/// What the plans of the golden models must not lose on the way to kernels: the bias of gated MLPs,
/// and waiting for weights that the step itself would compute.
#[test]
fn biases_are_kept_and_no_step_waits_for_weights() {
    let biased = plan("golden/llama-mha-bias", DType::BF16, Spelling::Fused);
    for p in programs(&biased, Spelling::Fused, &limits(8, 512)) {
        let program = biased
            .program(p.kind)
            .expect("nothing is computed while loading");
        for l in &p.launches {
            let name = &p.kernels[l.kernel].name;
            let bias = lathe_ir::ops::gemm::BIAS;
            let has_bias = program.steps[l.step].get(bias).is_some();
            let is_gemm = matches!(program.steps[l.step].op, lathe_ir::Op::Gemm(_));
            // What comes before the GEMM itself.
            let before = name.starts_with("norm") || name.starts_with("row_sums");
            if is_gemm && has_bias && !before {
                assert!(name.contains("bias"), "{name} drops a bias");
            }
        }
    }
    // Weights that need arithmetic or a pack are ready when a step starts: it never waits for them.
    for golden in ["falcon", "gemma", "gpt2"] {
        let folded = plan(&format!("golden/{golden}"), DType::BF16, Spelling::Fused);
        for p in programs(&folded, Spelling::Fused, &limits(8, 64)) {
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
#[ignore = "NVRTC missing (make nvrtc)"]
fn every_kernel_compiles_without_spills() {
    ensure_nvrtc();
    let kernels = compiled();
    let mut bad = kernels.failed.clone();
    for (source, compiled) in kernels.all.values() {
        for line in compiled.serialisation_lines() {
            bad.push(format!("{}: {line}", source.name));
        }
        assert_eq!(compiled.resources.len(), 1, "{}", compiled.log);
        for r in &compiled.resources {
            if std::env::var_os("LATHE_SHOW_KERNELS").is_some() {
                let seconds = compiled.duration.as_secs_f64();
                println!(
                    "{:60} {:4} registers, {seconds:5.1} s",
                    r.kernel, r.registers
                );
            }
            if r.spill_stores > 0 || r.stack_bytes > 0 {
                bad.push(format!("{}: {r:?}", source.name));
            }
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

/// Registers, spills, shared memory and barriers, one line a kernel that the lines above do not have.
#[test]
#[ignore = "NVRTC missing (make nvrtc)"]
fn resources_are_as_they_were() {
    ensure_nvrtc();
    let found = version().unwrap();
    assert_eq!(found, (13, 0), "the snapshot is of NVRTC 13.0");
    let mut shown = std::collections::BTreeSet::new();
    let mut table = |models: &[(String, Spelling)], limits: LoadOptions| {
        let mut text = String::from("registers  spills  shared  barriers  kernel\n");
        for (model, spelling) in models {
            let _ = writeln!(text, "{model}, {spelling:?}");
            for kernel in kernels(model, DType::BF16, *spelling, &limits) {
                if !shown.insert(kernel.code().to_owned()) {
                    continue;
                }
                let Some((_, compiled)) = compiled().all.get(kernel.code()) else {
                    panic!("{} of {model} is not among all kernels", kernel.name);
                };
                for r in &compiled.resources {
                    let spills = r.spill_stores + r.spill_loads + r.stack_bytes;
                    let _ = writeln!(
                        text,
                        "{:9}  {spills:6}  {:6}  {:8}  {}",
                        r.registers, r.shared_bytes, r.barriers, r.kernel
                    );
                }
            }
        }
        text
    };
    let llama = |name: &str| (format!("configs/{name}"), Spelling::Fused);
    let large = table(
        &[llama("llama-3.1-8b"), llama("llama-3.2-1b")],
        limits(512, 8192),
    );
    let fused = |name| (name, Spelling::Fused);
    let mut families: Vec<_> = of_families().into_iter().map(fused).collect();
    families.push(("golden/llama-rope3-tied".into(), Spelling::Unfused));
    let small = table(&families, limits(8, 64));
    insta::with_settings!({snapshot_path => "../../../snapshots/cuda", prepend_module_to_snapshot => false}, {
        insta::assert_snapshot!("resources_llama", large);
        insta::assert_snapshot!("resources_families", small);
    });
}

fn disassembler() -> sass::Disassembler {
    ensure_nvrtc();
    sass::Disassembler::find().expect("nvdisasm was not found: run `make nvrtc`")
}

/// Loads, waits and matrix products of the hot kernels come in the intended order.
#[test]
#[ignore = "NVRTC missing (make nvrtc)"]
fn the_machine_code_keeps_the_order() {
    let disassembler = disassembler();
    let (mut bad, mut checks) = (Vec::new(), BTreeMap::<&str, usize>::new());
    let mut seen = std::collections::BTreeSet::new();
    for (model, limits) in [
        ("configs/llama-3.1-8b", limits(1, 512)),
        ("configs/llama-3.1-8b", limits(64, 8)),
        ("golden/mistral-window", limits(1, 64)),
        ("golden/gemma2", limits(1, 64)),
    ] {
        for kernel in kernels(model, DType::BF16, Spelling::Fused, &limits) {
            if !seen.insert(kernel.code().to_owned()) {
                continue;
            }
            let (_, compiled) = &compiled().all[kernel.code()];
            let instructions = disassembler.disassemble(&compiled.cubin);
            let outcome = order::check(&kernel.name, kernel.code(), &instructions);
            for name in outcome.made {
                *checks.entry(name).or_default() += 1;
            }
            let named = outcome.violations.into_iter();
            bad.extend(named.map(|v| format!("{}: {v}", kernel.name)));
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
    println!("{} kernels disassembled: {checks:?}", seen.len());
    for check in order::CHECKS {
        assert!(
            checks.contains_key(check),
            "no kernel was checked for {check}"
        );
    }
}

/// The checks find what they are for: sources in which the compiler is known to lose the order.
#[test]
#[ignore = "NVRTC missing (make nvrtc)"]
fn lost_orders_are_found() {
    let disassembler = disassembler();
    let dir = tempfile::tempdir().unwrap();
    // The head of a model with tied embeddings has a norm of its own.
    let limits = limits(8, 64);
    let all = kernels(
        "configs/llama-3.2-1b",
        DType::BF16,
        Spelling::Fused,
        &limits,
    );
    let violations = |prefix: &str, from: &str, to: &str| {
        let kernel = all.iter().find(|k| k.name.starts_with(prefix)).unwrap();
        assert!(
            kernel.code().contains(from),
            "{} has no {from}",
            kernel.name
        );
        // Of longer rows a thread of the norm has several vectors.
        let code = kernel.code().replace("LATHE_K 2048", "LATHE_K 4096");
        let code = code.replace(from, to);
        let source = Source::new(kernel.name.clone(), code.clone());
        let compiled = lathe_runtime::device::cuda::nvrtc::compile(&source, dir.path()).unwrap();
        let instructions = disassembler.disassemble(&compiled.cubin);
        order::check(&kernel.name, &code, &instructions).violations
    };
    // The wait for the next block between softmax and wait 0 is what keeps them apart.
    let next = "    mbar_wait(c.v_full + 8 * c.v.slot, c.v.phase);\n    wgmma_wait<0>();";
    let moved = "    wgmma_wait<0>();\n    mbar_wait(c.v_full + 8 * c.v.slot, c.v.phase);";
    let found = violations("attn_prefill", next, moved);
    assert!(
        found.iter().any(|v| v.contains("exponentials")),
        "{found:?}"
    );
    // Loads that the compiler may move sink below the wait.
    let plain = "gm[i] = ld16(gamma + (tid + i * T) * VEC);";
    let movable = "gm[i] = __ldg((const uint4*)(gamma + (tid + i * T) * VEC));";
    let found = violations("norm", plain, movable);
    assert!(found.iter().any(|v| v.contains("sunk")), "{found:?}");
    // Without the wait at all.
    let found = violations("norm", "  pdl_wait();", "");
    assert!(found.iter().any(|v| v.contains("no wait")), "{found:?}");
}
