//! The self-test of a GPU: each step's launches on the operands that the CPU had, with everything else
//! poisoned, compared in all of memory.

mod memory;
mod steps;

pub use steps::check_steps;

use self::memory::{Image, Output, Work};
use crate::device::cpu::{Snapshot, Twin};
use crate::device::cuda::cubin_cache::CubinCache;
use crate::device::cuda::driver::{Device, Stream};
use crate::device::cuda::memory::{Arena, aligned, bytes_of};
use crate::device::cuda::prepare::{Addresses, Modules, Ready, Resolver};
use crate::device::cuda::programs::{Key, key, sampling};
use crate::device::cuda::state::MetaLayout;
use crate::device::cuda::{CudaError, DevicePtr, buckets};
use crate::sampling::sample;
use crate::selftest::cases::{Rng, each_vector, fill_cache};
use crate::selftest::compare::{Reference, compare, numbers, rms, tolerance};
use crate::selftest::cpu::{append_tolerance, batch_env, load, place, step_dtype};
use crate::selftest::{Case, Outcome, POISON, Report, SelftestError, Subject, extents};
use half::bf16;
use lathe_codegen::cuda::{CudaOptions, CudaProgram, KernelSource, Ref, Sizes, lower_tuned};
use lathe_codegen::{Operand, Program, ProgramKind, Step, ValueId};
use lathe_ir::ops::Sample;
use lathe_ir::ops::X;
use lathe_ir::{DType, Op, SymEnv};
use std::collections::BTreeMap;

/// Compares a GPU with the CPU.
pub struct CudaSelftest {
    modules: Modules,
    cache: Option<CubinCache>,
    stream: Stream,
    filter: Option<String>,
}

/// Constants of a subject on the device.
struct Constants {
    addresses: Addresses,
    /// The weights, to see at the end that nothing wrote them.
    weights: Vec<Vec<u8>>,
    _arena: Arena,
}

/// A case being run.
struct Running<'a> {
    stream: &'a Stream,
    subject: &'a Subject,
    case: &'a Case,
    program: &'a Program,
    lowered: &'a CudaProgram,
    launches: &'a [Ready],
    caches: &'a [DevicePtr],
    image: Image,
    work: Work,
    filter: Option<&'a str>,
    /// Sizes of the batch and of its bucket.
    sizes: [SymEnv; 2],
}

/// The bucket of a case and how its tokens are chosen.
fn bucket(case: &Case) -> Key {
    let b = &case.batch;
    let sizes = match case.kind {
        ProgramKind::Decode => Sizes::decode(buckets::decode(b.sequences())),
        _ => buckets::general(b.tokens_len(), b.sequences(), b.rows.len()),
    };
    key(case.kind, sizes, sampling(b, case.logits))
}

/// The families of a step's launches, in order, each once.
fn families(program: &Program, lowered: &CudaProgram, at: usize) -> String {
    let mut names: Vec<String> = Vec::new();
    for l in lowered.launches.iter().filter(|l| l.step == at) {
        let name = match lowered.kernels[l.kernel].family {
            "plain" => format!("plain {}", program.steps[at].op.name()),
            other => other.to_owned(),
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(" + ")
}

impl CudaSelftest {
    /// Opens a device. Only steps are compared whose families contain `filter`. Compiled kernels go
    /// to `cubins`, by default the user's cache.
    ///
    /// # Errors
    /// No usable GPU.
    pub fn open(
        ordinal: usize,
        filter: Option<String>,
        cubins: Option<std::path::PathBuf>,
    ) -> Result<CudaSelftest, CudaError> {
        let device = Device::open(ordinal)?;
        Ok(CudaSelftest {
            modules: Modules::default(),
            cache: CubinCache::if_usable(cubins)?,
            stream: device.stream()?,
            filter,
        })
    }

    fn options(&self, subject: &Subject) -> CudaOptions {
        let o = &subject.options;
        CudaOptions {
            pdl: true,
            sms: self.stream.device().properties().sm_count,
            page_size: o.page_size,
            max_pages: o.max_pages(),
            plain: false,
            per_op: subject.per_op,
        }
    }

    /// Lowers a case; `None` if the filter leaves none of its steps.
    fn lower(&self, subject: &Subject, case: &Case) -> Result<Option<CudaProgram>, CudaError> {
        let program = subject.plan.program(case.kind);
        let program = program.ok_or(CudaError::NoStepProgram)?;
        let (_, sizes, sampling) = bucket(case);
        let options = self.options(subject);
        let choices = case.choices(&subject.plan, sizes, sampling, options)?;
        let plan = &subject.plan;
        let lowered = lower_tuned(plan, program, sizes, sampling, options, &choices)?;
        let wanted = |at: usize| {
            let f = self.filter.as_deref().unwrap_or("");
            families(program, &lowered, at).contains(f)
        };
        let any = lowered.launches.iter().any(|l| wanted(l.step));
        Ok(any.then_some(lowered))
    }

    /// Compiles the kernels of all cases, on all cores; returns how many there are.
    ///
    /// # Errors
    /// A step has no kernel, or a kernel does not compile.
    pub fn compile(&mut self, subjects: &[Subject]) -> Result<usize, CudaError> {
        let mut kernels: BTreeMap<String, KernelSource> = BTreeMap::new();
        for subject in subjects {
            for case in &subject.cases {
                for k in self.lower(subject, case)?.iter().flat_map(|l| &l.kernels) {
                    kernels
                        .entry(k.code().to_owned())
                        .or_insert_with(|| k.clone());
                }
            }
        }
        let kernels: Vec<KernelSource> = kernels.into_values().collect();
        let device = self.stream.device().clone();
        self.modules.get(&device, self.cache.as_ref(), &kernels)?;
        Ok(kernels.len())
    }

    /// Compares all steps of a subject's cases.
    ///
    /// # Errors
    /// A kernel does not end, or the CPU cannot run the subject.
    pub fn check(
        &mut self,
        subject: &Subject,
        seed: u64,
        report: &mut Report,
    ) -> Result<(), SelftestError> {
        let mut twin = load(subject)?;
        let mut constants = self.upload(subject, &*twin)?;
        for (number, case) in subject.cases.iter().enumerate() {
            let Some(lowered) = self.lower(subject, case)? else {
                continue;
            };
            let mut rng = Rng::new(seed ^ number as u64);
            for (i, spec) in subject.plan.caches.iter().enumerate() {
                let page = subject.options.page_size;
                fill_cache(twin.cache_mut(i), spec, case, page, &mut rng);
            }
            self.case(subject, case, &lowered, &mut *twin, &mut constants, report)?;
        }
        let mut changed = Vec::new();
        for (i, want) in constants.weights.iter().enumerate() {
            let mut found = vec![0; want.len()];
            // SAFETY: the weight was uploaded from as many bytes; the wait ends the copy.
            unsafe {
                self.stream
                    .copy_to_host(&mut found, constants.addresses.weights[i])?
            };
            self.stream.synchronize()?;
            if found != *want {
                changed.push(i.to_string());
            }
        }
        let fault =
            (!changed.is_empty()).then(|| format!("weights {} changed", changed.join(", ")));
        let name = || subject.name.clone();
        report.record(
            "weights unchanged",
            subject.plan.dtype,
            name,
            Outcome::exact(fault),
        );
        Ok(())
    }

    /// Puts weights and tables on the device, the CPU's bytes as they are, and makes room for caches.
    fn upload(&self, subject: &Subject, twin: &dyn Twin) -> Result<Constants, CudaError> {
        let plan = &subject.plan;
        let weights: Vec<Vec<u8>> = (0..plan.weights.len())
            .map(|i| twin.weight(i).to_vec())
            .collect();
        let tables: Vec<Vec<f32>> = plan
            .tables
            .iter()
            .map(|t| t.data.iter().map(|v| v.get() as f32).collect())
            .collect();
        let tokens = subject.options.pages * subject.options.page_size;
        let cache_bytes = |c: &lathe_codegen::plan::CacheSpec| tokens * c.token_bytes();
        let total = weights.iter().map(|w| aligned(w.len())).sum::<usize>()
            + tables.iter().map(|t| aligned(4 * t.len())).sum::<usize>()
            + twin
                .rope()
                .values()
                .map(|(c, s)| aligned(4 * c.len()) + aligned(4 * s.len()))
                .sum::<usize>()
            + plan
                .caches
                .iter()
                .map(|c| aligned(cache_bytes(c)))
                .sum::<usize>();
        let hint = "the self-test needs a few hundred MB";
        let mut arena = Arena::new(self.stream.device(), "the self-test", total, hint)?;
        let put = |arena: &mut Arena, bytes: &[u8]| {
            let at = arena.alloc(bytes.len())?;
            // SAFETY: just allocated with this size; the wait keeps the source alive long enough.
            unsafe { self.stream.copy_to_device(at, bytes)? };
            self.stream.synchronize()?;
            Ok::<_, CudaError>(at)
        };
        let mut addresses = Addresses::default();
        for w in &weights {
            addresses.weights.push(put(&mut arena, w)?);
        }
        for t in &tables {
            addresses.tables.push(put(&mut arena, bytes_of(t))?);
        }
        for (&(table, bits), (cos, sin)) in twin.rope() {
            for (is_sine, wave) in [(false, cos), (true, sin)] {
                let at = put(&mut arena, bytes_of(wave))?;
                addresses.rope.insert((table, bits, is_sine), at);
            }
        }
        for c in &plan.caches {
            addresses.caches.push(arena.alloc(cache_bytes(c))?);
            let rows = tokens * 2 * c.kv_heads as usize;
            addresses.cache_rows.push(rows as u64);
        }
        Ok(Constants {
            addresses,
            weights,
            _arena: arena,
        })
    }

    fn case(
        &mut self,
        subject: &Subject,
        case: &Case,
        lowered: &CudaProgram,
        twin: &mut dyn Twin,
        constants: &mut Constants,
        report: &mut Report,
    ) -> Result<(), SelftestError> {
        let program = subject.plan.program(case.kind);
        let program = program.ok_or(CudaError::NoStepProgram)?;
        let device = self.stream.device().clone();
        let sizes = lowered.sizes;
        let bucket = sizes.env();
        let meta = MetaLayout::new(sizes, self.options(subject).max_pages);
        let image = Image::new(&device, program, &bucket, &meta, &case.batch)?;
        let work = Work::new(&self.stream, &lowered.workspaces)?;
        let addresses = &mut constants.addresses;
        addresses.meta = image.meta();
        addresses.sampled = image.sampled();
        addresses.workspaces = work.addresses();
        let slots: Vec<DevicePtr> = (0..program.slots.len()).map(|i| image.slot(i)).collect();
        let kernels = &lowered.kernels;
        let modules = self.modules.get(&device, self.cache.as_ref(), kernels)?;
        let resolver = Resolver {
            program,
            lowered,
            addresses,
            slots: &slots,
            meta: &meta,
            library: None,
        };
        let launches = match resolver.launches(&modules, true) {
            Ok(launches) => launches,
            Err(error) => {
                let place = || format!("{}, {}", subject.name, case.label);
                let fault = Outcome::exact(Some(error.to_string()));
                report.record("refused by the driver", subject.plan.dtype, place, fault);
                return Ok(());
            }
        };
        let mut running = Running {
            stream: &self.stream,
            subject,
            case,
            program,
            lowered,
            launches: &launches,
            caches: &addresses.caches,
            image,
            work,
            filter: self.filter.as_deref(),
            sizes: [batch_env(case), bucket],
        };
        twin.trace(case.kind, &case.batch, &mut |at, snapshot| {
            running.step(at, snapshot, report)
        })
    }
}

impl Running<'_> {
    fn step(
        &mut self,
        at: usize,
        snapshot: &dyn Snapshot,
        report: &mut Report,
    ) -> Result<(), SelftestError> {
        let step = &self.program.steps[at];
        let name = families(self.program, self.lowered, at);
        let dtype = step_dtype(step, self.subject.plan.dtype);
        let (subject, case, program) = (self.subject, self.case, self.program);
        let here = || place(subject, case, program, at);
        if name.is_empty() {
            // The GEMM before it has sampled.
            let swallowed = step.op == Op::Sample(Sample)
                && at > 0
                && families(program, self.lowered, at - 1).contains("gemv");
            if !swallowed {
                let fault = Some("no kernel runs this step".into());
                report.record("missing", dtype, here, Outcome::exact(fault));
            }
            return Ok(());
        }
        let wanted = self.filter.is_none_or(|f| name.contains(f));
        // GEMMs leave sums of squares that others read.
        if !wanted && !matches!(step.op, Op::Gemm(_)) {
            return Ok(());
        }
        let fail = |error| SelftestError::Kernel {
            place: here(),
            kernels: name.clone(),
            error: Box::new(error),
        };
        let outputs = self.outputs(at, snapshot);
        let outcome = self.judge(at, snapshot, &outputs).map_err(fail)?;
        if !wanted {
            return Ok(());
        }
        report.record(&name, dtype, here, outcome);
        if let Some(tied) = self.with_ties(step, snapshot) {
            let outputs = self.outputs(at, &tied);
            let outcome = self.judge(at, &tied, &outputs).map_err(fail)?;
            let place = || format!("{}, with ties", here());
            report.record(&name, dtype, place, outcome);
        }
        Ok(())
    }

    /// For a step that samples: the same with logits rounded to quarters, so that many are equal, also
    /// where top-k and top-p end.
    fn with_ties<'a>(&self, step: &Step, snapshot: &'a dyn Snapshot) -> Option<Altered<'a>> {
        let (Op::Sample(_), Operand::Value(logits)) = (&step.op, step.get(X)?) else {
            return None;
        };
        let (ty, next) = (step.tensor(X)?, step.results.first().copied().flatten()?);
        let rounded: Vec<f32> = numbers(snapshot.value(*logits), ty.dtype)
            .into_iter()
            .map(|v| ((v * 4.0).round() / 4.0) as f32)
            .collect();
        let bytes = match ty.dtype {
            DType::BF16 => {
                let halves = rounded.iter().map(|&v| bf16::from_f32(v).to_le_bytes());
                halves.flatten().collect()
            }
            DType::F32 => bytes_of(&rounded).to_vec(),
            _ => return None,
        };
        let samplers = &self.case.batch.samplers;
        let rows = rounded.chunks(self.subject.vocab).zip(samplers);
        let tokens: Vec<i32> = rows
            .map(|(row, s)| sample(row, &s.params, s.request, s.position).map_or(-1, |t| t as i32))
            .collect();
        Some(Altered {
            inner: snapshot,
            values: vec![(*logits, bytes), (next, bytes_of(&tokens).to_vec())],
        })
    }

    /// Where the step's results go and what they are on the CPU.
    fn outputs(&self, at: usize, snapshot: &dyn Snapshot) -> Vec<Output> {
        let step = &self.program.steps[at];
        let rows = self.case.batch.rows.len();
        let sampled = |want: Vec<f64>| Output {
            offset: self.image.sampled_offset(),
            part: vec![rows],
            whole: vec![self.lowered.sizes.r],
            dtype: DType::I32,
            want,
            tolerance: crate::selftest::compare::Tolerance {
                relative: 0.0,
                floor: 0.0,
            },
        };
        if step.op == Op::Sample(Sample) {
            let next = step.results[0].map(|v| numbers(snapshot.value(v), DType::I32));
            return vec![sampled(next.unwrap_or_default())];
        }
        let size = match step.tensors().next() {
            Some((Operand::Value(v), t)) => rms(&numbers(snapshot.value(*v), t.dtype)),
            _ => 0.0,
        };
        let mut outputs = Vec::new();
        for (i, v) in step.results.iter().enumerate() {
            let (Some(v), Some(ty)) = (*v, step.result_type(i)) else {
                continue;
            };
            let (env, longest) = (&self.sizes[0], self.case.longest());
            let tol = tolerance(step, ty.dtype, env, longest, size, Reference::Device);
            let want = numbers(snapshot.value(v), ty.dtype);
            if self.argmax_follows(at) && i + 1 == step.results.len() {
                let mut o = sampled(want);
                o.tolerance = tol;
                outputs.push(o);
                continue;
            }
            let stored = &self.program.values[v.0 as usize].0;
            outputs.push(Output {
                offset: self.image.slot_offset(self.program.slot(v)),
                part: extents(stored, &self.sizes[0]),
                whole: extents(stored, &self.sizes[1]),
                dtype: ty.dtype,
                want,
                tolerance: tol,
            });
        }
        outputs
    }

    /// Whether the step's kernel keeps its logits to itself and samples.
    fn argmax_follows(&self, at: usize) -> bool {
        let next = self.program.steps.get(at + 1);
        next.is_some_and(|s| s.op == Op::Sample(Sample))
            && self.lowered.launches.iter().all(|l| l.step != at + 1)
    }

    fn judge(
        &mut self,
        at: usize,
        snapshot: &dyn Snapshot,
        outputs: &[Output],
    ) -> Result<Outcome, CudaError> {
        let program = self.program;
        let step = &program.steps[at];
        self.image.poison(&self.case.batch);
        for (operand, _) in step.tensors() {
            let Operand::Value(v) = operand else {
                continue;
            };
            let ty = &program.values[v.0 as usize].0;
            let [part, whole] = self.sizes.map(|env| extents(ty, &env));
            self.image.put(
                program.slot(*v),
                snapshot.value(*v),
                &part,
                &whole,
                ty.dtype,
            );
        }
        let cache = step.operands.iter().find_map(|o| match o {
            Operand::Cache(c) => Some(*c),
            _ => None,
        });
        let cache = cache.map(|c| (c, self.cache_before(c, snapshot.cache(c))));
        let used = self.lowered.launches.iter().filter(|l| l.step == at);
        let used: Vec<usize> = used
            .flat_map(|l| l.args.iter().filter_map(work_of))
            .collect();
        let carried = self.work.carried(self.stream, &used)?;
        let first = self.run(at, cache.as_ref().map(|(c, b)| (*c, &b[..])))?;
        let mut outcome = Outcome::default();
        for o in outputs {
            outcome = outcome.and(match self.argmax_follows(at) && o.dtype == DType::I32 {
                true => chosen(o, &first.memory, self.subject.vocab),
                false => o.judge(&first.memory),
            });
        }
        let stray = self.image.stray(outputs, &first.memory);
        outcome = outcome.and(Outcome::exact(stray));
        if let Some((c, before)) = &cache {
            let found = self.judge_cache(step, *c, before, &first.cache, snapshot.cache(*c));
            outcome = outcome.and(found);
        }
        let fault = self.work.fault(self.stream, &used)?;
        outcome = outcome.and(Outcome::exact(fault));
        self.work.restore(self.stream, &carried)?;
        let second = self.run(at, cache.as_ref().map(|(c, b)| (*c, &b[..])))?;
        let differs = outputs
            .iter()
            .any(|o| o.found(&first.memory) != o.found(&second.memory))
            || first.cache != second.cache;
        let fault = differs.then(|| "a second run gives other bits".to_owned());
        Ok(outcome.and(Outcome::exact(fault)))
    }

    /// Uploads the memory before the step, runs its launches and reads the memory after it.
    fn run(&mut self, at: usize, cache: Option<(usize, &[u8])>) -> Result<After, CudaError> {
        self.image.upload(self.stream)?;
        if let Some((c, before)) = cache {
            // SAFETY: the cache has these bytes; `before` outlives the wait below.
            unsafe { self.stream.copy_to_device(self.caches[c], before)? };
        }
        for (l, lowered) in self.launches.iter().zip(&self.lowered.launches) {
            if lowered.step == at {
                // SAFETY: resolved from the lowered program; the memory lives until the wait.
                unsafe { l.submit(self.stream)? };
            }
        }
        self.stream.synchronize()?;
        let memory = self.image.download(self.stream)?;
        let mut after = After {
            memory,
            cache: Vec::new(),
        };
        if let Some((c, before)) = cache {
            after.cache = vec![0; before.len()];
            // SAFETY: as above.
            unsafe { self.stream.copy_to_host(&mut after.cache, self.caches[c])? };
            self.stream.synchronize()?;
        }
        Ok(after)
    }

    fn rows_of_step(&self) -> Vec<std::ops::Range<usize>> {
        let lens = self.case.batch.kv_lens.iter();
        let past = self.case.past();
        past.iter()
            .zip(lens)
            .map(|(&p, &l)| p..l as usize)
            .collect()
    }

    /// The cache before the step: the CPU's after it, with poison in the rows that the step appends.
    fn cache_before(&self, cache: usize, after: &[u8]) -> Vec<u8> {
        let spec = &self.subject.plan.caches[cache];
        let (d, size) = (spec.head_dim as usize, spec.dtype.size());
        let rows = self.rows_of_step();
        let mut before = after.to_vec();
        each_vector(
            spec,
            &self.case.batch,
            self.subject.options.page_size,
            |b| rows[b].clone(),
            |at| {
                for word in before[at * size..][..d * size].as_chunks_mut::<4>().0 {
                    *word = POISON.to_le_bytes();
                }
            },
        );
        before
    }

    fn judge_cache(
        &self,
        step: &Step,
        cache: usize,
        before: &[u8],
        after: &[u8],
        want: &[u8],
    ) -> Outcome {
        let spec = &self.subject.plan.caches[cache];
        let (d, size) = (spec.head_dim as usize, spec.dtype.size());
        let rows = self.rows_of_step();
        let (mut expected, mut found) = (Vec::new(), Vec::new());
        let mut rest = after.to_vec();
        each_vector(
            spec,
            &self.case.batch,
            self.subject.options.page_size,
            |b| rows[b].clone(),
            |at| {
                let place = at * size..(at + d) * size;
                expected.extend_from_slice(&want[place.clone()]);
                found.extend_from_slice(&after[place.clone()]);
                rest[place.clone()].copy_from_slice(&before[place]);
            },
        );
        if rest != before {
            return Outcome::exact(Some("a cached row that is not of this step changed".into()));
        }
        let expected = numbers(&expected, spec.dtype);
        compare(
            &expected,
            &found,
            spec.dtype,
            d,
            append_tolerance(step, spec),
        )
    }
}

/// A snapshot with some values replaced.
struct Altered<'a> {
    inner: &'a dyn Snapshot,
    values: Vec<(ValueId, Vec<u8>)>,
}

impl Snapshot for Altered<'_> {
    fn value(&self, v: ValueId) -> &[u8] {
        let own = self.values.iter().find(|(id, _)| *id == v);
        own.map_or_else(|| self.inner.value(v), |(_, bytes)| bytes)
    }

    fn cache(&self, i: usize) -> &[u8] {
        self.inner.cache(i)
    }
}

/// Memory after a step.
struct After {
    memory: Vec<u8>,
    cache: Vec<u8>,
}

/// The workspace that an argument points to.
fn work_of(arg: &lathe_codegen::cuda::Arg) -> Option<usize> {
    use lathe_codegen::cuda::Arg;
    match arg {
        Arg::Ptr(Ref::Work(i)) => Some(*i),
        Arg::Map(m) => match m.base {
            Ref::Work(i) => Some(i),
            _ => None,
        },
        _ => None,
    }
}

/// A token that a kernel chose without showing its logits: on the CPU it may lie below the best one by
/// the tolerance of both.
fn chosen(o: &Output, memory: &[u8], vocab: usize) -> Outcome {
    let tokens = numbers(&o.found(memory), DType::I32);
    let mut outcome = Outcome {
        tolerance: 2.0 * o.tolerance.relative,
        ..Outcome::default()
    };
    for (r, (row, &token)) in o.want.chunks(vocab).zip(&tokens).enumerate() {
        let best = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let error = match row.get(token as usize) {
            Some(logit) if token >= 0.0 => (best - logit) / (best.abs() + rms(row)),
            _ => f64::INFINITY,
        };
        if error > outcome.error {
            outcome.error = error;
        }
        if error > outcome.tolerance {
            outcome.fault = Some(format!("row {r}: token {token} is not the best one"));
        }
    }
    outcome
}
