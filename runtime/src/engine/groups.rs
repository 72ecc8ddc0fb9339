//! Steps of about the same size, counted together: what kinds of steps a run consisted of.

use super::stats::StepStats;
use crate::device::step::Capacity;
use lathe_codegen::work::Span;
use std::collections::BTreeMap;

/// Sums over steps of about the same size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepGroup {
    /// Steps.
    pub steps: u64,
    /// Sequences.
    pub sequences: u64,
    /// Of these, sequences that decode.
    pub decodes: u64,
    /// Token rows.
    pub tokens: u64,
    /// Of these, rows of sequences that do not decode.
    pub prefill_tokens: u64,
    /// Cached tokens.
    pub context: u64,
    /// Time on the device.
    pub device_ns: u64,
}

impl StepGroup {
    /// The sequences of the mean step, within what the device takes. Prompts are taken to be computed in one piece
    /// where other sequences can hold the cached tokens.
    pub fn mean_step(&self, capacity: &Capacity) -> Vec<Span> {
        let steps = self.steps.max(1);
        let mean = |sum: u64| ((sum + steps / 2) / steps) as usize;
        let (new, context) = (mean(self.prefill_tokens), mean(self.context));
        let decodes = mean(self.decodes).min(capacity.max_sequences);
        let prompts = match self.sequences - self.decodes {
            0 => 0,
            n => mean(n).max(1).min(capacity.max_sequences - decodes),
        };
        let most = capacity.max_seq_len.max(1);
        let mut spans = Vec::with_capacity(decodes + prompts);
        if let Some(len) = context.saturating_sub(new).checked_div(decodes) {
            let len = len.clamp(1, most);
            spans.extend(std::iter::repeat_n(Span { rows: 1, len }, decodes));
        }
        let mut left = capacity.max_tokens.saturating_sub(decodes);
        for i in 0..prompts {
            let rows = new / prompts + usize::from(i < new % prompts);
            let rows = rows.clamp(1, most).min(left);
            let past = if decodes == 0 { context / prompts } else { 0 };
            left -= rows;
            if rows > 0 {
                let len = past.clamp(rows, most);
                spans.push(Span { rows, len });
            }
        }
        spans
    }
}

/// Groups of all steps of an engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepGroups(BTreeMap<(bool, u32, u32), StepGroup>);

impl StepGroups {
    /// Counts a step with those that decode as it does and are of its size within a factor of two.
    pub(super) fn add(&mut self, step: &StepStats) {
        let size = |n: usize| n.max(1).ilog2();
        let key = (
            step.decodes == step.sequences,
            size(step.tokens),
            size(step.sequences),
        );
        let group = self.0.entry(key).or_default();
        group.steps += 1;
        group.sequences += step.sequences as u64;
        group.decodes += step.decodes as u64;
        group.tokens += step.tokens as u64;
        group.prefill_tokens += step.prefill_tokens as u64;
        group.context += step.context;
        group.device_ns += step.device_ns;
    }

    /// The groups, those that took most of the device's time first.
    pub fn by_time(&self) -> Vec<StepGroup> {
        let mut groups: Vec<StepGroup> = self.0.values().copied().collect();
        groups.sort_by_key(|g| std::cmp::Reverse(g.device_ns));
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: Capacity = Capacity {
        max_tokens: 64,
        max_sequences: 8,
        max_seq_len: 40,
        page_size: 4,
        pages: 80,
        vocab: 10,
    };

    fn step(decodes: usize, prompts: usize, prefill_tokens: usize, context: u64) -> StepStats {
        StepStats {
            sequences: decodes + prompts,
            decodes,
            tokens: decodes + prefill_tokens,
            prefill_tokens,
            context,
            device_ns: 10,
            ..StepStats::default()
        }
    }

    #[test]
    fn steps_of_one_size_are_one_group() {
        let mut groups = StepGroups::default();
        for s in [
            step(4, 0, 0, 100),
            step(6, 0, 0, 140),
            step(1, 0, 0, 9),
            step(4, 1, 1, 50),
        ] {
            groups.add(&s);
        }
        let by_time = groups.by_time();
        assert_eq!(by_time.len(), 3);
        let first = by_time[0];
        assert_eq!((first.steps, first.sequences, first.device_ns), (2, 10, 20));
        assert_eq!(
            first.mean_step(&CAPACITY),
            vec![Span { rows: 1, len: 24 }; 5]
        );
    }

    #[test]
    fn mean_steps_with_prompts() {
        let mut groups = StepGroups::default();
        groups.add(&step(2, 2, 25, 85));
        let mean = groups.by_time()[0].mean_step(&CAPACITY);
        let (decode, rest) = mean.split_at(2);
        assert_eq!(decode, [Span { rows: 1, len: 30 }; 2]);
        assert_eq!(
            rest,
            [Span { rows: 13, len: 13 }, Span { rows: 12, len: 12 }]
        );
        // A chunk of a long prompt: the cached tokens are its own.
        let mut groups = StepGroups::default();
        groups.add(&step(0, 1, 8, 24));
        let mean = groups.by_time()[0].mean_step(&CAPACITY);
        assert_eq!(mean, [Span { rows: 8, len: 24 }]);
    }

    /// Rounding must not lead beyond what the device takes.
    #[test]
    fn mean_steps_fit_the_device() {
        let mut groups = StepGroups::default();
        groups.add(&step(8, 0, 0, 4000));
        groups.add(&step(7, 1, 57, 400));
        groups.add(&step(6, 2, 58, 400));
        for group in groups.by_time() {
            let mean = group.mean_step(&CAPACITY);
            let tokens: usize = mean.iter().map(|s| s.rows).sum();
            assert!(tokens <= 64 && mean.len() <= 8 && !mean.is_empty());
            assert!(mean.iter().all(|s| s.rows <= s.len && s.len <= 40));
        }
    }
}
