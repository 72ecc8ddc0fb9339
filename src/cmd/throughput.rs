//! `throughput`: how many tokens a second a dataset is completed with.

use anyhow::Context;
use clap::Args;
use lathe_runtime::load::LoadOptions;
use lathe_runtime::sampling::SamplingParams;
use lathe_runtime::session::{StaticRequest, run_static};
use lathe_runtime::text::TextTokenizer;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use crate::bench::dataset::{Dataset, ReadOptions};
use crate::bench::metrics::RequestRecord;
use crate::bench::report::{
    Engine, LatheSection, Phase, Report, WorldInfo, write_output_json, write_report_json,
    write_request_json,
};
use crate::bench::warnings::{RunLimits, warnings};
use crate::cli::GlobalOptions;
use crate::config::{Given, Options, Resolved, RuntimeKind};
use crate::errors::usage_error;
use crate::model::{CompiledModel, WeightChoice};

/// Offline throughput of a dataset.
#[derive(Debug, Args)]
pub struct Throughput {
    /// JSON lines with task_id, input_ids (or prompt) and output_tokens; - is stdin
    #[arg(long, value_name = "FILE")]
    dataset: PathBuf,
    /// Accepted for compatibility: _autodeploy, or any word that means this program
    #[arg(long, default_value = "_autodeploy", value_parser = ["_autodeploy", "lathe"])]
    backend: String,
    /// YAML file whose keys override the command line
    #[arg(long = "extra_llm_api_options", alias = "config", value_name = "FILE")]
    extra_llm_api_options: Option<PathBuf>,
    /// Most sequences of a batch; all requests by default
    #[arg(long = "max_batch_size", value_name = "N")]
    max_batch_size: Option<u32>,
    /// Most token rows of a step
    #[arg(long = "max_num_tokens", value_name = "N")]
    max_num_tokens: Option<u32>,
    /// Longest sequence; the dataset's longest by default
    #[arg(long = "max_seq_len", value_name = "N")]
    max_seq_len: Option<u32>,
    /// Only the first N requests; 0 means all
    #[arg(long = "num_requests", default_value_t = 0, value_name = "N")]
    num_requests: usize,
    /// Requests that are run before the clock starts
    #[arg(long, default_value_t = 2, value_name = "N")]
    warmup: usize,
    /// Token that ends an output; -1 runs every request to its output_tokens
    #[arg(long = "eos_id", default_value_t = -1, allow_negative_numbers = true, value_name = "ID")]
    eos_id: i64,
    /// Report the times of first tokens
    #[arg(long)]
    streaming: bool,
    /// Write the report as JSON
    #[arg(long = "report_json", value_name = "FILE")]
    report_json: Option<PathBuf>,
    /// Write the outputs as text
    #[arg(long = "output_json", value_name = "FILE")]
    output_json: Option<PathBuf>,
    /// Write a record of each request
    #[arg(long = "request_json", value_name = "FILE")]
    request_json: Option<PathBuf>,
}

impl Throughput {
    /// Runs the benchmark and prints the report.
    pub fn run(&self, global: &GlobalOptions) -> anyhow::Result<()> {
        let flags = Options {
            max_batch_size: Given::flag("--max_batch_size", self.max_batch_size.map(Some)),
            max_num_tokens: Given::flag("--max_num_tokens", self.max_num_tokens.map(Some)),
            max_seq_len: Given::flag("--max_seq_len", self.max_seq_len.map(Some)),
            ..Options::default()
        };
        let yaml = match &self.extra_llm_api_options {
            Some(path) => crate::config::read(path)?,
            None => Options::default(),
        };
        let resolved = Resolved::new(flags, yaml);
        if resolved.runtime.value == RuntimeKind::Trtllm {
            return Err(usage_error(
                "runtime: trtllm (continuous batching) is not implemented yet; put `runtime: demollm` into the \
                 file of --extra_llm_api_options",
            ));
        }
        let mut model = CompiledModel::compile(global, &resolved)?;
        model.require_cache()?;
        let tokenizer = TextTokenizer::load(&model.folder).ok();
        let dataset = Dataset::read(
            &self.dataset,
            ReadOptions {
                num_requests: self.num_requests,
                vocab_size: Some(model.info.vocab as usize),
                tokenizer: tokenizer.as_ref(),
            },
        )?;
        let stats = dataset.stats();
        let max_seq_len = resolved
            .max_seq_len
            .value
            .map_or(stats.max_sequence_length, |n| n as usize);
        dataset.check_lengths(max_seq_len)?;
        model.check_length(max_seq_len)?;
        let batch = resolved
            .max_batch_size
            .value
            .map_or(dataset.requests.len(), |n| n as usize)
            .clamp(1, dataset.requests.len());
        let max_tokens = resolved.max_num_tokens.value.map_or(2048, |n| n as usize);
        let options = LoadOptions::contiguous(batch, max_seq_len, max_tokens);
        let weights = if resolved.skip_loading_weights.value {
            WeightChoice::Random(0)
        } else {
            WeightChoice::Checkpoint
        };
        let mut executor = model.load(weights, options)?;
        let requests = self.requests(&dataset)?;
        let warmup: Vec<StaticRequest> = requests
            .iter()
            .take(self.warmup.min(batch))
            .cloned()
            .collect();
        if !warmup.is_empty() {
            run_static(&mut *executor, &warmup, |_| {}).context("warm-up")?;
        }
        let start = Instant::now();
        let mut records = Vec::with_capacity(requests.len());
        for chunk in requests.chunks(batch) {
            records.extend(run_chunk(&mut *executor, chunk, start, self.streaming)?);
        }
        let mut phases: Vec<Phase> = model
            .phases
            .iter()
            .map(|(name, d)| phase(name, d.as_secs_f64()))
            .collect();
        phases.push(phase("benchmark", start.elapsed().as_secs_f64()));
        let limits = RunLimits {
            concurrency: -1,
            max_batch_size: batch,
            cached_sequences: batch,
        };
        let section = LatheSection {
            device: model.target.name(),
            phases,
            warnings: warnings(&stats, limits),
            ..LatheSection::default()
        };
        let report = Report::new(
            engine(&model),
            None,
            WorldInfo {
                tp_size: 1,
                pp_size: 1,
                ep_size: 1,
                world_size: 1,
                max_batch_size: batch,
                max_num_tokens: options.max_tokens,
                scheduling_policy: "static batch".into(),
                kv_cache_percentage: None,
                issue_rate: 0.0,
            },
            &records,
            self.streaming,
            stats,
            section,
        );
        write!(std::io::stdout().lock(), "{report}")?;
        if let Some(path) = &self.report_json {
            write_report_json(path, &report)?;
        }
        if let Some(path) = &self.request_json {
            write_request_json(path, &records, tokenizer.as_ref())?;
        }
        if let Some(path) = &self.output_json {
            write_output_json(path, &records, tokenizer.as_ref())?;
        }
        Ok(())
    }

    fn requests(&self, dataset: &Dataset) -> anyhow::Result<Vec<StaticRequest>> {
        let stop = match self.eos_id {
            -1 => Vec::new(),
            id => vec![
                u32::try_from(id)
                    .map_err(|_| usage_error(format!("--eos_id {id} is no token id")))?,
            ],
        };
        Ok(dataset
            .requests
            .iter()
            .enumerate()
            .map(|(i, r)| StaticRequest {
                id: i as u64,
                prompt: r.input_ids.clone(),
                max_new: r.output_tokens as usize,
                stop: stop.clone(),
                params: SamplingParams::default(),
            })
            .collect())
    }
}

fn phase(name: &str, seconds: f64) -> Phase {
    Phase {
        name: name.into(),
        seconds,
    }
}

fn engine(model: &CompiledModel) -> Engine {
    Engine {
        model: model.name.clone(),
        model_path: Some(model.folder.display().to_string()),
        engine_dir: None,
        version: env!("CARGO_PKG_VERSION").into(),
        backend: "lathe".into(),
        dtype: model.dtype.name().into(),
        kv_cache_dtype: Some(model.dtype.name().into()),
        quantization: None,
    }
}

/// One static batch; all its requests start together.
fn run_chunk(
    executor: &mut dyn lathe_runtime::step::Executor,
    requests: &[StaticRequest],
    clock: Instant,
    streaming: bool,
) -> anyhow::Result<Vec<RequestRecord>> {
    let now = || clock.elapsed().as_nanos() as u64;
    let begin = now();
    let mut records: Vec<RequestRecord> = requests
        .iter()
        .map(|r| RequestRecord {
            id: r.id,
            isl: r.prompt.len(),
            start_ns: begin,
            first_token_ns: None,
            end_ns: begin,
            decode_iteration: 0,
            output_tokens: Vec::new(),
            error: None,
        })
        .collect();
    run_static(executor, requests, |event| {
        let r = &mut records[event.request];
        if r.output_tokens.is_empty() && streaming {
            r.first_token_ns = Some(now());
        }
        r.output_tokens.push(event.token);
        r.decode_iteration += 1;
        if event.last {
            r.end_ns = now();
        }
    })?;
    Ok(records)
}
