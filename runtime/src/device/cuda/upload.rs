//! Weights onto the device, straight into their packed layout.
//!
//! Stored weights: several threads, each with a few small pinned buffers of its own, read and permute rows into one
//! buffer while the others are copied. Nothing waits for all threads, the buffers stay in the CPU's caches, and
//! locking them costs little (about 0.8 ms a MiB, which is why they are small). Host memory is these buffers,
//! however large the model. Random weights: a kernel writes them where they belong.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lathe_codegen::cuda::random_weights::{KERNEL, SOURCE, THREADS};
use lathe_codegen::pack::{PackRecipe, RowPerm, Segment};

use rayon::prelude::*;

use super::compile::load_kernel;
use super::cubin_cache::CubinCache;
use super::driver::{Device, Event, Function, Stream};
use super::launch::{Args, LaunchConfig, launch};
use super::memory::Pinned;
use super::nvrtc::Source;
use super::{CudaError, DevicePtr};
use crate::threads::on_several;
use crate::weights::pack::Packer;
use crate::weights::{RandomTensor, TensorData, WeightSource, WeightsError};

/// Threads that read unless asked otherwise; more do not help against one copy engine.
const MAX_THREADS: usize = 16;

/// How stored weights are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UploadOptions {
    /// Threads that read and pack.
    pub threads: usize,
    /// Staging buffers of a thread, at least 2 for reading and copying at the same time.
    pub stages: usize,
    /// Bytes of a staging buffer, unless a row is longer.
    pub stage_bytes: usize,
}

impl Default for UploadOptions {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(4, |n| n.get());
        UploadOptions {
            threads: cores.min(MAX_THREADS),
            stages: 2,
            stage_bytes: 1 << 20,
        }
    }
}

/// One packed weight and where it goes.
#[derive(Debug, Clone, Copy)]
pub struct Placement<'a> {
    /// What it is made of.
    pub recipe: &'a PackRecipe,
    /// Where it goes: `recipe.bytes()` bytes on the device, aligned to 16.
    pub dst: DevicePtr,
}

/// What an upload did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UploadStats {
    /// Bytes that were read, packed and copied.
    pub copied: usize,
    /// Bytes that were made on the device.
    pub generated: usize,
    /// Time of it all.
    pub duration: Duration,
}

impl fmt::Display for UploadStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gb = |bytes: usize| bytes as f64 * 1e-9;
        let seconds = self.duration.as_secs_f64();
        let done = match (self.copied, self.generated) {
            (copied, 0) => format!("{:.2} GB read", gb(copied)),
            (0, generated) => format!("{:.2} GB of random values made", gb(generated)),
            (copied, generated) => {
                format!("{:.2} GB read, {:.2} GB made", gb(copied), gb(generated))
            }
        };
        let rate = gb(self.copied + self.generated) / seconds.max(1e-9);
        write!(f, "weights: {done} in {seconds:.2} s, {rate:.1} GB/s")
    }
}

/// Puts all weights in their places and waits until they are there. `progress` is called with the bytes done, from
/// any thread.
///
/// # Safety
/// Every placement's memory is on the stream's device, has the bytes of its recipe, and is used by nothing else
/// until this returns.
///
/// # Errors
/// Recipes that do not fit the source, unreadable files, NVRTC for random weights, the driver.
pub unsafe fn upload_weights(
    stream: &Stream,
    placements: &[Placement<'_>],
    source: &dyn WeightSource,
    cache: Option<&CubinCache>,
    options: UploadOptions,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<UploadStats, CudaError> {
    let start = Instant::now();
    stream.device().bind()?;
    let mut stats = UploadStats::default();
    let is_random = |p: &&Placement<'_>| {
        p.recipe
            .segments
            .iter()
            .all(|s| matches!(source.data(&s.tensor), Some(TensorData::Random(_))))
    };
    let (random, stored): (Vec<&Placement<'_>>, Vec<_>) = placements.iter().partition(is_random);
    if !random.is_empty() {
        let generator = Generator::new(stream.device(), cache)?;
        for placement in random {
            // SAFETY: by the contract of this function.
            unsafe { generator.generate(stream, placement, source)? };
            stats.generated += placement.recipe.bytes();
            progress(stats.generated);
        }
    }
    if !stored.is_empty() {
        let packers = stored
            .par_iter()
            .map(|p| Packer::new(p.recipe, source))
            .collect::<Result<Vec<_>, _>>()?;
        tracing::debug!("recipes bound after {:?}", start.elapsed());
        let done = |bytes| progress(stats.generated + bytes);
        // SAFETY: by the contract of this function.
        stats.copied = unsafe { copy_stored(stream, &stored, &packers, options, &done)? };
    }
    stream.synchronize()?;
    stats.duration = start.elapsed();
    progress(stats.generated + stats.copied);
    Ok(stats)
}

/// Rows of one weight that fit into a staging buffer.
struct Piece {
    weight: usize,
    rows: Range<usize>,
}

/// Packs and copies all weights on several threads; returns the bytes copied.
///
/// # Safety
/// As [`upload_weights`].
unsafe fn copy_stored(
    stream: &Stream,
    placements: &[&Placement<'_>],
    packers: &[Packer<'_>],
    options: UploadOptions,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<usize, CudaError> {
    let stage_bytes = placements
        .iter()
        .map(|p| p.recipe.row_bytes())
        .fold(options.stage_bytes, usize::max);
    let mut pieces = Vec::new();
    for (weight, placement) in placements.iter().enumerate() {
        let recipe = placement.recipe;
        let rows_per_piece = stage_bytes / recipe.row_bytes().max(1);
        let starts = (0..recipe.rows).step_by(rows_per_piece);
        let ranges = starts.map(|first| first..(first + rows_per_piece).min(recipe.rows));
        pieces.extend(ranges.map(|rows| Piece { weight, rows }));
    }
    let (next, copied) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let start = Instant::now();
    let worker = || -> Result<(), CudaError> {
        let mut ring = Ring::new(stream, stage_bytes, options.stages)?;
        let locked = start.elapsed();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(index) else {
                tracing::debug!(
                    "buffers locked after {locked:?}, read after {:?}",
                    start.elapsed()
                );
                return Ok(());
            };
            let placement = placements[piece.weight];
            let row_bytes = placement.recipe.row_bytes();
            let bytes = piece.rows.len() * row_bytes;
            let dst = placement.dst + (piece.rows.start * row_bytes) as DevicePtr;
            let pack = |out: &mut [u8]| packers[piece.weight].fill_serial(piece.rows.clone(), out);
            // SAFETY: these rows of the placement, which no other piece has.
            unsafe { ring.stage(dst, bytes, pack)? };
            progress(copied.fetch_add(bytes, Ordering::Relaxed) + bytes);
        }
    };
    // A worker that fails makes the others stop at their next piece.
    let stop_others = |outcome: &Result<(), CudaError>| {
        if outcome.is_err() {
            next.store(pieces.len(), Ordering::Relaxed);
        }
    };
    let outcomes = on_several(options.threads.min(pieces.len()), || {
        let outcome = worker();
        stop_others(&outcome);
        outcome
    });
    outcomes.into_iter().collect::<Result<(), CudaError>>()?;
    Ok(copied.into_inner())
}

/// A thread's pinned buffers, used in turn: one is packed while the others are on their way.
struct Ring<'a> {
    stream: &'a Stream,
    buffers: Vec<(Pinned, Event)>,
    current: usize,
}

impl<'a> Ring<'a> {
    fn new(stream: &'a Stream, bytes: usize, stages: usize) -> Result<Self, CudaError> {
        let device = stream.device();
        let buffer = |_| Ok((Pinned::new(device, bytes)?, device.event(false)?));
        let buffers = (0..stages.max(1))
            .map(buffer)
            .collect::<Result<Vec<_>, CudaError>>()?;
        Ok(Ring {
            stream,
            buffers,
            current: 0,
        })
    }

    /// Lets `pack` fill `bytes` of the next buffer and starts their copy to `dst`.
    ///
    /// # Safety
    /// `dst` has `bytes` on the stream's device, used by nothing else until the stream has done the copy.
    unsafe fn stage(
        &mut self,
        dst: DevicePtr,
        bytes: usize,
        pack: impl FnOnce(&mut [u8]) -> Result<(), WeightsError>,
    ) -> Result<(), CudaError> {
        let (buffer, event) = &mut self.buffers[self.current];
        event.synchronize()?;
        let staged = &mut buffer.as_mut_slice()[..bytes];
        pack(staged)?;
        // SAFETY: `dst` by the contract of this function. The buffer is next written after the wait for its event
        // above, and freed after the wait for the stream in `drop`.
        unsafe { self.stream.copy_to_device(dst, staged)? };
        self.stream.record(event)?;
        self.current = (self.current + 1) % self.buffers.len();
        Ok(())
    }
}

impl Drop for Ring<'_> {
    fn drop(&mut self) {
        // Copies from the buffers may still run.
        let _ = self.stream.synchronize();
    }
}

/// The kernel that makes random weights.
struct Generator {
    function: Function,
    blocks: u32,
}

impl Generator {
    fn new(device: &Device, cache: Option<&CubinCache>) -> Result<Self, CudaError> {
        Ok(Generator {
            function: load_kernel(device, &Source::new(KERNEL, SOURCE), cache)?,
            blocks: 8 * device.properties().sm_count,
        })
    }

    /// Launches the kernel once a segment.
    ///
    /// # Safety
    /// As [`upload_weights`].
    unsafe fn generate(
        &self,
        stream: &Stream,
        placement: &Placement<'_>,
        source: &dyn WeightSource,
    ) -> Result<(), CudaError> {
        let recipe = placement.recipe;
        // Checks names, ranges and that the recipe covers its rows, so that the kernel stays inside.
        Packer::new(recipe, source)?;
        for segment in recipe
            .segments
            .iter()
            .filter(|s| !s.src_rows.is_empty() && recipe.cols > 0)
        {
            let (Some(info), Some(TensorData::Random(values))) =
                (source.info(&segment.tensor), source.data(&segment.tensor))
            else {
                unreachable!("{} was a random tensor a moment ago", segment.tensor);
            };
            let (_, stored_cols) = info.matrix();
            for args in segment_args(recipe, segment, stored_cols, values, placement.dst) {
                let blocks = self.blocks.min(args.1.div_ceil(THREADS));
                // SAFETY: parameters as in random_weights.cu; the rows written lie in the placement.
                unsafe {
                    launch(
                        stream,
                        &self.function,
                        &LaunchConfig::linear(blocks, THREADS),
                        &args.0,
                    )?
                };
            }
        }
        Ok(())
    }
}

/// Parameters of the launches for one segment and the chunks of 8 columns of each. The kernel counts chunks in 32
/// bits, so a gigantic segment takes several launches, each of whole permutation blocks.
fn segment_args(
    recipe: &PackRecipe,
    segment: &Segment,
    stored_cols: usize,
    values: RandomTensor,
    dst: DevicePtr,
) -> Vec<(Args, u32)> {
    let chunks = recipe.cols.div_ceil(8);
    let (perm, perm_arg, unit) = match segment.perm {
        RowPerm::Identity => (0, 0, 1),
        RowPerm::RopeHalves { head_dim } => (1, head_dim, head_dim),
        RowPerm::Interleave8 { part } => (2, part, 8),
    };
    // Destination rows that `unit` source rows span.
    let span = if perm == 2 { 16 } else { unit };
    let most = ((u32::MAX as usize / chunks) / unit).max(1) * unit;
    let (row_stride, col_stride) = if segment.transpose {
        (1, stored_cols)
    } else {
        (stored_cols, 1)
    };
    let total = segment.src_rows.len();
    (0..total)
        .step_by(most)
        .map(|done| {
            let rows = most.min(total - done);
            let first =
                (segment.src_rows.start + done) * row_stride + segment.src_cols.start * col_stride;
            let args = Args::new()
                .ptr(dst)
                .u32(recipe.dtype.code())
                .u32(recipe.cols as u32)
                .u32(rows as u32)
                .u32((segment.dst_row + done / unit * span) as u32)
                .u32(perm)
                .u32(perm_arg as u32)
                .u64(first as u64)
                .u64(row_stride as u64)
                .u64(col_stride as u64)
                .u32(values.hash as u32)
                .u32((values.hash >> 32) as u32)
                .f32(values.law.mean)
                .f32(values.law.amplitude);
            (args, (rows * chunks) as u32)
        })
        .collect()
}
