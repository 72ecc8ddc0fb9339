//! Where a long run stopped, so that the next one goes on from there.

use crate::campaign::Totals;
use std::path::PathBuf;
use std::time::Instant;

/// Seeds that were run, and what came of them since the file was begun.
#[derive(Clone, Debug)]
pub(crate) struct State {
    /// The file; none for a run that asks for a seed.
    file: Option<PathBuf>,
    /// The next seed.
    pub(crate) next: u64,
    programs: u64,
    defects: u64,
    begun: Instant,
}

impl State {
    /// Where the last run stopped, or a seed that is asked for.
    pub(crate) fn read(seed: Option<u64>) -> State {
        let folder = std::env::var_os("STATE").map(PathBuf::from);
        let file = folder.filter(|_| seed.is_none()).map(|f| f.join("state"));
        let text = file.as_ref().and_then(|f| std::fs::read_to_string(f).ok());
        let numbers: Vec<u64> = (text.iter())
            .flat_map(|t| t.split_whitespace())
            .filter_map(|n| n.parse().ok())
            .collect();
        let at = |i: usize| numbers.get(i).copied().unwrap_or(0);
        State {
            file,
            next: seed.unwrap_or(at(0)),
            programs: at(1),
            defects: at(2),
            begun: Instant::now(),
        }
    }

    /// After some more programs; those that have not ended are run again.
    pub(crate) fn with(&self, totals: &Totals, next: u64, slow: &[u64]) -> State {
        State {
            next: slow.iter().copied().min().unwrap_or(next).min(next),
            programs: self.programs + totals.programs(),
            defects: self.defects + totals.defects.len() as u64,
            ..self.clone()
        }
    }

    /// Prints where the run is, and keeps it.
    pub(crate) fn tell(&self, totals: &Totals, first: u64, slow: &[u64]) {
        let seconds = self.begun.elapsed().as_secs_f64();
        let rate = totals.programs() as f64 / seconds.max(0.001);
        println!(
            "seeds {first}..{}: {} programs, {rate:.0}/s, {} defects; {} programs and {} defects in all",
            self.next,
            totals.programs(),
            totals.defects.len(),
            self.programs,
            self.defects
        );
        for seed in slow {
            println!("seed {seed} takes long");
        }
        if let Some(file) = &self.file {
            let folder = file.parent().expect("a file in a folder");
            let text = format!("{} {} {}\n", self.next, self.programs, self.defects);
            let kept = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(file, text));
            kept.unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        }
    }
}
