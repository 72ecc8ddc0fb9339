//! `throughput` with `runtime: demollm`: one static batch after the other over a contiguous cache.

use std::time::Instant;

use anyhow::Context;
use lathe_runtime::load::LoadOptions;
use lathe_runtime::sampling::SamplingParams;
use lathe_runtime::session::{StaticRequest, run_static};
use lathe_runtime::step::Executor;
use lathe_runtime::text::TextTokenizer;

use super::outputs::{Outputs, engine, machine, phases};
use crate::bench::dataset::Dataset;
use crate::bench::metrics::RequestRecord;
use crate::bench::report::{LatheSection, Report, WorldInfo};
use crate::bench::warnings::{RunLimits, warnings};
use crate::config::Resolved;
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
        executor.warm_up()?;
        let requests = self.requests();
        let warmup = &requests[..self.warmup.min(batch)];
        if !warmup.is_empty() {
            run_static(&mut *executor, warmup, |_| {}).context("warm-up")?;
        }
        let start = Instant::now();
        let mut records = Vec::with_capacity(requests.len());
        for chunk in requests.chunks(batch) {
            records.extend(run_chunk(&mut *executor, chunk, start, self.streaming)?);
        }
        let stats = self.dataset.stats();
        let limits = RunLimits {
            concurrency: -1,
            max_batch_size: batch,
            cached_sequences: batch,
        };
        let section = LatheSection {
            device: model.target.name(),
            phases: phases(model, start.elapsed().as_secs_f64()),
            warnings: warnings(&stats, limits),
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
            machine(&model.target),
            world,
            &records,
            self.streaming,
            stats,
            section,
        );
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

/// One static batch; all its requests start together.
fn run_chunk(
    executor: &mut dyn Executor,
    requests: &[StaticRequest],
    clock: Instant,
    streaming: bool,
) -> anyhow::Result<Vec<RequestRecord>> {
    let now = || clock.elapsed().as_nanos() as u64;
    let begin = now();
    let mut records: Vec<RequestRecord> = requests
        .iter()
        .map(|request| RequestRecord {
            id: request.id,
            isl: request.prompt.len(),
            start_ns: begin,
            end_ns: begin,
            ..RequestRecord::default()
        })
        .collect();
    run_static(executor, requests, |event| {
        let record = &mut records[event.request];
        if record.output_tokens.is_empty() {
            record.first_token_ns = streaming.then(now);
        } else {
            record.decode_iteration += 1;
        }
        record.output_tokens.push(event.token);
        if event.last {
            record.end_ns = now();
        }
    })?;
    Ok(records)
}
