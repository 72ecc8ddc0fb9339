//! `selftest`: every kernel family of this machine's device against another implementation.

use clap::Args;
use lathe_runtime::selftest::{Report, Subject, Tester};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use crate::bench::files::{check_writable, write_json};
use crate::bench::table::{Align, table};
use crate::errors::usage_error;
use crate::global_options::GlobalOptions;
use crate::selftest::{Effort, subjects};
use crate::target::{Target, cost_model};

/// Test every kernel family of this machine's device on random inputs: a GPU against the CPU, the CPU
/// against the interpreter.
#[derive(Debug, Args)]
pub struct Selftest {
    /// Test only families whose names contain this
    #[arg(long, value_name = "FAMILY")]
    filter: Option<String>,
    /// Seed of weights and inputs
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// A few models and sizes: seconds instead of minutes
    #[arg(long)]
    quick: bool,
    /// Write the results to a JSON file, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl Selftest {
    /// Runs the comparisons; the command fails if one of them fails.
    pub fn run(&self, global: &GlobalOptions) -> anyhow::Result<()> {
        if let Some(path) = &self.json {
            check_writable(path)?;
        }
        let target = Target::resolve(global.device, global.kernel_cache())?;
        let effort = match self.quick {
            true => Effort::Quick,
            false => Effort::Full,
        };
        let start = Instant::now();
        let mut tester = target.tester(self.filter.clone())?;
        let device = target.into_device();
        let slow = tester.has_slow_reference();
        let all = subjects(&cost_model(&*device), slow, effort, self.seed)?;
        let mut report = Report::default();
        self.compare(&mut *tester, &all, effort, &mut report)?;
        // A family without a case was not tested: only a full run promises them all.
        let promised = match self.filter {
            Some(_) => &[],
            None => tester.families(),
        };
        let uncovered: Vec<&str> = promised
            .iter()
            .copied()
            .filter(|f| !report.covers(f))
            .collect();
        let name = device.name();
        let seconds = start.elapsed().as_secs_f64();
        if let Some(path) = &self.json {
            write_json(path, b"  ", &self.to_json(&name, &report, &uncovered))?;
        }
        if report.rows.is_empty() {
            let filter = self.filter.as_deref().unwrap_or("");
            let error = format!(
                "--filter {filter}: no family has this in its name; without a filter all are listed"
            );
            return Err(usage_error(error));
        }
        print(&report, &uncovered)?;
        let (cases, failed) = report.totals();
        writeln!(
            std::io::stdout(),
            "{cases} cases, {failed} failed ({name}, seed {}, {seconds:.0} s)",
            self.seed
        )?;
        anyhow::ensure!(failed == 0, "{failed} of {cases} cases failed");
        anyhow::ensure!(
            uncovered.is_empty() || effort == Effort::Quick,
            "no case tested {}",
            uncovered.join(", ")
        );
        Ok(())
    }

    fn compare(
        &self,
        tester: &mut dyn Tester,
        all: &[Subject],
        effort: Effort,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let start = Instant::now();
        let kernels = tester.prepare(all)?;
        if kernels > 0 {
            let seconds = start.elapsed().as_secs_f64();
            tracing::info!("{kernels} kernels in {seconds:.1} s");
        }
        for subject in all {
            let (start, known) = (Instant::now(), report.failures.len());
            tester.check(subject, self.seed, report)?;
            for f in &report.failures[known..] {
                tracing::warn!("{}: {}: {}", f.family, f.place, f.what);
            }
            let o = &subject.options;
            tracing::info!(
                "{}, {} tokens a page: {:.1} s",
                subject.name,
                o.page_size,
                start.elapsed().as_secs_f64()
            );
        }
        let steps = if effort == Effort::Quick { 50 } else { 300 };
        // The first subject, and the first of another element type.
        let first = all.first();
        let other = all
            .iter()
            .find(|s| first.is_some_and(|f| f.plan.dtype != s.plan.dtype));
        for subject in first.into_iter().chain(other) {
            let start = Instant::now();
            if tester.check_sessions(subject, steps, self.seed, report)? {
                tracing::info!(
                    "{}, whole steps: {:.1} s",
                    subject.name,
                    start.elapsed().as_secs_f64()
                );
            }
        }
        Ok(())
    }

    fn to_json(&self, device: &str, report: &Report, uncovered: &[&str]) -> serde_json::Value {
        let (cases, failed) = report.totals();
        let rows: Vec<_> = report
            .rows
            .iter()
            .map(|((family, dtype), r)| {
                json!({
                    "family": family,
                    "dtype": dtype.name(),
                    "cases": r.cases,
                    "failed": r.failed,
                    "error": r.worst.error,
                    "tolerance": r.worst.tolerance,
                })
            })
            .collect();
        let failures: Vec<_> = report
            .failures
            .iter()
            .map(|f| json!({"family": f.family, "place": f.place, "what": f.what}))
            .collect();
        json!({
            "device": device,
            "seed": self.seed,
            "quick": self.quick,
            "cases": cases,
            "failed": failed,
            "families": rows,
            "failures": failures,
            "uncovered": uncovered,
        })
    }
}

fn print(report: &Report, uncovered: &[&str]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let head = [
        "family",
        "type",
        "cases",
        "failed",
        "worst error",
        "tolerance",
        "verdict",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for ((family, dtype), row) in &report.rows {
        let (error, tolerance) = match row.worst.tolerance == 0.0 {
            true => ("equal".to_owned(), String::new()),
            false => (
                format!("{:.1e}", row.worst.error),
                format!("{:.1e}", row.worst.tolerance),
            ),
        };
        let verdict = if row.failed == 0 { "ok" } else { "FAILED" };
        rows.push(vec![
            family.clone(),
            dtype.name().to_owned(),
            row.cases.to_string(),
            row.failed.to_string(),
            error,
            tolerance,
            verdict.to_owned(),
        ]);
    }
    let align = |column| match column {
        0 | 1 | 6 => Align::Left,
        _ => Align::Right,
    };
    write!(out, "{}", table(&rows, align))?;
    for f in &report.failures {
        writeln!(out, "FAILED {}: {}: {}", f.family, f.place, f.what)?;
    }
    if !uncovered.is_empty() {
        writeln!(out, "no case: {}", uncovered.join(", "))?;
    }
    Ok(())
}
