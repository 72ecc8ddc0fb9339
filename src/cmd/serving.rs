//! `throughput` and `latency` on the continuous-batching engine.

use std::time::Duration;

use lathe_codegen::Plan;
use lathe_passes::egraph::cost::{CostPoint, DeviceModel};
use lathe_passes::predict::predict;
use lathe_runtime::device::Memory;
use lathe_runtime::device::load::LoadOptions;
use lathe_runtime::engine::{EngineConfig, Policy};
use lathe_runtime::interrupt::interrupt_flag;
use lathe_runtime::text::TextTokenizer;

use super::outputs::{Outputs, engine, gpu_state, machine, phases};
use crate::bench::dataset::{Dataset, DatasetStats};
use crate::bench::kv_size::{KvLimits, kv_size};
use crate::bench::metrics::RequestRecord;
use crate::bench::report::{ExecutionInfo, LatheSection, Report, WorldInfo};
use crate::bench::schedule::{Free, StepCost, choose};
use crate::bench::serve::{Load, Served, latency_config, serve};
use crate::bench::sizing::{Sizes, SizingInput, sizes};
use crate::bench::step_shares::class_times;
use crate::bench::tuning::{TuningError, TuningInput};
use crate::bench::warnings::{RunLimits, warnings};
use crate::config::{Resolved, Run};
use crate::console::Task;
use crate::model::{CompiledModel, WeightChoice};
use crate::target::cost_model;

/// A run on the engine.
pub(super) struct ServingJob<'a> {
    /// The configuration.
    pub(super) resolved: &'a Resolved,
    /// The requests.
    pub(super) dataset: &'a Dataset,
    /// For the texts in the output files.
    pub(super) tokenizer: Option<&'a TextTokenizer>,
    /// How requests are put on the engine.
    pub(super) load: Load,
    /// When requests are admitted.
    pub(super) policy: Policy,
    /// One sequence at a time, whole prompts.
    pub(super) latency: bool,
    /// Input and output length to choose sizes for; the dataset's averages by default.
    pub(super) targets: (Option<u32>, Option<u32>),
    /// Longest sequence.
    pub(super) max_seq_len: usize,
    /// Where the weights come from.
    pub(super) weights: WeightChoice,
    /// Files to write.
    pub(super) outputs: Outputs<'a>,
}

/// Limits of a run, and what is to be said about them.
struct Limits {
    options: LoadOptions,
    config: EngineConfig,
    cached_sequences: usize,
    warnings: Vec<String>,
}

impl ServingJob<'_> {
    /// Runs the benchmark and prints the report.
    ///
    /// # Errors
    /// The model does not fit, the run did not reach its end, or a file cannot be written.
    pub(super) fn run(&self, model: &mut CompiledModel) -> anyhow::Result<()> {
        let stats = self.dataset.stats();
        let limits = self.limits(model, &stats)?;
        let mut executor = model.load(self.weights, limits.options)?;
        model.warm_up(&mut *executor)?;
        let task = Task::begin("benchmark");
        let n = self.dataset.requests.len();
        let mut served = serve(
            &mut *executor,
            limits.config,
            self.dataset,
            &self.load,
            interrupt_flag(),
            &mut |finished| task.advance(finished, n),
        )?;
        let done = served.records.len();
        let elapsed = task.end(&format!("{done} of {n} requests"));
        let execution = executor.execution().map(Into::into);
        if served.incomplete.is_none() {
            // The result is known: a failure here must not cost it.
            let budget = (elapsed / 20).max(Duration::from_secs(1));
            match class_times(&mut *executor, &served.groups, budget) {
                Ok(classes) => served.classes = classes,
                Err(error) => tracing::warn!("kernels were not sampled: {error}"),
            }
        }
        let seconds = elapsed.as_secs_f64();
        self.report(model, stats, &limits, &served, execution, seconds)
    }

    fn limits(&self, model: &CompiledModel, stats: &DatasetStats) -> anyhow::Result<Limits> {
        let resolved = self.resolved;
        let plan = &model.plan;
        let capabilities = model.device.capabilities();
        let weights = plan.weight_bytes() as u64;
        let memory = model.device.memory()?;
        let Some(free) = memory.free.checked_sub(weights) else {
            let memory = memory.free;
            return Err(TuningError::WeightsDoNotFit { weights, memory }.into());
        };
        let (cacheable, reserve) = memory.for_cache(free);
        let cache = plan.caches.first();
        let (isl, osl) = self.targets;
        let fraction = resolved.free_mem_ratio.value;
        let chunked = resolved.enable_chunked_prefill.value && !self.latency;
        let given = |n: Option<u32>| n.map(|n| n as usize);
        let mut sizes = sizes(&SizingInput {
            dataset: stats,
            max_batch_size: if self.latency {
                Some(1)
            } else {
                given(resolved.max_batch_size.value)
            },
            max_num_tokens: given(resolved.max_num_tokens.value),
            concurrency: self.load.concurrency,
            tuning: TuningInput {
                layers: plan.caches.len(),
                kv_heads: cache.map_or(0, |cache| cache.kv_heads as usize),
                head_dim: cache.map_or(0, |cache| cache.head_dim as usize),
                kv_element_bytes: cache.map_or(0.0, |cache| cache.dtype.size() as f64),
                weight_bytes: weights,
                device_bytes: weights + cacheable.saturating_sub(reserve),
                tp: 1,
                kv_fraction: fraction,
                isl: isl.map_or(stats.avg_isl, f64::from),
                osl: osl.map_or(stats.avg_osl, f64::from),
                max_isl: stats.max_isl,
                chunked_prefill: chunked,
            },
            capabilities,
        })?;
        let (mut options, mut cached_sequences) = self.load_options(model, &sizes, memory, free)?;
        if capabilities.has_known_rates && !self.latency {
            let config = self.engine_config(model, &sizes, &options, chunked);
            if let Some((batch, tokens)) = self.better_sizes(model, config, &options) {
                sizes.max_batch_size = batch;
                sizes.max_num_tokens = tokens;
                (options, cached_sequences) = self.load_options(model, &sizes, memory, free)?;
            }
        }
        let config = self.engine_config(model, &sizes, &options, chunked);
        Ok(Limits {
            options,
            config,
            cached_sequences,
            warnings: sizes.warnings,
        })
    }

    /// What is loaded for these sizes, with the cache that `free` bytes allow, and how many requests of
    /// average length that holds.
    fn load_options(
        &self,
        model: &CompiledModel,
        sizes: &Sizes,
        memory: Memory,
        free: u64,
    ) -> anyhow::Result<(LoadOptions, usize)> {
        let plan = &model.plan;
        let mut options = LoadOptions {
            max_tokens: sizes.max_num_tokens,
            max_rows: sizes.max_batch_size,
            max_sequences: sizes.max_batch_size,
            max_seq_len: self.max_seq_len,
            page_size: self.resolved.attn_page_size.value as usize,
            pages: 0,
        };
        let left = free.saturating_sub(work_bytes(plan, &options));
        let (free_bytes, reserve_bytes) = memory.for_cache(left);
        let size = kv_size(
            self.dataset,
            &KvLimits {
                page_size: options.page_size,
                token_bytes: model.device.token_bytes(plan),
                free_bytes,
                reserve_bytes,
                fraction: self.resolved.free_mem_ratio.value,
                max_batch_size: sizes.max_batch_size,
                concurrency: self.load.concurrency,
            },
        )?;
        options.pages = size.pages;
        Ok((options, size.cached_sequences))
    }

    fn engine_config(
        &self,
        model: &CompiledModel,
        sizes: &Sizes,
        options: &LoadOptions,
        chunked: bool,
    ) -> EngineConfig {
        let capacity = options.capacity(model.info.vocab as usize);
        EngineConfig {
            policy: self.policy,
            chunked_prefill: chunked,
            overlap: model.device.capabilities().is_asynchronous,
            log_steps: self.outputs.iteration_log.is_some(),
            max_batch_size: sizes.max_batch_size,
            ..if self.latency {
                latency_config(&capacity)
            } else {
                EngineConfig::of(&capacity)
            }
        }
    }

    /// Batch and tokens of a step that a trial prefers to the heuristic's, where the user gave none.
    fn better_sizes(
        &self,
        model: &CompiledModel,
        config: EngineConfig,
        options: &LoadOptions,
    ) -> Option<(usize, usize)> {
        let plan = &model.plan;
        let free = Free {
            batch: self.resolved.max_batch_size.value.is_none(),
            tokens: self.resolved.max_num_tokens.value.is_none(),
        };
        let elements = |w: &lathe_codegen::plan::WeightBuffer| w.recipe.rows * w.recipe.cols;
        let launches = plan.programs.iter().map(|p| p.steps.len()).max();
        let cost = StepCost::new(
            &cost_model(&*model.device),
            plan.weight_bytes(),
            plan.weights.iter().map(elements).sum(),
            plan.token_bytes(),
            launches.unwrap_or(0),
        );
        let capacity = options.capacity(model.info.vocab as usize);
        let concurrency = self.load.concurrency;
        let choice = choose(self.dataset, config, capacity, concurrency, cost, free)?;
        tracing::info!(
            "max_batch_size {} and max_num_tokens {} in place of {} and {}: {:.1} s are predicted, not {:.1} s",
            choice.max_batch_size,
            choice.max_num_tokens,
            config.max_batch_size,
            config.max_num_tokens,
            choice.seconds,
            choice.before
        );
        Some((choice.max_batch_size, choice.max_num_tokens))
    }

    fn report(
        &self,
        model: &CompiledModel,
        stats: DatasetStats,
        limits: &Limits,
        served: &Served,
        execution: Option<ExecutionInfo>,
        seconds: f64,
    ) -> anyhow::Result<()> {
        let device = model.device.describe();
        let gpu = gpu_state(device.as_ref());
        let machine = device.map(machine);
        let run = if self.latency {
            Run::Latency
        } else {
            Run::Serving
        };
        let mut section = LatheSection {
            device: format!("{}{}", model.device.name(), gpu.describe()),
            roofline_percent: roofline_percent(model, served),
            phases: phases(model, seconds),
            warnings: model.remarks(self.resolved, run),
            execution,
            ..LatheSection::default()
        };
        section.warnings.extend_from_slice(&limits.warnings);
        if let Some(machine) = &machine {
            section.warnings.extend(gpu.warnings(&machine.name));
        }
        // One request at a time is the point of `latency`.
        if !self.latency {
            section.warnings.extend(warnings(
                &stats,
                RunLimits {
                    concurrency: self.load.concurrency,
                    max_batch_size: limits.config.max_batch_size,
                    cached_sequences: limits.cached_sequences,
                    peak_sequences: Some(served.totals.peak_sequences),
                },
            ));
        }
        let capacity = limits.options.capacity(model.info.vocab as usize);
        served.describe(&capacity, &mut section);
        let world = WorldInfo {
            tp_size: 1,
            pp_size: 1,
            ep_size: 1,
            world_size: 1,
            max_batch_size: limits.config.max_batch_size,
            max_num_tokens: limits.config.max_num_tokens,
            scheduling_policy: self.policy.name().into(),
            kv_cache_percentage: Some(self.resolved.free_mem_ratio.value),
            issue_rate: 0.0,
        };
        let report = Report::new(
            engine(model),
            machine,
            world,
            &served.records,
            self.load.streaming,
            stats,
            section,
        );
        let mut records: Vec<RequestRecord> = served.records.clone();
        records.extend_from_slice(&served.unfinished);
        records.sort_by_key(|record| record.id);
        self.outputs
            .write(&report, &records, &served.iterations, self.tokenizer)
    }
}

/// Bytes that a load takes beside weights and cache.
fn work_bytes(plan: &Plan, options: &LoadOptions) -> u64 {
    let general = plan.activation_bytes(&options.general_env());
    general.max(plan.activation_bytes(&options.decode_env())) as u64
}

/// The roofline's time of the mean decode step over the measured one, in per cent. Nothing where the
/// device's rates are not known.
fn roofline_percent(model: &CompiledModel, served: &Served) -> Option<f64> {
    if !model.device.capabilities().has_known_rates {
        return None;
    }
    let graph = model.compiled.steps.decode.as_ref()?;
    let at = mean_decode_point(served, cost_model(&*model.device))?;
    let predicted_ns = predict(graph, &at).total.picoseconds as f64 * 1e-3;
    let measured_ns = served.totals.decode_period_ns as f64 / served.totals.decode_steps as f64;
    (measured_ns > 0.0).then(|| 100.0 * predicted_ns / measured_ns)
}

/// Sequences and cached tokens of the mean decode step.
fn mean_decode_point(served: &Served, device: DeviceModel) -> Option<CostPoint> {
    let totals = &served.totals;
    let batch = totals.decode_sequences.checked_div(totals.decode_steps)?;
    let context = totals.decode_context.checked_div(totals.decode_sequences)?;
    Some(CostPoint::decode(batch as i64, context as i64, device))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_runtime::engine::Totals;

    #[test]
    fn the_mean_decode_step() {
        let mut served = Served::default();
        assert!(mean_decode_point(&served, DeviceModel::H100).is_none());
        served.totals = Totals {
            decode_steps: 10,
            decode_sequences: 640,
            decode_context: 64_000,
            ..Totals::default()
        };
        let point = mean_decode_point(&served, DeviceModel::H100).unwrap();
        assert_eq!(point, CostPoint::decode(64, 100, DeviceModel::H100));
    }
}
