//! `throughput` and `latency`: a dataset on the engine, in continuous or in static batches.

use std::time::Duration;

use lathe_passes::egraph::cost::{CostPoint, DeviceModel};
use lathe_passes::predict::predict;
use lathe_runtime::engine::Policy;
use lathe_runtime::interrupt::interrupt_flag;
use lathe_runtime::text::TextTokenizer;

use super::outputs::{Outputs, engine, gpu_state, machine, phases};
use crate::bench::dataset::{Dataset, DatasetStats};
use crate::bench::metrics::RequestRecord;
use crate::bench::report::{ExecutionInfo, LatheSection, Report, WorldInfo};
use crate::bench::run_plan::{DeviceFacts, ModelSizes, RunKind, RunPlan, Wishes};
use crate::bench::serve::{Load, Served, serve};
use crate::bench::step_shares::class_times;
use crate::bench::warnings::{RunLimits, warnings};
use crate::config::{Resolved, Run};
use crate::console::Task;
use crate::model::{CompiledModel, WeightChoice};
use crate::target::cost_model;

/// A run on the engine.
pub(super) struct ServingJob<'a> {
    /// How requests come.
    pub(super) kind: RunKind,
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
    /// Input and output length to choose sizes for; the dataset's averages by default.
    pub(super) targets: (Option<u32>, Option<u32>),
    /// Longest sequence.
    pub(super) max_seq_len: usize,
    /// Where the weights come from.
    pub(super) weights: WeightChoice,
    /// Remarks on flags that change nothing in this run.
    pub(super) idle: Vec<String>,
    /// Files to write.
    pub(super) outputs: Outputs<'a>,
}

impl ServingJob<'_> {
    /// Runs the benchmark and prints the report.
    ///
    /// # Errors
    /// The model does not fit, the run did not reach its end, or a file cannot be written.
    pub(super) fn run(&self, model: &mut CompiledModel) -> anyhow::Result<()> {
        let plan = self.plan(model)?;
        let mut executor = model.load(self.weights, plan.load)?;
        model.warm_up(&mut *executor)?;
        let task = Task::begin("benchmark");
        let n = self.dataset.requests.len();
        let mut served = serve(
            &mut *executor,
            plan.engine,
            self.dataset,
            &self.load,
            interrupt_flag(),
            &mut |finished| task.advance(finished, n),
        )?;
        let done = served.records.len();
        let elapsed = task.end(&format!("{done} of {n} requests"));
        let execution = executor.execution().map(Into::into);
        if served.incomplete.is_none() && self.kind != RunKind::StaticBatches {
            // The result is known: a failure here must not cost it.
            let budget = (elapsed / 20).max(Duration::from_secs(1));
            match class_times(&mut *executor, &served.groups, budget) {
                Ok(classes) => served.classes = classes,
                Err(error) => tracing::warn!("kernels were not sampled: {error}"),
            }
        }
        self.report(model, &plan, &served, execution, elapsed.as_secs_f64())
    }

    /// The sizes of the run on this device as it is now.
    fn plan(&self, model: &CompiledModel) -> anyhow::Result<RunPlan> {
        let (resolved, device) = (self.resolved, &*model.device);
        let given = |n: Option<u32>| n.map(|n| n as usize);
        let facts = DeviceFacts {
            memory: device.memory()?,
            capabilities: device.capabilities(),
            rates: cost_model(device),
        };
        let token_bytes = device.token_bytes(&model.plan);
        let sizes = ModelSizes::of(&model.plan, token_bytes, model.info.vocab as usize);
        let wishes = Wishes {
            kind: self.kind,
            policy: self.policy,
            max_batch_size: given(resolved.max_batch_size.value),
            max_num_tokens: given(resolved.max_num_tokens.value),
            max_seq_len: self.max_seq_len,
            page_size: resolved.attn_page_size.value as usize,
            kv_fraction: resolved.free_mem_ratio.value,
            chunked_prefill: resolved.enable_chunked_prefill.value,
            concurrency: self.load.concurrency,
            targets: self.targets,
            log_steps: self.outputs.iteration_log.is_some(),
        };
        let plan = RunPlan::new(&facts, &sizes, self.dataset, &wishes)?;
        if let Some(choice) = &plan.trial {
            tracing::info!(
                "max_batch_size {} and max_num_tokens {} in place of {} and {}: {:.1} s are predicted, not {:.1} s",
                choice.max_batch_size,
                choice.max_num_tokens,
                choice.instead_of.0,
                choice.instead_of.1,
                choice.seconds,
                choice.before
            );
        }
        Ok(plan)
    }

    fn report(
        &self,
        model: &CompiledModel,
        plan: &RunPlan,
        served: &Served,
        execution: Option<ExecutionInfo>,
        seconds: f64,
    ) -> anyhow::Result<()> {
        let stats = self.dataset.stats();
        let device = model.device.describe();
        let mut section = self.section(model, plan, &stats, served);
        section.phases = phases(model, seconds);
        section.execution = execution;
        let world = WorldInfo {
            tp_size: 1,
            pp_size: 1,
            ep_size: 1,
            world_size: 1,
            max_batch_size: plan.engine.max_batch_size,
            max_num_tokens: plan.engine.max_num_tokens,
            scheduling_policy: plan.engine.policy.name().into(),
            kv_cache_percentage: match self.kind {
                RunKind::StaticBatches => None,
                RunKind::Serving | RunKind::Latency => Some(self.resolved.free_mem_ratio.value),
            },
            issue_rate: 0.0,
        };
        let report = Report::new(
            engine(model),
            device.map(machine),
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

    /// The report's own section, without what the clock says.
    fn section(
        &self,
        model: &CompiledModel,
        plan: &RunPlan,
        stats: &DatasetStats,
        served: &Served,
    ) -> LatheSection {
        let run = match self.kind {
            RunKind::Serving => Run::Serving,
            RunKind::Latency => Run::Latency,
            RunKind::StaticBatches => Run::StaticBatches,
        };
        let mut section = LatheSection {
            device: model.device.name(),
            warnings: model.remarks(self.resolved, run),
            ..LatheSection::default()
        };
        let mut limits = RunLimits {
            concurrency: self.load.concurrency,
            max_batch_size: plan.engine.max_batch_size,
            cached_sequences: plan.cached_sequences,
            peak_sequences: None,
        };
        let more = &mut section.warnings;
        more.extend(self.idle.iter().chain(&plan.warnings).cloned());
        if self.kind == RunKind::StaticBatches {
            more.extend(warnings(stats, limits));
            section.incomplete.clone_from(&served.incomplete);
            return section;
        }
        let device = model.device.describe();
        let gpu = gpu_state(device.as_ref());
        more.extend(device.iter().flat_map(|device| gpu.warnings(&device.name)));
        // One request at a time is the point of `latency`.
        if self.kind == RunKind::Serving {
            limits.peak_sequences = Some(served.totals.peak_sequences);
            more.extend(warnings(stats, limits));
        }
        section.device += &gpu.describe();
        section.roofline_percent = roofline_percent(model, served);
        let capacity = plan.load.capacity(model.info.vocab as usize);
        served.describe(&capacity, &mut section);
        section
    }
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
