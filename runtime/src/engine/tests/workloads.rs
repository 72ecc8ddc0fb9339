//! Random workloads: whatever the limits, the order of events and the policy, each request gets
//! exactly the tokens that it gets alone.

use proptest::prelude::*;

use super::*;
use crate::engine::sim::{SimDevice, expected_tokens};
use crate::engine::{FinishReason, Policy, RequestError};

#[derive(Debug, Clone)]
struct Workload {
    capacity: Capacity,
    config: EngineConfig,
    /// Requests with the iteration before which they arrive.
    requests: Vec<(Request, usize)>,
    /// Requests that are cancelled before an iteration.
    cancels: Vec<(u64, usize)>,
}

prop_compose! {
    fn limits()(
        page_size in prop::sample::select(vec![1usize, 2, 3, 4, 7, 16, 64]),
        max_batch in 1usize..12,
        more_tokens in 0usize..40,
        max_seq_len in 2usize..64,
        // The cache in sequences of full length, from one third to many.
        fill in 1usize..24,
        vocab in 2usize..60,
        policy in prop::sample::select(vec![
            Policy::GuaranteedNoEvict,
            Policy::MaxUtilization,
            Policy::Static,
        ]),
        chunked_prefill in any::<bool>(),
    ) -> (Capacity, EngineConfig) {
        let capacity = Capacity {
            max_tokens: max_batch + more_tokens,
            max_sequences: max_batch,
            max_seq_len,
            page_size,
            pages: (max_seq_len * fill).div_ceil(3 * page_size).max(1),
            vocab,
        };
        let config = EngineConfig {
            policy,
            chunked_prefill,
            stream: true,
            log_steps: true,
            ..EngineConfig::of(&capacity)
        };
        (capacity, config)
    }
}

/// Shape of a request: prompt and output as fractions, seed, whether it has a stop token, arrival,
/// cancellation.
type Shape = (f64, f64, u64, bool, usize, Option<usize>);

fn shapes() -> impl Strategy<Value = Vec<Shape>> {
    let shape = (
        0f64..1.0,
        0f64..1.0,
        0u64..1000,
        prop::bool::weighted(0.4),
        0usize..60,
        prop::option::weighted(0.1, 0usize..80),
    );
    prop::collection::vec(shape, 1..28)
}

fn workload(with_cancels: bool) -> impl Strategy<Value = Workload> {
    (limits(), shapes(), any::<bool>()).prop_map(move |((capacity, config), shapes, at_once)| {
        let mut requests = Vec::new();
        let mut cancels = Vec::new();
        for (id, (prompt, output, seed, stops, arrival, cancel)) in (0u64..).zip(shapes) {
            let n = capacity.max_seq_len;
            let n_prompt = 1 + (prompt * (n - 1) as f64) as usize;
            let max_new = 1 + (output * (n - n_prompt) as f64) as usize;
            // Equal prompts in different requests would hide mixed-up pages.
            let token = |i: u64| (seed.wrapping_mul(31) + i * 7 + id) % capacity.vocab as u64;
            let request = Request {
                id: id * 3 + 1,
                prompt: (0..n_prompt as u64).map(|i| token(i) as i32).collect(),
                max_new: max_new.min(n - n_prompt).max(1),
                stop: if stops {
                    vec![token(seed) as i32, 0]
                } else {
                    Vec::new()
                },
                params: SamplingParams {
                    seed,
                    ..SamplingParams::default()
                },
                arrival_ns: 0,
            };
            if let Some(iteration) = cancel.filter(|_| with_cancels) {
                cancels.push((request.id, iteration));
            }
            requests.push((request, if at_once { 0 } else { arrival }));
        }
        Workload {
            capacity,
            config,
            requests,
            cancels,
        }
    })
}

/// Refusals by request, and the outcome of the others.
fn simulate(workload: &Workload, overlap: bool) -> (BTreeMap<u64, RequestError>, Outcome) {
    let mut device = SimDevice::new(workload.capacity);
    let config = EngineConfig {
        overlap,
        ..workload.config
    };
    let mut engine = Engine::new(&mut device, config, Clock::start()).unwrap();
    let mut outcome = Outcome::default();
    let mut refused = BTreeMap::new();
    let mut iteration = 0;
    let last_arrival = workload.requests.iter().map(|(_, at)| *at).max().unwrap();
    let work: usize = workload
        .requests
        .iter()
        .map(|(request, _)| request.prompt.len() + 2 * request.max_new + 3)
        .sum();
    loop {
        for (request, _) in workload.requests.iter().filter(|(_, at)| *at == iteration) {
            if let Err(error) = engine.add(request.clone()) {
                refused.insert(request.id, error);
            }
        }
        for (id, _) in workload.cancels.iter().filter(|(_, at)| *at == iteration) {
            engine.cancel(*id);
        }
        let progress = engine.iterate().unwrap();
        let batcher = engine.batcher();
        check_invariants(batcher);
        if config.policy == Policy::GuaranteedNoEvict {
            assert!(pages_to_come(batcher) <= workload.capacity.pages);
        }
        let n_steps = outcome.totals.steps;
        outcome.take(&mut engine);
        for (step, number) in engine.take_steps().zip(n_steps..) {
            assert_eq!(step.step, number);
            assert!(
                step.sequences <= config.max_batch_size && step.tokens <= config.max_num_tokens
            );
            assert!(step.pages_used <= workload.capacity.pages);
            // A static batch has all its prompts before its first decode.
            let mixes = step.decodes > 0 && step.prefill_tokens > 0;
            assert!(config.policy != Policy::Static || !mixes);
        }
        iteration += 1;
        if progress == Progress::Idle && iteration > last_arrival {
            break;
        }
        // The oldest request advances in every step and is never pre-empted.
        assert!(iteration <= last_arrival + work, "starvation");
    }
    assert!(engine.is_idle() && engine.batcher().pool.used() == 0);
    outcome.iterations = iteration;
    (refused, outcome)
}

fn is_right_refusal(error: &RequestError, request: &Request, workload: &Workload) -> bool {
    let lifetime = pages_for(request.lifetime(), workload.capacity.page_size);
    match error {
        RequestError::PromptExceedsStep { .. } => {
            !workload.config.chunked_prefill
                && request.prompt.len() > workload.config.max_num_tokens
        }
        RequestError::ExceedsCache { .. } => lifetime > workload.capacity.pages,
        RequestError::TooLong { .. } => {
            request.prompt.len() + request.max_new > workload.capacity.max_seq_len
        }
        _ => false,
    }
}

fn check_outcome(workload: &Workload, refused: &BTreeMap<u64, RequestError>, outcome: &Outcome) {
    let n = refused.len() + outcome.finished.len();
    assert_eq!(n, workload.requests.len(), "every request has one outcome");
    for (request, _) in &workload.requests {
        if let Some(error) = refused.get(&request.id) {
            assert!(is_right_refusal(error, request, workload), "{error}");
            continue;
        }
        let finished = &outcome.finished[&request.id];
        let expected = expected_tokens(request, workload.capacity.vocab);
        let stopped = expected
            .last()
            .is_some_and(|token| request.stop.contains(token));
        match &finished.reason {
            FinishReason::Cancelled => {
                assert!(workload.cancels.iter().any(|(id, _)| *id == request.id));
                assert!(expected.starts_with(&finished.tokens));
            }
            reason => {
                let right = if stopped {
                    FinishReason::Stop
                } else {
                    FinishReason::Length
                };
                assert_eq!((reason, &finished.tokens), (&right, &expected));
            }
        }
        let events: Vec<_> = outcome
            .events
            .iter()
            .filter(|e| e.request == request.id)
            .collect();
        let streamed: Vec<i32> = events.iter().map(|event| event.token).collect();
        assert_eq!(streamed, finished.tokens);
        assert!(events.iter().zip(0..).all(|(event, i)| event.index == i));
        assert_eq!(events.first().map(|e| e.at_ns), finished.first_token_ns);
        if finished.reason.is_complete() {
            assert_eq!(events.last().map(|e| e.at_ns), Some(finished.end_ns));
        }
    }
    if workload.config.policy != Policy::MaxUtilization {
        assert_eq!(outcome.totals.preemptions, 0);
    }
    let per_request: u64 = outcome
        .finished
        .values()
        .map(|finished| u64::from(finished.preemptions))
        .sum();
    assert_eq!(per_request, outcome.totals.preemptions);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn each_request_gets_its_tokens(workload in workload(false)) {
        for overlap in [true, false] {
            let (refused, outcome) = simulate(&workload, overlap);
            check_outcome(&workload, &refused, &outcome);
        }
    }

    #[test]
    fn cancellations_change_no_other_request(workload in workload(true)) {
        for overlap in [true, false] {
            let (refused, outcome) = simulate(&workload, overlap);
            check_outcome(&workload, &refused, &outcome);
        }
    }
}

/// The strategy reaches the cases that it is meant to test.
#[test]
fn workloads_cover_the_cases() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let [
        mut preempted,
        mut discarded,
        mut refused,
        mut mixed,
        mut cancelled,
        mut stopped,
    ] = [0; 6];
    for _ in 0..500 {
        let workload = workload(true).new_tree(&mut runner).unwrap().current();
        let (refusals, outcome) = simulate(&workload, true);
        let reasons = |reason| {
            outcome
                .finished
                .values()
                .filter(|f| f.reason == reason)
                .count()
        };
        preempted += usize::from(outcome.totals.preemptions > 0);
        discarded += usize::from(outcome.totals.discarded > 0);
        refused += usize::from(!refusals.is_empty());
        mixed += usize::from(outcome.totals.decode_steps < outcome.totals.steps);
        cancelled += reasons(FinishReason::Cancelled);
        stopped += reasons(FinishReason::Stop);
    }
    let seen = [preempted, discarded, refused, mixed, cancelled, stopped];
    assert!(seen.iter().all(|&n| n >= 20), "{seen:?}");
}
