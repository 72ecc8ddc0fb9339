//! The loop: plan, submit, and meanwhile read what the step before has sampled.

use std::collections::BTreeMap;

use super::batcher::Batcher;
use super::config::{ConfigError, EngineConfig};
use super::groups::StepGroups;
use super::request::{FinishReason, Finished, Request, RequestError, TokenEvent};
use super::sequence::Handle;
use super::stats::{Clock, StepStats, Totals};
use crate::device::executor::Executor;
use crate::device::step::{Capacity, StepError, StepOutput};

/// A failed engine. Its requests can still be taken out with [`Engine::abort`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// A step failed.
    #[error("step {step}: {source}")]
    Step {
        /// Number of the step.
        step: u64,
        /// What the device said.
        source: StepError,
    },
    /// The device gave another number of tokens than it was asked for.
    #[error("step {step}: {found} tokens came back, expected {expected}")]
    Output {
        /// Number of the step.
        step: u64,
        /// Tokens that came.
        found: usize,
        /// Tokens that were asked for.
        expected: usize,
    },
    /// A step failed before.
    #[error("the engine has stopped after a failure")]
    Stopped,
}

/// What [`Engine::iterate`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A step was submitted or read.
    Busy,
    /// There was nothing to do.
    Idle,
}

/// A submitted step whose tokens have not been read.
#[derive(Debug)]
struct Flight {
    samples: Vec<Handle>,
    stats: StepStats,
}

/// Runs requests on a device by continuous batching, with at most two steps submitted at a time.
pub struct Engine<'e> {
    executor: &'e mut dyn Executor,
    config: EngineConfig,
    capacity: Capacity,
    clock: Clock,
    batcher: Batcher,
    /// Slots of live requests by number.
    by_id: BTreeMap<u64, u32>,
    flight: Option<Flight>,
    /// An empty list for the next flight.
    spare: Vec<Handle>,
    next_step: u64,
    /// When the last step was read, unless the engine has been idle since.
    last_ns: Option<u64>,
    failed: bool,
    events: Vec<TokenEvent>,
    finished: Vec<Finished>,
    steps: Vec<StepStats>,
    totals: Totals,
    groups: StepGroups,
}

impl<'e> Engine<'e> {
    /// An engine without requests.
    ///
    /// # Errors
    /// The configuration does not fit the device.
    pub fn new(
        executor: &'e mut dyn Executor,
        config: EngineConfig,
        clock: Clock,
    ) -> Result<Self, ConfigError> {
        let capacity = executor.capacity();
        config.check(&capacity)?;
        Ok(Self {
            batcher: Batcher::new(config, &capacity),
            executor,
            config,
            capacity,
            clock,
            by_id: BTreeMap::new(),
            flight: None,
            spare: Vec::new(),
            next_step: 0,
            last_ns: None,
            failed: false,
            events: Vec::new(),
            finished: Vec::new(),
            steps: Vec::new(),
            totals: Totals::default(),
            groups: StepGroups::default(),
        })
    }

    /// Puts a request into the queue.
    ///
    /// # Errors
    /// The request cannot be run; nothing has changed.
    pub fn add(&mut self, request: Request) -> Result<(), RequestError> {
        if self.by_id.contains_key(&request.id) {
            return Err(RequestError::Duplicate(request.id));
        }
        request.check(&self.config, &self.capacity)?;
        let id = request.id;
        let slot = self.batcher.add(request);
        self.by_id.insert(id, slot);
        Ok(())
    }

    /// Ends a request early, with the tokens known so far; false when there is none of this number.
    pub fn cancel(&mut self, id: u64) -> bool {
        let Some(&slot) = self.by_id.get(&id) else {
            return false;
        };
        self.end(slot, FinishReason::Cancelled, self.clock.now_ns());
        true
    }

    /// Ends all requests, with the tokens known so far. A step in flight is waited for and its
    /// tokens are kept, unless the device has failed.
    pub fn abort(&mut self) {
        if !self.failed {
            self.failed = self.read_flight().is_err();
        }
        self.flight = None;
        let now_ns = self.clock.now_ns();
        for slot in self.batcher.sequences.live() {
            self.end(slot, FinishReason::Aborted, now_ns);
        }
    }

    /// Whether no request is live and no step in flight.
    pub fn is_idle(&self) -> bool {
        self.by_id.is_empty() && self.flight.is_none()
    }

    /// Live requests.
    pub fn live(&self) -> usize {
        self.batcher.sequences.len()
    }

    /// Submits the next step, then reads the tokens of the one before (of the same one without
    /// overlap).
    ///
    /// # Errors
    /// The device failed. The tokens of steps that ran are kept; no further step is submitted.
    pub fn iterate(&mut self) -> Result<Progress, EngineError> {
        if self.failed {
            return Err(EngineError::Stopped);
        }
        let outcome = self.submit_and_read();
        if outcome.is_err() {
            self.failed = true;
        }
        outcome
    }

    fn submit_and_read(&mut self) -> Result<Progress, EngineError> {
        let from_ns = self.clock.now_ns();
        let mut stats = self.batcher.plan();
        if self.batcher.batch.tokens.is_empty() {
            let progress = match self.flight {
                Some(_) => Progress::Busy,
                None => Progress::Idle,
            };
            self.read_flight()?;
            self.last_ns = None;
            return Ok(progress);
        }
        stats.step = self.next_step;
        self.next_step += 1;
        let start_ns = *self.last_ns.get_or_insert(from_ns);
        stats.submitted_ns = self.clock.now_ns();
        stats.plan_ns = stats.submitted_ns - from_ns;
        debug_assert!(start_ns <= stats.submitted_ns);
        if let Err(source) = self.executor.submit(&self.batcher.batch) {
            // The step before may still have run to its end.
            let _ = self.read_flight();
            return Err(EngineError::Step {
                step: stats.step,
                source,
            });
        }
        self.batcher.retire();
        let mut samples = std::mem::take(&mut self.spare);
        std::mem::swap(&mut samples, &mut self.batcher.samples);
        let submitted = Flight { samples, stats };
        if self.config.overlap {
            self.read_flight()?;
            self.flight = Some(submitted);
        } else {
            self.flight = Some(submitted);
            self.read_flight()?;
        }
        Ok(Progress::Busy)
    }

    /// Waits for the step in flight, if there is one, and hands out its tokens.
    fn read_flight(&mut self) -> Result<(), EngineError> {
        let Some(Flight { samples, mut stats }) = self.flight.take() else {
            return Ok(());
        };
        let step = stats.step;
        let output = self
            .executor
            .collect()
            .map_err(|source| EngineError::Step { step, source })?;
        if output.next.len() != samples.len() {
            return Err(EngineError::Output {
                step,
                found: output.next.len(),
                expected: samples.len(),
            });
        }
        let now_ns = self.clock.now_ns();
        let from_ns = self.last_ns.replace(now_ns).unwrap_or(stats.submitted_ns);
        stats.close(from_ns, now_ns, output.time.device);
        let n_finished = self.finished.len();
        self.hand_out(&samples, &output, step, now_ns);
        stats.finished = self.finished.len() - n_finished;
        self.totals.add(&stats);
        self.groups.add(&stats);
        if self.config.log_steps {
            self.steps.push(stats);
        }
        self.spare = samples;
        self.spare.clear();
        Ok(())
    }

    fn hand_out(&mut self, samples: &[Handle], output: &StepOutput, step: u64, now_ns: u64) {
        for (&handle, &token) in samples.iter().zip(&output.next) {
            let Some(sequence) = self.batcher.sequences.find(handle) else {
                self.totals.discarded += 1;
                continue;
            };
            if usize::try_from(token).map_or(true, |id| id >= self.capacity.vocab) {
                let reason = format!(
                    "the device chose token {token}, outside the vocabulary of {}",
                    self.capacity.vocab
                );
                self.end(handle.slot, FinishReason::Failed(reason), now_ns);
                continue;
            }
            if sequence.output.is_empty() {
                sequence.output.reserve_exact(sequence.max_new.min(4096));
                sequence.first_token_ns = Some(now_ns);
                sequence.first_step = step;
            }
            sequence.last_step = step;
            sequence.output.push(token);
            self.totals.generated += 1;
            if self.config.stream {
                self.events.push(TokenEvent {
                    request: sequence.id,
                    token,
                    index: sequence.output.len() as u32 - 1,
                    at_ns: now_ns,
                });
            }
            if sequence.stop.contains(&token) {
                self.end(handle.slot, FinishReason::Stop, now_ns);
            } else if sequence.output.len() == sequence.max_new {
                self.end(handle.slot, FinishReason::Length, now_ns);
            }
        }
    }

    fn end(&mut self, slot: u32, reason: FinishReason, now_ns: u64) {
        let finished = self.batcher.end(slot, reason, now_ns);
        self.by_id.remove(&finished.id);
        self.finished.push(finished);
    }

    /// Takes the tokens that became known since the last call, in order; empty without `stream`.
    pub fn take_events(&mut self) -> std::vec::Drain<'_, TokenEvent> {
        self.events.drain(..)
    }

    /// Takes the requests that ended since the last call, in order.
    pub fn take_finished(&mut self) -> std::vec::Drain<'_, Finished> {
        self.finished.drain(..)
    }

    /// Takes the steps that were read since the last call, in order; empty without `log_steps`.
    pub fn take_steps(&mut self) -> std::vec::Drain<'_, StepStats> {
        self.steps.drain(..)
    }

    /// Sums over all steps that were read.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// The steps that were read, those of about the same size together.
    pub fn groups(&self) -> &StepGroups {
        &self.groups
    }

    /// Limits of the device.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// The engine's clock.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    #[cfg(test)]
    pub(super) fn batcher(&self) -> &Batcher {
        &self.batcher
    }
}

impl Drop for Engine<'_> {
    /// Leaves the device without a submitted step, so that another engine can use it.
    fn drop(&mut self) {
        if !self.failed && self.flight.is_some() {
            let _ = self.executor.collect();
        }
    }
}
