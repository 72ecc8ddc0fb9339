//! Single properties by small cases.

use super::*;
use crate::device::executor::Execution;
use crate::device::profile::{ProfileOptions, StepProfile};
use crate::device::step::{StepBatch, StepError, StepKind, StepOutput};
use crate::engine::sim::{SimDevice, expected_tokens};
use crate::engine::{ConfigError, FinishReason, Policy};

/// Notes the calls that a device gets.
struct Recorder {
    device: SimDevice,
    calls: Vec<&'static str>,
    batches: Vec<StepBatch>,
}

impl Recorder {
    fn new(capacity: Capacity) -> Self {
        Self {
            device: SimDevice::new(capacity),
            calls: Vec::new(),
            batches: Vec::new(),
        }
    }
}

impl Executor for Recorder {
    fn capacity(&self) -> Capacity {
        self.device.capacity()
    }

    fn warm_up(&mut self) -> Result<(), StepError> {
        self.device.warm_up()
    }

    fn execution(&self) -> Option<Execution> {
        self.device.execution()
    }

    fn step(&mut self, batch: &StepBatch, logits: bool) -> Result<StepOutput, StepError> {
        self.device.step(batch, logits)
    }

    fn submit(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        self.calls.push("submit");
        self.batches.push(batch.clone());
        self.device.submit(batch)
    }

    fn collect(&mut self) -> Result<StepOutput, StepError> {
        self.calls.push("collect");
        self.device.collect()
    }

    fn profile(
        &mut self,
        batch: &StepBatch,
        options: ProfileOptions,
    ) -> Result<Option<StepProfile>, StepError> {
        self.device.profile(batch, options)
    }
}

#[test]
fn the_next_step_is_submitted_before_the_last_one_is_read() {
    let mut device = Recorder::new(capacity());
    let config = EngineConfig::of(&capacity());
    run(&mut device, config, &[request(1, &[3, 4, 5], 3)]);
    let overlapped = [
        "submit", "submit", "collect", "submit", "collect", "collect",
    ];
    assert_eq!(device.calls, overlapped);
    let tokens: Vec<_> = device.batches.iter().map(|b| b.tokens.clone()).collect();
    assert_eq!(tokens, [vec![3, 4, 5], vec![-1], vec![-1]]);

    let mut device = Recorder::new(capacity());
    let config = EngineConfig {
        overlap: false,
        ..config
    };
    run(&mut device, config, &[request(1, &[3, 4, 5], 3)]);
    assert_eq!(device.calls, ["submit", "collect"].repeat(3));
    assert!(
        device
            .batches
            .iter()
            .all(|b| b.tokens.iter().all(|&t| t >= 0))
    );
}

#[test]
fn prompts_are_cut_and_run_beside_decodes() {
    let mut device = Recorder::new(capacity());
    let long: Vec<i32> = (0..25).collect();
    let requests = [
        request(1, &[7; 5], 6),
        request(2, &long, 2),
        request(3, &[9; 3], 1),
    ];
    let outcome = run(&mut device, EngineConfig::of(&capacity()), &requests);
    // 5 + 11 of 25; 1 decode + 14 left + 1 of the last prompt; ...
    let shapes: Vec<(usize, Vec<i32>)> = device
        .batches
        .iter()
        .map(|batch| (batch.tokens_len(), batch.cu_seqlens.clone()))
        .collect();
    assert_eq!(shapes[0], (16, vec![0, 5, 16]));
    assert_eq!(shapes[1], (16, vec![0, 1, 15, 16]));
    assert_eq!(shapes[2], (4, vec![0, 1, 2, 4]));
    assert_eq!(device.batches[2].rows, [0, 1, 3]);
    let kinds: Vec<StepKind> = device.batches.iter().map(StepBatch::kind).collect();
    let (general, decode) = (StepKind::General, StepKind::Decode);
    assert_eq!(kinds, [general, general, general, decode, decode, decode]);
    assert_eq!((outcome.totals.steps, outcome.totals.decode_steps), (6, 3));
    for request in &requests {
        assert_eq!(
            outcome.finished[&request.id].tokens,
            expected_tokens(request, 50)
        );
    }
}

#[test]
fn without_chunks_a_prompt_is_whole() {
    let mut device = Recorder::new(capacity());
    let config = EngineConfig {
        chunked_prefill: false,
        ..EngineConfig::of(&capacity())
    };
    let requests = [
        request(1, &[7; 10], 4),
        request(2, &[8; 16], 2),
        request(3, &[9; 2], 4),
    ];
    let outcome = run(&mut device, config, &requests);
    // The second prompt waits until nothing runs beside it, and nothing overtakes it.
    let lengths: Vec<usize> = device.batches.iter().map(StepBatch::tokens_len).collect();
    assert_eq!(lengths, [10, 1, 1, 1, 16, 3, 1, 1, 1]);
    for request in &requests {
        assert_eq!(
            outcome.finished[&request.id].tokens,
            expected_tokens(request, 50)
        );
    }
}

/// Known lengths cost no step too many.
#[test]
fn a_length_has_no_lag() {
    let mut device = SimDevice::new(capacity());
    let requests: Vec<Request> = (0..9)
        .map(|i| request(i, &[i as i32; 3], 1 + i as usize))
        .collect();
    let outcome = run(&mut device, EngineConfig::of(&capacity()), &requests);
    let rows: usize = requests.iter().map(Request::lifetime).sum();
    assert_eq!(outcome.totals.tokens as usize, rows);
    assert_eq!(outcome.totals.generated, 45);
    assert_eq!(outcome.totals.discarded, 0);
}

#[test]
fn a_stop_token_costs_one_row() {
    let mut wanted = request(5, &[1, 2], 20);
    let free_run = expected_tokens(&wanted, 50);
    wanted.stop = vec![free_run[3]];
    let expected = expected_tokens(&wanted, 50);
    for (overlap, discarded) in [(true, 1), (false, 0)] {
        let mut device = SimDevice::new(capacity());
        let config = EngineConfig {
            overlap,
            ..EngineConfig::of(&capacity())
        };
        let outcome = run(&mut device, config, std::slice::from_ref(&wanted));
        assert_eq!(outcome.finished[&5].tokens, expected);
        assert_eq!(outcome.finished[&5].reason, FinishReason::Stop);
        assert_eq!(outcome.totals.discarded, discarded);
    }
}

#[test]
fn a_full_cache_preempts_the_newest() {
    // Two sequences of 4 + 12 tokens need 4 pages each at the end; there are 5.
    let small = Capacity {
        pages: 5,
        ..capacity()
    };
    let requests = [request(1, &[1, 2, 3, 4], 13), request(2, &[5, 6, 7, 8], 13)];
    let keep = EngineConfig::of(&small);
    let evict = EngineConfig {
        policy: Policy::MaxUtilization,
        ..keep
    };
    for (config, some) in [(keep, false), (evict, true)] {
        let outcome = run(&mut SimDevice::new(small), config, &requests);
        assert_eq!(outcome.totals.preemptions > 0, some);
        assert_eq!(outcome.finished[&1].preemptions, 0);
        for request in &requests {
            assert_eq!(
                outcome.finished[&request.id].tokens,
                expected_tokens(request, 50)
            );
        }
    }
}

/// Without chunks, too: the sequence has grown beyond one step when it is computed again.
#[test]
fn a_preempted_sequence_longer_than_a_step_comes_back() {
    let small = Capacity {
        pages: 9,
        max_tokens: 8,
        max_sequences: 2,
        ..capacity()
    };
    let requests = [request(1, &[1; 6], 26), request(2, &[2; 6], 26)];
    let config = EngineConfig {
        policy: Policy::MaxUtilization,
        chunked_prefill: false,
        ..EngineConfig::of(&small)
    };
    let outcome = run(&mut SimDevice::new(small), config, &requests);
    assert!(outcome.finished[&2].preemptions > 0);
    for request in &requests {
        assert_eq!(
            outcome.finished[&request.id].tokens,
            expected_tokens(request, 50)
        );
    }
}

#[test]
fn cancelled_while_waiting_running_and_in_flight() {
    let one = Capacity {
        max_sequences: 1,
        ..capacity()
    };
    let mut device = SimDevice::new(one);
    let mut engine = Engine::new(&mut device, EngineConfig::of(&one), Clock::start()).unwrap();
    for id in 0..3 {
        engine.add(request(id, &[1, 2, 3], 5)).unwrap();
    }
    assert!(!engine.cancel(9));
    for _ in 0..3 {
        engine.iterate().unwrap();
    }
    assert!(engine.cancel(2), "it waits");
    assert!(engine.cancel(0), "it runs and has a row in flight");
    assert!(!engine.cancel(0));
    check_invariants(engine.batcher());
    let mut outcome = Outcome::default();
    while engine.iterate().unwrap() == Progress::Busy {
        check_invariants(engine.batcher());
    }
    outcome.take(&mut engine);
    let lengths: Vec<usize> = outcome.finished.values().map(|f| f.tokens.len()).collect();
    assert_eq!(lengths, [2, 5, 0]);
    assert_eq!(
        outcome.finished[&1].tokens,
        expected_tokens(&request(1, &[1, 2, 3], 5), 50)
    );
    assert_eq!(outcome.totals.discarded, 1);
}

#[test]
fn configurations_beyond_the_device() {
    let mut device = SimDevice::new(capacity());
    let fits = EngineConfig::of(&capacity());
    let mut error = |config| Engine::new(&mut device, config, Clock::start()).err();
    assert_eq!(error(fits), None);
    assert_eq!(
        error(EngineConfig {
            max_batch_size: 0,
            ..fits
        }),
        Some(ConfigError::Zero("max_batch_size"))
    );
    let found = error(EngineConfig {
        max_num_tokens: 17,
        ..fits
    })
    .unwrap();
    assert_eq!(
        found.to_string(),
        "max_num_tokens is 17, the loaded model can do 16"
    );
    let found = error(EngineConfig {
        max_num_tokens: 3,
        ..fits
    });
    assert_eq!(
        found,
        Some(ConfigError::BatchExceedsTokens {
            batch: 4,
            tokens: 3
        })
    );
}

#[test]
fn steps_are_measured() {
    let mut device = SimDevice::new(capacity());
    device.step_time = std::time::Duration::from_micros(300);
    let config = EngineConfig {
        log_steps: true,
        ..EngineConfig::of(&capacity())
    };
    let clock = Clock::start();
    let mut engine = Engine::new(&mut device, config, clock).unwrap();
    let begin = clock.now_ns();
    for id in 0..6 {
        engine.add(request(id, &[1, 2, 3], 4)).unwrap();
    }
    while engine.iterate().unwrap() == Progress::Busy {}
    let wall = clock.now_ns() - begin;
    let steps: Vec<_> = engine.take_steps().collect();
    let totals = *engine.totals();
    assert_eq!(steps.len() as u64, totals.steps);
    assert!(steps.iter().all(|s| s.device_ns >= 300_000));
    assert!(
        steps
            .iter()
            .all(|s| s.period_ns == s.device_ns + s.host_gap_ns)
    );
    let periods: u64 = steps.iter().map(|s| s.period_ns).sum();
    assert!(
        periods <= wall && periods >= wall * 9 / 10,
        "{periods} of {wall}"
    );
    assert_eq!(
        (steps[0].sequences, steps[0].running, steps[0].waiting),
        (4, 4, 2)
    );
    assert_eq!((steps[0].prefill_tokens, steps[0].decodes), (12, 0));
    assert_eq!(steps.iter().map(|s| s.finished).sum::<usize>(), 6);
    // 3 + 4 - 1 tokens are 2 pages.
    assert_eq!((totals.peak_pages, totals.peak_sequences), (8, 4));
}

/// No page is kept for the growth of sequences that have all that they will ever need.
#[test]
fn a_cache_that_just_suffices_is_filled() {
    let exact = Capacity {
        pages: 4,
        ..capacity()
    };
    let requests: Vec<Request> = (0..4).map(|id| request(id, &[1, 2], 3)).collect();
    let config = EngineConfig {
        policy: Policy::MaxUtilization,
        ..EngineConfig::of(&exact)
    };
    let outcome = run(&mut SimDevice::new(exact), config, &requests);
    assert_eq!(
        (outcome.totals.peak_sequences, outcome.totals.peak_pages),
        (4, 4)
    );
}
