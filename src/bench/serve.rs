//! Offline load on the continuous-batching engine, with trtllm-bench's semantics: all requests at
//! once or at most `--concurrency` in flight, a request's clock starts when it gets its slot, and
//! warm-up requests run before on the same device.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use lathe_codegen::work::KernelClass;
use lathe_runtime::device::executor::Executor;
use lathe_runtime::device::step::Capacity;
use lathe_runtime::engine::{
    Clock, ConfigError, Engine, EngineConfig, EngineError, FinishReason, Finished, Policy,
    Progress, Request, StepGroup, StepStats, Totals,
};
use lathe_runtime::sampling::SamplingParams;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::dataset::Dataset;
use super::metrics::RequestRecord;
use super::report::{Incomplete, KvOccupancy, LatheSection, StepBreakdown};
use super::report_json::{InflightBatchingStats, IterationStats, KvCacheStats};
use super::step_shares::ClassTimes;

/// How requests are put on the engine.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    /// Most requests in flight; 0 or less is no limit.
    pub concurrency: i64,
    /// Requests, drawn from the dataset with replacement, that run before the measurement.
    pub warmup: usize,
    /// Whether the times of first tokens are recorded.
    pub streaming: bool,
    /// Tokens that end an output; none runs each request to its length.
    pub stop: Vec<i32>,
    /// How tokens are chosen.
    pub params: SamplingParams,
}

impl Default for Load {
    /// trtllm-bench's defaults.
    fn default() -> Self {
        Self {
            concurrency: -1,
            warmup: 2,
            streaming: false,
            stop: Vec::new(),
            params: SamplingParams::default(),
        }
    }
}

impl Load {
    /// That of `latency`: one request after the other, streaming.
    pub fn latency() -> Self {
        Self {
            concurrency: 1,
            streaming: true,
            ..Self::default()
        }
    }

    fn slots(&self) -> usize {
        usize::try_from(self.concurrency)
            .ok()
            .filter(|&limit| limit > 0)
            .unwrap_or(usize::MAX)
    }
}

/// The engine's configuration for `latency`: one sequence at a time, whole prompts.
pub fn latency_config(capacity: &Capacity) -> EngineConfig {
    EngineConfig {
        policy: Policy::GuaranteedNoEvict,
        max_batch_size: 1,
        chunked_prefill: false,
        ..EngineConfig::of(capacity)
    }
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The engine's configuration does not fit the loaded model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The device failed before the measurement.
    #[error("warm-up: {0}")]
    WarmUp(EngineError),
}

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

/// Runs the warm-up, then the dataset. `stop` ends the run with what there is; `progress` is told
/// how many requests have ended.
///
/// # Errors
/// The configuration does not fit or the device fails in the warm-up. A failure in the measurement
/// is no error here: it is [`Served::incomplete`].
pub fn serve(
    executor: &mut dyn Executor,
    config: EngineConfig,
    dataset: &Dataset,
    load: &Load,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(usize),
) -> Result<Served, ServeError> {
    warm_up(executor, config, dataset, load, stop)?;
    let requests: VecDeque<Request> = (0u64..)
        .zip(&dataset.requests)
        .map(|(id, request)| prepared(id, request, load))
        .collect();
    let clock = Clock::start();
    let engine = Engine::new(executor, config, clock)?;
    let mut run = Run::new(engine, load.streaming);
    let outcome = run.all(requests, load.slots(), stop, progress);
    Ok(run.finish(outcome, dataset.requests.len()))
}

fn prepared(id: u64, request: &super::dataset::Request, load: &Load) -> Request {
    // An id beyond i32 is beyond every vocabulary, too; the engine refuses it.
    let token = |&id: &u32| i32::try_from(id).unwrap_or(i32::MAX);
    Request {
        id,
        prompt: request.input_ids.iter().map(token).collect(),
        max_new: request.output_tokens as usize,
        stop: load.stop.clone(),
        params: load.params,
        arrival_ns: 0,
    }
}

/// Runs `load.warmup` requests and forgets their results. Refused requests are met again, and
/// reported, in the measurement.
fn warm_up(
    executor: &mut dyn Executor,
    config: EngineConfig,
    dataset: &Dataset,
    load: &Load,
    stop: &AtomicBool,
) -> Result<(), ServeError> {
    /// Any will do, but the same in each run.
    const SEED: u64 = 0;
    if dataset.requests.is_empty() {
        return Ok(());
    }
    let mut rng = StdRng::seed_from_u64(SEED);
    let requests: VecDeque<Request> = (0..load.warmup as u64)
        .map(|id| {
            let drawn = &dataset.requests[rng.random_range(0..dataset.requests.len())];
            prepared(id, drawn, load)
        })
        .collect();
    let config = EngineConfig {
        log_steps: false,
        ..config
    };
    let engine = Engine::new(executor, config, Clock::start())?;
    let mut run = Run::new(engine, false);
    match run.all(requests, load.slots(), stop, &mut |_| {}) {
        Ok(()) | Err(Stopped::Interrupted) => Ok(()),
        Err(Stopped::Failed(error)) => Err(ServeError::WarmUp(error)),
    }
}

/// Why a run ended early.
enum Stopped {
    Interrupted,
    Failed(EngineError),
}

/// A run under way.
struct Run<'e> {
    engine: Engine<'e>,
    streaming: bool,
    in_flight: usize,
    records: Vec<RequestRecord>,
    unfinished: Vec<RequestRecord>,
    steps: Vec<StepStats>,
}

impl<'e> Run<'e> {
    fn new(engine: Engine<'e>, streaming: bool) -> Self {
        Self {
            engine,
            streaming,
            in_flight: 0,
            records: Vec::new(),
            unfinished: Vec::new(),
            steps: Vec::new(),
        }
    }

    fn all(
        &mut self,
        mut requests: VecDeque<Request>,
        slots: usize,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(usize),
    ) -> Result<(), Stopped> {
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(Stopped::Interrupted);
            }
            while self.in_flight < slots {
                let Some(request) = requests.pop_front() else {
                    break;
                };
                self.issue(request);
            }
            let outcome = self.engine.iterate();
            let n_before = self.records.len();
            self.take_results();
            if self.records.len() > n_before {
                progress(self.records.len());
            }
            let idle = outcome.map_err(Stopped::Failed)? == Progress::Idle;
            if idle && requests.is_empty() && self.in_flight == 0 {
                return Ok(());
            }
        }
    }

    /// Gives a request its slot: here its clock starts.
    fn issue(&mut self, mut request: Request) {
        request.arrival_ns = self.engine.clock().now_ns();
        let (id, isl, start_ns) = (request.id, request.prompt.len(), request.arrival_ns);
        match self.engine.add(request) {
            Ok(()) => self.in_flight += 1,
            Err(error) => self.records.push(RequestRecord {
                id,
                isl,
                start_ns,
                end_ns: start_ns,
                error: Some(error.to_string()),
                ..RequestRecord::default()
            }),
        }
    }

    fn take_results(&mut self) {
        for finished in self.engine.take_finished() {
            self.in_flight -= 1;
            let (reason, record) = record(finished, self.streaming);
            match reason {
                FinishReason::Aborted => self.unfinished.push(record),
                _ => self.records.push(record),
            }
        }
        self.engine.take_events();
        self.steps.extend(self.engine.take_steps());
    }

    fn finish(mut self, outcome: Result<(), Stopped>, planned: usize) -> Served {
        self.engine.abort();
        self.take_results();
        self.records.sort_by_key(|record| record.id);
        self.unfinished.sort_by_key(|record| record.id);
        let finished = self.records.len();
        // What was in flight when Ctrl-C was pressed may have been the last.
        let incomplete = outcome
            .err()
            .filter(|_| finished < planned)
            .map(|stopped| Incomplete {
                reason: match stopped {
                    Stopped::Interrupted => "interrupted".into(),
                    Stopped::Failed(error) => error.to_string(),
                },
                finished: self
                    .records
                    .iter()
                    .filter(|record| record.error.is_none())
                    .count(),
                planned,
            });
        let capacity = self.engine.capacity();
        Served {
            iterations: self
                .steps
                .iter()
                .map(|step| iteration(step, &capacity))
                .collect(),
            totals: *self.engine.totals(),
            groups: self.engine.groups().by_time(),
            classes: None,
            records: self.records,
            unfinished: self.unfinished,
            incomplete,
        }
    }
}

fn record(finished: Finished, streaming: bool) -> (FinishReason, RequestRecord) {
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

fn iteration(step: &StepStats, capacity: &Capacity) -> IterationStats {
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use lathe_runtime::engine::sim::{SimDevice, expected_tokens};

    use super::*;
    use crate::bench::metrics::BenchStatistics;

    const CAPACITY: Capacity = Capacity {
        max_tokens: 64,
        max_sequences: 8,
        max_seq_len: 64,
        page_size: 8,
        pages: 40,
        vocab: 100,
    };

    fn dataset(n: u32) -> Dataset {
        let request = |i: u32| super::super::dataset::Request {
            task_id: i64::from(i),
            input_ids: (0..4 + i % 9).map(|t| (t * 7 + i) % 100).collect(),
            output_tokens: 1 + i % 13,
        };
        Dataset {
            path: "d.jsonl".into(),
            requests: (0..n).map(request).collect(),
        }
    }

    fn config() -> EngineConfig {
        EngineConfig {
            log_steps: true,
            ..EngineConfig::of(&CAPACITY)
        }
    }

    fn run(device: &mut SimDevice, dataset: &Dataset, load: &Load) -> Served {
        let stop = AtomicBool::new(false);
        serve(device, config(), dataset, load, &stop, &mut |_| {}).unwrap()
    }

    #[test]
    fn every_request_has_its_tokens() {
        let data = dataset(50);
        let load = Load::default();
        let served = run(&mut SimDevice::new(CAPACITY), &data, &load);
        assert_eq!(
            (served.records.len(), served.incomplete.as_ref()),
            (50, None)
        );
        for (id, record) in (0u64..).zip(&served.records) {
            let request = prepared(id, &data.requests[id as usize], &load);
            let expected = expected_tokens(&request, CAPACITY.vocab);
            let found: Vec<i32> = record.output_tokens.iter().map(|&t| t as i32).collect();
            assert_eq!((record.id, &found), (id, &expected));
            assert_eq!(
                (record.isl, record.error.as_ref()),
                (request.prompt.len(), None)
            );
            assert!(record.first_token_ns.is_none(), "no streaming");
            assert_eq!(record.decode_iteration, record.n_output() as u64 - 1);
        }
        let generated: usize = served.records.iter().map(RequestRecord::n_output).sum();
        assert_eq!(served.totals.generated, generated as u64);
    }

    /// The report's totals follow from the records, and these from a clock outside.
    #[test]
    fn totals_agree_with_an_outer_clock() {
        let data = dataset(60);
        let mut device = SimDevice::new(CAPACITY);
        device.step_time = Duration::from_millis(4);
        let load = Load {
            warmup: 0,
            streaming: true,
            ..Load::default()
        };
        let outer = Instant::now();
        let served = run(&mut device, &data, &load);
        let outer = outer.elapsed().as_nanos() as f64;
        let within = |a: f64, b: f64| (a / b - 1.0).abs() < 0.01;
        let stats = BenchStatistics::of(&served.records);
        assert!(
            within(stats.total_latency_ns, outer),
            "{} of {outer}",
            stats.total_latency_ns
        );
        let tokens: u32 = data
            .requests
            .iter()
            .map(|request| request.output_tokens)
            .sum();
        let rate = f64::from(tokens) / outer * 1e9;
        assert!(
            within(stats.output_throughput, rate),
            "{} of {rate}",
            stats.output_throughput
        );
        assert_eq!(stats.num_requests, 60);
        let periods: f64 = served
            .iterations
            .iter()
            .map(|i| i.iter_latency_ms * 1e6)
            .sum();
        assert!(within(periods, outer), "{periods} of {outer}");
        let device: f64 = served
            .iterations
            .iter()
            .map(|i| i.device_ms + i.host_gap_ms)
            .sum();
        assert!(within(device * 1e6, outer), "{device} of {outer}");
        for record in &served.records {
            let first = record.first_token_ns.unwrap();
            assert!(record.start_ns < first && first <= record.end_ns);
        }
    }

    #[test]
    fn concurrency_limits_what_is_in_flight() {
        let data = dataset(30);
        for concurrency in [1, 3] {
            let load = Load {
                concurrency,
                ..Load::default()
            };
            let served = run(&mut SimDevice::new(CAPACITY), &data, &load);
            let mut edges: Vec<(u64, i64)> = Vec::new();
            for record in &served.records {
                edges.extend([(record.start_ns, 1), (record.end_ns, -1)]);
            }
            edges.sort_unstable();
            let mut in_flight = 0;
            let peak = edges.iter().map(|(_, step)| {
                in_flight += step;
                in_flight
            });
            assert_eq!(peak.max(), Some(concurrency));
            assert_eq!(served.totals.peak_sequences, concurrency as usize);
        }
    }

    #[test]
    fn warm_up_is_run_and_not_counted() {
        let data = dataset(5);
        let steps = |warmup| {
            let mut device = SimDevice::new(CAPACITY);
            let served = run(
                &mut device,
                &data,
                &Load {
                    warmup,
                    ..Load::default()
                },
            );
            assert_eq!(served.records.len(), 5);
            assert_eq!(served.iterations.len() as u64, served.totals.steps);
            (device.steps, served.totals.steps)
        };
        let (all, measured) = steps(0);
        assert_eq!(all, measured);
        let (all, measured_warm) = steps(7);
        assert_eq!(measured_warm, measured);
        assert!(all > measured);
    }

    #[test]
    fn latency_runs_one_after_the_other() {
        let data = dataset(12);
        let config = EngineConfig {
            log_steps: true,
            ..latency_config(&CAPACITY)
        };
        let stop = AtomicBool::new(false);
        let mut device = SimDevice::new(CAPACITY);
        let load = Load::latency();
        let served = serve(&mut device, config, &data, &load, &stop, &mut |_| {}).unwrap();
        assert!(served.iterations.iter().all(|i| {
            i.num_active_requests == 1 && i.inflight_batching_stats.num_scheduled_requests == 1
        }));
        assert!(
            served
                .records
                .windows(2)
                .all(|pair| pair[0].end_ns <= pair[1].start_ns)
        );
        assert!(
            served
                .records
                .iter()
                .all(|record| record.first_token_ns.is_some())
        );
    }

    #[test]
    fn bad_requests_fail_alone() {
        let mut data = dataset(10);
        data.requests[4].output_tokens = 1000;
        data.requests[7].input_ids[1] = 100;
        data.requests[8].input_ids[0] = u32::MAX;
        let load = Load {
            concurrency: 2,
            ..Load::default()
        };
        let served = run(&mut SimDevice::new(CAPACITY), &data, &load);
        let errors: Vec<(u64, &str)> = served
            .records
            .iter()
            .filter_map(|record| Some((record.id, record.error.as_deref()?)))
            .collect();
        assert_eq!(
            errors,
            [
                (
                    4,
                    "8 input + 1000 output tokens are 1008, max_seq_len is 64"
                ),
                (
                    7,
                    "token id 100 at index 1 is outside the vocabulary of 100"
                ),
                (
                    8,
                    "token id 2147483647 at index 0 is outside the vocabulary of 100"
                ),
            ]
        );
        assert_eq!(
            (served.records.len(), served.incomplete.as_ref()),
            (10, None)
        );
        assert_eq!(BenchStatistics::of(&served.records).num_requests, 7);
    }

    #[test]
    fn an_interrupt_keeps_what_there_is() {
        let data = dataset(40);
        let stop = AtomicBool::new(false);
        let mut device = SimDevice::new(CAPACITY);
        let mut progress = |finished| stop.store(finished >= 10, Ordering::Relaxed);
        let load = Load::default();
        let served = serve(&mut device, config(), &data, &load, &stop, &mut progress).unwrap();
        let incomplete = served.incomplete.clone().unwrap();
        assert_eq!(
            (incomplete.reason.as_str(), incomplete.planned),
            ("interrupted", 40)
        );
        assert_eq!(incomplete.finished, served.records.len());
        assert!(served.records.len() >= 10 && served.records.len() < 40);
        assert_eq!(served.records.len() + served.unfinished.len(), 40);
        assert!(served.unfinished.iter().any(|record| record.n_output() > 0));
        let mut section = LatheSection::default();
        served.describe(&CAPACITY, &mut section);
        assert_eq!(section.incomplete, Some(incomplete));
    }

    #[test]
    fn a_device_failure_keeps_what_there_is() {
        let data = dataset(40);
        let mut device = SimDevice::new(CAPACITY);
        device.fail_at = Some(12);
        let load = Load {
            warmup: 0,
            ..Load::default()
        };
        let served = run(&mut device, &data, &load);
        let incomplete = served.incomplete.unwrap();
        assert_eq!(incomplete.reason, "step 12: out of device memory");
        assert!(incomplete.finished > 0 && incomplete.finished < 40);
        assert_eq!(served.totals.steps, 12);

        let mut device = SimDevice::new(CAPACITY);
        device.fail_at = Some(1);
        let stop = AtomicBool::new(false);
        let error = serve(
            &mut device,
            config(),
            &data,
            &Load::default(),
            &stop,
            &mut |_| {},
        );
        assert_eq!(
            error.unwrap_err().to_string(),
            "warm-up: step 1: out of device memory"
        );
    }

    /// Two thirds of the cache that the batch needs at full length.
    #[test]
    fn pre_emptions_are_counted_in_report_and_log() {
        let small = Capacity {
            pages: 12,
            ..CAPACITY
        };
        let request = |i: u32| super::super::dataset::Request {
            task_id: 0,
            input_ids: vec![i; 5],
            output_tokens: 15,
        };
        let data = Dataset {
            path: "d".into(),
            requests: (0..30).map(request).collect(),
        };
        let load = Load::default();
        let stop = AtomicBool::new(false);
        let run = |policy| {
            let config = EngineConfig {
                policy,
                log_steps: true,
                ..EngineConfig::of(&small)
            };
            let mut device = SimDevice::new(small);
            serve(&mut device, config, &data, &load, &stop, &mut |_| {}).unwrap()
        };
        let kept = run(Policy::GuaranteedNoEvict);
        let evicted = run(Policy::MaxUtilization);
        for (served, some) in [(&kept, false), (&evicted, true)] {
            let mut section = LatheSection::default();
            served.describe(&small, &mut section);
            let logged = served.iterations.iter();
            let logged: usize = logged
                .map(|i| i.inflight_batching_stats.num_paused_requests)
                .sum();
            assert_eq!(section.preemptions, Some(logged as u64));
            assert_eq!(logged > 0, some);
            assert_eq!((served.records.len(), served.unfinished.len()), (30, 0));
        }
        // The tokens do not tell which of the two it was.
        let tokens = |served: &Served| -> Vec<Vec<u32>> {
            let records = served.records.iter();
            records.map(|record| record.output_tokens.clone()).collect()
        };
        assert_eq!(tokens(&kept), tokens(&evicted));
    }

    /// What the log says of steps that mix prompts and decodes.
    #[test]
    fn the_log_tells_prompts_from_decodes() {
        let request = |isl: usize| super::super::dataset::Request {
            task_id: 0,
            input_ids: vec![1; isl],
            output_tokens: 3,
        };
        let data = Dataset {
            path: "d".into(),
            requests: vec![request(10), request(60)],
        };
        let load = Load {
            warmup: 0,
            ..Load::default()
        };
        let served = run(&mut SimDevice::new(CAPACITY), &data, &load);
        let log: Vec<_> = served
            .iterations
            .iter()
            .map(|i| &i.inflight_batching_stats)
            .map(|s| (s.num_context_requests, s.num_gen_requests, s.num_ctx_tokens))
            .collect();
        // 64 tokens a step: 10 + 54 of 60, then one decode beside the last 6.
        assert_eq!(log, [(2, 0, 64), (1, 1, 6), (0, 2, 0), (0, 1, 0)]);
        let queued: Vec<usize> = served
            .iterations
            .iter()
            .map(|i| i.num_queued_requests)
            .collect();
        assert_eq!(queued, [0; 4]);
    }

    #[test]
    fn the_section_tells_of_the_cache() {
        let data = dataset(40);
        let served = run(&mut SimDevice::new(CAPACITY), &data, &Load::default());
        let mut section = LatheSection::default();
        served.describe(&CAPACITY, &mut section);
        let cache = section.kv_cache.unwrap();
        assert_eq!((cache.num_pages, cache.page_size), (40, 8));
        let logged = served
            .iterations
            .iter()
            .map(|i| i.kv_cache_stats.used_num_blocks);
        assert_eq!(Some(cache.peak_pages), logged.clone().max());
        let mean = logged.sum::<usize>() as f64 / served.iterations.len() as f64;
        assert!((cache.average_percent - mean / 0.4).abs() < 1e-9);
        assert_eq!(section.preemptions, Some(0));
        assert_eq!(section.step_breakdown.unwrap().steps, served.totals.steps);
    }
}
