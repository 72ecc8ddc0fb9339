//! Where the time of a compilation goes.

use indexmap::IndexMap;
use std::time::{Duration, Instant};

/// Attributes wall time to phases without gaps.
#[derive(Debug)]
pub(super) struct Clock {
    last: Instant,
    laps: IndexMap<&'static str, Duration>,
}

impl Clock {
    /// A clock that starts now.
    pub(super) fn start() -> Clock {
        Clock {
            last: Instant::now(),
            laps: IndexMap::new(),
        }
    }

    /// Ends a phase: the time since the last one is its own.
    pub(super) fn lap(&mut self, phase: &'static str) -> Duration {
        let now = Instant::now();
        let d = now - self.last;
        self.last = now;
        *self.laps.entry(phase).or_default() += d;
        d
    }

    /// The phases with their times, in the order in which they first ended.
    pub(super) fn laps(self) -> IndexMap<&'static str, Duration> {
        self.laps
    }
}
