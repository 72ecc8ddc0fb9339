//! Time by phase, without gaps.

use indexmap::IndexMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Target of the events that say how long a phase took.
pub const PHASE: &str = "lathe::phase";

/// Attributes the wall time of a command to phases. What no phase claims is shown as
/// `unattributed`.
#[derive(Debug)]
pub struct Phases {
    start: Instant,
    last: Instant,
    laps: IndexMap<String, Duration>,
}

impl Default for Phases {
    fn default() -> Self {
        Phases::new()
    }
}

impl Phases {
    /// Starts the clock.
    pub fn new() -> Phases {
        let now = Instant::now();
        Phases {
            start: now,
            last: now,
            laps: IndexMap::new(),
        }
    }

    /// Ends a phase: all time since the last one is its own.
    pub fn end(&mut self, phase: &str) -> Duration {
        let now = Instant::now();
        let d = now - self.last;
        self.last = now;
        *self.laps.entry(phase.to_string()).or_default() += d;
        tracing::debug!(target: PHASE, phase, seconds = d.as_secs_f64(), "phase");
        d
    }

    /// Ends a phase that measured its own parts: they are listed instead of it, and what they do
    /// not add up to stays unattributed.
    pub fn end_parts(&mut self, phase: &str, parts: &IndexMap<&'static str, Duration>) {
        self.last = Instant::now();
        for (part, d) in parts {
            tracing::debug!(target: PHASE, phase, part, seconds = d.as_secs_f64(), "phase");
            *self.laps.entry(format!("{phase}: {part}")).or_default() += *d;
        }
    }

    /// Wall time since the start.
    pub fn wall(&self) -> Duration {
        self.start.elapsed()
    }

    /// The table of phases.
    pub fn table(&self) -> String {
        let wall = self.wall();
        let known: Duration = self.laps.values().sum();
        let rest = wall.saturating_sub(known);
        let mut out = String::from("time\n");
        let mut line = |name: &str, d: Duration| {
            let share = 100.0 * d.as_secs_f64() / wall.as_secs_f64().max(1e-9);
            let _ = writeln!(out, "  {name:<22} {:>10} {share:>6.1} %", duration(d));
        };
        for (name, d) in &self.laps {
            line(name, *d);
        }
        line("unattributed", rest);
        line("wall", wall);
        out
    }

    /// Each phase with its time, in order.
    pub fn laps(&self) -> &IndexMap<String, Duration> {
        &self.laps
    }
}

/// A duration in the unit that suits it: `340 µs`, `12.5 ms`, `3.20 s`.
pub fn duration(d: Duration) -> String {
    picoseconds(
        u64::try_from(d.as_nanos())
            .unwrap_or(u64::MAX)
            .saturating_mul(1000),
    )
}

/// A time in picoseconds in the unit that suits it.
pub fn picoseconds(ps: u64) -> String {
    let us = ps as f64 / 1e6;
    match us {
        _ if us >= 1e6 => format!("{:.2} s", us / 1e6),
        _ if us >= 1e4 => format!("{:.1} ms", us / 1e3),
        _ if us >= 1e3 => format!("{:.2} ms", us / 1e3),
        _ if us >= 10.0 => format!("{us:.0} µs"),
        _ => format!("{us:.1} µs"),
    }
}

/// A count of bytes: `512 B`, `1.50 MiB`, `14.96 GiB`.
pub fn bytes(n: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut v = n;
    let mut unit = 0;
    while v >= 1024.0 && unit + 1 < UNITS.len() {
        v /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{v:.0} B")
    } else {
        format!("{v:.2} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(picoseconds(1_200_000), "1.2 µs");
        assert_eq!(picoseconds(12_345_678_900), "12.3 ms");
        assert_eq!(duration(Duration::from_millis(3200)), "3.20 s");
        assert_eq!(bytes(512.0), "512 B");
        assert_eq!(bytes(1024.0 * 1024.0 * 1.5), "1.50 MiB");
    }

    #[test]
    fn phases_add_up() {
        let mut p = Phases::new();
        std::thread::sleep(Duration::from_millis(5));
        p.end("sleep");
        let parts: IndexMap<&'static str, Duration> = [("a", Duration::ZERO)].into();
        p.end_parts("passes", &parts);
        let table = p.table();
        for name in ["sleep", "passes: a", "unattributed", "wall"] {
            assert!(table.contains(name), "{table}");
        }
        let known: Duration = p.laps().values().sum();
        assert!(known <= p.wall());
    }
}
