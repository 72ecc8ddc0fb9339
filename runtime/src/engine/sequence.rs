//! Live requests and where they stand.

use super::request::{FinishReason, Finished, Request};
use crate::sampling::SamplingParams;

/// A live request. Lengths count tokens.
///
/// Tokens exist in three degrees: sampled by a submitted step (`n_sampled`), known to the host
/// (`output`), and computed into the cache by a submitted step (`computed`).
#[derive(Debug)]
pub(crate) struct Sequence {
    /// The request's number.
    pub(crate) id: u64,
    /// Order of arrival.
    pub(crate) ordinal: u64,
    pub(crate) params: SamplingParams,
    pub(crate) prompt: Vec<i32>,
    pub(crate) max_new: usize,
    pub(crate) stop: Vec<i32>,
    /// Generated tokens that the host knows.
    pub(crate) output: Vec<i32>,
    /// Generated tokens, with the one that the step in flight samples.
    pub(crate) n_sampled: usize,
    /// Tokens whose keys and values are in the cache once all submitted steps have run.
    pub(crate) computed: usize,
    /// Which result of the last submitted step is this sequence's, while the host does not know it.
    pub(crate) sample_index: usize,
    /// Its pages.
    pub(crate) pages: Vec<i32>,
    pub(crate) arrival_ns: u64,
    pub(crate) first_token_ns: Option<u64>,
    pub(crate) first_step: u64,
    pub(crate) last_step: u64,
    pub(crate) preemptions: u32,
}

impl Sequence {
    fn new(request: Request, ordinal: u64) -> Self {
        Self {
            id: request.id,
            ordinal,
            params: request.params,
            prompt: request.prompt,
            max_new: request.max_new,
            stop: request.stop,
            output: Vec::new(),
            n_sampled: 0,
            computed: 0,
            sample_index: 0,
            pages: Vec::new(),
            arrival_ns: request.arrival_ns,
            first_token_ns: None,
            first_step: 0,
            last_step: 0,
            preemptions: 0,
        }
    }

    /// Tokens that exist, prompt and sampled.
    pub(crate) fn len(&self) -> usize {
        self.prompt.len() + self.n_sampled
    }

    /// Most tokens that it ever caches.
    pub(crate) fn lifetime(&self) -> usize {
        self.prompt.len() + self.max_new - 1
    }

    /// Rows that are to be computed before the next token can be sampled.
    pub(crate) fn remaining(&self) -> usize {
        self.len() - self.computed
    }

    /// Whether only its last generated token is to be computed.
    pub(crate) fn decodes(&self) -> bool {
        self.n_sampled > 0 && self.remaining() == 1
    }

    /// Whether no further step is needed.
    pub(crate) fn is_sampled_out(&self) -> bool {
        self.n_sampled >= self.max_new
    }

    /// The last generated token, or a reference to the step in flight.
    pub(crate) fn last_token(&self) -> i32 {
        if self.n_sampled > self.output.len() {
            -1 - self.sample_index as i32
        } else {
            self.output[self.output.len() - 1]
        }
    }

    /// Ends it.
    pub(crate) fn finish(self, reason: FinishReason, end_ns: u64) -> Finished {
        Finished {
            id: self.id,
            reason,
            prompt_len: self.prompt.len(),
            tokens: self.output,
            arrival_ns: self.arrival_ns,
            first_token_ns: self.first_token_ns,
            end_ns,
            first_step: self.first_step,
            last_step: self.last_step,
            preemptions: self.preemptions,
        }
    }
}

/// Names a live request; does not name the next one in the same slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Handle {
    pub(crate) slot: u32,
    generation: u32,
}

/// The live requests in reusable slots.
#[derive(Debug, Default)]
pub(crate) struct Sequences {
    slots: Vec<(u32, Option<Sequence>)>,
    free: Vec<u32>,
    arrived: u64,
}

impl Sequences {
    /// Takes a request in.
    pub(crate) fn insert(&mut self, request: Request) -> u32 {
        let sequence = Sequence::new(request, self.arrived);
        self.arrived += 1;
        match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize].1 = Some(sequence);
                slot
            }
            None => {
                self.slots.push((0, Some(sequence)));
                self.slots.len() as u32 - 1
            }
        }
    }

    /// Takes a request out; its slot's next one has another handle.
    pub(crate) fn remove(&mut self, slot: u32) -> Sequence {
        let (generation, sequence) = &mut self.slots[slot as usize];
        *generation = generation.wrapping_add(1);
        self.free.push(slot);
        sequence.take().expect("invariant: the slot is in use")
    }

    /// The request in a slot in use.
    pub(crate) fn get(&self, slot: u32) -> &Sequence {
        let sequence = self.slots[slot as usize].1.as_ref();
        sequence.expect("invariant: the slot is in use")
    }

    /// The request in a slot in use.
    pub(crate) fn get_mut(&mut self, slot: u32) -> &mut Sequence {
        let sequence = self.slots[slot as usize].1.as_mut();
        sequence.expect("invariant: the slot is in use")
    }

    /// The handle of the request in a slot.
    pub(crate) fn handle(&self, slot: u32) -> Handle {
        Handle {
            slot,
            generation: self.slots[slot as usize].0,
        }
    }

    /// The named request, unless it has ended.
    pub(crate) fn find(&mut self, handle: Handle) -> Option<&mut Sequence> {
        let (generation, sequence) = &mut self.slots[handle.slot as usize];
        sequence
            .as_mut()
            .filter(|_| *generation == handle.generation)
    }

    /// Slots in use, in order of arrival.
    pub(crate) fn live(&self) -> Vec<u32> {
        let mut live: Vec<(u64, u32)> = (0u32..)
            .zip(&self.slots)
            .filter_map(|(slot, (_, sequence))| Some((sequence.as_ref()?.ordinal, slot)))
            .collect();
        live.sort_unstable();
        live.into_iter().map(|(_, slot)| slot).collect()
    }

    /// Number of live requests.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}
