//! The CUDA device: a plan in memory, its programs lowered by bucket, and steps.
//!
//! A step costs the host one copy of its metadata from pinned memory, one graph launch and one copy
//! of the sampled tokens back; nothing is allocated and nothing waits but [`Executor::collect`].

use super::cubin_cache::{CubinCache, DEFAULT_LIMIT};
use super::driver::{Device, Event, Function, Stream};
use super::graph::Graph;
use super::launch::{Args, LaunchConfig, launch};
use super::memory::{Arena, Pinned, aligned, bytes_of, check_fits};
use super::prepare::{Addresses, Modules, Prepared, Resolver};
use super::profile::KernelTime;
use super::state::{MetaLayout, check};
use super::timing::time_runs;
use super::upload::{Placement, upload_weights};
use super::{CudaError, DevicePtr, buckets};
use crate::load::{LoadOptions, Loadable, rope_tables};
use crate::step::{Capacity, Executor, StepBatch, StepError, StepKind, StepOutput, StepTime};
use half::{bf16, f16};
use lathe_codegen::cuda::{
    CudaOptions, CudaProgram, Meta, Sampling, Sizes, lower_program, tokens_kernel,
};
use lathe_codegen::{Plan, Program, ProgramKind};
use lathe_ir::{DType, Sym, SymEnv};
use std::collections::{BTreeMap, VecDeque};

/// Steps whose results may be outstanding.
const IN_FLIGHT: usize = 4;

/// How a plan is put on a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaLoad {
    /// Device by number.
    pub ordinal: usize,
    /// Decode steps are captured and launched as one graph.
    pub graphs: bool,
    /// Programmatic dependent launch.
    pub pdl: bool,
    /// Only the kernels that others are compared with.
    pub plain: bool,
    /// Folder of compiled kernels; none: the user's cache.
    pub cache: Option<std::path::PathBuf>,
}

impl Default for CudaLoad {
    fn default() -> Self {
        CudaLoad {
            ordinal: 0,
            graphs: true,
            pdl: true,
            plain: false,
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
struct Pending {
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
    prepared: BTreeMap<(ProgramKind, Sizes, Sampling), Prepared>,
    modules: Modules,
    plan: Plan,
    options: LoadOptions,
    how: CudaLoad,
    kernels: CudaOptions,
    vocab: usize,
    cache: Option<CubinCache>,
    addresses: Addresses,
    /// Addresses of the slots of each program.
    slots: Vec<Vec<DevicePtr>>,
    pending: VecDeque<Pending>,
    ring: Vec<Slot>,
    next_slot: usize,
    /// Rows that the last step sampled.
    sampled: usize,
    /// Resolves references to sampled tokens; made when it is first needed.
    token_kernel: Option<Function>,
    stream: Stream,
    _arenas: Vec<Arena>,
}

/// The buckets of the largest steps.
struct Largest {
    decode: Sizes,
    general: Sizes,
}

impl Largest {
    fn new(o: &LoadOptions) -> Largest {
        let n = buckets::decode(o.max_sequences);
        let rows = o.max_rows.max(o.max_sequences);
        Largest {
            decode: Sizes { t: n, b: n, r: n },
            general: buckets::general(o.max_tokens, o.max_sequences, rows),
        }
    }

    fn of(&self, kind: ProgramKind) -> Sizes {
        match kind {
            ProgramKind::Decode => self.decode,
            _ => self.general,
        }
    }
}

fn env(s: Sizes) -> SymEnv {
    SymEnv::new(&[
        (Sym::T, s.t as i64),
        (Sym::B, s.b as i64),
        (Sym::R, s.r as i64),
    ])
}

impl CudaExecutor {
    /// Loads a plan onto a GPU: predicts and checks memory, reads or makes the weights. Kernels are
    /// compiled when a bucket is first used, or by [`CudaExecutor::prepare`].
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
        let dir = how
            .cache
            .clone()
            .unwrap_or_else(|| CubinCache::default_dir(None));
        let cache = match CubinCache::open(dir, DEFAULT_LIMIT) {
            Ok(cache) => Some(cache),
            Err(CudaError::Io { path, source }) => {
                tracing::warn!("{}: no kernel cache: {source}", path.display());
                None
            }
            Err(error) => return Err(error),
        };
        let kernels = CudaOptions {
            pdl: how.pdl,
            sms: device.properties().sm_count,
            page_size: options.page_size,
            max_pages: options.max_seq_len.div_ceil(options.page_size.max(1)),
            plain: how.plain,
        };
        let largest = Largest::new(&options);
        let stepped = |p: &&Program| p.kind != ProgramKind::Full;
        let workspaces = workspaces(&plan, &options, kernels)?;
        let activations = plan
            .programs
            .iter()
            .filter(stepped)
            .map(|p| p.activation_bytes(&env(largest.of(p.kind))))
            .max()
            .unwrap_or(0);
        // The kernels take cosines and sines apart: keyed like `Addresses::rope`.
        let rope: Vec<((usize, u64, bool), Vec<f32>)> = rope_tables(&plan, options.max_seq_len)
            .into_iter()
            .flat_map(|((t, bits), (cos, sin))| [((t, bits, false), cos), ((t, bits, true), sin)])
            .collect();
        let meta_bytes = [largest.decode, largest.general]
            .map(|s| MetaLayout::new(s, kernels.max_pages).bytes())
            .into_iter()
            .max()
            .unwrap_or(0);
        let rows = largest.decode.r.max(largest.general.r);
        let table_bytes: usize = plan.tables.iter().map(|t| aligned(4 * t.data.len())).sum();
        let rope_bytes: usize = rope.iter().map(|(_, v)| aligned(4 * v.len())).sum();
        let work_bytes: usize = workspaces.values().map(|w| aligned(w.0)).sum();
        let weight_bytes: usize = plan.weights.iter().map(|w| aligned(w.recipe.bytes())).sum();
        let tokens = options.pages * options.page_size;
        let cache_bytes: usize = plan
            .caches
            .iter()
            .map(|c| aligned(tokens * c.token_bytes()))
            .sum();
        let state = aligned(meta_bytes) + aligned(4 * rows) + table_bytes + rope_bytes + work_bytes;
        let wanted = [
            ("weights".to_owned(), weight_bytes),
            ("KV cache".to_owned(), cache_bytes),
            ("activations".to_owned(), activations),
            ("workspaces".to_owned(), state),
        ];
        let hint =
            "lower the batch size, the sequence length, the tokens of a step or the KV cache";
        check_fits(&device, &wanted, hint)?;

        let mut weights = Arena::new(&device, "weights", weight_bytes, hint)?;
        let mut caches = Arena::new(&device, "KV cache", cache_bytes, hint)?;
        let slots_arena = Arena::new(&device, "activations", activations, hint)?;
        let mut state_arena = Arena::new(&device, "workspaces", state, hint)?;
        let mut addresses = Addresses::default();
        for w in &plan.weights {
            addresses.weights.push(weights.alloc(w.recipe.bytes())?);
        }
        for c in &plan.caches {
            addresses
                .caches
                .push(caches.alloc(tokens * c.token_bytes())?);
            addresses
                .cache_rows
                .push((tokens * 2 * c.kv_heads as usize) as u64);
        }
        addresses.meta = state_arena.alloc(meta_bytes)?;
        addresses.sampled = state_arena.alloc(4 * rows)?;
        // Every cache starts as zeros, so that what was never written is a number.
        // SAFETY: each range is a part of an arena that nothing uses yet.
        unsafe {
            stream.fill_u32(caches.base(), 0, caches.capacity() / 4)?;
            stream.fill_u32(slots_arena.base(), 0, slots_arena.capacity() / 4)?;
            stream.fill_u32(state_arena.base(), 0, state_arena.capacity() / 4)?;
        }
        for (name, (bytes, fill)) in workspaces {
            let at = state_arena.alloc(bytes)?;
            if let Some(word) = fill {
                // SAFETY: as above.
                unsafe { stream.fill_u32(at, word, bytes / 4)? };
            }
            addresses.workspaces.insert(name, at);
        }
        for t in &plan.tables {
            let data: Vec<f32> = t.data.iter().map(|v| v.get() as f32).collect();
            let at = state_arena.alloc(4 * data.len())?;
            // SAFETY: the range was just allocated; the data lives until the wait below.
            unsafe { stream.copy_to_device(at, bytes_of(&data))? };
            stream.synchronize()?;
            addresses.tables.push(at);
        }
        for (key, data) in rope {
            let at = state_arena.alloc(4 * data.len())?;
            // SAFETY: as above.
            unsafe { stream.copy_to_device(at, bytes_of(&data))? };
            stream.synchronize()?;
            addresses.rope.insert(key, at);
        }
        let placements: Vec<Placement<'_>> = plan
            .weights
            .iter()
            .zip(&addresses.weights)
            .map(|(w, &dst)| Placement {
                recipe: &w.recipe,
                dst,
            })
            .collect();
        // SAFETY: each weight was given its own memory of its recipe's size, and no kernel runs yet.
        let stats = unsafe {
            upload_weights(&stream, &placements, model.weights, cache.as_ref(), &|_| {})?
        };
        tracing::debug!("weights: {stats:?}");
        let slots = plan
            .programs
            .iter()
            .map(|p| {
                let env = env(largest.of(p.kind));
                let mut at = slots_arena.base();
                let mut place = |bytes: usize| {
                    let here = at;
                    at += aligned(bytes) as DevicePtr;
                    here
                };
                p.slots.iter().map(|s| place(s.bytes(&env))).collect()
            })
            .collect();
        let ring = (0..IN_FLIGHT)
            .map(|_| {
                Ok(Slot {
                    meta: Pinned::new(&device, meta_bytes)?,
                    next: Pinned::new(&device, 4 * rows)?,
                    start: device.event(true)?,
                    end: device.event(true)?,
                })
            })
            .collect::<Result<Vec<_>, CudaError>>()?;
        Ok(CudaExecutor {
            prepared: BTreeMap::new(),
            modules: Modules::default(),
            plan,
            options,
            how: how.clone(),
            kernels,
            vocab: model.vocab,
            cache,
            addresses,
            slots,
            pending: VecDeque::new(),
            ring,
            next_slot: 0,
            sampled: 0,
            token_kernel: None,
            stream,
            _arenas: vec![weights, caches, slots_arena, state_arena],
        })
    }

    /// Compiles the kernels of greedy decode steps of up to `sequences` rows, so that no later step
    /// waits for them.
    ///
    /// # Errors
    /// A kernel does not compile.
    pub fn prepare(&mut self, sequences: usize) -> Result<(), CudaError> {
        if self.plan.program(ProgramKind::Decode).is_none() {
            return Ok(());
        }
        for sizes in buckets::all_decode(sequences.min(self.options.max_sequences)) {
            let key = self.key(ProgramKind::Decode, sizes, Sampling::GreedyOnly);
            self.ready(key)?;
        }
        Ok(())
    }

    /// Compiles the kernels of every bucket of greedy steps at once, on all cores: a step that meets
    /// a new bucket later only has to be put together.
    fn compile_all(&mut self) -> Result<(), CudaError> {
        let mut kernels = Vec::new();
        let mut known = std::collections::BTreeSet::new();
        for program in &self.plan.programs {
            for sizes in all_sizes(program.kind, &self.options) {
                let (_, sizes, sampling) = self.key(program.kind, sizes, Sampling::GreedyOnly);
                let lowered = lower_program(&self.plan, program, sizes, sampling, self.kernels)?;
                for kernel in lowered.kernels {
                    if known.insert(kernel.text.clone()) {
                        kernels.push(kernel);
                    }
                }
            }
        }
        let device = self.stream.device().clone();
        self.modules.get(&device, self.cache.as_ref(), &kernels)?;
        Ok(())
    }

    fn key(
        &self,
        kind: ProgramKind,
        sizes: Sizes,
        sampling: Sampling,
    ) -> (ProgramKind, Sizes, Sampling) {
        // Only small steps keep their logits to themselves.
        let sampling = match sampling {
            Sampling::GreedyOnly if sizes.r > 4 => Sampling::Greedy,
            s => s,
        };
        (kind, sizes, sampling)
    }

    /// Lowers, compiles, resolves and captures a program unless that was done before.
    fn ready(&mut self, key: (ProgramKind, Sizes, Sampling)) -> Result<(), CudaError> {
        if self.prepared.contains_key(&key) {
            return Ok(());
        }
        let (kind, sizes, sampling) = key;
        let at = self.plan.programs.iter().position(|p| p.kind == kind);
        let at = at.ok_or(CudaError::NoStepProgram)?;
        let program = &self.plan.programs[at];
        let lowered = lower_program(&self.plan, program, sizes, sampling, self.kernels)?;
        let device = self.stream.device().clone();
        let modules = self
            .modules
            .get(&device, self.cache.as_ref(), &lowered.kernels)?;
        let meta = MetaLayout::new(sizes, self.kernels.max_pages);
        let resolver = Resolver {
            program,
            lowered: &lowered,
            addresses: &self.addresses,
            slots: &self.slots[at],
            meta: &meta,
        };
        let launches = resolver.launches(&modules, self.how.pdl)?;
        let logits = lowered.logits.map(|v| {
            let size = program.values[v.0 as usize].0.dtype.size();
            (self.slots[at][program.slot(v)], size)
        });
        let graph = match self.how.graphs && kind == ProgramKind::Decode {
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
    fn choose(&self, batch: &StepBatch, logits: bool) -> (ProgramKind, Sizes, Sampling) {
        let greedy = batch.samplers.iter().all(|s| s.params.is_greedy());
        let sampling = match (greedy, logits) {
            (false, _) => Sampling::Params,
            (true, true) => Sampling::Greedy,
            (true, false) => Sampling::GreedyOnly,
        };
        let decode = batch.kind() == StepKind::Decode
            && self.plan.program(ProgramKind::Decode).is_some()
            // The decode kernel takes the last position of every sequence.
            && batch.positions.iter().zip(&batch.kv_lens).all(|(p, l)| p + 1 == *l);
        if decode {
            let n = buckets::decode(batch.sequences());
            let sizes = Sizes { t: n, b: n, r: n };
            self.key(ProgramKind::Decode, sizes, sampling)
        } else {
            let (t, b) = (batch.tokens_len(), batch.sequences());
            let sizes = buckets::general(t, b, batch.rows.len());
            self.key(ProgramKind::General, sizes, sampling)
        }
    }

    /// Puts a step into the stream.
    fn launch_step(
        &mut self,
        batch: &StepBatch,
        logits: bool,
    ) -> Result<(ProgramKind, Sizes, Sampling), StepError> {
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
        Ok(key)
    }

    fn enqueue(
        &mut self,
        batch: &StepBatch,
        key: (ProgramKind, Sizes, Sampling),
    ) -> Result<(), CudaError> {
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
                .copy_to_device(self.addresses.meta, &s.meta.as_slice()[..bytes])?;
        }
        if let Some(function) = resolver {
            let rows = key.1.t as u32;
            let tokens = self.addresses.meta + prepared.meta.offset(Meta::Tokens) as DevicePtr;
            let args = Args::new()
                .ptr(tokens)
                .ptr(self.addresses.sampled)
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
            unsafe { self.stream.copy_to_host(next, self.addresses.sampled)? };
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

    fn finish(&mut self) -> Result<StepOutput, StepError> {
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

    fn read_logits(
        &self,
        key: (ProgramKind, Sizes, Sampling),
        rows: usize,
    ) -> Result<Vec<f32>, CudaError> {
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

    /// Times every kernel of the program that would run `batch`: all its launches of a step back to
    /// back, so that each reads the weights of another layer. The batch is run first, so that the
    /// state on the device is its.
    ///
    /// # Errors
    /// As [`Executor::step`].
    pub fn profile(
        &mut self,
        batch: &StepBatch,
        runs: usize,
    ) -> Result<Vec<KernelTime>, StepError> {
        let key = self.launch_step(batch, false)?;
        self.finish()?;
        let prepared = &self.prepared[&key];
        let program = self.plan.program(key.0).ok_or(CudaError::NoStepProgram);
        let program = program.map_err(device_error)?;
        let mut times = Vec::new();
        for (index, kernel) in prepared.lowered.kernels.iter().enumerate() {
            let of_kernel =
                |r: &&super::prepare::Ready| prepared.lowered.launches[r.index].kernel == index;
            let group: Vec<_> = prepared.launches.iter().filter(of_kernel).collect();
            let Some(first) = group.first() else {
                continue;
            };
            let samples = time_runs(&self.stream, 1, runs.max(1), |stream| {
                // SAFETY: as in `enqueue`.
                group.iter().try_for_each(|r| unsafe { r.submit(stream) })
            })
            .map_err(device_error)?;
            let count = group.len();
            let micros = samples.median() / count as f64;
            let l = &prepared.lowered.launches[first.index];
            times.push(KernelTime {
                name: kernel.name.clone(),
                path: program.steps[l.step].prov.path.to_string(),
                count,
                micros,
                gb_per_s: l.bytes / micros * 1e-3,
                tflops: l.flops / micros * 1e-6,
            });
        }
        Ok(times)
    }

    /// Launches of a decode step of `sequences` rows, and whether they are one graph.
    ///
    /// # Errors
    /// A kernel does not compile.
    pub fn decode_launches(&mut self, sequences: usize) -> Result<(usize, bool), CudaError> {
        let n = buckets::decode(sequences);
        let sizes = Sizes { t: n, b: n, r: n };
        let key = self.key(ProgramKind::Decode, sizes, Sampling::GreedyOnly);
        self.ready(key)?;
        let p = &self.prepared[&key];
        Ok((p.launches.len(), p.graph.is_some()))
    }
}

impl Executor for CudaExecutor {
    fn capacity(&self) -> Capacity {
        self.options.capacity(self.vocab)
    }

    fn warm_up(&mut self) -> Result<(), StepError> {
        self.compile_all().map_err(device_error)
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
}

impl Drop for CudaExecutor {
    fn drop(&mut self) {
        // Steps in flight still use the memory that goes with this.
        if let Err(error) = self.stream.synchronize() {
            tracing::debug!("CUDA: {error}");
        }
    }
}

fn device_error(error: CudaError) -> StepError {
    StepError::Device(error.to_string())
}

/// Every bucket that a program may run in, as far as kernels differ.
fn all_sizes(kind: ProgramKind, options: &LoadOptions) -> Vec<Sizes> {
    let rows = options.max_rows.max(options.max_sequences);
    match kind {
        ProgramKind::Decode => buckets::all_decode(options.max_sequences),
        ProgramKind::General => {
            let mut sizes = buckets::all_general(options.max_tokens, options.max_sequences, rows);
            // Kernels change with the number of sampled rows too.
            let most = buckets::general(options.max_tokens, options.max_sequences, rows);
            let fewer = (0..usize::BITS).map(|i| 1 << i).take_while(|&r| r < most.r);
            sizes.extend(fewer.map(|r| Sizes { r, ..most }));
            sizes
        }
        ProgramKind::Full => Vec::new(),
    }
}

/// The largest workspace of each name over all buckets, with what fills it.
fn workspaces(
    plan: &Plan,
    options: &LoadOptions,
    kernels: CudaOptions,
) -> Result<BTreeMap<String, (usize, Option<u32>)>, CudaError> {
    let mut all: BTreeMap<String, (usize, Option<u32>)> = BTreeMap::new();
    let mut add = |lowered: CudaProgram| {
        for w in lowered.workspaces {
            let entry = all.entry(w.name).or_insert((0, w.fill));
            entry.0 = entry.0.max(w.bytes.next_multiple_of(4));
        }
    };
    for program in &plan.programs {
        let sizes = all_sizes(program.kind, options);
        for s in sizes {
            for sampling in [Sampling::GreedyOnly, Sampling::Params] {
                if sampling == Sampling::Params && s.r > 4 {
                    continue;
                }
                add(lower_program(plan, program, s, sampling, kernels)?);
            }
        }
    }
    Ok(all)
}
