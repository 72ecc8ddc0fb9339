//! The `lathe` program.
#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use lathe::cli::Stop;
use lathe::errors::{is_broken_pipe, is_usage, one_line};

/// Exit code of a [usage error](lathe::errors); everything else that fails gives 1.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = match lathe::cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(Stop::Shown(text)) => {
            let _ = text.print();
            return ExitCode::from(u8::try_from(text.exit_code()).unwrap_or(USAGE));
        }
        Err(Stop::Usage(error)) => {
            eprintln!("error: {error}");
            return ExitCode::from(USAGE);
        }
    };
    lathe::cli::init_logging(cli.global.log_level, cli.global.log_format);
    match cli
        .command
        .run(&cli.global)
        .and_then(|()| Ok(std::io::stdout().flush()?))
    {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output went away (`lathe ... | head`): it has what it wanted.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", one_line(&error));
            if is_usage(&error) {
                ExitCode::from(USAGE)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}
