//! A device that computes nothing, for what schedules alone.

use crate::device::executor::{Execution, Executor};
use crate::device::profile::{ProfileOptions, StepProfile};
use crate::device::step::{Capacity, StepBatch, StepError, StepOutput};
use std::collections::VecDeque;
use std::fmt;

/// Answers every sampled row with token 0, and shows each batch to `on_step`.
pub struct NullDevice<F> {
    capacity: Capacity,
    on_step: F,
    /// Sampled rows of the steps that are not collected.
    rows: VecDeque<usize>,
}

impl<F: FnMut(&StepBatch)> NullDevice<F> {
    /// A device with these limits.
    pub fn new(capacity: Capacity, on_step: F) -> Self {
        Self {
            capacity,
            on_step,
            rows: VecDeque::new(),
        }
    }
}

impl<F> fmt::Debug for NullDevice<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NullDevice")
            .field("capacity", &self.capacity)
            .field("rows", &self.rows)
            .finish_non_exhaustive()
    }
}

impl<F: FnMut(&StepBatch)> Executor for NullDevice<F> {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn warm_up(&mut self) -> Result<(), StepError> {
        Ok(())
    }

    fn execution(&self) -> Option<Execution> {
        None
    }

    fn step(&mut self, batch: &StepBatch, _logits: bool) -> Result<StepOutput, StepError> {
        self.submit(batch)?;
        self.collect()
    }

    fn submit(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        (self.on_step)(batch);
        self.rows.push_back(batch.rows.len());
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, StepError> {
        let rows = self.rows.pop_front().unwrap_or(0);
        Ok(StepOutput {
            next: vec![0; rows],
            ..StepOutput::default()
        })
    }

    fn profile(
        &mut self,
        _batch: &StepBatch,
        _options: ProfileOptions,
    ) -> Result<Option<StepProfile>, StepError> {
        Ok(None)
    }
}
