//! What the engine measures of its steps.

use std::time::Instant;

/// The clock of an engine and of whoever measures it: nanoseconds since its start.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// A clock that shows 0 now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Nanoseconds since the start.
    pub fn now_ns(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// One step as the scheduler saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepStats {
    /// Number of the step, from 0.
    pub step: u64,
    /// Sequences in it.
    pub sequences: usize,
    /// Of these, sequences that decode: one row, with tokens of their own before it.
    pub decodes: usize,
    /// Token rows.
    pub tokens: usize,
    /// Of these, rows of sequences that do not decode.
    pub prefill_tokens: usize,
    /// Cached tokens of its sequences once it has run.
    pub context: u64,
    /// Pages in use while it ran.
    pub pages_used: usize,
    /// Requests admitted and not finished when it was planned.
    pub running: usize,
    /// Requests that waited for admission when it was planned.
    pub waiting: usize,
    /// Requests that ended with its tokens.
    pub finished: usize,
    /// Sequences that lost their pages when it was planned.
    pub preempted: usize,
    /// When it was handed to the device.
    pub submitted_ns: u64,
    /// When its tokens were known.
    pub collected_ns: u64,
    /// Host time spent on planning it.
    pub plan_ns: u64,
    /// Time from the step before (or from the start of its own planning after an idle time) to the
    /// end of this one.
    pub period_ns: u64,
    /// Time on the device, as the device says; 0 when it does not.
    pub device_ns: u64,
    /// Part of the period in which the device waited for the host.
    pub host_gap_ns: u64,
}

impl StepStats {
    /// Closes the measurement: the step before ended at `from_ns`, this one now, at `now_ns`.
    pub(crate) fn close(&mut self, from_ns: u64, now_ns: u64, device_seconds: f64) {
        self.collected_ns = now_ns;
        self.period_ns = now_ns.saturating_sub(from_ns);
        self.device_ns = (device_seconds * 1e9) as u64;
        self.host_gap_ns = if self.device_ns > 0 {
            self.period_ns.saturating_sub(self.device_ns)
        } else {
            // Without a device clock: a step that was submitted before the last one ended has no gap.
            self.submitted_ns.saturating_sub(from_ns)
        };
    }
}

/// Sums over all steps of an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    /// Steps.
    pub steps: u64,
    /// Steps in which all sequences decode.
    pub decode_steps: u64,
    /// Sequences of these steps, summed.
    pub decode_sequences: u64,
    /// Cached tokens of these steps, summed.
    pub decode_context: u64,
    /// Sum of the periods of these steps.
    pub decode_period_ns: u64,
    /// Token rows.
    pub tokens: u64,
    /// Tokens that requests received.
    pub generated: u64,
    /// Rows computed for tokens that nobody wanted: a stop token or a cancellation was known one
    /// step too late.
    pub discarded: u64,
    /// Sequences that lost their pages.
    pub preemptions: u64,
    /// Most sequences in a step.
    pub peak_sequences: usize,
    /// Most pages in use.
    pub peak_pages: usize,
    /// Pages in use, summed over steps.
    pub pages_by_step: u64,
    /// Sum of the periods of all steps.
    pub period_ns: u64,
    /// Sum of the device's times.
    pub device_ns: u64,
    /// Sum of the host gaps.
    pub host_gap_ns: u64,
    /// Largest host gap.
    pub max_host_gap_ns: u64,
    /// Sum of planning times.
    pub plan_ns: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, step: &StepStats) {
        self.steps += 1;
        if step.decodes == step.sequences {
            self.decode_steps += 1;
            self.decode_sequences += step.sequences as u64;
            self.decode_context += step.context;
            self.decode_period_ns += step.period_ns;
        }
        self.tokens += step.tokens as u64;
        self.preemptions += step.preempted as u64;
        self.peak_sequences = self.peak_sequences.max(step.sequences);
        self.peak_pages = self.peak_pages.max(step.pages_used);
        self.pages_by_step += step.pages_used as u64;
        self.period_ns += step.period_ns;
        self.device_ns += step.device_ns;
        self.host_gap_ns += step.host_gap_ns;
        self.max_host_gap_ns = self.max_host_gap_ns.max(step.host_gap_ns);
        self.plan_ns += step.plan_ns;
    }

    /// Mean host gap of a step in nanoseconds.
    pub fn mean_host_gap_ns(&self) -> f64 {
        if self.steps == 0 {
            return 0.0;
        }
        self.host_gap_ns as f64 / self.steps as f64
    }

    /// Mean pages in use during a step.
    pub fn mean_pages(&self) -> f64 {
        if self.steps == 0 {
            return 0.0;
        }
        self.pages_by_step as f64 / self.steps as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gap_with_and_without_a_device_clock() {
        let mut step = StepStats {
            submitted_ns: 130,
            ..StepStats::default()
        };
        step.close(100, 200, 80e-9);
        assert_eq!(
            (step.period_ns, step.device_ns, step.host_gap_ns),
            (100, 80, 20)
        );
        step.close(100, 200, 0.0);
        assert_eq!(step.host_gap_ns, 30);
        // Submitted while the step before still ran.
        step.submitted_ns = 90;
        step.close(100, 200, 0.0);
        assert_eq!(step.host_gap_ns, 0);
        let mut totals = Totals::default();
        totals.add(&step);
        step.host_gap_ns = 10;
        totals.add(&step);
        assert_eq!(
            (totals.mean_host_gap_ns(), totals.max_host_gap_ns),
            (5.0, 10)
        );
        assert_eq!(Totals::default().mean_pages(), 0.0);
    }
}
