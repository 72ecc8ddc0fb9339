//! The CUDA device: steps of a plan that lies on it (`resident`), by programs that were
//! lowered for buckets of sizes (`programs`).
//!
//! A step costs the host one copy of its metadata from pinned memory, one graph launch and one copy
//! of the sampled tokens back; nothing is allocated and nothing waits but [`Executor::collect`].

use super::autotune::Tuned;
use super::buckets::DecodeBuckets;
use super::cubin_cache::CubinCache;
use super::driver::{Device, Event, Function, Stream};
use super::graph::Graph;
use super::launch::{Args, LaunchConfig, launch};
use super::memory::Pinned;
use super::prepare::{Modules, Prepared, Resolver};
use super::programs::{Key, Programs, key, sampling};
use super::resident::Resident;
use super::state::{MetaLayout, check};
use super::timing::Samples;
use super::tuner::{Loaded, Tuner};
use super::{CudaError, DevicePtr, buckets};
use crate::device::executor::{Execution, Executor};
use crate::device::load::{LoadOptions, Loadable};
use crate::device::profile::{ProfileOptions, StepProfile};
use crate::device::step::{Capacity, StepBatch, StepError, StepKind, StepOutput, StepTime};
use half::{bf16, f16};
use lathe_codegen::cuda::{Choices, CudaOptions, Meta, Sampling, Sizes, tokens_kernel};
use lathe_codegen::{Plan, ProgramKind};
use lathe_ir::DType;
use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

/// Steps whose results may be outstanding.
const IN_FLIGHT: usize = 4;
/// Submit times that are kept for the median.
const SUBMITS: usize = 4096;

/// How a plan is put on a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaLoad {
    /// Device by number.
    pub ordinal: usize,
    /// Decode steps are captured and launched as one graph.
    pub graphs: bool,
    /// Rows of decode steps that are captured, smaller steps padded to them; none: all, in sizes
    /// that suit the kernels.
    pub graph_sizes: Option<Vec<usize>>,
    /// Programmatic dependent launch.
    pub pdl: bool,
    /// Only the kernels that others are compared with.
    pub plain: bool,
    /// Every operation of the plan is one launch.
    pub per_op: bool,
    /// GEMM kernels are chosen by timing.
    pub autotune: bool,
    /// Autotuning may choose cuBLASLt's, where the library is there.
    pub cublaslt: bool,
    /// Folder of compiled kernels; none: the user's cache.
    pub cache: Option<std::path::PathBuf>,
}

impl Default for CudaLoad {
    fn default() -> Self {
        CudaLoad {
            ordinal: 0,
            graphs: true,
            graph_sizes: None,
            pdl: true,
            plain: false,
            per_op: false,
            autotune: false,
            cublaslt: false,
            cache: None,
        }
    }
}

/// Loads a plan onto a GPU.
///
/// # Errors
/// No GPU, no NVRTC, not enough memory, weights that do not fit, or a step without a kernel.
pub fn load(
    model: Loadable<'_>,
    options: LoadOptions,
    how: &CudaLoad,
) -> Result<Box<dyn Executor>, CudaError> {
    Ok(Box::new(CudaExecutor::load(model, options, how)?))
}

/// A submitted step.
pub(super) struct Pending {
    slot: usize,
    rows: usize,
}

/// Host memory and events of one step in flight.
struct Slot {
    meta: Pinned,
    next: Pinned,
    start: Event,
    end: Event,
}

/// A plan on a GPU.
pub struct CudaExecutor {
    // Graphs and modules first: they are dropped before the memory that they point to.
    pub(super) prepared: BTreeMap<Key, Prepared>,
    modules: Modules,
    /// Lowered and not yet prepared.
    pub(super) programs: Programs,
    /// GEMM kernels that are not the heuristics'.
    choices: Choices,
    tuner: Tuner,
    tuned: Option<Tuned>,
    pub(super) plan: Plan,
    options: LoadOptions,
    how: CudaLoad,
    kernels: CudaOptions,
    vocab: usize,
    cache: Option<CubinCache>,
    pub(super) resident: Resident,
    pub(super) pending: VecDeque<Pending>,
    ring: Vec<Slot>,
    next_slot: usize,
    /// Rows that the last step sampled.
    sampled: usize,
    /// How many decode steps ran each program.
    decode_runs: BTreeMap<Key, usize>,
    /// Seconds that the last decode steps took to submit, in a ring.
    submits: Vec<f64>,
    /// Decode steps submitted.
    decode_steps: usize,
    /// Resolves references to sampled tokens; made when it is first needed.
    token_kernel: Option<Function>,
    pub(super) stream: Stream,
}

impl CudaExecutor {
    /// Loads a plan onto a GPU: predicts and checks memory, reads or makes the weights. Kernels are
    /// compiled when a bucket is first used, or by [`Executor::warm_up`].
    ///
    /// # Errors
    /// As [`load`].
    pub fn load(
        model: Loadable<'_>,
        options: LoadOptions,
        how: &CudaLoad,
    ) -> Result<CudaExecutor, CudaError> {
        let plan = model.plan.clone();
        if plan.program(ProgramKind::General).is_none() {
            return Err(CudaError::NoStepProgram);
        }
        let device = Device::open(how.ordinal)?;
        let stream = device.stream()?;
        let cache = CubinCache::if_usable(how.cache.clone())?;
        let kernels = CudaOptions {
            pdl: how.pdl,
            sms: device.properties().sm_count,
            page_size: options.page_size,
            max_pages: options.max_pages(),
            plain: how.plain,
            per_op: how.per_op,
        };
        let decode = DecodeBuckets::new(options.max_sequences, how.graph_sizes.as_deref());
        let tuner = match how.autotune {
            true => Tuner::open(&device, how.cublaslt, cache.as_ref())?,
            false => Tuner::default(),
        };
        let choices = tuner.known(&plan, &options, kernels, &decode)?;
        let programs = Programs::lower(&plan, &options, kernels, decode, &choices)?;
        let resident =
            Resident::load(&stream, model, &options, &programs, kernels, cache.as_ref())?;
        let ring = (0..IN_FLIGHT)
            .map(|_| {
                Ok(Slot {
                    meta: Pinned::new(&device, resident.meta_bytes)?,
                    next: Pinned::new(&device, 4 * resident.rows)?,
                    start: device.event(true)?,
                    end: device.event(true)?,
                })
            })
            .collect::<Result<Vec<_>, CudaError>>()?;
        Ok(CudaExecutor {
            prepared: BTreeMap::new(),
            modules: Modules::default(),
            programs,
            choices,
            tuner,
            tuned: None,
            plan,
            options,
            how: how.clone(),
            kernels,
            vocab: model.vocab,
            cache,
            resident,
            pending: VecDeque::new(),
            ring,
            next_slot: 0,
            sampled: 0,
            decode_runs: BTreeMap::new(),
            submits: Vec::new(),
            decode_steps: 0,
            token_kernel: None,
            stream,
        })
    }

    /// Compiles the kernels of every step at once, on all cores, and puts greedy decode steps
    /// together: a step that meets a new bucket later has little left to do.
    fn prepare_all(&mut self) -> Result<(), CudaError> {
        self.autotune()?;
        let kernels = self.programs.kernels();
        let device = self.stream.device().clone();
        self.modules.get(&device, self.cache.as_ref(), &kernels)?;
        self.token_kernel()?;
        if self.plan.program(ProgramKind::Decode).is_some() {
            for n in self.programs.decode.all() {
                let sizes = Sizes::decode(n);
                self.ready(key(ProgramKind::Decode, sizes, Sampling::GreedyOnly))?;
            }
        }
        Ok(())
    }

    /// Chooses GEMM kernels by timing, unless that was done or is not wanted, and lowers anew.
    fn autotune(&mut self) -> Result<(), CudaError> {
        if !self.how.autotune || self.tuned.is_some() || !self.pending.is_empty() {
            return Ok(());
        }
        let (choices, tuned) = self.tuner.tune(Loaded {
            stream: &self.stream,
            plan: &self.plan,
            options: &self.options,
            kernels: self.kernels,
            decode: &self.programs.decode,
            resident: &self.resident,
            modules: &mut self.modules,
            cubins: self.cache.as_ref(),
        })?;
        tracing::info!("{tuned}");
        self.tuned = Some(tuned);
        if choices != self.choices {
            self.choices = choices;
            self.prepared.clear();
            self.decode_runs.clear();
            let decode = self.programs.decode.clone();
            self.programs = Programs::lower(
                &self.plan,
                &self.options,
                self.kernels,
                decode,
                &self.choices,
            )?;
        }
        Ok(())
    }

    /// What autotuning did; nothing before [`Executor::warm_up`] and where it is off.
    pub fn tuned(&self) -> Option<Tuned> {
        self.tuned
    }

    /// Lowers, compiles, resolves and captures a program unless that was done before.
    pub(super) fn ready(&mut self, key: Key) -> Result<(), CudaError> {
        if self.prepared.contains_key(&key) {
            return Ok(());
        }
        let (kind, sizes, _) = key;
        let at = self.plan.position(kind).ok_or(CudaError::NoStepProgram)?;
        let program = &self.plan.programs[at];
        let lowered = self
            .programs
            .take(&self.plan, key, self.kernels, &self.choices)?;
        let device = self.stream.device().clone();
        let modules = self
            .modules
            .get(&device, self.cache.as_ref(), &lowered.kernels)?;
        let meta = MetaLayout::new(sizes, self.kernels.max_pages);
        let resolver = Resolver {
            program,
            lowered: &lowered,
            addresses: &self.resident.addresses,
            slots: &self.resident.slots[at],
            meta: &meta,
            library: self.tuner.library(),
        };
        let launches = resolver.launches(&modules, self.how.pdl)?;
        let logits = lowered.logits.map(|v| {
            let size = program.values[v.0 as usize].0.dtype.size();
            (self.resident.slots[at][program.slot(v)], size)
        });
        let captured = self.how.graphs
            && kind == ProgramKind::Decode
            && self.programs.decode.is_captured(sizes.b);
        let graph = match captured {
            false => None,
            true => Some(Graph::capture(&self.stream, |stream| {
                // SAFETY: resolved from the lowered program; `self` keeps the memory.
                launches
                    .iter()
                    .try_for_each(|l| unsafe { l.submit(stream) })
            })?),
        };
        let prepared = Prepared {
            lowered,
            launches,
            meta,
            logits,
            graph,
        };
        self.prepared.insert(key, prepared);
        Ok(())
    }

    /// The program and bucket for a batch.
    fn choose(&self, batch: &StepBatch, logits: bool) -> Key {
        let sampling = sampling(batch, logits);
        let decode = batch.kind() == StepKind::Decode
            && self.plan.program(ProgramKind::Decode).is_some()
            // The decode kernel takes the last position of every sequence.
            && batch.positions.iter().zip(&batch.kv_lens).all(|(p, l)| p + 1 == *l);
        if decode {
            let sizes = Sizes::decode(self.programs.decode.of(batch.sequences()));
            key(ProgramKind::Decode, sizes, sampling)
        } else {
            let (t, b) = (batch.tokens_len(), batch.sequences());
            let sizes = buckets::general(t, b, batch.rows.len());
            key(ProgramKind::General, sizes, sampling)
        }
    }

    /// Puts a step into the stream.
    pub(super) fn launch_step(
        &mut self,
        batch: &StepBatch,
        logits: bool,
    ) -> Result<Key, StepError> {
        let start = Instant::now();
        check(batch, &self.options, self.vocab, self.sampled)?;
        if self.pending.len() == IN_FLIGHT {
            return Err(StepError::Batch(format!(
                "{IN_FLIGHT} steps are submitted and not collected"
            )));
        }
        let key = self.choose(batch, logits);
        self.stream.device().bind().map_err(device_error)?;
        self.ready(key).map_err(device_error)?;
        self.enqueue(batch, key).map_err(device_error)?;
        if key.0 == ProgramKind::Decode {
            let seconds = start.elapsed().as_secs_f64();
            match self.submits.get_mut(self.decode_steps % SUBMITS) {
                Some(oldest) => *oldest = seconds,
                None => self.submits.push(seconds),
            }
            self.decode_steps += 1;
            *self.decode_runs.entry(key).or_default() += 1;
        }
        Ok(key)
    }

    fn enqueue(&mut self, batch: &StepBatch, key: Key) -> Result<(), CudaError> {
        let slot = self.next_slot;
        self.next_slot = (slot + 1) % IN_FLIGHT;
        let refers = batch.tokens.iter().any(|&t| t < 0);
        let resolver = match refers {
            true => Some(self.token_kernel()?),
            false => None,
        };
        let prepared = &self.prepared[&key];
        let s = &mut self.ring[slot];
        let bytes = prepared.meta.bytes();
        prepared
            .meta
            .write(batch, &mut s.meta.as_mut_slice()[..bytes]);
        self.stream.record(&s.start)?;
        // SAFETY: the block has room for the largest layout. The slot is next written after its step
        // was collected (there are as many slots as steps in flight).
        unsafe {
            self.stream
                .copy_to_device(self.resident.addresses.meta, &s.meta.as_slice()[..bytes])?;
        }
        if let Some(function) = resolver {
            let rows = key.1.t as u32;
            let tokens =
                self.resident.addresses.meta + prepared.meta.offset(Meta::Tokens) as DevicePtr;
            let args = Args::new()
                .ptr(tokens)
                .ptr(self.resident.addresses.sampled)
                .u32(rows);
            let config = LaunchConfig::linear(rows.div_ceil(256), 256);
            // SAFETY: parameters as in tokens.cu; both arrays belong to `self`.
            unsafe { launch(&self.stream, &function, &config, &args)? };
        }
        match &prepared.graph {
            Some(graph) => graph.launch(&self.stream)?,
            None => {
                for l in &prepared.launches {
                    // SAFETY: resolved from the lowered program; `self` keeps the memory.
                    unsafe { l.submit(&self.stream)? };
                }
            }
        }
        let rows = batch.rows.len();
        if rows > 0 {
            let next = &mut s.next.as_mut_slice()[..4 * rows];
            // SAFETY: the slot's memory is read only after its event.
            unsafe {
                self.stream
                    .copy_to_host(next, self.resident.addresses.sampled)?
            };
        }
        self.stream.record(&s.end)?;
        self.sampled = rows;
        self.pending.push_back(Pending { slot, rows });
        Ok(())
    }

    /// The kernel that resolves references to sampled tokens.
    fn token_kernel(&mut self) -> Result<Function, CudaError> {
        if let Some(function) = &self.token_kernel {
            return Ok(function.clone());
        }
        let source = tokens_kernel();
        let device = self.stream.device().clone();
        let module = self
            .modules
            .get(&device, self.cache.as_ref(), std::slice::from_ref(&source))?
            .remove(0);
        let function = module.function(&source.name, 0)?;
        Ok(self.token_kernel.insert(function).clone())
    }

    pub(super) fn finish(&mut self) -> Result<StepOutput, StepError> {
        let p = self
            .pending
            .pop_front()
            .ok_or_else(|| StepError::Batch("nothing was submitted".into()))?;
        let s = &self.ring[p.slot];
        s.end.synchronize().map_err(device_error)?;
        let ms = s.end.elapsed_ms(&s.start).map_err(device_error)?;
        Ok(StepOutput {
            next: s.next.as_slice_of::<i32>()[..p.rows].to_vec(),
            logits: None,
            time: StepTime {
                device: f64::from(ms) * 1e-3,
            },
        })
    }

    fn read_logits(&self, key: Key, rows: usize) -> Result<Vec<f32>, CudaError> {
        let Some((at, size)) = self.prepared[&key].logits else {
            return Ok(Vec::new());
        };
        let mut bytes = vec![0; rows * self.vocab * size];
        // SAFETY: the logits have a row for each sampled row; the wait ends the copy.
        unsafe { self.stream.copy_to_host(&mut bytes, at)? };
        self.stream.synchronize()?;
        let halves = || bytes.as_chunks::<2>().0.iter();
        Ok(match (size, self.plan.dtype) {
            (2, DType::F16) => halves().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            (2, _) => halves().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            _ => {
                let words = bytes.as_chunks::<4>().0.iter();
                words.map(|b| f32::from_le_bytes(*b)).collect()
            }
        })
    }

    /// The bytes of a packed weight on the device.
    pub(crate) fn read_weight(&self, i: usize) -> Result<Vec<u8>, CudaError> {
        let mut bytes = vec![0; self.plan.weights[i].recipe.bytes()];
        // SAFETY: the weight was given as many bytes; the wait ends the copy.
        unsafe {
            self.stream
                .copy_to_host(&mut bytes, self.resident.addresses.weights[i])?
        };
        self.stream.synchronize()?;
        Ok(bytes)
    }
}

impl Executor for CudaExecutor {
    fn capacity(&self) -> Capacity {
        self.options.capacity(self.vocab)
    }

    fn warm_up(&mut self) -> Result<(), StepError> {
        self.prepare_all().map_err(device_error)
    }

    fn execution(&self) -> Option<Execution> {
        let (&key, _) = self.decode_runs.iter().max_by_key(|(_, runs)| **runs)?;
        let prepared = self.prepared.get(&key)?;
        let program = self.plan.program(key.0)?;
        Some(Execution {
            launches: prepared.launches.len(),
            kernels_per_layer: prepared.lowered.kernels_per_layer(&self.plan, program),
            graph_launches: usize::from(prepared.graph.is_some()),
            submit_seconds: Samples::new(self.submits.clone())?.median(),
            tuned: self.tuned.map(|t| (t.shapes, t.changed)),
        })
    }

    fn step(&mut self, batch: &StepBatch, logits: bool) -> Result<StepOutput, StepError> {
        if !self.pending.is_empty() {
            return Err(StepError::Batch("submitted steps are not collected".into()));
        }
        let key = self.launch_step(batch, logits)?;
        let mut out = self.finish()?;
        if logits {
            let values = self
                .read_logits(key, batch.rows.len())
                .map_err(device_error)?;
            out.logits = Some(values);
        }
        Ok(out)
    }

    fn submit(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        self.launch_step(batch, false).map(drop)
    }

    fn collect(&mut self) -> Result<StepOutput, StepError> {
        self.finish()
    }

    fn profile(
        &mut self,
        batch: &StepBatch,
        options: ProfileOptions,
    ) -> Result<Option<StepProfile>, StepError> {
        self.profile_batch(batch, options).map(Some)
    }
}

impl Drop for CudaExecutor {
    fn drop(&mut self) {
        // Steps in flight still use the memory that goes with this.
        if let Err(error) = self.stream.synchronize() {
            tracing::debug!("CUDA: {error}");
        }
    }
}

pub(super) fn device_error(error: CudaError) -> StepError {
    StepError::Device(error.to_string())
}
