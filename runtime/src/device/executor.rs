//! A loaded model: the interface between the engine and a device.

use super::profile::{ProfileOptions, StepProfile};
use super::step::{Capacity, StepBatch, StepError, StepOutput};

/// How a device executes decode steps of the size that ran most often.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Execution {
    /// Kernels of the step.
    pub launches: usize,
    /// Of these, kernels of the layer in the middle.
    pub kernels_per_layer: usize,
    /// Graphs that the host launches for the step: 1, or 0 if it launches the kernels one by one.
    pub graph_launches: usize,
    /// Host time of submitting such a step: the median in seconds.
    pub submit_seconds: f64,
    /// GEMM shapes whose kernel was chosen by timing, a shape counted for each bucket, and how many of
    /// them do not have the heuristic's kernel.
    pub tuned: Option<(usize, usize)>,
}

/// A loaded model on a device.
///
/// No method has a default: what wraps an executor must hand on every one of them.
pub trait Executor {
    /// Limits of a step.
    fn capacity(&self) -> Capacity;

    /// Does now what the first steps of each size would otherwise wait for, such as compiling
    /// kernels: called before a clock starts.
    ///
    /// # Errors
    /// The device fails.
    fn warm_up(&mut self) -> Result<(), StepError>;

    /// How decode steps are executed; nothing before the first one and where steps are not made of
    /// launches.
    fn execution(&self) -> Option<Execution>;

    /// Runs a step to its end. With `logits`, the logits of the sampled rows are returned too.
    ///
    /// # Errors
    /// The batch is invalid or the device fails.
    fn step(&mut self, batch: &StepBatch, logits: bool) -> Result<StepOutput, StepError>;

    /// Starts a step whose input tokens may be results of the step before: a row with a negative
    /// token `-1-i` takes the `i`-th sampled token of the previous step, so that the host need not
    /// have read it. A device without a queue runs the step at once.
    ///
    /// # Errors
    /// As [`Executor::step`].
    fn submit(&mut self, batch: &StepBatch) -> Result<(), StepError>;

    /// Waits for the oldest submitted step that has not been collected.
    ///
    /// # Errors
    /// Nothing was submitted, or the device fails.
    fn collect(&mut self) -> Result<StepOutput, StepError>;

    /// Times each kernel of the step that would run `batch`. Nothing may be submitted; the cache at the batch's
    /// pages is overwritten. `None` from a device that does not tell kernels apart.
    ///
    /// # Errors
    /// As [`Executor::step`].
    fn profile(
        &mut self,
        batch: &StepBatch,
        options: ProfileOptions,
    ) -> Result<Option<StepProfile>, StepError>;
}
