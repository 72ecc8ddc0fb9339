//! Many programs on some threads, and what became of them.

use crate::cases::{Case, Kind};
use crate::check::Verdict;
use lathe_passes::Rule;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Counts of one kind of programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Programs that have a meaning and went through.
    pub(crate) programs: u64,
    /// Of these, models with step programs.
    pub(crate) steps: u64,
    /// Of these, those whose step programs ran on the device.
    pub(crate) device: u64,
    /// Results that were compared.
    pub(crate) compared: u64,
}

/// What became of many programs.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) counts: BTreeMap<Kind, Counts>,
    /// Reports of defects, by seed.
    pub(crate) defects: BTreeMap<u64, String>,
}

impl Totals {
    pub(crate) fn programs(&self) -> u64 {
        self.counts.values().map(|c| c.programs).sum()
    }
}

/// Which seeds are run, and until when.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) first: u64,
    /// Programs at most, fit or not.
    pub(crate) seeds: u64,
    pub(crate) time: Option<Duration>,
    pub(crate) threads: usize,
    /// Stop at so many defects.
    pub(crate) defects: usize,
    /// Whether defects are reported by a small program.
    pub(crate) shrink: bool,
    /// Only programs of this kind.
    pub(crate) kind: Option<Kind>,
    pub(crate) instead: &'a [&'static Rule],
}

/// Runs the programs of seeds one after the other. Every few seconds `told` hears of the totals, of the
/// first seed that has not been begun, and of seeds that take long.
pub(crate) fn run(plan: Plan<'_>, told: &mut dyn FnMut(&Totals, u64, &[u64])) -> Totals {
    let start = Instant::now();
    let next = AtomicU64::new(plan.first);
    let stop = AtomicBool::new(false);
    let totals = Mutex::new(Totals::default());
    let running: Mutex<BTreeMap<u64, Instant>> = Mutex::new(BTreeMap::new());
    let work = || {
        loop {
            let late = plan.time.is_some_and(|t| start.elapsed() > t);
            if late || stop.load(Ordering::Relaxed) {
                break;
            }
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed - plan.first >= plan.seeds {
                break;
            }
            running.lock().unwrap().insert(seed, Instant::now());
            one(seed, &plan, &totals);
            running.lock().unwrap().remove(&seed);
            if totals.lock().unwrap().defects.len() >= plan.defects {
                stop.store(true, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..plan.threads)
            .map(|i| {
                let thread = std::thread::Builder::new().name(format!("fuzz {i}"));
                // Compilation recurses over programs.
                let thread = thread.stack_size(16 << 20).spawn_scoped(scope, work);
                thread.expect("a thread")
            })
            .collect();
        let mut last = Instant::now();
        while threads.iter().any(|t| !t.is_finished()) {
            std::thread::sleep(Duration::from_millis(20));
            if last.elapsed() > Duration::from_secs(10) {
                last = Instant::now();
                let slow = running.lock().unwrap();
                let slow = slow.iter().filter(|(_, t)| t.elapsed() > SLOW);
                let slow: Vec<u64> = slow.map(|(seed, _)| *seed).collect();
                told(&totals.lock().unwrap(), next.load(Ordering::Relaxed), &slow);
            }
        }
    });
    let totals = totals.into_inner().unwrap();
    told(&totals, next.load(Ordering::Relaxed), &[]);
    totals
}

/// A program that takes longer is reported, as one that may not end.
const SLOW: Duration = Duration::from_secs(20);

fn one(seed: u64, plan: &Plan<'_>, totals: &Mutex<Totals>) {
    let case = match plan.kind {
        Some(kind) => Case::of(kind, seed),
        None => Case::new(seed),
    };
    let Some(case) = case else { return };
    let verdict = case.check(plan.instead);
    let report = match &verdict {
        Verdict::Defect(d) => Some(case.report(d, plan.instead, plan.shrink)),
        _ => None,
    };
    // At once: a run that is stopped has told what it found.
    if let Some(report) = report.as_ref().filter(|_| plan.shrink) {
        println!("{report}");
    }
    let mut totals = totals.lock().unwrap();
    let counts = totals.counts.entry(case.kind).or_default();
    match verdict {
        Verdict::Unfit => {}
        Verdict::Defect(_) => counts.programs += 1,
        Verdict::Passed(reach) => {
            counts.programs += 1;
            counts.steps += u64::from(reach.steps);
            counts.device += u64::from(reach.device);
            counts.compared += reach.compared as u64;
        }
    }
    totals.defects.extend(report.map(|r| (seed, r)));
}
