//! Runs on the simulated device.

use std::time::{Duration, Instant};

use std::sync::atomic::Ordering;

use lathe_runtime::device::load::LoadOptions;
use lathe_runtime::device::step::Capacity;
use lathe_runtime::engine::Policy;
use lathe_runtime::engine::sim::{SimDevice, expected_tokens};

use super::*;
use crate::bench::dataset::Request as Line;
use crate::bench::metrics::{BenchStatistics, RequestRecord};
use crate::bench::report::LatheSection;

const CAPACITY: Capacity = Capacity {
    max_tokens: 64,
    max_sequences: 8,
    max_seq_len: 64,
    page_size: 8,
    pages: 40,
    vocab: 100,
};

fn dataset(n: u32) -> Dataset {
    let request = |i: u32| Line {
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
        max_batch_size: 1,
        chunked_prefill: false,
        ..EngineConfig::of(&CAPACITY)
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
    let request = |i: u32| Line {
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
    let request = |isl: usize| Line {
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

fn static_config(batch: usize, capacity: &Capacity) -> EngineConfig {
    EngineConfig {
        policy: Policy::Static,
        max_batch_size: batch,
        overlap: false,
        log_steps: true,
        ..EngineConfig::of(capacity)
    }
}

/// One static batch after the other: each starts when the one before has ended, all its prompts come
/// before its first decode, and the tokens are those of a request that runs alone.
#[test]
fn static_batches_run_one_after_the_other() {
    let data = dataset(10);
    let config = static_config(4, &CAPACITY);
    let stop = AtomicBool::new(false);
    let load = Load {
        streaming: true,
        ..Load::default()
    };
    let mut device = SimDevice::new(CAPACITY);
    let served = serve(&mut device, config, &data, &load, &stop, &mut |_| {}).unwrap();
    assert_eq!((served.records.len(), &served.incomplete), (10, &None));
    for (id, record) in (0u64..).zip(&served.records) {
        let request = prepared(id, &data.requests[id as usize], &load);
        let expected = expected_tokens(&request, CAPACITY.vocab);
        let found: Vec<i32> = record.output_tokens.iter().map(|&t| t as i32).collect();
        assert_eq!((record.id, found), (id, expected));
        assert_eq!(record.decode_iteration, record.n_output() as u64 - 1);
    }
    let batches: Vec<&[RequestRecord]> = served.records.chunks(4).collect();
    for pair in batches.windows(2) {
        let ended = pair[0].iter().map(|record| record.end_ns).max();
        assert!(ended <= pair[1].iter().map(|record| record.start_ns).min());
    }
    // Steps hold prompts or decodes, never both.
    let kinds = served.iterations.iter().map(|i| &i.inflight_batching_stats);
    let mut batch = 0;
    for step in kinds {
        assert!(step.num_context_requests == 0 || step.num_gen_requests == 0);
        assert!(step.num_scheduled_requests <= 4);
        batch += usize::from(step.num_context_requests > 0);
    }
    assert_eq!(batch, 3, "the prompts of a batch fit one step");
}

/// Out of device memory, or Ctrl-C, in the middle of a batch: what is complete counts, the rest is
/// kept and marked.
#[test]
fn a_failing_step_leaves_partial_results_of_a_static_batch() {
    let capacity = LoadOptions::contiguous(3, 16, 16).capacity(100);
    let line = |output_tokens| Line {
        task_id: 0,
        input_ids: vec![1, 2],
        output_tokens,
    };
    let data = Dataset {
        path: "d".into(),
        requests: [2, 6, 6].map(line).to_vec(),
    };
    let load = Load {
        warmup: 0,
        streaming: true,
        ..Load::default()
    };
    let run = |fail_at, stopped| {
        let mut device = SimDevice::new(capacity);
        device.fail_at = fail_at;
        let stop = AtomicBool::new(stopped);
        let config = static_config(3, &capacity);
        serve(&mut device, config, &data, &load, &stop, &mut |_| {}).unwrap()
    };
    let lengths = |records: &[RequestRecord]| -> Vec<usize> {
        records.iter().map(RequestRecord::n_output).collect()
    };
    let whole = run(None, false);
    assert_eq!(
        (lengths(&whole.records), &whole.incomplete),
        (vec![2, 6, 6], &None)
    );

    let part = run(Some(3), false);
    let incomplete = part.incomplete.clone().unwrap();
    assert_eq!(incomplete.reason, "step 3: out of device memory");
    assert_eq!((incomplete.finished, incomplete.planned), (1, 3));
    assert_eq!(lengths(&part.records), [2]);
    assert_eq!(lengths(&part.unfinished), [3, 3]);
    let mut marks = part.unfinished.iter().map(|r| r.error.as_deref());
    assert!(marks.all(|mark| mark == Some("unfinished")));
    let tokens = |record: &RequestRecord| record.output_tokens.clone();
    assert!(tokens(&whole.records[1]).starts_with(&tokens(&part.unfinished[0])));

    let none = run(None, true);
    assert_eq!(none.incomplete.unwrap().reason, "interrupted");
    assert_eq!(none.records.len(), 0);
}
