//! What can go wrong between a `config.json` and its graph.

use crate::TypeError;
use thiserror::Error;

/// An import failed. Every variant names the configuration and the key.
#[derive(Debug, Error)]
pub enum ImportError {
    /// The file cannot be read.
    #[error("{file}: {source}")]
    Read {
        /// The configuration file.
        file: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The text is no JSON object.
    #[error("{file}: {reason}")]
    Json {
        /// The configuration file.
        file: String,
        /// Where and why.
        reason: String,
    },
    /// A required key is absent (or null).
    #[error("{file}: '{key}' is missing, expected {expected}")]
    Missing {
        /// The configuration file.
        file: String,
        /// Dotted key.
        key: String,
        /// What should stand there.
        expected: String,
    },
    /// A key has a value of the wrong kind or range.
    #[error("{file}: '{key}' is {found}, expected {expected}")]
    Invalid {
        /// The configuration file.
        file: String,
        /// Dotted key.
        key: String,
        /// The value that stands there.
        found: String,
        /// What should stand there.
        expected: String,
    },
    /// A well-formed value that lathe does not implement.
    #[error("{file}: '{key}' = {found} is not supported; supported: {supported}")]
    Unsupported {
        /// The configuration file.
        file: String,
        /// Dotted key.
        key: String,
        /// The value that stands there.
        found: String,
        /// What would be accepted.
        supported: String,
    },
    /// The blocks of a family do not fit together under this configuration.
    #[error("{file}: {path}: {source}")]
    Type {
        /// The configuration file.
        file: String,
        /// Module path of the node.
        path: String,
        /// Why the operation does not accept its operands.
        source: TypeError,
    },
}
