//! Programs that nobody wrote, through everything that lathe does to programs, against the interpreter.
//!
//! A seed is a program: `docs/fuzzing.md` says how to run many, and what they found.

mod campaign;
mod cases;
mod check;
mod device;
mod mutate;
mod oracle;
mod programs;
mod rng;
mod shrink;
mod state;
mod wrong;

use campaign::{Plan, Totals, run};
use state::State;
use std::sync::Once;
use std::time::Duration;

/// Panics of the threads that check programs are kept for the reports.
pub(crate) fn begin() {
    static ONCE: Once = Once::new();
    ONCE.call_once(check::keep_panics);
}

pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// A number of the environment.
fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok().filter(|v| !v.is_empty())?;
    let number = value.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

fn summary(totals: &Totals) -> String {
    let counts = totals.counts.iter().map(|(kind, c)| {
        format!(
            "{kind:?}: {} programs, {} with steps, {} of them on the device, {} results compared",
            c.programs, c.steps, c.device, c.compared
        )
    });
    counts.collect::<Vec<_>>().join("\n")
}

fn reports(totals: &Totals) -> String {
    let all: Vec<&str> = totals.defects.values().map(String::as_str).collect();
    all.join("\n")
}

/// The first programs of all kinds.
#[test]
fn programs_keep_their_meaning() {
    begin();
    let plan = Plan {
        first: 0,
        seeds: 2600,
        time: None,
        threads: threads(),
        defects: 5,
        shrink: true,
        kind: None,
        instead: &[],
    };
    let totals = run(plan, &mut |_, _, slow| {
        assert!(slow.is_empty(), "seeds {slow:?} do not end");
    });
    assert!(totals.defects.is_empty(), "{}", reports(&totals));
    // Most of them are programs, and go all the way.
    let device: u64 = totals.counts.values().map(|c| c.device).sum();
    let enough = totals.programs() >= 2000 && device >= 500;
    assert!(enough, "{}", summary(&totals));
}

/// As many programs as there is time for: `make fuzz SEED=.. MINUTES=..`.
#[test]
#[ignore = "runs for MINUTES"]
fn long() {
    begin();
    let minutes = number("MINUTES").unwrap_or(10);
    let mut state = State::read(number("SEED"));
    let plan = Plan {
        first: state.next,
        seeds: if minutes == 0 { 1 } else { u64::MAX },
        time: (minutes > 0).then(|| Duration::from_secs(60 * minutes)),
        threads: number("THREADS").map_or(threads(), |n| n as usize),
        defects: number("DEFECTS").map_or(20, |n| n as usize),
        shrink: true,
        kind: None,
        instead: &[],
    };
    let before = state.clone();
    let totals = run(plan, &mut |totals, next, slow| {
        state = before.with(totals, next, slow);
        state.tell(totals, plan.first, slow);
    });
    println!("{}", summary(&totals));
    assert!(totals.defects.is_empty(), "{}", reports(&totals));
}
