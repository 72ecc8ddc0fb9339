//! Completing some prompts as one static batch: what `generate` and `verify` need of the engine.

use super::config::{ConfigError, EngineConfig};
use super::policy::Policy;
use super::request::{FinishReason, Request, RequestError, TokenEvent};
use super::stats::Clock;
use super::step_loop::{Engine, EngineError};
use crate::device::executor::Executor;

/// Why not all requests were completed.
#[derive(Debug, thiserror::Error)]
pub enum CompleteError {
    /// The executor can run no batch.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A request does not fit the executor.
    #[error("request {id}: {source}")]
    Request {
        /// Its number.
        id: u64,
        /// Why it was refused.
        source: RequestError,
    },
    /// A request failed alone.
    #[error("request {id}: {reason}")]
    Failed {
        /// Its number.
        id: u64,
        /// What went wrong.
        reason: String,
    },
    /// The device failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Completes requests of different numbers and returns their tokens, in the order of the requests; one
/// that asks for no token gets none. `on_token` is told each token as soon as it is known. Where not all
/// requests fit the executor at a time, they run in several batches.
///
/// # Errors
/// A request does not fit the executor, or a step fails.
pub fn complete(
    executor: &mut dyn Executor,
    requests: &[Request],
    mut on_token: impl FnMut(TokenEvent),
) -> Result<Vec<Vec<i32>>, CompleteError> {
    let config = EngineConfig {
        policy: Policy::Static,
        // The tokens are wanted as they come.
        overlap: false,
        stream: true,
        ..EngineConfig::of(&executor.capacity())
    };
    let mut engine = Engine::new(executor, config, Clock::start())?;
    for request in requests.iter().filter(|request| request.max_new > 0) {
        let id = request.id;
        let added = engine.add(request.clone());
        added.map_err(|source| CompleteError::Request { id, source })?;
    }
    let mut outputs = vec![Vec::new(); requests.len()];
    while !engine.is_idle() {
        engine.iterate()?;
        engine.take_events().for_each(&mut on_token);
        for finished in engine.take_finished() {
            let id = finished.id;
            if let FinishReason::Failed(reason) = finished.reason {
                return Err(CompleteError::Failed { id, reason });
            }
            let at = requests.iter().position(|request| request.id == id);
            outputs[at.expect("invariant: only what was added ends")] = finished.tokens;
        }
    }
    Ok(outputs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::load::LoadOptions;
    use crate::engine::sim::{SimDevice, expected_tokens};
    use crate::sampling::SamplingParams;

    fn request(id: u64, prompt: &[i32], max_new: usize) -> Request {
        Request {
            id,
            prompt: prompt.to_vec(),
            max_new,
            stop: Vec::new(),
            params: SamplingParams::default(),
            arrival_ns: 0,
        }
    }

    /// Five requests on a device for two: three batches. Who asks for nothing gets nothing.
    #[test]
    fn outputs_have_the_order_of_the_requests() {
        let mut device = SimDevice::new(LoadOptions::contiguous(2, 12, 3).capacity(50));
        let requests = [
            request(9, &[1, 2, 3, 4], 5),
            request(3, &[5], 0),
            request(4, &[6, 7], 2),
            request(1, &[8], 8),
            request(2, &[9, 9, 9, 9, 9], 1),
        ];
        let mut told = 0;
        let outputs = complete(&mut device, &requests, |_| told += 1).unwrap();
        let expected = requests.each_ref().map(|r| expected_tokens(r, 50));
        assert_eq!(outputs, expected);
        assert_eq!(told, 16);
    }

    #[test]
    fn what_fails_is_an_error() {
        let capacity = LoadOptions::contiguous(2, 12, 3).capacity(50);
        let mut device = SimDevice::new(capacity);
        let error = complete(&mut device, &[request(7, &[50], 1)], |_| {}).unwrap_err();
        assert_eq!(
            error.to_string(),
            "request 7: token id 50 at index 0 is outside the vocabulary of 50"
        );
        device.fail_at = Some(2);
        let error = complete(&mut device, &[request(0, &[1], 4)], |_| {}).unwrap_err();
        assert_eq!(error.to_string(), "step 2: out of device memory");
    }
}
