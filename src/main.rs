//! The `lathe` program.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))] // They panic where nothing can be written.
#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use lathe::cli::Stop;
use lathe::errors::{is_broken_pipe, is_usage, one_line};
use lathe_runtime::text::sandbox;

/// Exit code of a [usage error](lathe::errors); everything else that fails gives 1.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    lathe_runtime::process::fail_large_writes();
    match run() {
        Ok(code) => code,
        // The reader of our output went away (`lathe ... | head`): it has what it wanted.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&one_line(&error));
            if is_usage(&error) {
                ExitCode::from(USAGE)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn run() -> anyhow::Result<ExitCode> {
    // The standard library puts /dev/null there, where everything that is written would be lost in silence.
    anyhow::ensure!(
        !lathe_runtime::process::started_without_stdout(),
        "standard output is closed; give it a reader, a file or /dev/null"
    );
    if std::env::args_os()
        .nth(1)
        .is_some_and(|a| a == sandbox::ARGUMENT)
    {
        sandbox::serve()?;
        return Ok(ExitCode::SUCCESS);
    }
    let cli = match lathe::cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(Stop::Shown(text)) => {
            text.print()?;
            std::io::stdout().flush()?;
            return Ok(ExitCode::from(
                u8::try_from(text.exit_code()).unwrap_or(USAGE),
            ));
        }
        Err(Stop::Usage(error)) => return Err(error.into()),
    };
    lathe::cli::init_logging(cli.global.log_level, cli.global.log_format);
    lathe_runtime::threads::start().map_err(anyhow::Error::msg)?;
    cli.command.run(&cli.global)?;
    std::io::stdout().flush()?;
    Ok(ExitCode::SUCCESS)
}

/// Says an error on stderr, if that can be written.
fn complain(lines: &str) {
    let _ = std::io::stderr().write_all(format!("error: {lines}\n").as_bytes());
}
