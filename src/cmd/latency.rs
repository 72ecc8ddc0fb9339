//! `latency`: how long one request takes when it is alone.

use clap::Args;
use lathe_runtime::engine::Policy;
use lathe_runtime::text::TextTokenizer;

use super::bench_args::BenchArgs;
use super::outputs::Outputs;
use super::serving::ServingJob;
use super::throughput::{read_dataset, weight_choice};
use crate::bench::run_plan::RunKind;
use crate::bench::serve::Load;
use crate::config::RuntimeKind;
use crate::errors::usage_error;
use crate::global_options::GlobalOptions;
use crate::model::CompiledModel;

/// Latency of one request at a time, streaming.
#[derive(Debug, Args)]
pub struct Latency {
    #[command(flatten)]
    bench: BenchArgs,
    /// Most requests in flight; they run one after the other in any case
    #[arg(
        long,
        default_value_t = 1,
        allow_negative_numbers = true,
        value_name = "N"
    )]
    concurrency: i64,
}

impl Latency {
    /// Runs the benchmark and prints the report.
    pub fn run(&self, global: &GlobalOptions) -> anyhow::Result<()> {
        let bench = &self.bench;
        bench.check()?;
        let params = bench.sampling()?;
        let resolved = bench.resolve(bench.flags())?;
        if resolved.runtime.value != RuntimeKind::Trtllm {
            return Err(usage_error(
                "latency runs on the engine; runtime: demollm is for throughput",
            ));
        }
        let path = bench.dataset()?;
        let outputs = Outputs {
            report_json: bench.report_json.as_deref(),
            iteration_log: bench.iteration_log.as_deref(),
            ..Outputs::default()
        };
        outputs.check()?;
        let mut model = CompiledModel::compile(global, &resolved)?;
        model.require_cache()?;
        let tokenizer = TextTokenizer::load(&model.folder).ok();
        let (dataset, max_seq_len) = read_dataset(
            path,
            bench.num_requests,
            &model,
            &resolved,
            tokenizer.as_ref(),
        )?;
        let job = ServingJob {
            kind: RunKind::Latency,
            resolved: &resolved,
            dataset: &dataset,
            tokenizer: tokenizer.as_ref(),
            load: Load {
                concurrency: self.concurrency,
                warmup: bench.warmup,
                params,
                ..Load::latency()
            },
            policy: Policy::GuaranteedNoEvict,
            targets: (None, None),
            max_seq_len,
            weights: weight_choice(&resolved),
            idle: Vec::new(),
            outputs,
        };
        job.run(&mut model)
    }
}
