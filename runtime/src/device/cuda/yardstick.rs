//! cuBLASLt beside our own GEMMs: the same shape and weights, random activations, launches captured in graphs.

use super::cublaslt::{CublasLt, Gemm, GemmOperands, GemmShape, WORKSPACE_BYTES};
use super::driver::Stream;
use super::graph::Graph;
use super::memory::{Arena, aligned, check_fits};
use super::noise::{fill_repeated, noise};
use super::timing::{Timer, time_graph};
use super::{CudaError, DevicePtr};
use crate::device::profile::median;

/// Weights that an algorithm is ranked with, together: several times the L2.
const RANKED_BYTES: usize = 256 << 20;
/// Algorithms that are timed again, in turn with ours.
const FINALISTS: usize = 3;
/// Random values that are repeated to fill memory.
pub(super) const PATTERN: usize = 4 << 20;

/// The library with memory for its operands.
pub(super) struct Yardstick {
    // Before the memory that it works in.
    lt: CublasLt,
    x: DevicePtr,
    y: DevicePtr,
    _arena: Arena,
}

impl Yardstick {
    /// Opens the library and takes memory for x of `x` and y of `y` bf16 elements.
    ///
    /// # Errors
    /// No cuBLASLt, or not enough memory.
    pub(super) fn new(stream: &Stream, x: usize, y: usize) -> Result<Yardstick, CudaError> {
        let parts = [WORKSPACE_BYTES, 2 * x, 2 * y];
        let bytes: usize = parts.iter().map(|&b| aligned(b)).sum();
        let name = "comparison with cuBLASLt";
        let hint = "lower the batch or the prefill, or leave cuBLASLt out";
        check_fits(stream.device(), &[(name.to_owned(), bytes)], hint)?;
        let mut arena = Arena::new(stream.device(), name, bytes, hint)?;
        let lt = CublasLt::new(arena.alloc(parts[0])?)?;
        let (x_at, y_at) = (arena.alloc(parts[1])?, arena.alloc(parts[2])?);
        // SAFETY: the range is the arena's, which nothing uses yet.
        unsafe { fill_repeated(stream, x_at, 2 * x, &noise(PATTERN.min(x)))? };
        Ok(Yardstick {
            lt,
            x: x_at,
            y: y_at,
            _arena: arena,
        })
    }

    /// Graphs of the fastest algorithms, each a product with every one of `weights`, `repeat` times over.
    ///
    /// # Safety
    /// The weights are `[N, K]` bf16 on the device and stay until the graphs are gone, as this object does; x and y
    /// fit the memory that it was made with.
    ///
    /// # Errors
    /// No algorithm, or the device fails.
    pub(super) unsafe fn graphs(
        &self,
        stream: &Stream,
        shape: GemmShape,
        weights: &[DevicePtr],
        repeat: usize,
    ) -> Result<Vec<Graph>, CudaError> {
        let gemm = self.lt.gemm(shape)?;
        let of = |w: &DevicePtr| GemmOperands {
            x: self.x,
            w: *w,
            y: self.y,
        };
        let all: Vec<GemmOperands> = weights.iter().map(of).collect();
        let enough = RANKED_BYTES.div_ceil(2 * shape.n * shape.k).clamp(2, 8);
        let few: Vec<GemmOperands> = all.iter().cycle().take(enough).copied().collect();
        let mut ranked: Vec<(f64, usize)> = Vec::new();
        let mut refusal = None;
        for algorithm in 0..gemm.algorithms() {
            // SAFETY: by the contract of this function.
            let graph = unsafe { capture(stream, &gemm, algorithm, &few, 1) };
            match graph.and_then(|graph| time_graph(stream, &graph, 3, 1)) {
                Ok(micros) => ranked.push((micros, algorithm)),
                // An algorithm that refuses or cannot be captured; after a failure of the device this fails, too.
                Err(error) => {
                    stream.synchronize()?;
                    refusal = Some(error);
                }
            }
        }
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
        if let (true, Some(refusal)) = (ranked.is_empty(), refusal) {
            return Err(refusal);
        }
        ranked
            .iter()
            .take(FINALISTS)
            // SAFETY: by the contract of this function.
            .map(|&(_, algorithm)| unsafe { capture(stream, &gemm, algorithm, &all, repeat) })
            .collect()
    }
}

/// # Safety
/// As [`Gemm::run`] for each of the operands, until the graph is gone.
unsafe fn capture(
    stream: &Stream,
    gemm: &Gemm,
    algorithm: usize,
    operands: &[GemmOperands],
    repeat: usize,
) -> Result<Graph, CudaError> {
    // The library loads a kernel when it is first used, which a capture does not allow.
    if let Some(first) = operands.first() {
        // SAFETY: by the contract of this function.
        unsafe { gemm.run_with(stream, first, None, algorithm)? };
        stream.synchronize()?;
    }
    Graph::capture(stream, |stream| {
        (0..repeat).try_for_each(|_| {
            operands
                .iter()
                // SAFETY: by the contract of this function.
                .try_for_each(|o| unsafe { gemm.run_with(stream, o, None, algorithm) })
        })
    })
}

/// Median microseconds of one replay of each graph, timed in turn so that a change of clocks meets all alike.
///
/// # Errors
/// The device fails.
pub(super) fn in_turn(
    stream: &Stream,
    graphs: &[&Graph],
    rounds: usize,
) -> Result<Vec<f64>, CudaError> {
    /// Microseconds of a sample, so that the time of the events does not count.
    const SAMPLE: f64 = 1000.0;
    let timer = Timer::new(stream)?;
    let mut replays = Vec::with_capacity(graphs.len());
    for graph in graphs {
        graph.launch(stream)?;
        let once = timer.time(stream, |stream| graph.launch(stream))?;
        replays.push((SAMPLE / once.max(1.0)).ceil().clamp(1.0, 10.0) as usize);
    }
    let mut samples = vec![Vec::with_capacity(rounds); graphs.len()];
    for _ in 0..rounds {
        for ((graph, &n), all) in graphs.iter().zip(&replays).zip(&mut samples) {
            let time = timer.time(stream, |stream| {
                (0..n).try_for_each(|_| graph.launch(stream))
            })?;
            all.push(time / n as f64);
        }
    }
    Ok(samples.into_iter().map(median).collect())
}
