//! The `lathe` program.
#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use lathe::errors::{UsageError, is_broken_pipe, one_line};

/// Exit code for a wrong command line; everything else that fails gives 1.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = match lathe::cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come here too; clap knows stream and exit code of each.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE));
        }
    };
    lathe::cli::init_logging(cli.global.log_level, cli.global.log_format);
    match lathe::cmd::run(&cli).and_then(|()| Ok(std::io::stdout().flush()?)) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output went away (`lathe ... | head`): it has what it wanted.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", one_line(&error));
            if error.downcast_ref::<UsageError>().is_some() {
                ExitCode::from(USAGE)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}
