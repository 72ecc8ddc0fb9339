//! Errors that the program itself tells apart; libraries have their own.

/// A command line that parses but cannot be meant; exits with 2 instead of 1.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// The error as `anyhow` carries it.
pub fn usage_error(message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(UsageError(message.into()))
}

/// An error with its causes on one line. A cause that the message before it already ends with is
/// not said twice.
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
    line
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
    }
}
