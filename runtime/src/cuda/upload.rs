//! Weights onto the device, straight into their packed layout.
//!
//! Stored weights: all threads of the rayon pool read and permute rows into one of a few pinned staging buffers,
//! whose copy to the device then runs while the next buffer is filled. Host memory is the staging buffers, however
//! large the model. Random weights: a kernel writes them where they belong.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use lathe_codegen::cuda::random_weights::{KERNEL, SOURCE, THREADS};
use lathe_codegen::pack::{PackDType, PackRecipe, RowPerm, Segment};

use super::cubin_cache::CubinCache;
use super::driver::{Device, Event, Function, Stream};
use super::launch::{Args, LaunchConfig, launch};
use super::memory::Pinned;
use super::nvrtc::{self, Source};
use super::{CudaError, DevicePtr};
use crate::weights::pack::Packer;
use crate::weights::{RandomTensor, TensorData, WeightSource, WeightsError};

/// Staging buffers in flight.
const STAGES: usize = 4;
/// Bytes of a staging buffer.
const STAGE_BYTES: usize = 32 << 20;

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

/// Puts all weights in their places and waits until they are there. `progress` is called with the bytes done.
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
    progress: &dyn Fn(usize),
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
        let mut staging = Staging::new(stream)?;
        for placement in stored {
            let packer = Packer::new(placement.recipe, source)?;
            // SAFETY: by the contract of this function.
            unsafe {
                staging.add(placement, &packer, &mut |bytes| {
                    progress(stats.generated + bytes)
                })?
            };
        }
        // SAFETY: as above.
        unsafe { staging.flush()? };
        stats.copied = staging.copied;
    }
    stream.synchronize()?;
    stats.duration = start.elapsed();
    progress(stats.generated + stats.copied);
    Ok(stats)
}

/// A ring of pinned buffers. Pieces are packed into the current one until it is full, then it is copied.
struct Staging<'a> {
    stream: &'a Stream,
    buffers: Vec<(Pinned, Event)>,
    current: usize,
    used: usize,
    pieces: Vec<(DevicePtr, Range<usize>)>,
    copied: usize,
}

impl<'a> Staging<'a> {
    fn new(stream: &'a Stream) -> Result<Self, CudaError> {
        let device = stream.device();
        let buffer = |_| Ok((Pinned::new(device, STAGE_BYTES)?, device.event(false)?));
        let buffers = (0..STAGES)
            .map(buffer)
            .collect::<Result<Vec<_>, CudaError>>()?;
        Ok(Staging {
            stream,
            buffers,
            current: 0,
            used: 0,
            pieces: Vec::new(),
            copied: 0,
        })
    }

    /// Packs a weight piece by piece into the ring.
    ///
    /// # Safety
    /// As [`upload_weights`].
    unsafe fn add(
        &mut self,
        placement: &Placement<'_>,
        packer: &Packer<'_>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<(), CudaError> {
        let recipe = placement.recipe;
        let row_bytes = recipe.row_bytes();
        if row_bytes > STAGE_BYTES {
            let reason = format!("a row has {row_bytes} bytes, a staging buffer {STAGE_BYTES}");
            let tensor = recipe
                .segments
                .first()
                .map_or(String::new(), |s| s.tensor.clone());
            return Err(WeightsError::Pack {
                origin: "upload".into(),
                tensor,
                reason,
            }
            .into());
        }
        let mut row = 0;
        while row < recipe.rows {
            let rows = ((STAGE_BYTES - self.used) / row_bytes.max(1)).min(recipe.rows - row);
            if rows == 0 {
                // SAFETY: as this function.
                unsafe { self.flush()? };
                progress(self.copied);
                continue;
            }
            let range = self.used..self.used + rows * row_bytes;
            packer.fill(
                row..row + rows,
                &mut self.buffers[self.current].0.as_mut_slice()[range.clone()],
            )?;
            self.used = range.end.next_multiple_of(16).min(STAGE_BYTES);
            self.pieces
                .push((placement.dst + (row * row_bytes) as DevicePtr, range));
            row += rows;
        }
        Ok(())
    }

    /// Copies the current buffer and waits until the next one may be overwritten.
    ///
    /// # Safety
    /// As [`upload_weights`].
    unsafe fn flush(&mut self) -> Result<(), CudaError> {
        let (buffer, event) = &self.buffers[self.current];
        for (dst, range) in self.pieces.drain(..) {
            self.copied += range.len();
            // SAFETY: the destination is a part of a placement. The buffer is next written after the wait for the
            // event of its own turn, and freed after the stream was waited for (in `drop`).
            unsafe { self.stream.copy_to_device(dst, &buffer.as_slice()[range])? };
        }
        self.stream.record(event)?;
        self.current = (self.current + 1) % self.buffers.len();
        self.used = 0;
        self.buffers[self.current].1.synchronize()
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        // Copies from the buffers may still run if an error ended the upload early.
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
        let source = Source::new(KERNEL, SOURCE);
        let failed =
            nvrtc::failed_dir(cache.map_or(Path::new(&std::env::temp_dir()), CubinCache::dir));
        let compiled = match cache {
            Some(cache) => cache.get_or_compile(&source, &failed)?,
            None => nvrtc::compile(&source, &failed)?,
        };
        let function = device
            .load_module(KERNEL, &compiled.cubin)?
            .function(KERNEL, 0)?;
        Ok(Generator {
            function,
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
    let dtype = match recipe.dtype {
        PackDType::F32 => 0,
        PackDType::Bf16 => 1,
        PackDType::F16 => 2,
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
                .u32(dtype)
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
