//! What a run gave: records of requests, a log of iterations, and their part of the report.

use lathe_codegen::work::KernelClass;
use lathe_runtime::device::step::Capacity;
use lathe_runtime::engine::{FinishReason, Finished, StepGroup, StepStats, Totals};

use crate::bench::metrics::RequestRecord;
use crate::bench::report::{Incomplete, KvOccupancy, LatheSection, StepBreakdown};
use crate::bench::report_json::{InflightBatchingStats, IterationStats, KvCacheStats};
use crate::bench::step_shares::ClassTimes;

/// What a run gave.
#[derive(Debug, Clone, Default)]
pub struct Served {
    /// Requests that ended, well or with an error, by id.
    pub records: Vec<RequestRecord>,
    /// Requests that were issued, but not ended when the run was stopped, by id; they hold the
    /// tokens known so far.
    pub unfinished: Vec<RequestRecord>,
    /// The engine's iterations; empty unless the configuration has `log_steps`.
    pub iterations: Vec<IterationStats>,
    /// Sums over all iterations.
    pub totals: Totals,
    /// What kinds of steps there were, those that took longest first.
    pub groups: Vec<StepGroup>,
    /// The device's time by kind of kernel, once it was sampled.
    pub classes: Option<ClassTimes>,
    /// Set when the run did not reach its end.
    pub incomplete: Option<Incomplete>,
}

impl Served {
    /// Fills in the parts of the report's own section that the engine knows.
    pub fn describe(&self, capacity: &Capacity, section: &mut LatheSection) {
        section.incomplete.clone_from(&self.incomplete);
        section.preemptions = Some(self.totals.preemptions);
        section.kv_cache = Some(KvOccupancy {
            num_pages: capacity.pages,
            page_size: capacity.page_size,
            peak_pages: self.totals.peak_pages,
            average_percent: 100.0 * self.totals.mean_pages() / capacity.pages.max(1) as f64,
        });
        if self.totals.steps > 0 {
            let per_step = |ns: u64| ns as f64 * 1e-6 / self.totals.steps as f64;
            let class_ms = |kinds: &[KernelClass]| {
                let classes = self.classes?;
                let ns: f64 = kinds.iter().map(|&kind| classes.of(kind)).sum();
                Some(ns * 1e-6 / self.totals.steps as f64)
            };
            section.step_breakdown = Some(StepBreakdown {
                steps: self.totals.steps,
                device_ms: per_step(self.totals.device_ns),
                attention_ms: class_ms(&[KernelClass::Attention]),
                gemm_ms: class_ms(&[KernelClass::Gemm]),
                other_ms: class_ms(&[KernelClass::Pointwise, KernelClass::Other]),
                sampled_steps: self.classes.map(|classes| classes.profiled),
                host_gap_ms: per_step(self.totals.host_gap_ns),
            });
        }
    }
}

/// The record of a request that ended, with the reason; without `streaming` the time of its first
/// token is not told.
pub(super) fn record(finished: Finished, streaming: bool) -> (FinishReason, RequestRecord) {
    let error = match &finished.reason {
        FinishReason::Length | FinishReason::Stop => None,
        FinishReason::Cancelled => Some("cancelled".to_owned()),
        FinishReason::Aborted => Some("unfinished".to_owned()),
        FinishReason::Failed(reason) => Some(reason.clone()),
    };
    let record = RequestRecord {
        id: finished.id,
        isl: finished.prompt_len,
        start_ns: finished.arrival_ns,
        first_token_ns: finished.first_token_ns.filter(|_| streaming),
        end_ns: finished.end_ns,
        decode_iteration: finished.last_step - finished.first_step,
        // The engine hands out tokens of the vocabulary only.
        output_tokens: finished.tokens.iter().map(|&token| token as u32).collect(),
        error,
    };
    (finished.reason, record)
}

/// A step as a line of the iteration log.
pub(super) fn iteration(step: &StepStats, capacity: &Capacity) -> IterationStats {
    let ms = |ns: u64| ns as f64 * 1e-6;
    IterationStats {
        iter: step.step,
        iter_latency_ms: ms(step.period_ns),
        num_active_requests: step.running,
        num_queued_requests: step.waiting,
        num_completed_requests: step.finished,
        kv_cache_stats: KvCacheStats {
            max_num_blocks: capacity.pages,
            used_num_blocks: step.pages_used,
            free_num_blocks: capacity.pages - step.pages_used,
            tokens_per_block: capacity.page_size,
        },
        inflight_batching_stats: InflightBatchingStats {
            num_scheduled_requests: step.sequences,
            num_context_requests: step.sequences - step.decodes,
            num_gen_requests: step.decodes,
            num_ctx_tokens: step.prefill_tokens,
            num_paused_requests: step.preempted,
        },
        device_ms: ms(step.device_ns),
        host_gap_ms: ms(step.host_gap_ns),
    }
}
