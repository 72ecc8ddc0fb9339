//! The commands, one file each.

use clap::Subcommand;

use crate::cli::Cli;

mod compare;
mod prepare_dataset;

/// What to do.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // There is one value a process.
pub enum Command {
    /// Make a benchmark dataset (JSONL)
    PrepareDataset(prepare_dataset::PrepareDataset),
    /// Put report files side by side, with ratios to the first
    Compare(compare::Compare),
}

/// Runs the chosen command.
pub fn run(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::PrepareDataset(command) => command.run(&cli.global),
        Command::Compare(command) => command.run(),
    }
}
