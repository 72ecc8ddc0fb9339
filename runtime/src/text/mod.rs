//! Text in and out: the tokenizer of a checkpoint folder, its special tokens and its chat template.
//!
//! Nothing here is in the timed path of a benchmark: datasets are tokenised beforehand and output is
//! decoded afterwards.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use lathe_ir::foreign::{self, Kind};
use std::path::{Path, PathBuf};

mod bounds;
mod chat;
mod guard;
mod message;
pub mod sandbox;
mod strftime;
pub mod template;
#[cfg(test)]
mod test_folder;
mod tokenizer;

pub use chat::ChatTemplate;
pub use message::ChatMessage;
pub use sandbox::Sandbox;
pub use tokenizer::{SpecialTokens, StreamDecoder, TextTokenizer, eos_token_ids};

/// What can be wrong with a checkpoint's text files, or with text given to them.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The folder has no tokenizer.json.
    #[error(
        "{folder}: no tokenizer.json in this folder; give token ids instead of text, or a folder that has one"
    )]
    NoTokenizer {
        /// The checkpoint folder.
        folder: PathBuf,
    },
    /// A file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file is malformed (the reason has line and column).
    #[error("{path}: not valid JSON: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Reason with line and column.
        source: serde_json::Error,
    },
    /// A field has a form that is not understood.
    #[error("{path}: {field} is {found}, expected {expected}")]
    Field {
        /// The file.
        path: PathBuf,
        /// Name of the field.
        field: &'static str,
        /// What stands there.
        found: String,
        /// What was expected.
        expected: &'static str,
    },
    /// The tokenizer library refuses tokenizer.json.
    #[error("{path}: not a tokenizer: {reason}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// The library's reason.
        reason: String,
    },
    /// Text could not be encoded.
    #[error("text cannot be tokenised: {0}")]
    Encode(String),
    /// Tokens could not be decoded.
    #[error("tokens cannot be decoded: {0}")]
    Decode(String),
    /// The chat template does not compile, raised an exception or ran too long.
    #[error("{path}: chat template{line}: {reason}", line = line.map(|n| format!(", line {n}")).unwrap_or_default())]
    Template {
        /// The file that holds the template.
        path: PathBuf,
        /// Line inside the template, when known.
        line: Option<usize>,
        /// The reason.
        reason: String,
    },
}

/// Reads a JSON file of the folder; `None` when there is no such file.
fn read_json(folder: &Path, name: &str) -> Result<Option<serde_json::Value>, TextError> {
    let path = folder.join(name);
    let Some(text) = read_text(&path, Kind::Config)? else {
        return Ok(None);
    };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|source| TextError::Json { path, source })
}

/// Reads a text file; `None` when it does not exist.
fn read_text(path: &Path, kind: Kind) -> Result<Option<String>, TextError> {
    match foreign::read_text(path, kind) {
        Ok(text) => Ok(Some(text)),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Io {
            path: path.to_path_buf(),
            source,
        }),
    }
}

/// A short form of a JSON value for an error message.
fn shorten(value: &serde_json::Value) -> String {
    let text = guard::one_line(&value.to_string());
    if text.chars().count() <= 60 {
        text
    } else {
        text.chars().take(57).chain("...".chars()).collect()
    }
}
