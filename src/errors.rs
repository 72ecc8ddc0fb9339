//! Errors that the program itself tells apart; libraries have their own.
//!
//! An error is one line on stderr that begins with `error: `; where several things of one kind are wrong, each has its
//! line. The exit code says whom to ask:
//!
//! - **2, usage**: what was typed, or written into a file of options (`--extra_llm_api_options`, `--sampler_options`), is
//!   wrong: unknown or missing flags, commands, keys and names, values that are out of range or that this program does not
//!   support, settings that contradict one another or do not fit the model that they are for. Another command line or
//!   options file would do.
//! - **1, the rest**: what the command line names cannot be read or used: missing or bad model files, datasets, programs in
//!   text form and reports, files (of options, too) that are not there, output that cannot be written, a device or a
//!   memory that is missing or too small, a result out of its tolerance, an interrupted run.
//!
//! No input may cause a panic. Text from an input that goes into a message is made [`printable`].

pub use lathe_ir::printable;

use crate::config::ConfigError;

/// A command line or an options file that can be read but not be meant; exits with 2 instead of 1.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// The error as `anyhow` carries it.
pub fn usage_error(message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(UsageError(message.into()))
}

/// Whether the exit code is that of a wrong command line or options file.
pub fn is_usage(error: &anyhow::Error) -> bool {
    if let Some(config) = error.downcast_ref::<ConfigError>() {
        return !matches!(config, ConfigError::Read { .. });
    }
    error.downcast_ref::<UsageError>().is_some()
}

/// An error with its causes on one line, or on as many as its message lists problems. A cause that the message before
/// it already ends with is not said twice. Control characters that a message lets through do not reach the terminal.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if line.ends_with(&text) {
            continue;
        }
        if !line.is_empty() {
            line += ": ";
        }
        line += &text;
    }
    let lines: Vec<String> = line.split('\n').map(printable).collect();
    lines.join("\n")
}

/// Whether the failure is only that the reader of our output closed its end.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("c.json: {source}")]
        struct Read {
            source: std::io::Error,
        }
        let source = std::io::Error::other("no luck");
        let error = anyhow::Error::new(Read { source }).context("loading");
        assert_eq!(one_line(&error), "loading: c.json: no luck");
        let error = anyhow::anyhow!("a\u{1b}[2J\nb\r");
        assert_eq!(one_line(&error), "a\\u{1b}[2J\nb\\r");
    }
}
