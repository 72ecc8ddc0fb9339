//! Decides what the next step computes: decoding sequences first, then prompts in chunks, then new
//! requests, as far as tokens, sequences and pages allow. In static batches prompts come first, and no
//! request joins those that decode.

use std::collections::VecDeque;

use super::config::EngineConfig;
use super::forecast::{Forecast, Life};
use super::pages::{PagePool, pages_for};
use super::policy::{Policy, has_room};
use super::request::{FinishReason, Finished, Request};
use super::sequence::{Handle, Sequence, Sequences};
use super::stats::StepStats;
use crate::device::step::{Capacity, RowSampler, StepBatch};

/// The requests, their queue and the pages. It plans steps and takes results, but runs nothing.
///
/// Between calls: a live request is waiting (without pages), running (with pages) or sampled out
/// (without pages, its last token in flight); both queues are in order of arrival, and every running
/// request arrived before every waiting one.
#[derive(Debug)]
pub(crate) struct Batcher {
    config: EngineConfig,
    page_size: usize,
    pub(crate) sequences: Sequences,
    pub(crate) running: Vec<u32>,
    pub(crate) waiting: VecDeque<u32>,
    pub(crate) pool: PagePool,
    /// The step that was planned last.
    pub(crate) batch: StepBatch,
    /// Whose token each of its results is.
    pub(crate) samples: Vec<Handle>,
    /// Running sequences that are not decoding; only used inside `plan`.
    prefills: Vec<u32>,
    /// What the running sequences will hold; only used inside `admit`.
    forecast: Forecast,
    /// Requests that have joined the static batch.
    joined: usize,
    /// Whether the static batch decodes, so that no request joins it.
    is_closed: bool,
}

impl Batcher {
    pub(crate) fn new(config: EngineConfig, capacity: &Capacity) -> Self {
        Self {
            config,
            page_size: capacity.page_size,
            sequences: Sequences::default(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            pool: PagePool::new(capacity.pages),
            batch: StepBatch {
                // The same width in every step, so that a device may keep its own table.
                max_pages: pages_for(config.max_seq_len, capacity.page_size),
                ..StepBatch::default()
            },
            samples: Vec::new(),
            prefills: Vec::new(),
            forecast: Forecast::new(capacity.page_size),
            joined: 0,
            is_closed: false,
        }
    }

    #[cfg(test)]
    pub(super) fn batch_page_size(&self) -> usize {
        self.page_size
    }

    /// Puts a checked request into the queue.
    pub(crate) fn add(&mut self, request: Request) -> u32 {
        let slot = self.sequences.insert(request);
        self.waiting.push_back(slot);
        slot
    }

    /// Takes a request out wherever it is.
    pub(crate) fn end(&mut self, slot: u32, reason: FinishReason, now_ns: u64) -> Finished {
        let mut sequence = self.sequences.remove(slot);
        self.pool.release(&mut sequence.pages);
        let by_ordinal =
            |sequences: &Sequences, other: u32| sequences.get(other).ordinal.cmp(&sequence.ordinal);
        // The slot itself is empty now, so it is found by its value, beside those that are in order.
        let sequences = &self.sequences;
        let search = |other: &u32| {
            if *other == slot {
                std::cmp::Ordering::Equal
            } else {
                by_ordinal(sequences, *other)
            }
        };
        if let Ok(at) = self.running.binary_search_by(search) {
            self.running.remove(at);
        } else if let Ok(at) = self.waiting.binary_search_by(search) {
            self.waiting.remove(at);
        }
        sequence.finish(reason, now_ns)
    }

    /// Plans the next step into `batch` and `samples`. An empty batch means that nothing can run.
    pub(crate) fn plan(&mut self) -> StepStats {
        let mut stats = StepStats::default();
        self.batch.clear();
        self.samples.clear();
        self.prefills.clear();
        match self.config.policy {
            Policy::Static => self.plan_static(&mut stats),
            Policy::GuaranteedNoEvict | Policy::MaxUtilization => self.plan_continuous(&mut stats),
        }
        stats.sequences = self.batch.sequences();
        stats.tokens = self.batch.tokens_len();
        stats.prefill_tokens = stats.tokens - stats.decodes;
        stats.context = self.batch.kv_lens.iter().map(|&n| n as u64).sum();
        stats.pages_used = self.pool.used();
        stats.running = self.running.len();
        stats.waiting = self.waiting.len();
        stats
    }

    fn plan_continuous(&mut self, stats: &mut StepStats) {
        self.plan_decodes(stats);
        stats.decodes = self.batch.sequences();
        self.plan_prefills();
        // What was pre-empted in this step is not admitted in it: its last token may be in flight.
        if stats.preempted == 0 {
            self.admit();
        }
    }

    /// The prompts of a static batch as long as there are any, then its decoding sequences.
    fn plan_static(&mut self, stats: &mut StepStats) {
        if self.running.is_empty() {
            (self.joined, self.is_closed) = (0, false);
        }
        if !self.is_closed {
            let sequences = &self.sequences;
            let prompts = |slot: &&u32| !sequences.get(**slot).decodes();
            self.prefills.extend(self.running.iter().filter(prompts));
            self.plan_prefills();
            self.admit();
            self.is_closed = self.batch.tokens.is_empty();
        }
        if self.is_closed {
            self.plan_decodes(stats);
            stats.decodes = self.batch.sequences();
        }
    }

    /// One row for each decoding sequence, oldest first; the newest give way when pages run out.
    fn plan_decodes(&mut self, stats: &mut StepStats) {
        let mut i = 0;
        while i < self.running.len() {
            let slot = self.running[i];
            if !self.sequences.get(slot).decodes() {
                self.prefills.push(slot);
                i += 1;
                continue;
            }
            if !self.grow(slot) {
                let newest = self.running.pop().expect("invariant: i is in range");
                // It comes after `slot` or is it, so it has no row in this step yet.
                self.preempt(newest);
                stats.preempted += 1;
                continue;
            }
            let sequence = self.sequences.get_mut(slot);
            self.batch.push_decode(sequence);
            sequence.computed += 1;
            sequence.sample_index = self.samples.len();
            sequence.n_sampled += 1;
            self.samples.push(self.sequences.handle(slot));
            i += 1;
        }
    }

    /// Makes sure that the next row of a decoding sequence has its page.
    fn grow(&mut self, slot: u32) -> bool {
        let sequence = self.sequences.get_mut(slot);
        sequence.computed < sequence.pages.len() * self.page_size
            || self.pool.allocate(1, &mut sequence.pages)
    }

    /// Takes the pages of a sequence that is no longer in `running` and puts it before all waiting.
    fn preempt(&mut self, slot: u32) {
        let sequence = self.sequences.get_mut(slot);
        self.pool.release(&mut sequence.pages);
        sequence.computed = 0;
        sequence.preemptions += 1;
        self.waiting.push_front(slot);
    }

    /// The next chunk of each sequence that is not decoding, oldest first.
    fn plan_prefills(&mut self) {
        for i in 0..self.prefills.len() {
            let slot = self.prefills[i];
            let budget = self.config.max_num_tokens - self.batch.tokens_len();
            let rows = self.rows(self.sequences.get(slot), budget);
            if rows > 0 {
                self.push_chunk(slot, rows);
            }
        }
    }

    /// Rows of a prompt that this step computes; 0 when it has to wait.
    fn rows(&self, sequence: &Sequence, budget: usize) -> usize {
        let remaining = sequence.remaining();
        // A pre-empted sequence may have grown beyond one step; without chunks it would wait for ever.
        let whole = !self.config.chunked_prefill && remaining <= self.config.max_num_tokens;
        if whole && remaining > budget {
            0
        } else {
            remaining.min(budget)
        }
    }

    /// Admits waiting requests in order until one does not fit.
    fn admit(&mut self) {
        let mut growth = None;
        let mut foreseen = false;
        while let Some(&slot) = self.waiting.front() {
            let budget = self.config.max_num_tokens - self.batch.tokens_len();
            let members = match self.config.policy {
                Policy::Static => self.joined,
                Policy::GuaranteedNoEvict | Policy::MaxUtilization => self.running.len(),
            };
            if members >= self.config.max_batch_size {
                break;
            }
            let sequence = self.sequences.get(slot);
            let rows = self.rows(sequence, budget);
            let pages = pages_for(sequence.len(), self.page_size);
            if rows == 0 || self.pool.free() < pages {
                break;
            }
            let later = pages_for(sequence.lifetime(), self.page_size) - pages;
            let growth = growth.get_or_insert_with(|| self.growth());
            let fits = match self.config.policy {
                Policy::GuaranteedNoEvict => {
                    // At full length, all at once; else step by step.
                    self.pool.free() >= pages + *growth + later
                        || self.fits_over_time(slot, rows, &mut foreseen)
                }
                Policy::MaxUtilization => has_room(&self.pool, pages, *growth),
                Policy::Static => self.pool.free() >= pages + *growth + later,
            };
            if !fits {
                break;
            }
            *growth += later;
            let held = &mut self.sequences.get_mut(slot).pages;
            let allocated = self.pool.allocate(pages, held);
            debug_assert!(allocated, "invariant: the pages are free");
            self.waiting.pop_front();
            self.running.push(slot);
            self.joined += 1;
            self.push_chunk(slot, rows);
            // What was admitted decodes from the next step on, or is the last to be admitted in this one.
            if foreseen {
                self.forecast.insert(Life::of(self.sequences.get(slot)));
            }
        }
    }

    /// Whether the pages suffice in every step to come with one more request, of whose tokens this step
    /// computes `rows`. All other sequences decode: a prompt that is not through leaves no rows for
    /// another one.
    fn fits_over_time(&mut self, slot: u32, rows: usize, foreseen: &mut bool) -> bool {
        let sequences = &self.sequences;
        if !*foreseen {
            let lives = self
                .running
                .iter()
                .map(|&slot| Life::of(sequences.get(slot)));
            self.forecast.reset(lives);
            *foreseen = true;
        }
        let least = self
            .config
            .max_num_tokens
            .saturating_sub(self.running.len());
        let life = Life::of_admitted(sequences.get(slot), rows, least);
        self.forecast.fits(life, self.pool.len())
    }

    /// Pages that the running sequences may still ask for.
    fn growth(&self) -> usize {
        let missing = |&slot: &u32| {
            let sequence = self.sequences.get(slot);
            pages_for(sequence.lifetime(), self.page_size) - sequence.pages.len()
        };
        self.running.iter().map(missing).sum()
    }

    /// Adds the next `rows` rows of a sequence; its last row is sampled.
    fn push_chunk(&mut self, slot: u32, rows: usize) {
        let handle = self.sequences.handle(slot);
        let sequence = self.sequences.get_mut(slot);
        self.batch.push_rows(sequence, rows);
        sequence.computed += rows;
        if sequence.remaining() == 0 {
            sequence.sample_index = self.samples.len();
            sequence.n_sampled += 1;
            self.samples.push(handle);
        }
    }

    /// After the planned step has been submitted: sequences that it samples for the last time leave.
    /// Their pages may be used from the next step on, because a device runs steps in order.
    pub(crate) fn retire(&mut self) {
        let Self {
            sequences,
            running,
            pool,
            ..
        } = self;
        running.retain(|&slot| {
            let sequence = sequences.get_mut(slot);
            let stays = !sequence.is_sampled_out();
            if !stays {
                pool.release(&mut sequence.pages);
            }
            stays
        });
    }
}

impl StepBatch {
    fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.row_seq.clear();
        self.cu_seqlens.clear();
        self.kv_lens.clear();
        self.block_table.clear();
        self.rows.clear();
        self.samplers.clear();
    }

    /// The row of a decoding sequence; what [`StepBatch::push_sequence`] does for one row, without
    /// its loops.
    fn push_decode(&mut self, sequence: &Sequence) {
        let row = self.tokens.len() as i32;
        if row == 0 {
            self.cu_seqlens.push(0);
        }
        self.tokens.push(sequence.last_token());
        self.positions.push(sequence.computed as i32);
        self.row_seq.push(row);
        self.cu_seqlens.push(row + 1);
        self.kv_lens.push(sequence.computed as i32 + 1);
        let filled = self.block_table.len();
        self.block_table.extend_from_slice(&sequence.pages);
        self.block_table.resize(filled + self.max_pages, 0);
        self.rows.push(row);
        self.samplers.push(sampler(sequence));
    }

    /// The next `n` rows of a sequence, all of known tokens.
    fn push_rows(&mut self, sequence: &Sequence, n: usize) {
        let (start, end) = (sequence.computed, sequence.computed + n);
        let sample = (end == sequence.len()).then(|| sampler(sequence));
        let n_prompt = sequence.prompt.len();
        if end <= n_prompt {
            self.push_sequence(&sequence.prompt[start..end], start, &sequence.pages, sample);
            return;
        }
        // A pre-empted sequence computes its own tokens again, too.
        let own = &sequence.output[start.saturating_sub(n_prompt)..end - n_prompt];
        let tokens = [&sequence.prompt[start.min(n_prompt)..], own].concat();
        self.push_sequence(&tokens, start, &sequence.pages, sample);
    }
}

fn sampler(sequence: &Sequence) -> RowSampler {
    RowSampler {
        params: sequence.params,
        request: sequence.id,
        position: sequence.len() as u32,
    }
}
