//! A simulated device for tests of the scheduler and of what stands on it.
//!
//! Its "model" chooses the next token as a hash of the whole token history, and it knows that history
//! only through the pages: each row writes its token where the block table says, and a sampled row
//! reads positions 0 to its own back. A page that is lost, shared, reused too early or addressed
//! wrongly changes tokens. It also checks every batch for consistency.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::request::Request;
use crate::device::executor::{Execution, Executor};
use crate::device::profile::{ProfileOptions, StepProfile};
use crate::device::step::{Capacity, RowSampler, StepBatch, StepError, StepOutput, StepTime};

/// The simulated device.
#[derive(Debug)]
pub struct SimDevice {
    capacity: Capacity,
    /// Token ids by page and slot; -1 where nothing was written.
    cache: Vec<i32>,
    submitted: VecDeque<StepBatch>,
    /// Results of the step that ran last.
    last: Vec<i32>,
    /// Sampled rows of the step that was submitted last.
    last_rows: usize,
    /// Steps submitted so far.
    pub steps: u64,
    /// The step of this number fails.
    pub fail_at: Option<u64>,
    /// Every step takes at least this long.
    pub step_time: Duration,
}

impl SimDevice {
    /// A device with an empty cache.
    pub fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            cache: vec![-1; capacity.pages * capacity.page_size],
            submitted: VecDeque::new(),
            last: Vec::new(),
            last_rows: 0,
            steps: 0,
            fail_at: None,
            step_time: Duration::ZERO,
        }
    }

    fn run(&mut self, batch: &StepBatch) -> Result<Vec<i32>, StepError> {
        let page_size = self.capacity.page_size;
        let place = |row_seq: usize, position: usize| {
            let page = batch.block_table[row_seq * batch.max_pages + position / page_size];
            page as usize * page_size + position % page_size
        };
        for (row, &token) in batch.tokens.iter().enumerate() {
            let token = if token < 0 {
                self.last[(-1 - token) as usize]
            } else {
                token
            };
            let at = place(batch.row_seq[row] as usize, batch.positions[row] as usize);
            self.cache[at] = token;
        }
        let next = batch
            .rows
            .iter()
            .zip(&batch.samplers)
            .map(|(&row, sampler)| {
                let sequence = batch.row_seq[row as usize] as usize;
                let history = (0..=batch.positions[row as usize] as usize)
                    .map(|position| self.cache[place(sequence, position)]);
                next_token(history, sampler, self.capacity.vocab)
            });
        Ok(next.collect())
    }

    fn check(&self, batch: &StepBatch) -> Result<(), StepError> {
        let ensure = |holds: bool, what: &str| {
            if holds {
                Ok(())
            } else {
                Err(StepError::Batch(what.to_owned()))
            }
        };
        let Capacity {
            max_tokens,
            max_sequences,
            max_seq_len,
            page_size,
            pages,
            vocab,
        } = self.capacity;
        let (t, b) = (batch.tokens_len(), batch.sequences());
        ensure(t > 0 && t <= max_tokens, "tokens")?;
        ensure(b <= max_sequences, "sequences")?;
        ensure(
            batch.positions.len() == t && batch.row_seq.len() == t,
            "rows",
        )?;
        ensure(
            batch.block_table.len() == b * batch.max_pages,
            "block table",
        )?;
        ensure(batch.rows.len() == batch.samplers.len(), "samplers")?;
        ensure(
            batch.rows.is_sorted_by(|a, b| a < b),
            "order of sampled rows",
        )?;
        ensure(batch.rows.iter().all(|&r| (r as usize) < t), "sampled rows")?;
        ensure(
            batch.cu_seqlens.len() == b + 1
                && batch.cu_seqlens[0] == 0
                && batch.cu_seqlens[b] == t as i32,
            "cu_seqlens",
        )?;
        let known = |token: i32| {
            if token < 0 {
                ((-1 - token) as usize) < self.last_rows
            } else {
                (token as usize) < vocab
            }
        };
        ensure(batch.tokens.iter().all(|&token| known(token)), "token ids")?;
        let mut owners = vec![false; pages];
        for sequence in 0..b {
            let range = batch.cu_seqlens[sequence]..batch.cu_seqlens[sequence + 1];
            let kv_len = batch.kv_lens[sequence];
            ensure(
                !range.is_empty() && kv_len as usize <= max_seq_len,
                "lengths",
            )?;
            for row in range.clone() {
                ensure(batch.row_seq[row as usize] == sequence as i32, "row_seq")?;
                let position = kv_len - (range.end - row);
                ensure(batch.positions[row as usize] == position, "positions")?;
            }
            let table = &batch.block_table[sequence * batch.max_pages..][..batch.max_pages];
            for &page in &table[..(kv_len as usize).div_ceil(page_size)] {
                let free = usize::try_from(page).is_ok_and(|page| page < pages && !owners[page]);
                ensure(free, "a page with two owners or out of range")?;
                owners[page as usize] = true;
            }
        }
        Ok(())
    }
}

impl Executor for SimDevice {
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
        self.check(batch)?;
        if self.submitted.len() >= 2 {
            return Err(StepError::Batch("three steps at a time".into()));
        }
        if self.fail_at == Some(self.steps) {
            return Err(StepError::Device("out of device memory".into()));
        }
        self.steps += 1;
        self.last_rows = batch.rows.len();
        self.submitted.push_back(batch.clone());
        Ok(())
    }

    /// Runs the step only now, so that nothing of it can be known before.
    fn collect(&mut self) -> Result<StepOutput, StepError> {
        let start = Instant::now();
        let batch = self
            .submitted
            .pop_front()
            .ok_or_else(|| StepError::Batch("nothing was submitted".into()))?;
        self.last = self.run(&batch)?;
        while start.elapsed() < self.step_time {
            std::hint::spin_loop();
        }
        Ok(StepOutput {
            next: self.last.clone(),
            logits: None,
            time: StepTime {
                device: start.elapsed().as_secs_f64(),
            },
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

/// The token after a history: FNV-1a over the tokens and the sampling key.
fn next_token(history: impl Iterator<Item = i32>, sampler: &RowSampler, vocab: usize) -> i32 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut mix = |value: u64| hash = (hash ^ value).wrapping_mul(0x0100_0000_01b3);
    for token in history {
        mix(token as u32 as u64);
    }
    mix(sampler.params.seed);
    mix(sampler.request);
    mix(u64::from(sampler.position));
    ((hash >> 32) % vocab as u64) as i32
}

/// The output of a request that runs alone, computed without engine, pages or batches.
pub fn expected_tokens(request: &Request, vocab: usize) -> Vec<i32> {
    let mut history = request.prompt.clone();
    for _ in 0..request.max_new {
        let sampler = RowSampler {
            params: request.params,
            request: request.id,
            position: history.len() as u32,
        };
        let token = next_token(history.iter().copied(), &sampler, vocab);
        history.push(token);
        if request.stop.contains(&token) {
            break;
        }
    }
    history.split_off(request.prompt.len())
}
