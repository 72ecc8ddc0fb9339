//! A run under way: requests get their slots, steps are run, results are taken.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use lathe_runtime::engine::{
    Engine, EngineConfig, EngineError, FinishReason, Policy, Progress, Request, StepStats,
};

use super::results::{Served, iteration, record};
use crate::bench::metrics::RequestRecord;
use crate::bench::report::Incomplete;

/// Why a run ended early.
pub(super) enum Stopped {
    Interrupted,
    Failed(EngineError),
}

/// A run under way.
pub(super) struct Run<'e> {
    engine: Engine<'e>,
    streaming: bool,
    /// Requests of a static batch, if requests come in such.
    batch: Option<usize>,
    in_flight: usize,
    records: Vec<RequestRecord>,
    unfinished: Vec<RequestRecord>,
    steps: Vec<StepStats>,
}

impl<'e> Run<'e> {
    pub(super) fn new(engine: Engine<'e>, config: &EngineConfig, streaming: bool) -> Self {
        Self {
            engine,
            streaming,
            batch: (config.policy == Policy::Static).then_some(config.max_batch_size),
            in_flight: 0,
            records: Vec::new(),
            unfinished: Vec::new(),
            steps: Vec::new(),
        }
    }

    /// Runs all requests, at most `slots` of them at a time.
    pub(super) fn all(
        &mut self,
        mut requests: VecDeque<Request>,
        slots: usize,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(usize),
    ) -> Result<(), Stopped> {
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(Stopped::Interrupted);
            }
            // The requests of a static batch start together, when the one before has ended.
            let most = match self.batch {
                Some(_) if self.in_flight > 0 => 0,
                Some(batch) => batch.min(slots),
                None => slots,
            };
            while self.in_flight < most {
                let Some(request) = requests.pop_front() else {
                    break;
                };
                self.issue(request);
            }
            let outcome = self.engine.iterate();
            let n_before = self.records.len();
            self.take_results();
            if self.records.len() > n_before {
                progress(self.records.len());
            }
            let idle = outcome.map_err(Stopped::Failed)? == Progress::Idle;
            if idle && requests.is_empty() && self.in_flight == 0 {
                return Ok(());
            }
        }
    }

    /// Gives a request its slot: here its clock starts.
    fn issue(&mut self, mut request: Request) {
        request.arrival_ns = self.engine.clock().now_ns();
        let (id, isl, start_ns) = (request.id, request.prompt.len(), request.arrival_ns);
        match self.engine.add(request) {
            Ok(()) => self.in_flight += 1,
            Err(error) => self.records.push(RequestRecord {
                id,
                isl,
                start_ns,
                end_ns: start_ns,
                error: Some(error.to_string()),
                ..RequestRecord::default()
            }),
        }
    }

    fn take_results(&mut self) {
        for finished in self.engine.take_finished() {
            self.in_flight -= 1;
            let (reason, mut record) = record(finished, self.streaming);
            if self.batch.is_some() {
                // Steps of the others' prompts are none of its own.
                record.decode_iteration = (record.n_output() as u64).saturating_sub(1);
            }
            match reason {
                FinishReason::Aborted => self.unfinished.push(record),
                _ => self.records.push(record),
            }
        }
        self.engine.take_events();
        self.steps.extend(self.engine.take_steps());
    }

    /// What the run gave, of `planned` requests.
    pub(super) fn finish(mut self, outcome: Result<(), Stopped>, planned: usize) -> Served {
        self.engine.abort();
        self.take_results();
        self.records.sort_by_key(|record| record.id);
        self.unfinished.sort_by_key(|record| record.id);
        let finished = self.records.len();
        // What was in flight when Ctrl-C was pressed may have been the last.
        let incomplete = outcome
            .err()
            .filter(|_| finished < planned)
            .map(|stopped| Incomplete {
                reason: match stopped {
                    Stopped::Interrupted => "interrupted".into(),
                    Stopped::Failed(error) => error.to_string(),
                },
                finished: self
                    .records
                    .iter()
                    .filter(|record| record.error.is_none())
                    .count(),
                planned,
            });
        let capacity = self.engine.capacity();
        Served {
            iterations: self
                .steps
                .iter()
                .map(|step| iteration(step, &capacity))
                .collect(),
            totals: *self.engine.totals(),
            groups: self.engine.groups().by_time(),
            classes: None,
            records: self.records,
            unfinished: self.unfinished,
            incomplete,
        }
    }
}
