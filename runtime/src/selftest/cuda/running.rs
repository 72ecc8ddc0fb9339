//! A case on the GPU, step by step: operands in, launches, everything in memory compared.

use std::borrow::Cow;

use super::memory::{Image, Output, Work};
use crate::device::cuda::driver::Stream;
use crate::device::cuda::memory::bytes_of;
use crate::device::cuda::prepare::Ready;
use crate::device::cuda::{CudaError, DevicePtr};
use crate::sampling::sample;
use crate::selftest::cases::each_vector;
use crate::selftest::compare::{Reference, Tolerance, compare, numbers, rms, tolerance};
use crate::selftest::cpu::{append_tolerance, place, step_dtype};
use crate::selftest::twin::Snapshot;
use crate::selftest::{Case, Outcome, POISON, Report, SelftestError, Subject, extents};
use half::bf16;
use lathe_codegen::cuda::{Arg, CudaProgram, Ref};
use lathe_codegen::{Operand, Program, Step, ValueId};
use lathe_ir::ops::{Sample, X};
use lathe_ir::{DType, Op, SymEnv};

/// A case being run.
pub(super) struct Running<'a> {
    pub(super) stream: &'a Stream,
    pub(super) subject: &'a Subject,
    pub(super) case: &'a Case,
    pub(super) program: &'a Program,
    pub(super) lowered: &'a CudaProgram,
    pub(super) launches: &'a [Ready],
    pub(super) caches: &'a [DevicePtr],
    pub(super) image: Image,
    pub(super) work: Work,
    pub(super) filter: Option<&'a str>,
    /// Sizes of the batch and of its bucket.
    pub(super) sizes: [SymEnv; 2],
}

/// The families of a step's launches, in order, each once.
pub(super) fn families(program: &Program, lowered: &CudaProgram, at: usize) -> String {
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

impl Running<'_> {
    /// Runs a step and counts what came of it.
    pub(super) fn step(
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
            tolerance: Tolerance {
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
        let cache = cache.map(|c| (c, self.cache_before(c, &snapshot.cache(c))));
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
            let found = self.judge_cache(step, *c, before, &first.cache, &snapshot.cache(*c));
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

    fn cache(&self, i: usize) -> Cow<'_, [u8]> {
        self.inner.cache(i)
    }
}

/// Memory after a step.
struct After {
    memory: Vec<u8>,
    cache: Vec<u8>,
}

/// The workspace that an argument points to.
fn work_of(arg: &Arg) -> Option<usize> {
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
