//! What an engine may do, and whether a device can.

use super::policy::Policy;
use crate::device::step::Capacity;

/// Limits and ways of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// When requests are admitted.
    pub policy: Policy,
    /// Most sequences that run at a time.
    pub max_batch_size: usize,
    /// Most token rows of a step.
    pub max_num_tokens: usize,
    /// Longest sequence, prompt and output.
    pub max_seq_len: usize,
    /// Whether a prompt may be computed in several steps.
    pub chunked_prefill: bool,
    /// Whether a step is submitted before the tokens of the last one are read. A device that
    /// computes inside `submit` gains nothing from it and learns of stop tokens one step later.
    pub overlap: bool,
    /// Whether a [`TokenEvent`](super::TokenEvent) is kept for every token.
    pub stream: bool,
    /// Whether the [`StepStats`](super::StepStats) of every step are kept.
    pub log_steps: bool,
}

impl EngineConfig {
    /// All that the device can do, with the default policy, chunked prefill and overlap.
    pub fn of(capacity: &Capacity) -> Self {
        Self {
            policy: Policy::default(),
            max_batch_size: capacity.max_sequences.min(capacity.max_tokens),
            max_num_tokens: capacity.max_tokens,
            max_seq_len: capacity.max_seq_len,
            chunked_prefill: true,
            overlap: true,
            stream: false,
            log_steps: false,
        }
    }

    /// Checks the limits against the device's.
    ///
    /// # Errors
    /// The configuration cannot work on the device.
    pub(super) fn check(&self, capacity: &Capacity) -> Result<(), ConfigError> {
        let limits = [
            (
                "max_batch_size",
                self.max_batch_size,
                capacity.max_sequences,
            ),
            ("max_num_tokens", self.max_num_tokens, capacity.max_tokens),
            ("max_seq_len", self.max_seq_len, capacity.max_seq_len),
        ];
        for (name, value, limit) in limits {
            if value == 0 {
                return Err(ConfigError::Zero(name));
            }
            if value > limit {
                return Err(ConfigError::Beyond { name, value, limit });
            }
        }
        if capacity.page_size == 0 {
            return Err(ConfigError::Zero("page size"));
        }
        if self.max_batch_size > self.max_num_tokens {
            return Err(ConfigError::BatchExceedsTokens {
                batch: self.max_batch_size,
                tokens: self.max_num_tokens,
            });
        }
        Ok(())
    }
}

/// A configuration that cannot work on the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A limit is 0.
    #[error("{0} is 0, expected 1 or more")]
    Zero(&'static str),
    /// A limit is beyond the device's.
    #[error("{name} is {value}, the loaded model can do {limit}")]
    Beyond {
        /// The limit's name.
        name: &'static str,
        /// What was asked for.
        value: usize,
        /// What is possible.
        limit: usize,
    },
    /// Every running sequence needs a row in every step.
    #[error("max_batch_size is {batch}, more than max_num_tokens {tokens}")]
    BatchExceedsTokens {
        /// Sequences.
        batch: usize,
        /// Token rows.
        tokens: usize,
    },
}
