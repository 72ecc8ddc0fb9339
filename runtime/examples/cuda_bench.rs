//! Decode and prefill times of a configuration with random weights on a GPU:
//! `cuda_bench CONFIG_DIR DTYPE [MODES] [BATCHES] [PREFILLS]`, MODES of graphs, pdl, autotune, cublaslt,
//! profile (times of single kernels); `cuda_bench configs/llama-3.1-8b bf16 graphs,pdl,autotune 1,16,512 2048`.
use lathe_ir::import::{HfConfig, ImportOptions, import};
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{PassConfig, compile};
use lathe_runtime::device::cuda::{CudaExecutor, CudaLoad};
use lathe_runtime::device::executor::Executor;
use lathe_runtime::device::load::{LoadOptions, Loadable, expected_tensors};
use lathe_runtime::device::profile::ProfileOptions;
use lathe_runtime::device::step::{RowSampler, StepBatch};
use lathe_runtime::sampling::SamplingParams;
use lathe_runtime::weights::RandomWeights;
use std::path::Path;
use std::time::Instant;

/// Pages of a decoding sequence.
const PAGES_EACH: usize = 8;

fn batch(n: usize, tokens: &[i32], start: usize, pages_each: usize) -> StepBatch {
    let mut b = StepBatch {
        max_pages: pages_each,
        ..StepBatch::default()
    };
    for i in 0..n {
        let pages: Vec<i32> = (i * pages_each..(i + 1) * pages_each)
            .map(|p| p as i32)
            .collect();
        let sampler = RowSampler {
            params: SamplingParams::default(),
            request: i as u64,
            position: (start + tokens.len()) as u32,
        };
        b.push_sequence(tokens, start, &pages, Some(sampler));
    }
    b
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let modes = args.get(3).map_or("graphs,pdl", String::as_str);
    let list = |i: usize, default: &str| -> Result<Vec<usize>, std::num::ParseIntError> {
        let text = args.get(i).map_or(default, String::as_str);
        text.split(',').map(str::parse).collect()
    };
    let batches = list(4, "1,2,4,8,64")?;
    let prefills = list(5, "128,512,2048")?;
    let most = batches.iter().copied().max().unwrap_or(1).max(64);
    let start = Instant::now();
    let config = HfConfig::from_file(&Path::new(&args[1]).join("config.json"))?;
    let dtype = args[2].parse()?;
    let options = ImportOptions {
        dtype,
        max_seq_len: None,
    };
    let model = import(&config, &options)?;
    let compiled = compile(&model.graph, &PassConfig::new(DeviceModel::H100))?;
    let programs = lathe_codegen::Programs {
        decode: compiled.steps.decode.as_ref(),
        general: compiled.steps.general.as_ref(),
        full: None,
    };
    let plan = lathe_codegen::lower(&args[1], dtype, &programs)?;
    println!("{} compiled after {:?}", args[1], start.elapsed());
    let weights = RandomWeights::new(&expected_tensors(&model.arch.weights), 0);
    let load = LoadOptions {
        max_tokens: 4096,
        max_rows: most,
        max_sequences: most,
        max_seq_len: 4096,
        page_size: 64,
        pages: most.max(8) * PAGES_EACH,
    };
    let how = CudaLoad {
        graphs: modes.contains("graphs"),
        pdl: modes.contains("pdl"),
        autotune: modes.contains("autotune"),
        cublaslt: modes.contains("cublaslt"),
        ..CudaLoad::default()
    };
    let loadable = Loadable {
        plan: &plan,
        weights: &weights,
        vocab: model.arch.vocab as usize,
    };
    let mut executor = CudaExecutor::load(loadable, load, &how)?;
    println!("loaded after {:?}", start.elapsed());
    let prompt: Vec<i32> = (0..128).map(|i| (i * 37 + 11) % 30000).collect();
    let mut last = executor.step(&batch(1, &prompt, 0, 64), false)?.next[0];
    println!("first token {last} after {:?}", start.elapsed());
    executor.warm_up()?;
    println!("warm after {:?}", start.elapsed());
    if let Some(tuned) = executor.tuned() {
        println!("{tuned}");
    }
    for n in batches {
        let mut at = 300;
        for _ in 0..3 {
            executor.step(&batch(n, &[last], at, PAGES_EACH), false)?;
            at += 1;
        }
        let (launches, graph) = executor.decode_launches(n)?;
        let steps = 60;
        let mut device: Vec<f64> = Vec::new();
        let mut host = 0.0;
        let begin = Instant::now();
        for i in 0..steps {
            // Tokens of the step before are taken on the device.
            let tokens: Vec<i32> = (0..n as i32).map(|i| -1 - i).collect();
            let mut b = batch(n, &[last], at, PAGES_EACH);
            if i > 0 {
                b.tokens = tokens;
            }
            let t = Instant::now();
            executor.submit(&b)?;
            host += t.elapsed().as_secs_f64();
            if i > 0 {
                let out = executor.collect()?;
                last = out.next[0];
                device.push(out.time.device);
            }
            at += 1;
        }
        executor.collect()?;
        let wall = begin.elapsed().as_secs_f64() / f64::from(steps);
        device.sort_by(f64::total_cmp);
        println!(
            "decode batch {n}: {:.3} ms wall, {:.3} ms device, host {:.1} us, {launches} launches, graph {graph}",
            wall * 1e3,
            device[device.len() / 2] * 1e3,
            host / f64::from(steps) * 1e6
        );
    }
    for t in prefills {
        let prompt: Vec<i32> = (0..t as i32).map(|i| (i * 37 + 11) % 30000).collect();
        let mut times = Vec::new();
        for _ in 0..4 {
            times.push(executor.step(&batch(1, &prompt, 0, 64), false)?.time.device);
        }
        times.sort_by(f64::total_cmp);
        println!("prefill {t}: {:.3} ms", times[1] * 1e3);
    }
    if !modes.contains("profile") {
        return Ok(());
    }
    for (what, b) in [
        ("decode 1", batch(1, &[last], 400, 64)),
        ("decode 64", batch(64, &[last], 400, PAGES_EACH)),
        ("prefill 2048", batch(1, &vec![7; 2048], 0, 64)),
    ] {
        let options = ProfileOptions {
            runs: 5,
            vendor: false,
        };
        let profile = executor.profile(&b, options)?;
        for k in profile.into_iter().flat_map(|p| p.kernels) {
            println!(
                "{what}: {:48} x{:3} {:8.2} us {:7.0} GB/s {:6.1} TFLOP/s  {}",
                k.name,
                k.count,
                k.micros,
                k.bandwidth() * 1e-9,
                k.flop_rate() * 1e-12,
                k.path
            );
        }
    }
    Ok(())
}
