//! `opt`: passes on a program in text form. The tool behind the file tests.

use std::io::Write as _;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context;
use clap::Args;
use lathe_ir::foreign::{self, Kind};
use lathe_ir::{Graph, text, verify};
use lathe_passes::egraph::cost::{CostPoint, DeviceModel};
use lathe_passes::opt::{Goal, OptReport, run};
use lathe_passes::pipeline::CompileError;
use lathe_passes::trial::difference;
use lathe_passes::{Stage, chains, rules};

use crate::config::nearest;
use crate::console::say;
use crate::errors::{Problems, usage_error};
use crate::target::named;

/// Run passes on a program in text form and print the result
#[derive(Debug, Args)]
pub struct Opt {
    /// File with the program; - is standard input
    #[arg(default_value = "-", value_name = "FILE")]
    file: PathBuf,
    /// Stages and rules, run in this order, and chains; `lathe passes` lists them
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    passes: Vec<String>,
    /// What the result is chosen by: size, rewritten, decode[:BATCH], prefill[:TOKENS]
    #[arg(long, default_value = "prefill", value_name = "GOAL")]
    goal: GoalChoice,
    /// Device of the goals that are times: h100, h200, cpu; the same on every machine
    #[arg(long, value_name = "NAME", default_value = "h100")]
    target: String,
    /// Check the program before and after
    #[arg(long)]
    verify: bool,
    /// Evaluate the program before and after on random inputs, and say to stderr where they differ
    #[arg(long)]
    check: bool,
    /// Print matches, e-nodes and cost to stderr
    #[arg(long)]
    stats: bool,
}

/// `--goal`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GoalChoice {
    /// The fewest operations.
    Size,
    /// The fewest of the given operations.
    Rewritten,
    /// The least time to decode so many sequences.
    Decode(u32),
    /// The least time for so many tokens.
    Prefill(u32),
}

impl FromStr for GoalChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<GoalChoice, String> {
        let (word, n) = match s.split_once(':') {
            Some((word, n)) => {
                let n = n.parse::<u32>().ok().filter(|&n| n > 0);
                (
                    word,
                    Some(n.ok_or("expected a positive integer after ':'")?),
                )
            }
            None => (s, None),
        };
        match (word, n) {
            ("size", None) => Ok(GoalChoice::Size),
            ("rewritten", None) => Ok(GoalChoice::Rewritten),
            ("decode", n) => Ok(GoalChoice::Decode(n.unwrap_or(1))),
            ("prefill", n) => Ok(GoalChoice::Prefill(n.unwrap_or(2048))),
            _ => Err("expected size, rewritten, decode[:BATCH] or prefill[:TOKENS]".to_string()),
        }
    }
}

impl GoalChoice {
    /// The goal on a device.
    pub(crate) fn on(self, device: DeviceModel) -> Goal {
        match self {
            GoalChoice::Size => Goal::Size,
            GoalChoice::Rewritten => Goal::Rewritten,
            GoalChoice::Decode(n) => Goal::Time(CostPoint::decode(n.into(), 512, device)),
            GoalChoice::Prefill(n) => Goal::Time(CostPoint::prefill(n.into(), device)),
        }
    }
}

impl Opt {
    /// Runs the command.
    pub fn run(&self) -> anyhow::Result<()> {
        let (name, source) = if self.file.as_os_str() == "-" {
            let source = foreign::read_text_from(std::io::stdin().lock(), Kind::Program);
            ("standard input".to_string(), source)
        } else {
            let source = foreign::read_text(&self.file, Kind::Program);
            (self.file.display().to_string(), source)
        };
        let source = source.with_context(|| name.clone())?;
        let graph = text::parse(&source).map_err(|e| Problems::of_program(&name, &e))?;
        if self.verify {
            check(&name, &graph)?;
        }
        let device = named(&self.target)?;
        let passes: Vec<&str> = self.passes.iter().map(String::as_str).collect();
        let report = run(&graph, &passes, &self.goal.on(device)).map_err(with_nearest)?;
        if self.verify {
            check("the result", &report.graph)?;
        }
        if self.stats {
            let matches: Vec<String> = report
                .matches
                .iter()
                .map(|(r, n)| format!("{r} {n}"))
                .collect();
            say(&format!(
                "matches: {}; e-nodes {} in {} classes; cost {}",
                matches.join(", "),
                report.nodes,
                report.classes,
                report.cost
            ));
        }
        let mut out = std::io::stdout().lock();
        out.write_all(text::print(&report.graph).as_bytes())?;
        out.flush()?;
        if self.check {
            evaluate(&name, &graph, &report)?;
        }
        Ok(())
    }
}

/// Random inputs on which programs are compared.
const TRIALS: u64 = 4;
/// Largest difference of two numbers, relative to the largest of their result: rules keep the meaning over
/// the reals, and evaluation is in f64.
const TOLERANCE: f64 = 1e-9;

/// Compares a program and its rewritten form on random inputs.
fn evaluate(name: &str, before: &Graph, report: &OptReport) -> anyhow::Result<()> {
    for seed in 0..TRIALS {
        let found = difference(before, &report.graph, seed, TOLERANCE);
        match found.map_err(|e| anyhow::anyhow!("{name}: cannot be evaluated {e}"))? {
            None => {}
            Some(d) => {
                let assumed = report.assumptions.first();
                let assumed =
                    assumed.map_or(String::new(), |a| format!("; a rule assumes that {a}"));
                let what = format!("{name}: the passes change its meaning: {d}{assumed}");
                return Err(anyhow::anyhow!(what));
            }
        }
    }
    say(&format!(
        "equal on {TRIALS} random inputs, to {TOLERANCE:e}"
    ));
    Ok(())
}

/// An unknown pass with the known one that is meant.
fn with_nearest(error: CompileError) -> anyhow::Error {
    let CompileError::UnknownRule(name) = &error else {
        return error.into();
    };
    let stages = Stage::ALL.into_iter().map(Stage::name);
    let known = stages.chain(rules::all().into_iter().map(|r| r.name));
    match nearest(name, known.chain([chains::NAME])) {
        Some(near) => usage_error(format!(
            "no rule or stage named '{name}'; did you mean '{near}'?"
        )),
        None => usage_error(error.to_string()),
    }
}

fn check(name: &str, graph: &Graph) -> anyhow::Result<()> {
    let errors: Vec<String> = verify(graph)
        .iter()
        .map(|e| format!("{name}: {e}"))
        .collect();
    if errors.is_empty() {
        Ok(())
    } else {
        Err(Problems::new(errors).into())
    }
}
