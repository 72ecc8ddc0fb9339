//! Times the load of a checkpoint's weights onto a GPU for several numbers of threads and sizes of
//! staging buffers, beside plain parallel reads of its files and plain copies from pinned memory: `cuda_load CHECKPOINT_DIR [RUNS]`.
use lathe_ir::DType;
use lathe_ir::import::{HfConfig, ImportOptions, import};
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{PassConfig, compile};
use lathe_runtime::device::cuda::driver::Device;
use lathe_runtime::device::cuda::memory::{Arena, Pinned, aligned};
use lathe_runtime::device::cuda::upload::{Placement, UploadOptions, upload_weights};
use lathe_runtime::weights::{Checkpoint, read_folder};
use std::path::Path;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let folder = Path::new(
        args.get(1)
            .ok_or("usage: cuda_load CHECKPOINT_DIR [RUNS]")?,
    );
    let runs: usize = args.get(2).map_or(Ok(3), |n| n.parse())?;
    let config = HfConfig::from_file(&folder.join("config.json"))?;
    let options = ImportOptions {
        dtype: DType::BF16,
        max_seq_len: None,
    };
    let model = import(&config, &options)?;
    let compiled = compile(&model.graph, &PassConfig::new(DeviceModel::H100))?;
    let programs = lathe_codegen::Programs {
        decode: compiled.steps.decode.as_ref(),
        general: compiled.steps.general.as_ref(),
        full: None,
    };
    let plan = lathe_codegen::lower(&args[1], DType::BF16, &programs)?;
    let device = Device::open(0)?;
    let stream = device.stream()?;
    let bytes = plan.weights.iter().map(|w| aligned(w.recipe.bytes())).sum();
    let mut arena = Arena::new(&device, "weights", bytes, "take a smaller model")?;
    let mut placements = Vec::new();
    for w in &plan.weights {
        placements.push(Placement {
            recipe: &w.recipe,
            dst: arena.alloc(w.recipe.bytes())?,
        });
    }
    let checkpoint = Checkpoint::open(folder)?;
    let cores = std::thread::available_parallelism().map_or(4, |n| n.get());
    let median = |mut v: Vec<f64>| {
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    };
    println!("{} GB of weights, {cores} cores", bytes as f64 * 1e-9);
    for threads in [cores / 2, cores, 2 * cores] {
        let rates: Result<Vec<f64>, _> = (0..runs)
            .map(|_| read_folder(folder, threads).map(|r| r.rate() * 1e-9))
            .collect();
        println!(
            "read    {threads:3} threads {:26} {:6.1} GB/s",
            "",
            median(rates?)
        );
    }
    let copy = |bytes: usize| -> Result<f64, Box<dyn std::error::Error>> {
        let from = Pinned::new(&device, bytes)?;
        let start = Instant::now();
        let mut at = 0;
        while at + bytes <= arena.capacity() {
            // SAFETY: the range lies in the arena; the buffer lives until the wait.
            unsafe { stream.copy_to_device(arena.base() + at as u64, from.as_slice())? };
            at += bytes;
        }
        stream.synchronize()?;
        Ok(at as f64 / start.elapsed().as_secs_f64() * 1e-9)
    };
    for kib in [64 << 10, 1 << 10] {
        let rates: Result<Vec<f64>, _> = (0..runs).map(|_| copy(kib << 10)).collect();
        println!(
            "copy    {kib:6} KiB a copy from pinned memory {:6.1} GB/s",
            median(rates?)
        );
    }
    let mut all = vec![UploadOptions::default()];
    for threads in [cores / 2, cores] {
        for (stages, stage_bytes) in [(2, 512 << 10), (2, 1 << 20), (3, 1 << 20), (2, 2 << 20)] {
            all.push(UploadOptions {
                threads,
                stages,
                stage_bytes,
            });
        }
    }
    for how in all {
        let mut rates = Vec::new();
        for _ in 0..runs {
            // SAFETY: every placement has its own part of the arena, which nothing else uses.
            let stats =
                unsafe { upload_weights(&stream, &placements, &checkpoint, None, how, &|_| {})? };
            rates.push(stats.copied as f64 / stats.duration.as_secs_f64() * 1e-9);
        }
        println!(
            "load    {:3} threads, {} x {:4} KiB {:12} {:6.1} GB/s",
            how.threads,
            how.stages,
            how.stage_bytes >> 10,
            "",
            median(rates)
        );
    }
    Ok(())
}
