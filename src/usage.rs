//! A command line that clap refuses, said in one line: what was found, what was expected, the nearest
//! name that is known, and whose `--help` says more.

use std::error::Error as _;
use std::ffi::OsString;
use std::num::{IntErrorKind, ParseFloatError, ParseIntError};

use clap::Command;
use clap::error::{ContextKind, ContextValue, Error, ErrorKind};

use crate::errors::printable;

/// The line for an error of `command`, after it was given these arguments (the program's name first).
pub(crate) fn line(error: &Error, command: &Command, arguments: &[OsString]) -> String {
    let said = sentence(error).unwrap_or_else(|| flattened(error));
    let end = if said.ends_with('?') { "" } else { ";" };
    let path = path(command, arguments).join(" ");
    printable(&format!("{said}{end} see {path} --help"))
}

/// What is wrong; nothing for a kind that has no wording here.
fn sentence(error: &Error) -> Option<String> {
    let argument = text(error, ContextKind::InvalidArg);
    let (flag, placeholder) = parts(&argument);
    let found = text(error, ContextKind::InvalidValue);
    Some(match error.kind() {
        ErrorKind::UnknownArgument => {
            let what = if flag.starts_with('-') {
                "flag"
            } else {
                "argument"
            };
            let near = did_you_mean(error, ContextKind::SuggestedArg);
            format!("unknown {what} '{argument}'{near}")
        }
        ErrorKind::InvalidSubcommand => {
            let name = text(error, ContextKind::InvalidSubcommand);
            let near = did_you_mean(error, ContextKind::SuggestedSubcommand);
            format!("unknown command '{name}'{near}")
        }
        ErrorKind::InvalidValue if found.is_empty() => {
            let expected = match texts(error, ContextKind::ValidValue).join(", ") {
                words if words.is_empty() => placeholder.to_string(),
                words => words,
            };
            format!("{flag} has no value, expected {expected}")
        }
        ErrorKind::InvalidValue => {
            let expected = texts(error, ContextKind::ValidValue).join(", ");
            let near = did_you_mean(error, ContextKind::SuggestedValue);
            format!("{flag} is '{found}', expected {expected}{near}")
        }
        ErrorKind::ValueValidation => {
            let reason = expected(error, &found)?;
            format!("{flag} is '{found}', {reason}")
        }
        ErrorKind::MissingRequiredArgument => {
            format!(
                "missing {}",
                texts(error, ContextKind::InvalidArg).join(", ")
            )
        }
        ErrorKind::ArgumentConflict => {
            let others = texts(error, ContextKind::PriorArg);
            if others.contains(&argument) {
                format!("{flag} is given more than once")
            } else {
                let others: Vec<&str> = others.iter().map(|other| parts(other).0).collect();
                format!("{flag} cannot be used with {}", others.join(", "))
            }
        }
        ErrorKind::TooManyValues => format!("{flag} has one value too many, '{found}'"),
        ErrorKind::TooFewValues | ErrorKind::WrongNumberOfValues => {
            let number = |kind| match error.get(kind) {
                Some(ContextValue::Number(n)) => Some(*n),
                _ => None,
            };
            let found = number(ContextKind::ActualNumValues)?;
            let expected = match number(ContextKind::ExpectedNumValues) {
                Some(n) => n.to_string(),
                None => format!("{} or more", number(ContextKind::MinValues)?),
            };
            format!("{argument} has {found} values, expected {expected}")
        }
        ErrorKind::InvalidUtf8 => "an argument is no valid UTF-8".to_string(),
        _ => return None,
    })
}

/// Name and value of an argument as clap shows it: `--tp <N>`, `--stdout`, `<REPORT>...`.
fn parts(argument: &str) -> (&str, &str) {
    match argument.split_once(' ') {
        Some((flag, value)) if flag.starts_with('-') => (flag, value),
        _ => (argument, ""),
    }
}

/// What a value was expected to be, from the reason of its parser.
fn expected(error: &Error, found: &str) -> Option<String> {
    let reason = error.source()?;
    if let Some(number) = reason.downcast_ref::<ParseIntError>() {
        let negative = found.starts_with('-') && found.parse::<i128>().is_ok();
        return Some(match number.kind() {
            IntErrorKind::PosOverflow | IntErrorKind::NegOverflow => {
                "expected a smaller number".to_string()
            }
            _ if negative => "expected a number from 0 on".to_string(),
            _ => "expected a whole number".to_string(),
        });
    }
    if reason.downcast_ref::<ParseFloatError>().is_some() {
        return Some("expected a number".to_string());
    }
    let reason = reason.to_string();
    // The wording of clap's ranges: `0 is not in 1..=4294967295`.
    Some(match reason.split_once(" is not in ") {
        Some((_, range)) => format!("expected a number in {range}"),
        None => reason,
    })
}

fn did_you_mean(error: &Error, kind: ContextKind) -> String {
    // The nearest one is the last.
    match texts(error, kind).last() {
        Some(near) => format!("; did you mean '{near}'?"),
        None => String::new(),
    }
}

fn text(error: &Error, kind: ContextKind) -> String {
    texts(error, kind).join(" ")
}

fn texts(error: &Error, kind: ContextKind) -> Vec<String> {
    match error.get(kind) {
        Some(ContextValue::String(text)) => vec![text.clone()],
        Some(ContextValue::Strings(texts)) => texts.clone(),
        _ => Vec::new(),
    }
}

/// clap's own words, without the usage behind them.
fn flattened(error: &Error) -> String {
    let text = error.to_string();
    let words: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .filter(|line| !line.is_empty())
        .collect();
    words.join(" ").trim_start_matches("error: ").to_string()
}

/// The program and the commands that the arguments name, outermost first.
fn path<'a>(command: &'a Command, arguments: &[OsString]) -> Vec<&'a str> {
    let mut path = vec![command];
    let mut rest = arguments.iter().skip(1).filter_map(|a| a.to_str());
    while let Some(word) = rest.next() {
        if word.starts_with('-') {
            for _ in 0..values_after(&path, word) {
                rest.next();
            }
            continue;
        }
        let current = path[path.len() - 1];
        match current.find_subcommand(word) {
            Some(inner) => path.push(inner),
            None => break,
        }
    }
    path.into_iter().map(Command::get_name).collect()
}

/// How many words after a word that begins with `-` are its values.
fn values_after(path: &[&Command], word: &str) -> usize {
    let mut known = path.iter().flat_map(|command| command.get_arguments());
    let flag = if let Some(name) = word.strip_prefix("--") {
        known.find(|a| {
            a.get_long() == Some(name) || a.get_all_aliases().is_some_and(|all| all.contains(&name))
        })
    } else {
        // `-m x`, but not `-mx`.
        let mut letters = word.chars().skip(1);
        let letter = letters.next().filter(|_| letters.next().is_none());
        known.find(|a| letter.is_some() && a.get_short() == letter)
    };
    flag.and_then(clap::Arg::get_num_args)
        .map_or(0, |n| n.min_values())
}

#[cfg(test)]
mod tests {
    use crate::cli::{Stop, parse};
    use std::ffi::OsString;

    fn refused(line: &str) -> String {
        match parse(line.split_whitespace().map(OsString::from)) {
            Err(Stop::Usage(error)) => error.0,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn each_kind_in_one_line() {
        for (given, expected) in [
            (
                "lathe throughput --num_request 3",
                "unknown flag '--num_request'; did you mean '--num_requests'? see lathe throughput --help",
            ),
            (
                "lathe throughput --zebra",
                "unknown flag '--zebra'; see lathe throughput --help",
            ),
            (
                "lathe compile stray",
                "unknown argument 'stray'; see lathe compile --help",
            ),
            (
                "lathe throughput --dataset",
                "--dataset has no value, expected <FILE>; see lathe throughput --help",
            ),
            (
                "lathe -m compile compile --dump-format xml",
                "--dump-format is 'xml', expected text, dot, json, html; did you mean 'html'? see lathe compile --help",
            ),
            (
                "lathe --tp abc doctor",
                "--tp is 'abc', expected a whole number; see lathe doctor --help",
            ),
            (
                "lathe --tp 0 doctor",
                "--tp is '0', expected a number in 1..=4294967295; see lathe doctor --help",
            ),
            (
                "lathe throughput --num_requests -1",
                "--num_requests is '-1', expected a number from 0 on; see lathe throughput --help",
            ),
            (
                "lathe throughput --num_requests 99999999999999999999",
                "--num_requests is '99999999999999999999', expected a smaller number; see lathe throughput --help",
            ),
            (
                "lathe --device gpu doctor",
                "--device is 'gpu', expected auto, cpu, cuda or cuda:N; see lathe doctor --help",
            ),
            (
                "lathe compare",
                "missing <REPORT> <REPORT>...; see lathe compare --help",
            ),
            (
                "lathe throughputt",
                "unknown command 'throughputt'; did you mean 'throughput'? see lathe --help",
            ),
            (
                "lathe prepare-dataset -o x token-norm",
                "unknown command 'token-norm'; did you mean 'token-norm-dist'? see lathe prepare-dataset --help",
            ),
            (
                "lathe prepare-dataset -o x token-unif-dist --input-min x",
                "--input-min is 'x', expected a whole number from 0 to 16777216; see lathe prepare-dataset token-unif-dist --help",
            ),
            (
                "lathe prepare-dataset --rand-task-id 3 token-unif-dist",
                "--rand-task-id is 'token-unif-dist', expected a whole number; see lathe prepare-dataset --help",
            ),
            (
                "lathe doctor --read a --read b",
                "--read is given more than once; see lathe doctor --help",
            ),
        ] {
            assert_eq!(refused(given), expected, "{given}");
        }
    }

    #[test]
    fn what_was_typed_cannot_break_the_line() {
        let arguments = ["lathe", "doctor", "--a\nb\u{1b}[2J"].map(OsString::from);
        let Err(Stop::Usage(error)) = parse(arguments) else {
            panic!("accepted");
        };
        assert_eq!(
            error.0,
            "unknown flag '--a\\nb\\u{1b}[2J'; see lathe doctor --help"
        );
    }

    #[test]
    fn help_and_version_are_no_errors() {
        for line in [
            "lathe --help",
            "lathe -V",
            "lathe opt --help",
            "lathe",
            "lathe prepare-dataset",
        ] {
            let arguments = line.split(' ').map(OsString::from);
            assert!(matches!(parse(arguments), Err(Stop::Shown(_))), "{line}");
        }
    }
}
