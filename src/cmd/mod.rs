//! The commands, one file each.

use std::fmt::Display;
use std::ops::{Bound, RangeBounds};
use std::str::FromStr;

use clap::Subcommand;

use crate::global_options::GlobalOptions;

mod bench_args;
mod compare;
mod compile;
mod config_file;
mod doctor;
mod explain;
mod generate;
mod kernels;
mod latency;
mod opt;
mod outputs;
mod passes;
mod prepare_dataset;
mod selftest;
mod serving;
mod throughput;
mod verify;

/// What to do.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // There is one value a process.
pub enum Command {
    /// Complete a prompt
    Generate(generate::Generate),
    /// Offline throughput of a dataset
    Throughput(throughput::Throughput),
    /// Latency of one request at a time
    Latency(latency::Latency),
    /// Compare with reference logits and greedy tokens
    Verify(verify::Verify),
    /// Test every kernel family of this machine's device on random inputs
    Selftest(selftest::Selftest),
    /// Time each kernel of a model beside the machine's ceilings
    Kernels(kernels::Kernels),
    /// Say what this machine has and what is missing
    Doctor(doctor::Doctor),
    /// Make a benchmark dataset (JSONL)
    PrepareDataset(prepare_dataset::PrepareDataset),
    /// Put report files side by side, with ratios to the first
    Compare(compare::Compare),
    /// Compile a model and show what each pass did; needs no weights
    Compile(compile::Compile),
    /// Run passes on a program in text form and print the result
    Opt(opt::Opt),
    /// Show how an operation of the decode program came about
    Explain(explain::Explain),
    /// List passes and rewrite rules, or explain one
    Passes(passes::Passes),
}

impl Command {
    /// Runs the command.
    ///
    /// # Errors
    /// What the command could not do.
    pub fn run(&self, global: &GlobalOptions) -> anyhow::Result<()> {
        match self {
            Command::Generate(command) => command.run(global),
            Command::Throughput(command) => command.run(global),
            Command::Latency(command) => command.run(global),
            Command::Verify(command) => command.run(global),
            Command::Selftest(command) => command.run(global),
            Command::Kernels(command) => command.run(global),
            Command::Doctor(command) => command.run(global),
            Command::PrepareDataset(command) => command.run(global),
            Command::Compare(command) => command.run(),
            Command::Compile(command) => command.run(global),
            Command::Opt(command) => command.run(),
            Command::Explain(command) => command.run(global),
            Command::Passes(command) => command.run(),
        }
    }
}

/// A number of a flag, in whole numbers from a range that includes its bounds.
fn whole<T: FromStr + PartialOrd + Display>(
    text: &str,
    range: impl RangeBounds<T>,
) -> Result<T, String> {
    let number = text.parse().ok().filter(|n| range.contains(n));
    number.ok_or_else(|| {
        let mut expected = "expected a whole number".to_string();
        for (word, bound) in [("from", range.start_bound()), ("to", range.end_bound())] {
            if let Bound::Included(n) = bound {
                expected += &format!(" {word} {n}");
            }
        }
        expected
    })
}
