//! Requests, their errors and their results.

use crate::device::step::Capacity;
use crate::sampling::{SamplingError, SamplingParams};

use super::config::EngineConfig;
use super::pages::pages_for;

/// What is asked of the engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Its number: the caller's handle and a part of the sampling key.
    pub id: u64,
    /// Prompt tokens.
    pub prompt: Vec<i32>,
    /// Most tokens to generate.
    pub max_new: usize,
    /// Tokens that end the output; the one that does is part of it.
    pub stop: Vec<i32>,
    /// How tokens are chosen.
    pub params: SamplingParams,
    /// When it was handed in, in nanoseconds of the engine's clock.
    pub arrival_ns: u64,
}

/// Why a request is refused; the others are not affected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// Nothing to continue.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// Nothing to do.
    #[error("0 output tokens are asked for, expected 1 or more")]
    NoOutput,
    /// Longer than any sequence may be.
    #[error("{prompt} input + {max_new} output tokens are {}, max_seq_len is {max_seq_len}", prompt + max_new)]
    TooLong {
        /// Prompt tokens.
        prompt: usize,
        /// Tokens to generate.
        max_new: usize,
        /// The limit.
        max_seq_len: usize,
    },
    /// The prompt does not fit into one step and may not be cut.
    #[error(
        "the prompt of {prompt} tokens is longer than max_num_tokens {max_num_tokens} and chunked context is off"
    )]
    PromptExceedsStep {
        /// Prompt tokens.
        prompt: usize,
        /// Most tokens of a step.
        max_num_tokens: usize,
    },
    /// The whole cache is too small for it.
    #[error("{tokens} tokens need {needed} pages of KV cache, there are {pages}")]
    ExceedsCache {
        /// Tokens that it may cache.
        tokens: usize,
        /// Their pages.
        needed: usize,
        /// Pages of the cache.
        pages: usize,
    },
    /// A prompt token that the model does not know.
    #[error("token id {token} at index {index} is outside the vocabulary of {vocab}")]
    OutsideVocabulary {
        /// The token.
        token: i32,
        /// Its place in the prompt.
        index: usize,
        /// Vocabulary size.
        vocab: usize,
    },
    /// A sampling parameter is out of its range.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The number is taken by a request that has not finished.
    #[error("request {0} is already running")]
    Duplicate(u64),
}

impl Request {
    /// Most tokens that it ever caches: the last sampled token is not fed back.
    pub fn lifetime(&self) -> usize {
        (self.prompt.len() + self.max_new).saturating_sub(1)
    }

    /// Checks it against what the engine can run.
    pub(crate) fn check(
        &self,
        config: &EngineConfig,
        capacity: &Capacity,
    ) -> Result<(), RequestError> {
        let (prompt, max_new) = (self.prompt.len(), self.max_new);
        if prompt == 0 {
            return Err(RequestError::EmptyPrompt);
        }
        if max_new == 0 {
            return Err(RequestError::NoOutput);
        }
        let max_seq_len = config.max_seq_len;
        if prompt.saturating_add(max_new) > max_seq_len {
            return Err(RequestError::TooLong {
                prompt,
                max_new,
                max_seq_len,
            });
        }
        let max_num_tokens = config.max_num_tokens;
        if !config.chunked_prefill && prompt > max_num_tokens {
            return Err(RequestError::PromptExceedsStep {
                prompt,
                max_num_tokens,
            });
        }
        let tokens = self.lifetime();
        let needed = pages_for(tokens, capacity.page_size);
        if needed > capacity.pages {
            return Err(RequestError::ExceedsCache {
                tokens,
                needed,
                pages: capacity.pages,
            });
        }
        let vocab = capacity.vocab;
        let unknown = |&token: &i32| usize::try_from(token).map_or(true, |id| id >= vocab);
        if let Some(index) = self.prompt.iter().position(unknown) {
            return Err(RequestError::OutsideVocabulary {
                token: self.prompt[index],
                index,
                vocab,
            });
        }
        Ok(self.params.validate()?)
    }
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// It generated all its tokens.
    Length,
    /// It generated one of its stop tokens.
    Stop,
    /// The caller cancelled it.
    Cancelled,
    /// The engine was stopped before its end.
    Aborted,
    /// It failed alone.
    Failed(String),
}

impl FinishReason {
    /// Whether the output is what was asked for.
    pub fn is_complete(&self) -> bool {
        matches!(self, Self::Length | Self::Stop)
    }
}

/// The result of a request. Times are nanoseconds of the engine's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// The request's number.
    pub id: u64,
    /// Why it ended.
    pub reason: FinishReason,
    /// Prompt tokens.
    pub prompt_len: usize,
    /// The generated tokens, those of an early end included.
    pub tokens: Vec<i32>,
    /// When it was handed in.
    pub arrival_ns: u64,
    /// When its first token was known.
    pub first_token_ns: Option<u64>,
    /// When it ended.
    pub end_ns: u64,
    /// Number of the step that gave the first token.
    pub first_step: u64,
    /// Number of the step that gave the last token.
    pub last_step: u64,
    /// How often it lost its pages and was computed again.
    pub preemptions: u32,
}

/// A token that has just become known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenEvent {
    /// The request's number.
    pub request: u64,
    /// The token.
    pub token: i32,
    /// Its place in the output, from 0.
    pub index: u32,
    /// When it was known, in nanoseconds of the engine's clock.
    pub at_ns: u64,
}
