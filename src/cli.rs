//! The command line: the commands with the options of all, and the spelling rules that hold for all.

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser};

use crate::cmd::Command;
use crate::console::{self, LogWriter};
use crate::errors::UsageError;
use crate::global_options::{GlobalOptions, LogFormat, LogLevel};
use crate::usage;

/// Compiles Hugging Face language models with an e-graph of tensor rewrites into CUDA C, and benchmarks the
/// result.
#[derive(Debug, Parser)]
#[command(name = "lathe", version, propagate_version = true)]
pub struct Cli {
    /// Options that may stand before or after the command.
    #[command(flatten)]
    pub global: GlobalOptions,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Parses the command line.
///
/// trtllm-bench writes its flags with underscores and its dataset tool with dashes; here each flag is
/// understood in both spellings.
///
/// # Errors
/// Help or version was asked for, or the command line is wrong.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, Stop> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let mut command = with_both_spellings(Cli::command());
    command
        .try_get_matches_from_mut(&arguments)
        .and_then(|matches| Cli::from_arg_matches(&matches))
        .map_err(|error| match error.kind() {
            ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => Stop::Shown(error),
            _ => Stop::Usage(UsageError(usage::line(&error, &command, &arguments))),
        })
}

/// Why there is nothing to run.
#[derive(Debug)]
pub enum Stop {
    /// Help or the version; clap knows stream and exit code of each.
    Shown(clap::Error),
    /// The command line is wrong.
    Usage(UsageError),
}

fn with_both_spellings(command: clap::Command) -> clap::Command {
    command
        .mut_args(|argument| {
            // A negative number is a value, even where it is a wrong one: the message then names the flag.
            let takes_values = argument.get_action().takes_values() && !argument.is_positional();
            let argument = argument.allow_negative_numbers(takes_values);
            let Some(long) = argument.get_long().map(str::to_owned) else {
                return argument;
            };
            let known = argument.get_all_aliases().unwrap_or_default();
            let spellings: Vec<String> = std::iter::once(long.as_str())
                .chain(known.iter().copied())
                .flat_map(|name| [name.replace('-', "_"), name.replace('_', "-")])
                .filter(|name| *name != long && !known.contains(&name.as_str()))
                .collect();
            argument.aliases(spellings)
        })
        .mut_subcommands(with_both_spellings)
}

/// Sends log lines of at least this severity to stderr, and shows progress there if it is a terminal. `LATHE_LOG` (a tracing filter such as
/// `lathe_passes=debug`) overrides the level.
pub fn init_logging(level: LogLevel, format: LogFormat) {
    use LogLevel::{Debug, Info, Trace, Verbose};
    let talkative = matches!(level, Info | Verbose | Debug | Trace);
    console::init(talkative && format == LogFormat::Text);
    // egg reports every round of every saturation: only of interest when looking for a bug.
    let directive = match level {
        LogLevel::InternalError => "off",
        LogLevel::Error => "error",
        LogLevel::Warning => "warn",
        // A terminal shows the phases; in a file only who asks for JSON looks for them.
        LogLevel::Info if format == LogFormat::Text => "info,egg=warn,lathe::phase=warn",
        LogLevel::Info => "info,egg=warn",
        LogLevel::Verbose | LogLevel::Debug => "debug,egg=warn",
        LogLevel::Trace => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("LATHE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(directive));
    let text = format == LogFormat::Text;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(move || LogWriter { text })
        // A line that cannot be written is lost, and no more than that.
        .log_internal_errors(false);
    // A second initialisation happens only in tests and changes nothing.
    let _ = match format {
        LogFormat::Text => lines
            .with_ansi(false)
            .without_time()
            .with_target(false)
            .try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::global_options::DeviceChoice;
    use std::path::PathBuf;

    fn parsed(line: &str) -> Result<Cli, Stop> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_definition_is_consistent() {
        with_both_spellings(Cli::command()).debug_assert();
    }

    #[test]
    fn global_options_stand_on_both_sides_in_both_spellings() {
        let before = parsed("lathe --model_path /m --log-level debug compare a b").unwrap();
        let after = parsed("lathe compare a b --model-path /m --log_level debug").unwrap();
        for cli in [before, after] {
            assert_eq!(cli.global.model_path, Some(PathBuf::from("/m")));
            assert_eq!(cli.global.log_level, LogLevel::Debug);
        }
    }

    #[test]
    fn kernels_lie_in_the_workspace_or_in_the_users_cache() {
        let folder = |line: &str| parsed(line).unwrap().global.kernel_cache();
        for line in [
            "lathe -w /w doctor",
            "lathe latency --workspace /w --dataset d",
        ] {
            assert_eq!(folder(line), PathBuf::from("/w/cubins"), "{line}");
        }
        assert!(folder("lathe selftest").ends_with("lathe/cubins"));
    }

    #[test]
    fn the_device_is_chosen_by_the_machine_unless_named() {
        let cli = parsed("lathe compare a b").unwrap();
        assert_eq!(cli.global.device, DeviceChoice::Auto);
    }

    #[test]
    fn a_negative_number_is_the_wrong_value_of_its_flag() {
        for (line, flag) in [
            ("lathe throughput --num_requests -1", "--num_requests"),
            (
                "lathe prepare-dataset token-norm-dist --input-stdev -1",
                "--input-stdev",
            ),
            ("lathe --tp -2 doctor", "--tp"),
        ] {
            let Err(Stop::Usage(error)) = parsed(line) else {
                panic!("{line} is accepted");
            };
            assert!(error.0.starts_with(&format!("{flag} is '-")), "{error}");
        }
    }

    #[test]
    fn tp_is_at_least_one() {
        assert!(parsed("lathe compare a b --tp 0").is_err());
    }
}
