//! One step of a model: what the engine asks a device to do, and what it gets.
//!
//! Prefill, chunked prefill, decode and mixed batches are all ragged batches of token rows; a
//! device may run a batch of one row a sequence by its decode program. The engine owns pages
//! and lengths, the device owns memory and kernels.

use crate::sampling::SamplingParams;
use serde::Serialize;

/// Which program of a plan runs a step. In reports the general one is `prefill`, which it is mostly for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum StepKind {
    /// One row a sequence, all of them sampled.
    #[serde(rename = "decode")]
    Decode,
    /// Any rows; those in [`StepBatch::rows`] are sampled.
    #[serde(rename = "prefill")]
    General,
}

/// One step's rows and where their keys and values live.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepBatch {
    /// Token ids `[T]`, the rows of all sequences one after the other.
    pub tokens: Vec<i32>,
    /// Position of each row in its sequence, `[T]`.
    pub positions: Vec<i32>,
    /// Sequence of each row, `[T]`.
    pub row_seq: Vec<i32>,
    /// Row ranges of the sequences, `[B+1]`.
    pub cu_seqlens: Vec<i32>,
    /// Tokens of each sequence in the cache once this step's rows are appended, `[B]`.
    pub kv_lens: Vec<i32>,
    /// Pages of each sequence, `[B, max_pages]`; unused entries are 0.
    pub block_table: Vec<i32>,
    /// Columns of the block table.
    pub max_pages: usize,
    /// Rows whose next token is wanted, `[R]`.
    pub rows: Vec<i32>,
    /// How to sample each of them, `[R]`.
    pub samplers: Vec<RowSampler>,
}

/// How the next token of a row is chosen. The generator is keyed by (seed, request, position), so
/// the choice does not depend on the batch.
#[derive(Clone, Debug, PartialEq)]
pub struct RowSampler {
    /// Temperature, top-k, top-p and seed.
    pub params: SamplingParams,
    /// The request's number.
    pub request: u64,
    /// Position of the token that is sampled.
    pub position: u32,
}

impl StepBatch {
    /// Number of token rows.
    pub fn tokens_len(&self) -> usize {
        self.tokens.len()
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.kv_lens.len()
    }

    /// Decode if every sequence has one row and all rows are sampled in order.
    pub fn kind(&self) -> StepKind {
        let t = self.tokens.len();
        let all = self.rows.len() == t && self.rows.iter().enumerate().all(|(i, &r)| r == i as i32);
        if t == self.sequences() && all {
            StepKind::Decode
        } else {
            StepKind::General
        }
    }

    /// Appends the rows of one sequence: `tokens` at positions from `start` on, with its pages.
    /// With `sample`, the last row's next token is wanted.
    ///
    /// # Panics
    /// The sequence has more pages than the block table has columns (invariant: the scheduler
    /// sizes the table by the longest sequence).
    pub fn push_sequence(
        &mut self,
        tokens: &[i32],
        start: usize,
        pages: &[i32],
        sample: Option<RowSampler>,
    ) {
        assert!(
            pages.len() <= self.max_pages,
            "invariant: {} pages fit the block table of {} columns",
            pages.len(),
            self.max_pages
        );
        let seq = self.kv_lens.len() as i32;
        if self.cu_seqlens.is_empty() {
            self.cu_seqlens.push(0);
        }
        self.tokens.extend_from_slice(tokens);
        self.positions
            .extend((0..tokens.len()).map(|i| (start + i) as i32));
        self.row_seq.extend(std::iter::repeat_n(seq, tokens.len()));
        self.cu_seqlens.push(self.tokens.len() as i32);
        self.kv_lens.push((start + tokens.len()) as i32);
        let filled = self.block_table.len();
        self.block_table.extend_from_slice(pages);
        self.block_table.resize(filled + self.max_pages, 0);
        if let Some(s) = sample {
            self.rows.push(self.tokens.len() as i32 - 1);
            self.samplers.push(s);
        }
    }
}

/// Where the time of a step went, as far as the device can tell.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepTime {
    /// Seconds on the device.
    pub device: f64,
}

/// What a step returns.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// The next token of each sampled row, `[R]`.
    pub next: Vec<i32>,
    /// Logits `[R, V]` in f32, if they were asked for.
    pub logits: Option<Vec<f32>>,
    /// Times.
    pub time: StepTime,
}

/// How much a device can hold; fixed when the model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Most token rows of one step.
    pub max_tokens: usize,
    /// Most sequences of one step.
    pub max_sequences: usize,
    /// Longest sequence, prompt and output.
    pub max_seq_len: usize,
    /// Tokens a page.
    pub page_size: usize,
    /// Pages of the cache.
    pub pages: usize,
    /// Vocabulary size.
    pub vocab: usize,
}

/// A failed step.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum StepError {
    /// The batch breaks a limit of [`Capacity`] or is inconsistent: a bug in the caller.
    #[error("invalid batch: {0}")]
    Batch(String),
    /// The device failed.
    #[error("{0}")]
    Device(String),
}
