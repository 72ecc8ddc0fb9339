//! The scheduler against the simulated device.

mod behaviour;
mod faults;
mod workloads;

use std::collections::BTreeMap;

use super::batcher::Batcher;
use super::{
    Clock, Engine, EngineConfig, Finished, Progress, Request, TokenEvent, Totals, pages_for,
};
use crate::device::executor::Executor;
use crate::device::step::Capacity;
use crate::sampling::SamplingParams;

/// A small device.
fn capacity() -> Capacity {
    Capacity {
        max_tokens: 16,
        max_sequences: 4,
        max_seq_len: 32,
        page_size: 4,
        pages: 32,
        vocab: 50,
    }
}

fn request(id: u64, prompt: &[i32], max_new: usize) -> Request {
    Request {
        id,
        prompt: prompt.to_vec(),
        max_new,
        stop: Vec::new(),
        params: SamplingParams::default(),
        arrival_ns: 0,
    }
}

/// What a run gave.
#[derive(Debug, Default)]
struct Outcome {
    finished: BTreeMap<u64, Finished>,
    events: Vec<TokenEvent>,
    totals: Totals,
    iterations: usize,
}

impl Outcome {
    fn take(&mut self, engine: &mut Engine<'_>) {
        self.events.extend(engine.take_events());
        for finished in engine.take_finished() {
            let id = finished.id;
            assert!(
                self.finished.insert(id, finished).is_none(),
                "{id} ended twice"
            );
        }
        self.totals = *engine.totals();
    }
}

/// Runs all requests, handed in at once, to their end.
fn run(executor: &mut dyn Executor, config: EngineConfig, requests: &[Request]) -> Outcome {
    let mut engine = Engine::new(executor, config, Clock::start()).unwrap();
    for request in requests {
        engine.add(request.clone()).unwrap();
    }
    let mut outcome = Outcome::default();
    while engine.iterate().unwrap() == Progress::Busy {
        check_invariants(engine.batcher());
        outcome.take(&mut engine);
        outcome.iterations += 1;
    }
    assert!(engine.is_idle() && engine.live() == 0);
    assert_eq!(engine.batcher().pool.used(), 0, "pages leaked");
    outcome
}

/// What holds between any two calls of the batcher.
fn check_invariants(batcher: &Batcher) {
    let sequences = &batcher.sequences;
    let ordinals: Vec<u64> = batcher
        .running
        .iter()
        .chain(&batcher.waiting)
        .map(|&slot| sequences.get(slot).ordinal)
        .collect();
    assert!(
        ordinals.is_sorted_by(|a, b| a < b),
        "order of arrival: {ordinals:?}"
    );
    let mut owned: Vec<i32> = Vec::new();
    for slot in sequences.live() {
        let sequence = sequences.get(slot);
        let runs = batcher.running.contains(&slot);
        assert!(
            runs || sequence.pages.is_empty(),
            "pages of a sequence that does not run"
        );
        assert!(
            !runs || sequence.computed <= sequence.pages.len() * batcher.batch_page_size(),
            "tokens without a page"
        );
        owned.extend(&sequence.pages);
    }
    let n_owned = owned.len();
    owned.sort_unstable();
    owned.dedup();
    assert_eq!(owned.len(), n_owned, "a page has two owners");
    assert_eq!(n_owned, batcher.pool.used(), "pages leaked");
    assert!(owned.iter().all(|&page| batcher.pool.is_used(page)));
}

/// The most pages that the running requests need in any step to come, if none ends early and a prompt
/// that is not through is computed as fast as possible.
fn pages_to_come(batcher: &Batcher) -> usize {
    let mut lives: Vec<(usize, usize)> = batcher
        .running
        .iter()
        .map(|&slot| batcher.sequences.get(slot))
        .map(|s| (s.len().max(s.computed + 1), s.max_new - s.n_sampled))
        .collect();
    let mut most = 0;
    while !lives.is_empty() {
        let pages = |(tokens, _): &(usize, usize)| pages_for(*tokens, batcher.batch_page_size());
        most = most.max(lives.iter().map(pages).sum());
        lives.retain_mut(|(tokens, left)| {
            (*tokens, *left) = (*tokens + 1, left.saturating_sub(1));
            *left > 0
        });
    }
    most
}
