//! YAML text that somebody else may have written: bounded before the parser sees it, and its errors with their places,
//! some of which the parser does not tell.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use super::locate::{Keys, Position, position};
use crate::errors::printable;
use lathe_ir::foreign::{self, Kind};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_yaml::{Deserializer, Value};
use std::path::Path;
use thiserror::Error;

/// Brackets that may be open at once. The parser's time grows with the square of them, and it refuses 128 levels, but
/// only after it has read all.
const MAX_OPEN: usize = 1000;

/// A configuration file cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("{file}: {source}")]
    Read {
        /// The file.
        file: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It is no YAML.
    #[error("{file}:{at}: {reason}")]
    Malformed {
        /// The file.
        file: String,
        /// Where.
        at: Position,
        /// What is wrong.
        reason: String,
    },
    /// Unknown keys and bad values, one a line; of very many the first ones and how many more there are.
    #[error("{}", .0.join("\n"))]
    Invalid(Vec<String>),
}

/// The text of a file.
///
/// # Errors
/// It cannot be read.
pub(super) fn of_file(path: &Path) -> Result<String, ConfigError> {
    foreign::read_text(path, Kind::Options).map_err(|source| ConfigError::Read {
        file: path.display().to_string(),
        source,
    })
}

/// The value of a text; `file` names it in errors.
///
/// # Errors
/// It is no single YAML document, or is none of a `T`.
pub(super) fn value<T: DeserializeOwned>(file: &str, text: &str) -> Result<T, ConfigError> {
    let malformed = |(at, reason): (Position, String)| ConfigError::Malformed {
        file: file.to_owned(),
        at,
        reason: printable(&reason),
    };
    if let Some(refused) = refusal(text) {
        return Err(malformed(refused));
    }
    serde_yaml::from_str(text).map_err(|error| malformed(placed(text, &error)))
}

/// What is refused before parsing, with its place.
fn refusal(text: &str) -> Option<(Position, String)> {
    let mut at = Position { line: 1, column: 1 };
    let mut open = 0usize;
    for (i, c) in text.chars().enumerate() {
        match c {
            '[' | '{' => open += 1,
            ']' | '}' => open = open.saturating_sub(1),
            _ => {}
        }
        if open > MAX_OPEN {
            return Some((at, format!("more than {MAX_OPEN} brackets are open")));
        }
        let is_mark = i == 0 && c == '\u{feff}';
        if !is_mark && !is_yaml(c) {
            let reason = format!("the character U+{:04X} is not allowed", u32::from(c));
            return Some((at, reason));
        }
        at = match c {
            '\n' => Position {
                line: at.line + 1,
                column: 1,
            },
            _ => Position {
                column: at.column + 1,
                ..at
            },
        };
    }
    None
}

/// A character that YAML allows in a text.
fn is_yaml(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='~' | '\u{85}' | '\u{a0}'..='\u{fefe}' | '\u{ff00}'..='\u{fffd}' | '\u{10000}'..)
}

/// The place of an error and what it says.
fn placed(text: &str, error: &serde_yaml::Error) -> (Position, String) {
    let said = error.to_string();
    let Some(at) = position(error) else {
        return unplaced(text, said);
    };
    // The place stands in front already.
    let suffix = format!(" at line {} column {}", at.line, at.column);
    let reason = said.replacen(&suffix, "", 1);
    // The parser says where the mapping begins.
    let twice = reason.contains("duplicate entry with key");
    let at = Some(Keys::read(text))
        .filter(|_| twice)
        .and_then(|keys| keys.twice())
        .unwrap_or(at);
    (at, reason)
}

/// An error for which the parser has no place.
fn unplaced(text: &str, said: String) -> (Position, String) {
    let mut documents = Deserializer::from_str(text);
    let _ = documents.next().map(Value::deserialize);
    if let Some(second) = documents.next() {
        // What follows the first document is no document either, or it is one.
        let error = Value::deserialize(second).err();
        let broken = error.and_then(|error| Some((position(&error)?, error.to_string())));
        return match broken {
            Some((at, said)) => {
                let end = format!(" at line {} column {}", at.line, at.column);
                (at, said.replacen(&end, "", 1))
            }
            None => (
                second_document(text),
                "a second document begins, expected one".into(),
            ),
        };
    }
    let of_alias = || {
        let column = |line: &str| line.find('*').map(|i| line[..i].chars().count() + 1);
        let mut lines = text.lines().zip(1..);
        lines.find_map(|(text, line)| {
            let column = column(text)?;
            Some(Position { line, column })
        })
    };
    // Only aliases make more of a text than it is.
    let at = of_alias().unwrap_or(Position { line: 1, column: 1 });
    (at, said)
}

/// Where the second document of a text begins.
fn second_document(text: &str) -> Position {
    let mut begun = false;
    let mut ended = false;
    let mut line = 0;
    for content in text.lines() {
        line += 1;
        let is = |mark: &str| {
            let rest = content.strip_prefix(mark);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t']))
        };
        let blank = content.trim().is_empty() || content.trim_start().starts_with(['#', '%']);
        if is("...") {
            ended = true;
        } else if is("---") || (ended && !blank) {
            if begun {
                break;
            }
            (begun, ended) = (true, false);
        } else if !blank {
            begun = true;
        }
    }
    Position { line, column: 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        value::<Value>("c", text).unwrap_err().to_string()
    }

    #[test]
    fn every_error_has_its_place() {
        for (text, expected) in [
            (
                "a: 1\nb: \u{1}",
                "c:2:4: the character U+0001 is not allowed",
            ),
            (
                "a: 1\n---\nb: 2",
                "c:2:1: a second document begins, expected one",
            ),
            (
                "%YAML 1.1\n---\na: 1\n...\n# x\n---\nb: 2",
                "c:6:1: a second document begins, expected one",
            ),
            (
                "a: 1\nb: 2\n\na: 3",
                "c:4:1: duplicate entry with key \"a\"",
            ),
            (
                "transforms:\n  a: {}\n  b: {}\n  a: {}",
                "c:4:3: transforms: duplicate entry with key \"a\"",
            ),
            ("\"a\"\n \"b\"", "c:2:2: did not find expected"),
            ("a: [1\nx: 3\n", "c:2:2: did not find expected"),
            ("a: 1\nb: *y", "c:2:4: unknown anchor"),
        ] {
            let found = error(text);
            assert!(found.starts_with(expected), "{text:?}: {found}");
        }
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..9 {
            let all = format!("*a{}, ", i - 1).repeat(10);
            bomb += &format!("a{i}: &a{i} [{all}]\n");
        }
        assert_eq!(error(&bomb), "c:2:10: repetition limit exceeded");
    }

    #[test]
    fn nesting_is_refused_at_once() {
        for unit in ["[", "{a: ", "- ", "? ", "a: [\n"] {
            let text = unit.repeat(200_000 / unit.len());
            let start = std::time::Instant::now();
            let found = error(&text);
            assert!(
                start.elapsed().as_secs() < 5,
                "{unit}: {:?}",
                start.elapsed()
            );
            assert!(!found.contains("c:0:"), "{found}");
        }
        assert!(error(&"[".repeat(2000)).starts_with("c:1:1001: more than 1000 brackets"));
        assert!(error(&"[".repeat(200)).starts_with("c:1:129: recursion limit"));
        let closed = "[]{}".repeat(2000);
        assert!(!error(&format!("{closed}\n")).contains("brackets"));
    }
}
