//! Requests that cannot be run and devices that fail.

use super::*;
use crate::device::executor::Execution;
use crate::device::profile::{ProfileOptions, StepProfile};
use crate::device::step::{StepBatch, StepError, StepOutput};
use crate::engine::sim::{SimDevice, expected_tokens};
use crate::engine::{EngineError, FinishReason, RequestError};

#[test]
fn a_bad_request_does_not_stop_the_others() {
    let small = Capacity {
        pages: 7,
        ..capacity()
    };
    let mut device = SimDevice::new(small);
    let mut engine = Engine::new(&mut device, EngineConfig::of(&small), Clock::start()).unwrap();
    let good = request(1, &[1, 2, 3], 6);
    engine.add(good.clone()).unwrap();
    let mut hot = request(2, &[1], 1);
    hot.params.top_p = 0.0;
    let bad = [
        (request(2, &[], 3), "the prompt has no tokens"),
        (
            request(2, &[1], 0),
            "0 output tokens are asked for, expected 1 or more",
        ),
        (
            request(2, &[1; 30], 3),
            "30 input + 3 output tokens are 33, max_seq_len is 32",
        ),
        (
            request(2, &[1; 20], 12),
            "31 tokens need 8 pages of KV cache, there are 7",
        ),
        (
            request(2, &[1, 50], 3),
            "token id 50 at index 1 is outside the vocabulary of 50",
        ),
        (
            request(2, &[-1], 3),
            "token id -1 at index 0 is outside the vocabulary of 50",
        ),
        (hot, "top_p is 0, expected a number above 0 and at most 1"),
        (good.clone(), "request 1 is already running"),
    ];
    for (request, message) in bad {
        assert_eq!(engine.add(request).unwrap_err().to_string(), message);
    }
    let other = request(2, &[4, 5], 4);
    engine.add(other.clone()).unwrap();
    let mut outcome = Outcome::default();
    while engine.iterate().unwrap() == Progress::Busy {}
    outcome.take(&mut engine);
    for request in [good, other] {
        assert_eq!(
            outcome.finished[&request.id].tokens,
            expected_tokens(&request, 50)
        );
    }
}

#[test]
fn an_uncut_prompt_must_fit_into_a_step() {
    let mut device = SimDevice::new(capacity());
    let config = EngineConfig {
        chunked_prefill: false,
        ..EngineConfig::of(&capacity())
    };
    let mut engine = Engine::new(&mut device, config, Clock::start()).unwrap();
    let error = engine.add(request(1, &[1; 17], 3)).unwrap_err();
    assert_eq!(
        error,
        RequestError::PromptExceedsStep {
            prompt: 17,
            max_num_tokens: 16
        }
    );
}

/// Whichever step fails: one error, and the tokens of the steps before it are kept.
#[test]
fn a_failing_device_leaves_partial_results() {
    let requests: Vec<Request> = (0..6).map(|i| request(i, &[i as i32, 3], 4)).collect();
    for overlap in [true, false] {
        let config = EngineConfig {
            overlap,
            ..EngineConfig::of(&capacity())
        };
        let steps = run(&mut SimDevice::new(capacity()), config, &requests)
            .totals
            .steps;
        for fail_at in 0..steps {
            let mut device = SimDevice::new(capacity());
            device.fail_at = Some(fail_at);
            let mut engine = Engine::new(&mut device, config, Clock::start()).unwrap();
            for request in &requests {
                engine.add(request.clone()).unwrap();
            }
            let error = loop {
                if let Err(error) = engine.iterate() {
                    break error;
                }
            };
            assert_eq!(
                error.to_string(),
                format!("step {fail_at}: out of device memory")
            );
            assert_eq!(engine.iterate(), Err(EngineError::Stopped));
            engine.abort();
            let mut outcome = Outcome::default();
            outcome.take(&mut engine);
            assert!(engine.is_idle() && engine.batcher().pool.used() == 0);
            assert_eq!(outcome.finished.len(), 6);
            assert_eq!(outcome.totals.steps, fail_at, "steps that ran are read");
            let mut n_tokens = 0;
            for request in &requests {
                let finished = &outcome.finished[&request.id];
                let expected = expected_tokens(request, 50);
                assert!(expected.starts_with(&finished.tokens));
                let complete = finished.tokens.len() == expected.len();
                assert_eq!(finished.reason == FinishReason::Length, complete);
                assert_eq!(finished.reason == FinishReason::Aborted, !complete);
                n_tokens += finished.tokens.len();
            }
            assert_eq!(n_tokens as u64, outcome.totals.generated);
        }
    }
}

#[test]
fn stopping_keeps_what_is_in_flight() {
    let mut device = SimDevice::new(capacity());
    let config = EngineConfig::of(&capacity());
    let mut engine = Engine::new(&mut device, config, Clock::start()).unwrap();
    engine.add(request(1, &[1, 2, 3], 9)).unwrap();
    for _ in 0..3 {
        engine.iterate().unwrap();
    }
    engine.abort();
    let finished: Vec<_> = engine.take_finished().collect();
    assert_eq!(finished[0].reason, FinishReason::Aborted);
    assert_eq!(
        finished[0].tokens,
        expected_tokens(&request(1, &[1, 2, 3], 3), 50)
    );
    drop(engine);
    // Dropped in flight, it leaves the device usable as well.
    let mut engine = Engine::new(&mut device, config, Clock::start()).unwrap();
    engine.add(request(1, &[1, 2, 3], 9)).unwrap();
    engine.iterate().unwrap();
    drop(engine);
    run(&mut device, config, &[request(4, &[1, 2], 3)]);
}

/// Gives wrong results.
struct Broken {
    device: SimDevice,
    /// Changes the tokens that come back.
    change: fn(&mut Vec<i32>),
}

impl Executor for Broken {
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
        self.device.submit(batch)
    }

    fn collect(&mut self) -> Result<StepOutput, StepError> {
        let mut output = self.device.collect()?;
        (self.change)(&mut output.next);
        Ok(output)
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
fn a_token_that_is_none_fails_one_request() {
    let device = SimDevice::new(capacity());
    // A device says -1 where no logit is a number.
    let mut device = Broken {
        device,
        change: |next| next[0] = -1,
    };
    let requests = [request(1, &[1], 3), request(2, &[2], 3)];
    let mut engine =
        Engine::new(&mut device, EngineConfig::of(&capacity()), Clock::start()).unwrap();
    for request in &requests {
        engine.add(request.clone()).unwrap();
    }
    engine.iterate().unwrap();
    engine.iterate().unwrap();
    let finished: Vec<_> = engine.take_finished().collect();
    assert_eq!(finished.len(), 1);
    let reason = "the device chose token -1, outside the vocabulary of 50".to_owned();
    assert_eq!(
        (finished[0].id, &finished[0].reason),
        (1, &FinishReason::Failed(reason))
    );
    assert_eq!(engine.live(), 1);
}

#[test]
fn missing_results_are_an_error() {
    let device = SimDevice::new(capacity());
    let mut device = Broken {
        device,
        change: |next| next.clear(),
    };
    let mut engine =
        Engine::new(&mut device, EngineConfig::of(&capacity()), Clock::start()).unwrap();
    engine.add(request(1, &[1], 3)).unwrap();
    engine.iterate().unwrap();
    let error = engine.iterate().unwrap_err();
    assert_eq!(error.to_string(), "step 0: 0 tokens came back, expected 1");
}
