//! The best rates of a GPU, measured before what is compared with them.

use lathe_codegen::cuda::{Probe, probe_kernel};
use lathe_ir::Product;
use std::path::PathBuf;

use super::cubin_cache::CubinCache;
use super::cublaslt::GemmShape;
use super::driver::{Device, Function, Stream};
use super::graph::Graph;
use super::launch::{Args, LaunchConfig, launch};
use super::memory::{Arena, aligned};
use super::noise::{fill_repeated, noise};
use super::prepare::Modules;
use super::timing::{time_graph, time_runs};
use super::yardstick::{PATTERN, Yardstick, in_turn};
use super::{CudaError, DevicePtr};
use crate::device::profile::Ceilings;

/// Most bytes that are streamed: many times the L2.
const STREAM: usize = 4 << 30;
/// Samples of each rate.
const SAMPLES: usize = 9;
/// Empty kernels in a graph.
const LAUNCHES: usize = 256;
/// Shapes of which the fastest product counts.
const SHAPES: [(usize, usize, usize); 3] =
    [(2048, 6144, 4096), (4096, 4096, 4096), (4096, 8192, 4096)];
/// Weights that the products rotate through.
const WEIGHTS: usize = 4;

/// Measures the rates of a device, with kernels from the folder `cache`, by default the user's. The matrix rate is cuBLASLt's, and absent without it.
///
/// # Errors
/// No device, no NVRTC, or not enough memory.
pub(super) fn ceilings(ordinal: usize, cache: Option<PathBuf>) -> Result<Ceilings, CudaError> {
    let device = Device::open(ordinal)?;
    let stream = device.stream()?;
    let bytes = (device.memory()?.0 / 4).min(STREAM) / 512 * 512;
    let hint = "other programs use the GPU";
    let mut arena = Arena::new(&device, "streams", bytes + aligned(4), hint)?;
    let (src, sink) = (arena.alloc(bytes)?, arena.alloc(4)?);
    let cache = CubinCache::if_usable(cache)?;
    let probes = [Probe::Empty, Probe::EmptyPdl, Probe::Read, Probe::Copy];
    let sources = probes.map(probe_kernel);
    let modules = Modules::default().get(&device, cache.as_ref(), &sources)?;
    let functions = sources
        .iter()
        .zip(&modules)
        .map(|(s, m)| m.function(&s.name, 0))
        .collect::<Result<Vec<_>, _>>()?;
    let (all, half) = ((bytes / 16) as u64, (bytes / 32) as u64);
    let args = |count, dst| Args::new().ptr(src).u64(count).ptr(sink).ptr(dst);
    let grid = 4 * device.properties().sm_count;
    let rate = |function: &Function, args: &Args| {
        let config = LaunchConfig::linear(grid, 512);
        let samples = time_runs(&stream, 2, SAMPLES, |stream| {
            // SAFETY: parameters as in probe.cu, within the arena.
            unsafe { launch(stream, function, &config, args) }
        })?;
        Ok::<f64, CudaError>(bytes as f64 / samples.median() * 1e6)
    };
    // SAFETY: the memory is the arena's, which nothing uses yet.
    unsafe { stream.fill_u32(src, 0x3f8a_5c71, bytes / 4)? };
    let read = rate(&functions[2], &args(all, src))?;
    let copy = rate(&functions[3], &args(half, src + (bytes / 2) as DevicePtr))?;
    let gap = |function: &Function, pdl| {
        let config = LaunchConfig {
            pdl,
            ..LaunchConfig::linear(device.properties().sm_count, 128)
        };
        let args = args(0, src);
        let graph = Graph::capture(&stream, |stream| {
            // SAFETY: as above; the kernel touches no memory.
            (0..LAUNCHES).try_for_each(|_| unsafe { launch(stream, function, &config, &args) })
        })?;
        Ok::<f64, CudaError>(time_graph(&stream, &graph, SAMPLES, 4)? / LAUNCHES as f64 * 1e-6)
    };
    let launch = gap(&functions[0], false)?;
    let launch_pdl = gap(&functions[1], true)?;
    drop(arena);
    let matrix = match matrix_rate(&stream) {
        Ok(rate) => Some(rate),
        Err(error) => {
            tracing::debug!("no matrix rate of cuBLASLt: {error}");
            None
        }
    };
    Ok(Ceilings {
        read,
        copy,
        matrix,
        matrix_source: "cuBLASLt",
        launch: Some(launch),
        launch_pdl: Some(launch_pdl),
    })
}

/// Operations per second of the fastest product.
fn matrix_rate(stream: &Stream) -> Result<f64, CudaError> {
    let most = |f: fn(&(usize, usize, usize)) -> usize| SHAPES.iter().map(f).max().unwrap_or(0);
    let weight = most(|s| s.1 * s.2);
    let hint = "other programs use the GPU";
    let mut arena = Arena::new(
        stream.device(),
        "weights of the matrix rate",
        WEIGHTS * aligned(2 * weight),
        hint,
    )?;
    let pattern = noise(PATTERN);
    let weights = (0..WEIGHTS)
        .map(|_| {
            let at = arena.alloc(2 * weight)?;
            // SAFETY: the range was just cut off.
            unsafe { fill_repeated(stream, at, 2 * weight, &pattern)? };
            Ok(at)
        })
        .collect::<Result<Vec<_>, CudaError>>()?;
    let yardstick = Yardstick::new(stream, most(|s| s.0 * s.2), most(|s| s.0 * s.1))?;
    let mut best: f64 = 0.0;
    for (m, n, k) in SHAPES {
        let shape = GemmShape { m, n, k };
        // SAFETY: all memory has the largest sizes and lives to the end of this function.
        let graphs = unsafe { yardstick.graphs(stream, shape, &weights, 2)? };
        let graphs: Vec<&Graph> = graphs.iter().collect();
        for micros in in_turn(stream, &graphs, SAMPLES)? {
            best = best.max(Product { m, n, k }.flops() * (2 * WEIGHTS) as f64 / micros * 1e6);
        }
    }
    Ok(best)
}
