//! `throughput` with `runtime: demollm`: one static batch after the other over a contiguous cache.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Context;
use lathe_runtime::device::executor::{Execution, Executor};
use lathe_runtime::device::load::LoadOptions;
use lathe_runtime::device::profile::{ProfileOptions, StepProfile};
use lathe_runtime::device::step::{Capacity, StepBatch, StepError, StepOutput};
use lathe_runtime::interrupt::interrupt_flag;
use lathe_runtime::sampling::SamplingParams;
use lathe_runtime::session::{StaticRequest, run_static};
use lathe_runtime::text::TextTokenizer;

use super::outputs::{Outputs, engine, machine, phases};
use crate::bench::dataset::Dataset;
use crate::bench::metrics::RequestRecord;
use crate::bench::report::{Incomplete, LatheSection, Report, WorldInfo};
use crate::bench::warnings::{RunLimits, warnings};
use crate::config::{Resolved, Run};
use crate::console::Task;
use crate::model::{CompiledModel, WeightChoice};

/// A run of static batches.
pub(super) struct StaticJob<'a> {
    /// The configuration.
    pub(super) resolved: &'a Resolved,
    /// The requests.
    pub(super) dataset: &'a Dataset,
    /// For the texts in the output files.
    pub(super) tokenizer: Option<&'a TextTokenizer>,
    /// Requests that run before the clock starts.
    pub(super) warmup: usize,
    /// Tokens that end an output.
    pub(super) stop: Vec<u32>,
    /// How tokens are chosen.
    pub(super) params: SamplingParams,
    /// Whether the times of first tokens are recorded.
    pub(super) streaming: bool,
    /// Longest sequence.
    pub(super) max_seq_len: usize,
    /// Where the weights come from.
    pub(super) weights: WeightChoice,
    /// Remarks on flags that change nothing in this run.
    pub(super) idle: Vec<String>,
    /// Files to write.
    pub(super) outputs: Outputs<'a>,
}

impl StaticJob<'_> {
    /// Runs the benchmark and prints the report.
    ///
    /// # Errors
    /// The model does not fit, a step fails, or a file cannot be written.
    pub(super) fn run(&self, model: &mut CompiledModel) -> anyhow::Result<()> {
        let resolved = self.resolved;
        let n = self.dataset.requests.len();
        let batch = resolved
            .max_batch_size
            .value
            .map_or(n, |n| n as usize)
            .clamp(1, n);
        let max_tokens = resolved.max_num_tokens.value.map_or(2048, |n| n as usize);
        let options = LoadOptions::contiguous(batch, self.max_seq_len, max_tokens);
        let mut executor = model.load(self.weights, options)?;
        model.warm_up(&mut *executor)?;
        let requests = self.requests();
        let warmup = &requests[..self.warmup.min(batch)];
        if !warmup.is_empty() {
            run_static(&mut *executor, warmup, |_| {}).context("warm-up")?;
        }
        let task = Task::begin("benchmark");
        let start = Instant::now();
        let mut records = Vec::with_capacity(requests.len());
        let mut unfinished = Vec::new();
        let mut incomplete = None;
        for chunk in requests.chunks(batch) {
            let stoppable = &mut UntilInterrupted {
                executor: &mut *executor,
                interrupted: interrupt_flag(),
            };
            let done = run_chunk(stoppable, chunk, start, self.streaming);
            records.extend(done.records);
            unfinished.extend(done.unfinished);
            task.advance(records.len(), n);
            if let Err(error) = done.outcome {
                incomplete = Some(Incomplete {
                    reason: error.to_string(),
                    finished: records.len(),
                    planned: n,
                });
                break;
            }
        }
        let seconds = task
            .end(&format!("{} of {n} requests", records.len()))
            .as_secs_f64();
        let stats = self.dataset.stats();
        let limits = RunLimits {
            concurrency: -1,
            max_batch_size: batch,
            cached_sequences: batch,
            peak_sequences: None,
        };
        let mut remarks = model.remarks(resolved, Run::StaticBatches);
        remarks.extend(self.idle.iter().cloned());
        remarks.extend(warnings(&stats, limits));
        let section = LatheSection {
            device: model.device.name(),
            incomplete,
            phases: phases(model, seconds),
            warnings: remarks,
            execution: executor.execution().map(Into::into),
            ..LatheSection::default()
        };
        let world = WorldInfo {
            tp_size: 1,
            pp_size: 1,
            ep_size: 1,
            world_size: 1,
            max_batch_size: batch,
            max_num_tokens: options.max_tokens,
            scheduling_policy: "static".into(),
            kv_cache_percentage: None,
            issue_rate: 0.0,
        };
        let report = Report::new(
            engine(model),
            model.device.describe().map(machine),
            world,
            &records,
            self.streaming,
            stats,
            section,
        );
        records.extend(unfinished);
        records.sort_by_key(|record| record.id);
        self.outputs.write(&report, &records, &[], self.tokenizer)
    }

    fn requests(&self) -> Vec<StaticRequest> {
        (0u64..)
            .zip(&self.dataset.requests)
            .map(|(id, request)| StaticRequest {
                id,
                prompt: request.input_ids.clone(),
                max_new: request.output_tokens as usize,
                stop: self.stop.clone(),
                params: self.params,
            })
            .collect()
    }
}

/// Fails the next step once Ctrl-C was pressed.
struct UntilInterrupted<'a> {
    executor: &'a mut dyn Executor,
    interrupted: &'a AtomicBool,
}

impl Executor for UntilInterrupted<'_> {
    fn capacity(&self) -> Capacity {
        self.executor.capacity()
    }

    fn warm_up(&mut self) -> Result<(), StepError> {
        self.executor.warm_up()
    }

    fn execution(&self) -> Option<Execution> {
        self.executor.execution()
    }

    fn step(&mut self, batch: &StepBatch, logits: bool) -> Result<StepOutput, StepError> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(StepError::Device("interrupted".into()));
        }
        self.executor.step(batch, logits)
    }

    fn submit(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        self.executor.submit(batch)
    }

    fn collect(&mut self) -> Result<StepOutput, StepError> {
        self.executor.collect()
    }

    fn profile(
        &mut self,
        batch: &StepBatch,
        options: ProfileOptions,
    ) -> Result<Option<StepProfile>, StepError> {
        self.executor.profile(batch, options)
    }
}

/// What became of a static batch.
struct Chunk {
    records: Vec<RequestRecord>,
    /// Requests that had not all their tokens when a step failed.
    unfinished: Vec<RequestRecord>,
    outcome: Result<(), StepError>,
}

/// One static batch; all its requests start together.
fn run_chunk(
    executor: &mut dyn Executor,
    requests: &[StaticRequest],
    clock: Instant,
    streaming: bool,
) -> Chunk {
    let now = || clock.elapsed().as_nanos() as u64;
    let begin = now();
    let mut records: Vec<RequestRecord> = requests
        .iter()
        .map(|request| RequestRecord {
            id: request.id,
            isl: request.prompt.len(),
            start_ns: begin,
            end_ns: begin,
            error: Some("unfinished".into()),
            ..RequestRecord::default()
        })
        .collect();
    let outcome = run_static(executor, requests, |event| {
        let record = &mut records[event.request];
        if record.output_tokens.is_empty() {
            record.first_token_ns = streaming.then(now);
        } else {
            record.decode_iteration += 1;
        }
        record.output_tokens.push(event.token);
        record.end_ns = now();
        if event.last {
            record.error = None;
        }
    });
    let (records, unfinished) = records.into_iter().partition(|r| r.error.is_none());
    Chunk {
        records,
        unfinished,
        outcome: outcome.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_runtime::engine::sim::SimDevice;

    /// Out of device memory, or Ctrl-C, in the middle of a batch: what is complete counts, the rest is
    /// kept and marked.
    #[test]
    fn a_failing_step_leaves_partial_results() {
        let capacity = LoadOptions::contiguous(3, 16, 16).capacity(100);
        let requests: Vec<StaticRequest> = [2, 6, 6]
            .into_iter()
            .enumerate()
            .map(|(id, max_new)| StaticRequest {
                id: id as u64,
                prompt: vec![1, 2],
                max_new,
                stop: Vec::new(),
                params: SamplingParams::default(),
            })
            .collect();
        let lengths = |records: &[RequestRecord]| -> Vec<usize> {
            records.iter().map(RequestRecord::n_output).collect()
        };
        let mut device = SimDevice::new(capacity);
        let whole = run_chunk(&mut device, &requests, Instant::now(), true);
        assert_eq!(whole.outcome, Ok(()));
        assert_eq!(lengths(&whole.records), [2, 6, 6]);

        let mut device = SimDevice::new(capacity);
        device.fail_at = Some(3);
        let part = run_chunk(&mut device, &requests, Instant::now(), true);
        let error = part.outcome.unwrap_err();
        assert_eq!(error.to_string(), "out of device memory");
        assert_eq!(lengths(&part.records), [2]);
        assert_eq!(lengths(&part.unfinished), [3, 3]);
        assert!(
            part.unfinished
                .iter()
                .all(|r| r.error.as_deref() == Some("unfinished"))
        );
        let tokens = |record: &RequestRecord| record.output_tokens.clone();
        assert!(tokens(&whole.records[1]).starts_with(&tokens(&part.unfinished[0])));

        let stop = AtomicBool::new(true);
        let mut device = UntilInterrupted {
            executor: &mut device,
            interrupted: &stop,
        };
        let none = run_chunk(&mut device, &requests, Instant::now(), true);
        assert_eq!(none.outcome.unwrap_err().to_string(), "interrupted");
        assert_eq!((none.records.len(), none.unfinished.len()), (0, 3));
    }
}
