//! Offline load on the engine, with trtllm-bench's semantics: all requests at once or at most
//! `--concurrency` in flight, or one static batch after the other; a request's clock starts when it gets
//! its slot, and warm-up requests run before on the same device.

mod load;
mod results;
mod run;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;

use lathe_runtime::device::executor::Executor;
use lathe_runtime::engine::{Clock, ConfigError, Engine, EngineConfig, EngineError, Request};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::dataset::Dataset;
use load::prepared;
use run::{Run, Stopped};

pub use load::Load;
pub use results::Served;

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
    let mut run = Run::new(engine, &config, load.streaming);
    let outcome = run.all(requests, load.slots(), stop, progress);
    Ok(run.finish(outcome, dataset.requests.len()))
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
    let mut run = Run::new(engine, &config, false);
    match run.all(requests, load.slots(), stop, &mut |_| {}) {
        Ok(()) | Err(Stopped::Interrupted) => Ok(()),
        Err(Stopped::Failed(error)) => Err(ServeError::WarmUp(error)),
    }
}
