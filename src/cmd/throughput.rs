//! `throughput`: how many tokens a second a dataset is completed with.

use std::path::PathBuf;

use clap::Args;
use lathe_runtime::engine::Policy;
use lathe_runtime::text::TextTokenizer;

use super::bench_args::{BenchArgs, stop_tokens};
use super::outputs::Outputs;
use super::serving::ServingJob;
use crate::bench::dataset::{Dataset, ReadOptions};
use crate::bench::run_plan::RunKind;
use crate::bench::serve::Load;
use crate::config::{Given, Options, Resolved, RuntimeKind, Source};
use crate::errors::usage_error;
use crate::global_options::GlobalOptions;
use crate::model::{CompiledModel, WeightChoice};

/// Sequences for which the decode program is chosen, unless the configuration says otherwise. It does
/// not depend on the other flags, so that these change no token.
const DECODE_BATCH: u32 = 64;

/// Offline throughput of a dataset.
#[derive(Debug, Args)]
pub struct Throughput {
    #[command(flatten)]
    bench: BenchArgs,
    /// Most sequences that run at a time; chosen from memory and dataset by default
    #[arg(long = "max_batch_size", value_name = "N")]
    max_batch_size: Option<u32>,
    /// Most token rows of a step; chosen from memory and dataset by default
    #[arg(long = "max_num_tokens", value_name = "N")]
    max_num_tokens: Option<u32>,
    /// Input length to choose sizes for; the dataset's average by default
    #[arg(long = "target_input_len", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    target_input_len: Option<u32>,
    /// Output length to choose sizes for; the dataset's average by default
    #[arg(long = "target_output_len", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    target_output_len: Option<u32>,
    /// Token that ends an output; -1 runs every request to its output_tokens
    #[arg(
        long = "eos_id",
        default_value_t = -1,
        allow_negative_numbers = true,
        value_name = "ID"
    )]
    eos_id: i64,
    /// Most requests in flight; 0 or less is no limit
    #[arg(long, default_value_t = -1, allow_negative_numbers = true, value_name = "N")]
    concurrency: i64,
    /// Report the times of first tokens
    #[arg(long)]
    streaming: bool,
    /// Compute long prompts in several steps (the default)
    #[arg(
        long = "enable_chunked_context",
        overrides_with = "disable_chunked_context"
    )]
    enable_chunked_context: bool,
    /// Compute every prompt in one step
    #[arg(long = "disable_chunked_context")]
    disable_chunked_context: bool,
    /// When requests are admitted: guaranteed_no_evict or max_utilization
    #[arg(long = "scheduler_policy", default_value_t, value_name = "POLICY")]
    scheduler_policy: Policy,
    /// Accepted for compatibility: the tokenizer is loaded when there is one
    #[arg(long = "no_skip_tokenizer_init", hide = true)]
    _no_skip_tokenizer_init: bool,
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
        let bench = &self.bench;
        bench.check()?;
        let stop = stop_tokens(self.eos_id)?;
        let params = bench.sampling()?;
        let mut resolved = bench.resolve(self.flags())?;
        if resolved.decode_batch.source == Source::Default {
            resolved.decode_batch.value = DECODE_BATCH;
        }
        let serving = resolved.runtime.value == RuntimeKind::Trtllm;
        if !serving && (self.concurrency > 0 || bench.iteration_log.is_some()) {
            return Err(usage_error(
                "runtime: demollm runs static batches, so that --concurrency and --iteration_log have no meaning",
            ));
        }
        let path = bench.dataset()?;
        let outputs = Outputs {
            report_json: bench.report_json.as_deref(),
            request_json: self.request_json.as_deref(),
            output_json: self.output_json.as_deref(),
            iteration_log: bench.iteration_log.as_deref(),
        };
        outputs.check()?;
        let mut model = CompiledModel::compile(global, &resolved)?;
        model.require_cache()?;
        let vocab = model.info.vocab;
        if let Some(&id) = stop.iter().find(|&&id| u64::from(id) >= vocab as u64) {
            return Err(usage_error(format!(
                "--eos_id {id} is outside the vocabulary of {vocab}"
            )));
        }
        let tokenizer = TextTokenizer::load(&model.folder).ok();
        let (dataset, max_seq_len) = read_dataset(
            path,
            bench.num_requests,
            &model,
            &resolved,
            tokenizer.as_ref(),
        )?;
        let job = ServingJob {
            kind: match serving {
                true => RunKind::Serving,
                false => RunKind::StaticBatches,
            },
            resolved: &resolved,
            dataset: &dataset,
            tokenizer: tokenizer.as_ref(),
            load: Load {
                concurrency: self.concurrency,
                warmup: bench.warmup,
                streaming: self.streaming,
                stop: stop.iter().map(|&id| id as i32).collect(),
                params,
            },
            policy: self.scheduler_policy,
            targets: (self.target_input_len, self.target_output_len),
            max_seq_len,
            weights: weight_choice(&resolved),
            idle: match serving {
                true => Vec::new(),
                false => self.without_effect(),
            },
            outputs,
        };
        job.run(&mut model)
    }

    /// Flags that were given and change nothing in static batches.
    fn without_effect(&self) -> Vec<String> {
        let policy = self.scheduler_policy != Policy::default();
        [
            ("--scheduler_policy", policy),
            ("--target_input_len", self.target_input_len.is_some()),
            ("--target_output_len", self.target_output_len.is_some()),
        ]
        .into_iter()
        .filter(|(_, given)| *given)
        .map(|(flag, _)| format!("{flag} has no effect: runtime: demollm runs static batches"))
        .collect()
    }

    fn flags(&self) -> Options {
        let chunked = match (self.enable_chunked_context, self.disable_chunked_context) {
            (_, true) => Given::flag("--disable_chunked_context", Some(false)),
            (true, false) => Given::flag("--enable_chunked_context", Some(true)),
            (false, false) => None,
        };
        Options {
            max_batch_size: Given::flag("--max_batch_size", self.max_batch_size.map(Some)),
            max_num_tokens: Given::flag("--max_num_tokens", self.max_num_tokens.map(Some)),
            enable_chunked_prefill: chunked,
            ..self.bench.flags()
        }
    }
}

/// Random or the checkpoint's.
pub(super) fn weight_choice(resolved: &Resolved) -> WeightChoice {
    if resolved.skip_loading_weights.value {
        WeightChoice::Random(0)
    } else {
        WeightChoice::Checkpoint
    }
}

/// The dataset, and the longest sequence that is allowed for it.
///
/// # Errors
/// Bad lines, or requests that are too long.
pub(super) fn read_dataset(
    path: &std::path::Path,
    num_requests: usize,
    model: &CompiledModel,
    resolved: &Resolved,
    tokenizer: Option<&TextTokenizer>,
) -> anyhow::Result<(Dataset, usize)> {
    let dataset = Dataset::read(
        path,
        ReadOptions {
            num_requests,
            vocab_size: Some(model.info.vocab as usize),
            tokenizer,
        },
    )?;
    if num_requests > dataset.requests.len() {
        tracing::warn!(
            "--num_requests {num_requests}: the dataset has only {} requests",
            dataset.requests.len()
        );
    }
    let longest = dataset.stats().max_sequence_length;
    if resolved.max_seq_len.value.is_none() {
        let limit = model.info.max_position as usize;
        dataset.check_lengths("the model's max_position_embeddings", limit)?;
    }
    let max_seq_len = resolved.max_seq_len.value.map_or(longest, |n| n as usize);
    dataset.check_lengths("max_seq_len", max_seq_len)?;
    model.check_length(max_seq_len)?;
    Ok((dataset, max_seq_len))
}
