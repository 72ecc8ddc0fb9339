//! The commands, one file each.

use clap::Subcommand;

use crate::cli::Cli;

mod compare;
mod compile;
mod opt;
mod passes;
mod prepare_dataset;

/// What to do.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // There is one value a process.
pub enum Command {
    /// Make a benchmark dataset (JSONL)
    PrepareDataset(prepare_dataset::PrepareDataset),
    /// Put report files side by side, with ratios to the first
    Compare(compare::Compare),
    /// Compile a model and show what each pass did; needs no weights
    Compile(compile::Compile),
    /// Run passes on a program in text form and print the result
    Opt(opt::Opt),
    /// List passes and rewrite rules, or explain one
    Passes(passes::Passes),
}

/// Runs the chosen command.
pub fn run(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::PrepareDataset(command) => command.run(&cli.global),
        Command::Compare(command) => command.run(),
        Command::Compile(command) => command.run(&cli.global),
        Command::Opt(command) => command.run(&cli.global),
        Command::Passes(command) => command.run(),
    }
}
