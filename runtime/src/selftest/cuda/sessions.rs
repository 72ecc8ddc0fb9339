//! The self-test of whole steps on a GPU. What may not change a single bit must not: CUDA graphs,
//! programmatic dependent launch, rows of padding, tokens that are handed on without the host. And the
//! device draws the tokens that the host's sampler draws.

use crate::device::cuda::executor::{CudaExecutor, CudaLoad};
use crate::device::executor::Executor;
use crate::device::load::Loadable;
use crate::device::step::{RowSampler, StepBatch};
use crate::sampling::{SamplingParams, argmax, sample};
use crate::selftest::cases::Rng;
use crate::selftest::cpu::load;
use crate::selftest::{Outcome, Report, SelftestError, Subject};
use lathe_ir::DType;

/// Rows of logits that are kept of a session.
const EVERY: usize = 25;

/// Compares whole steps of a subject: sessions of `steps` decode steps with and without graphs and
/// programmatic dependent launch, batches with and without padding, tokens drawn by device and host,
/// and the random weights that the device made. The subject's options must hold 96 sequences and its
/// pages `steps` tokens of 5 of them.
///
/// # Errors
/// The subject cannot be loaded, or the device fails.
pub(super) fn check_sessions(
    subject: &Subject,
    how: &CudaLoad,
    steps: usize,
    seed: u64,
    report: &mut Report,
) -> Result<(), SelftestError> {
    let dtype = subject.plan.dtype;
    let name = |what: &str| format!("{}, {what}", subject.name);
    let start = |graphs, pdl| {
        let how = CudaLoad {
            graphs,
            pdl,
            per_op: subject.per_op,
            ..how.clone()
        };
        let model = Loadable {
            plan: &subject.plan,
            weights: &subject.weights,
            vocab: subject.vocab,
        };
        CudaExecutor::load(model, subject.options, &how)
    };
    let mut plain = start(false, false)?;
    let fault = weights_differ(subject, &plain)?;
    let place = || name("made on the device");
    report.record("random_weights", dtype, place, Outcome::exact(fault));

    for drawn in [false, true] {
        let session = Session::new(subject, 5, steps, drawn, seed);
        let reference = session.run(&mut plain, false)?;
        for (graphs, pdl, piped) in [
            (true, false, false),
            (false, true, false),
            (true, true, false),
            (true, true, true),
        ] {
            let mut other = start(graphs, pdl)?;
            let found = session.run(&mut other, piped)?;
            let fault = reference.differs(&found);
            let family = match piped {
                true => "tokens handed on",
                false => "graphs and PDL",
            };
            let what = format!("{steps} steps, graphs {graphs}, PDL {pdl}, drawn {drawn}");
            report.record(family, dtype, || name(&what), Outcome::exact(fault));
        }
    }
    for graphs in [false, true] {
        let mut executor = start(graphs, true)?;
        for (part, whole) in [(1, 1), (3, 4), (5, 8), (13, 16), (70, 96)] {
            let session = Session::new(subject, whole, 4, false, seed);
            let fault = session.padding(&mut executor, part)?;
            let what = format!("{part} of {whole} rows, graphs {graphs}");
            report.record("padding", dtype, || name(&what), Outcome::exact(fault));
        }
        for n in [2, 3, 7, 33] {
            for round in 0..8 {
                let seed = seed ^ (round << 8);
                let session = Session::new(subject, n, 4, true, seed);
                let fault = session.sampling(&mut executor, subject.vocab)?;
                let what = format!("{n} rows, graphs {graphs}");
                report.record(
                    "sampling",
                    DType::I32,
                    || name(&what),
                    Outcome::exact(fault),
                );
            }
        }
    }
    Ok(())
}

fn weights_differ(
    subject: &Subject,
    executor: &CudaExecutor,
) -> Result<Option<String>, SelftestError> {
    let twin = load(subject)?;
    for i in 0..subject.plan.weights.len() {
        if executor.read_weight(i)? != twin.weight(i) {
            return Ok(Some(format!("weight {i} has other bytes than on the CPU")));
        }
    }
    Ok(None)
}

/// A static batch: prompts of odd lengths, pages of their own.
struct Session {
    prompts: Vec<Vec<i32>>,
    params: Vec<SamplingParams>,
    pages_each: usize,
    steps: usize,
}

/// What a session gave.
#[derive(PartialEq)]
struct Transcript {
    tokens: Vec<Vec<i32>>,
    logits: Vec<(usize, Vec<f32>)>,
}

impl Transcript {
    fn differs(&self, other: &Transcript) -> Option<String> {
        let step = self
            .tokens
            .iter()
            .zip(&other.tokens)
            .position(|(a, b)| a != b);
        if let Some(step) = step {
            return Some(format!("step {step} gives other tokens"));
        }
        // A pipelined session reads no logits on the way.
        for (step, logits) in &other.logits {
            let same = self.logits.iter().find(|(s, _)| s == step);
            if same.is_none_or(|(_, mine)| bits(mine) != bits(logits)) {
                return Some(format!("step {step} gives other logits"));
            }
        }
        (self.tokens.len() != other.tokens.len()).then(|| "it ended early".to_owned())
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

impl Session {
    fn new(subject: &Subject, n: usize, steps: usize, drawn: bool, seed: u64) -> Session {
        let mut rng = Rng::new(seed);
        let prompts: Vec<Vec<i32>> = (0..n)
            .map(|_| {
                let len = 1 + rng.below(9);
                (0..len).map(|_| rng.below(subject.vocab) as i32).collect()
            })
            .collect();
        let params = (0..n)
            .map(|_| match drawn {
                true => rng.params(),
                false => SamplingParams::default(),
            })
            .collect();
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) + steps + 1;
        Session {
            prompts,
            params,
            pages_each: longest.div_ceil(subject.options.page_size),
            steps,
        }
    }

    /// Rows `tokens[b]` of the sequences after `past[b]` cached ones.
    fn batch(&self, tokens: &[Vec<i32>], past: &[usize]) -> StepBatch {
        let mut batch = StepBatch {
            max_pages: self.pages_each,
            ..StepBatch::default()
        };
        for (b, (new, &at)) in tokens.iter().zip(past).enumerate() {
            let pages: Vec<i32> = (b * self.pages_each..(b + 1) * self.pages_each)
                .map(|p| p as i32)
                .collect();
            let sampler = RowSampler {
                params: self.params[b],
                request: b as u64,
                position: (at + new.len()) as u32,
            };
            batch.push_sequence(new, at, &pages, Some(sampler));
        }
        batch
    }

    fn prefill(&self, executor: &mut dyn Executor) -> Result<Vec<i32>, SelftestError> {
        let past = vec![0; self.prompts.len()];
        Ok(executor
            .step(&self.batch(&self.prompts, &past), false)?
            .next)
    }

    fn lengths(&self) -> Vec<usize> {
        self.prompts.iter().map(Vec::len).collect()
    }

    fn run(&self, executor: &mut dyn Executor, piped: bool) -> Result<Transcript, SelftestError> {
        let mut tokens = vec![self.prefill(executor)?];
        let mut logits = Vec::new();
        let mut past = self.lengths();
        let n = past.len();
        for step in 0..self.steps {
            let last = tokens.last().cloned().unwrap_or_default();
            let rows: Vec<Vec<i32>> = (0..n)
                .map(|i| match piped && step > 0 {
                    true => vec![-1 - i as i32],
                    false => vec![last[i]],
                })
                .collect();
            let batch = self.batch(&rows, &past);
            past.iter_mut().for_each(|p| *p += 1);
            if piped {
                executor.submit(&batch)?;
                // One step stays in flight.
                if step > 0 {
                    tokens.push(executor.collect()?.next);
                }
                continue;
            }
            let wanted = step % EVERY == 0;
            let out = executor.step(&batch, wanted)?;
            tokens.push(out.next);
            logits.extend(out.logits.map(|l| (step, l)));
        }
        if piped {
            tokens.push(executor.collect()?.next);
        }
        Ok(Transcript { tokens, logits })
    }

    /// Whether the first `part` rows of a decode step have the same bits alone, padded to the bucket,
    /// as among all.
    fn padding(
        &self,
        executor: &mut dyn Executor,
        part: usize,
    ) -> Result<Option<String>, SelftestError> {
        let next = self.prefill(executor)?;
        let rows: Vec<Vec<i32>> = next.iter().map(|&t| vec![t]).collect();
        let past = self.lengths();
        let full = self.batch(&rows, &past);
        let few = self.batch(&rows[..part], &past[..part]);
        let all = executor.step(&full, true)?;
        // The step appends the same rows each time; the second padded one finds other leftovers.
        for time in ["first", "second"] {
            let padded = executor.step(&few, true)?;
            if padded.next[..] != all.next[..part] {
                return Ok(Some(format!("other tokens the {time} time")));
            }
            let (whole, own) = (all.logits.as_deref(), padded.logits.as_deref());
            let (whole, own) = (whole.unwrap_or(&[]), own.unwrap_or(&[]));
            if own.is_empty() || bits(&whole[..own.len()]) != bits(own) {
                return Ok(Some(format!("other logits the {time} time")));
            }
            self.prefill(executor)?;
        }
        // Without logits a step may sample inside the last GEMM.
        let silent = executor.step(&few, false)?;
        Ok((silent.next[..] != all.next[..part]).then(|| "other tokens without logits".to_owned()))
    }

    /// Whether the device draws what the host draws from the same logits.
    fn sampling(
        &self,
        executor: &mut dyn Executor,
        vocab: usize,
    ) -> Result<Option<String>, SelftestError> {
        let next = self.prefill(executor)?;
        let rows: Vec<Vec<i32>> = next.iter().map(|&t| vec![t]).collect();
        let batch = self.batch(&rows, &self.lengths());
        let out = executor.step(&batch, true)?;
        let logits = out.logits.unwrap_or_default();
        for (i, (row, s)) in logits.chunks(vocab).zip(&batch.samplers).enumerate() {
            let want = sample(row, &s.params, s.request, s.position);
            if want.map(|t| t as i32) != Some(out.next[i]) {
                let (params, got) = (&s.params, out.next[i]);
                return Ok(Some(format!(
                    "row {i}, {params:?}: {got}, {want:?} expected"
                )));
            }
            if s.params.is_greedy() && argmax(row).map(|t| t as i32) != Some(out.next[i]) {
                return Ok(Some(format!("row {i}: not the largest logit")));
            }
        }
        Ok((logits.len() != vocab * next.len()).then(|| "logits are missing".to_owned()))
    }
}
