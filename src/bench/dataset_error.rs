//! Why a dataset cannot be used.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

/// A line that is no request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineProblem {
    /// 1-based line number.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

/// Why a dataset cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Lines that are no requests, or requests that do not fit.
    #[error("{}", list_problems(path, problems, *n_more).join("\n"))]
    Lines {
        /// The file.
        path: String,
        /// The first bad lines.
        problems: Vec<LineProblem>,
        /// How many more there are.
        n_more: usize,
    },
    /// Requests that no sequence can hold.
    #[error("{}", list_too_long(path, limit, *max_seq_len, requests).join("\n"))]
    TooLong {
        /// The file.
        path: String,
        /// What sets the limit.
        limit: &'static str,
        /// The limit.
        max_seq_len: usize,
        /// Index, prompt tokens and output tokens of each.
        requests: Vec<(usize, usize, usize)>,
    },
    /// No request at all.
    #[error("{path}: no requests in this dataset")]
    Empty {
        /// The file.
        path: String,
    },
}

/// At most so many bad lines are printed; the rest is counted.
pub(super) const MAX_LISTED: usize = 10;

impl DatasetError {
    /// What the error says, a line for each problem.
    pub(crate) fn lines(&self) -> Vec<String> {
        match self {
            Self::Lines {
                path,
                problems,
                n_more,
            } => list_problems(path, problems, *n_more),
            Self::TooLong {
                path,
                limit,
                max_seq_len,
                requests,
            } => list_too_long(path, limit, *max_seq_len, requests),
            Self::Io { .. } | Self::Empty { .. } => vec![self.to_string()],
        }
    }
}

fn list_problems(path: &str, problems: &[LineProblem], n_more: usize) -> Vec<String> {
    let mut lines: Vec<String> = problems
        .iter()
        .map(|problem| format!("{path}:{}: {}", problem.line, problem.reason))
        .collect();
    if n_more > 0 {
        lines.push(format!("{path}: {n_more} more bad lines"));
    }
    lines
}

fn list_too_long(
    path: &str,
    limit: &str,
    max_seq_len: usize,
    requests: &[(usize, usize, usize)],
) -> Vec<String> {
    let mut lines: Vec<String> = requests
        .iter()
        .take(MAX_LISTED)
        .map(|(index, isl, osl)| {
            let total = isl + osl;
            format!("{path}: request {index}: {isl} input + {osl} output tokens are {total}, {limit} is {max_seq_len}")
        })
        .collect();
    if requests.len() > MAX_LISTED {
        lines.push(format!(
            "{path}: {} more requests are too long",
            requests.len() - MAX_LISTED
        ));
    }
    lines
}
