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
//! No input may cause a panic. Text from an input that goes into a message is made [`printable`], here at the latest:
//! only [`Problems`] and the lists of [`ConfigError`] and [`DatasetError`] end a line, never a text within them.

use std::error::Error;

use lathe_ir::text::ParseError;

pub use lathe_ir::printable;

use crate::bench::dataset::DatasetError;
use crate::config::ConfigError;

/// A command line or an options file that can be read but not be meant; exits with 2 instead of 1.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Several things of one kind that are wrong, a line each.
#[derive(Debug, thiserror::Error)]
#[error("{}", lines.join("\n"))]
pub struct Problems {
    lines: Vec<String>,
    usage: bool,
}

impl Problems {
    /// Problems that exit with 1.
    pub fn new(lines: Vec<String>) -> Problems {
        let usage = false;
        Problems { lines, usage }
    }

    /// Problems that another command line or options file would not have; they exit with 2.
    pub fn of_usage(lines: Vec<String>) -> Problems {
        let usage = true;
        Problems { lines, usage }
    }

    /// The problems of a program in text form that is called `name`, each with its place.
    pub fn of_program(name: &str, error: &ParseError) -> Problems {
        let placed = |problem: &dyn std::fmt::Display| format!("{name}:{problem}");
        Problems::new(match error {
            ParseError::Types(all) => all.iter().map(|one| placed(one)).collect(),
            syntax @ ParseError::Syntax { .. } => vec![placed(syntax)],
        })
    }
}

/// The error as `anyhow` carries it.
pub fn usage_error(message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(UsageError(message.into()))
}

/// Whether the exit code is that of a wrong command line or options file.
pub fn is_usage(error: &anyhow::Error) -> bool {
    if let Some(config) = error.downcast_ref::<ConfigError>() {
        return !matches!(config, ConfigError::Read { .. });
    }
    if let Some(problems) = error.downcast_ref::<Problems>() {
        return problems.usage;
    }
    error.downcast_ref::<UsageError>().is_some()
}

/// An error with its causes on one line, or on as many as it lists problems. A cause that the message before it already
/// ends with is not said twice. Whatever else would break a line or reach the terminal as a command is escaped.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut lines: Vec<String> = Vec::new();
    for cause in error.chain() {
        let mut said = lines_of(cause).into_iter();
        match (lines.last_mut(), said.next()) {
            (Some(last), Some(first)) if last.ends_with(&first) && said.len() == 0 => {}
            (Some(last), Some(first)) => {
                *last += ": ";
                *last += &first;
            }
            (None, first) => lines.extend(first),
            (Some(_), None) => {}
        }
        lines.extend(said);
    }
    let lines: Vec<String> = lines.iter().map(|line| printable(line)).collect();
    lines.join("\n")
}

/// What an error says, a line for each of its problems; a line may hold anything.
fn lines_of(error: &(dyn Error + 'static)) -> Vec<String> {
    if let Some(problems) = error.downcast_ref::<Problems>() {
        return problems.lines.clone();
    }
    if let Some(ConfigError::Invalid(lines)) = error.downcast_ref() {
        return lines.clone();
    }
    if let Some(dataset) = error.downcast_ref::<DatasetError>() {
        return dataset.lines();
    }
    vec![error.to_string()]
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
        assert_eq!(one_line(&error), "a\\u{1b}[2J\\nb\\r");
    }

    /// A text out of a file ends no line, wherever it stands.
    #[test]
    fn nobody_forges_a_line() {
        let forged = "x\nerror: all is well\u{202e}";
        let shown = "x\\nerror: all is well\\u{202e}";
        let problems = || vec![forged.to_owned(), "y".to_owned()];
        for error in [
            anyhow::Error::new(Problems::new(problems())),
            anyhow::Error::new(ConfigError::Invalid(problems())),
        ] {
            assert_eq!(one_line(&error), format!("{shown}\ny"));
            assert_eq!(one_line(&error.context("a")), format!("a: {shown}\ny"));
        }
        let error = usage_error(forged).context(forged);
        assert_eq!(one_line(&error), shown);
    }

    #[test]
    fn each_problem_of_a_program_names_the_file() {
        let text = "func @f() -> (f32[2]) {\n  %a = neg(%b)\n}\n";
        let error = lathe_ir::text::parse(text).unwrap_err();
        for line in Problems::of_program("p.ir", &error).lines {
            assert!(line.starts_with("p.ir:"), "{line}");
        }
    }
}
