//! Lines of a text that somebody else may have written: neither a line nor all of them are without bound.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::io::{BufRead, Error, ErrorKind, Read, Result};

use lathe_ir::foreign::Kind;

/// Bytes that a line may have: enough for 2^24 token ids of any vocabulary.
pub(super) const LONGEST: usize = 256 << 20;

/// The lines of a reader.
#[derive(Debug)]
pub(super) struct Lines<R> {
    reader: R,
    longest: usize,
    most: u64,
    left: u64,
}

/// A line that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Line {
    /// It is whole.
    Whole,
    /// It is longer than a line may be; what follows cannot be read.
    TooLong,
}

impl<R: BufRead> Lines<R> {
    /// Lines of at most `longest` bytes.
    pub(super) fn new(reader: R, longest: usize) -> Lines<R> {
        let most = Kind::Dataset.most_bytes();
        Lines {
            reader,
            longest,
            most,
            left: most,
        }
    }

    /// Reads the next line into `line`, without its end; `None` behind the last one.
    ///
    /// # Errors
    /// It cannot be read, or the lines have too many bytes together.
    pub(super) fn next_into(&mut self, line: &mut Vec<u8>) -> Result<Option<Line>> {
        line.clear();
        let mut limited = self.reader.by_ref().take(self.longest as u64 + 1);
        let n = limited.read_until(b'\n', line)?;
        if n == 0 {
            return Ok(None);
        }
        let Some(left) = self.left.checked_sub(n as u64) else {
            let reason = format!("has more than {} bytes", self.most);
            return Err(Error::new(ErrorKind::InvalidInput, reason));
        };
        self.left = left;
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        Ok(Some(match line.len() > self.longest {
            true => Line::TooLong,
            false => Line::Whole,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_and_are_bounded() {
        let mut lines = Lines::new(&b"ab\n\nabcd\nabcde\nx"[..], 4);
        let mut line = Vec::new();
        let mut found = Vec::new();
        while let Some(kind) = lines.next_into(&mut line).unwrap() {
            found.push((kind, line.clone()));
            if kind == Line::TooLong {
                break;
            }
        }
        let whole = |text: &str| (Line::Whole, text.as_bytes().to_vec());
        assert_eq!(
            found,
            [
                whole("ab"),
                whole(""),
                whole("abcd"),
                (Line::TooLong, b"abcde".to_vec())
            ]
        );
    }

    /// A stream without end is left after so many bytes.
    #[test]
    fn all_lines_together_are_bounded() {
        let mut lines = Lines::new(std::io::BufReader::new(std::io::repeat(b'\n')), 4);
        (lines.most, lines.left) = (100, 100);
        let mut line = Vec::new();
        for _ in 0..100 {
            assert_eq!(lines.next_into(&mut line).unwrap(), Some(Line::Whole));
        }
        let error = lines.next_into(&mut line).unwrap_err();
        assert_eq!(error.to_string(), "has more than 100 bytes");
    }
}
