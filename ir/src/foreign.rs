//! Files that somebody else has written, read within bounds.
//!
//! A checkpoint, a dataset or a report may come from anywhere. Each is opened here and nowhere else: only regular
//! files (a FIFO would wait for ever, /dev/zero never ends), and never more bytes than a file of its kind can have.
//! Errors say what was found and what was expected; who calls names the file.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::path::Path;

/// What a file is for, which bounds its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A JSON file of settings: config.json, generation_config.json, tokenizer_config.json.
    Config,
    /// tokenizer.json.
    Tokenizer,
    /// A chat template.
    Template,
    /// The index of a sharded checkpoint.
    Index,
    /// A YAML file of options.
    Options,
    /// A dataset: lines of JSON or of text.
    Dataset,
    /// A program in text form.
    Program,
    /// Reference logits.
    Golden,
    /// A report.
    Report,
    /// An entry of a cache on disk.
    Cache,
    /// The name of a commit.
    Reference,
    /// Weights, which are read piece by piece into memory that the model's sizes bound.
    Weights,
}

impl Kind {
    /// Bytes that such a file may have: some ten times those of the largest known.
    pub const fn most_bytes(self) -> u64 {
        match self {
            Kind::Reference => 4 << 10,
            Kind::Options => 256 << 10,
            Kind::Template => 1 << 20,
            Kind::Config => 16 << 20,
            Kind::Report => 16 << 20,
            Kind::Index | Kind::Program => 64 << 20,
            Kind::Tokenizer | Kind::Cache => 256 << 20,
            Kind::Golden => 4 << 30,
            Kind::Dataset => 16 << 30,
            Kind::Weights => u64::MAX,
        }
    }

    /// Why a file of `bytes` is refused, if it is.
    fn refusal(self, bytes: u64) -> Option<io::Error> {
        let most = self.most_bytes();
        (bytes > most).then(|| {
            let found = match bytes.checked_sub(1) {
                // Reading stopped there.
                Some(n) if n == most => format!("has more than {most} bytes"),
                _ => format!("has {bytes} bytes"),
            };
            invalid(format!("{found}, expected at most {most}"))
        })
    }
}

/// Opens a file for reading.
///
/// # Errors
/// It is no regular file, is larger than its kind can be, or cannot be opened.
pub fn open(path: &Path, kind: Kind) -> io::Result<File> {
    // Before it is opened, because opening alone may wait or have an effect.
    check(&std::fs::metadata(path)?, kind)?;
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // Another file may have taken its place since.
        options.custom_flags(libc::O_NONBLOCK);
    }
    let file = options.open(path)?;
    check(&file.metadata()?, kind)?;
    Ok(file)
}

/// The bytes of a file.
///
/// # Errors
/// As [`open`]; it cannot be read, or there is no memory for it.
pub fn read(path: &Path, kind: Kind) -> io::Result<Vec<u8>> {
    let file = open(path, kind)?;
    let expected = file.metadata()?.len();
    read_from(file, expected, kind)
}

/// The text of a file.
///
/// # Errors
/// As [`read`]; it is not UTF-8.
pub fn read_text(path: &Path, kind: Kind) -> io::Result<String> {
    text(read(path, kind)?)
}

/// The text of a stream, such as standard input.
///
/// # Errors
/// It ends too late, cannot be read, or is not UTF-8; there is no memory for it.
pub fn read_text_from(source: impl Read, kind: Kind) -> io::Result<String> {
    text(read_from(source, 0, kind)?)
}

/// What `source` has until its end; `expected` bytes are set aside at once.
fn read_from(source: impl Read, expected: u64, kind: Kind) -> io::Result<Vec<u8>> {
    let most = kind.most_bytes();
    let mut bytes = Vec::new();
    let expected = usize::try_from(expected.min(most)).unwrap_or(usize::MAX);
    bytes
        .try_reserve_exact(expected)
        .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    source
        .take(most.saturating_add(1))
        .read_to_end(&mut bytes)?;
    match kind.refusal(bytes.len() as u64) {
        Some(refused) => Err(refused),
        None => Ok(bytes),
    }
}

fn text(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        invalid(format!("is not UTF-8 (byte {at})"))
    })
}

fn check(found: &Metadata, kind: Kind) -> io::Result<()> {
    if !found.is_file() {
        let what = kind_of(found);
        return Err(invalid(format!("is {what}, expected a regular file")));
    }
    kind.refusal(found.len()).map_or(Ok(()), Err)
}

fn kind_of(found: &Metadata) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let kind = found.file_type();
        if kind.is_fifo() {
            return "a FIFO";
        }
        if kind.is_socket() {
            return "a socket";
        }
        if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        }
    }
    if found.is_dir() {
        "a folder"
    } else {
        "something else"
    }
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream that gives one byte a call, is interrupted now and then, and fails at a call.
    struct Drip {
        left: u64,
        calls: usize,
        fails_at: Option<usize>,
    }

    impl Read for Drip {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.calls += 1;
            if self.fails_at == Some(self.calls) {
                return Err(io::Error::other("the disk is gone"));
            }
            if self.calls.is_multiple_of(3) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            match out.first_mut() {
                Some(byte) if self.left > 0 => {
                    *byte = b'x';
                    self.left -= 1;
                    Ok(1)
                }
                _ => Ok(0),
            }
        }
    }

    fn drip(left: u64, fails_at: Option<usize>) -> Drip {
        let calls = 0;
        Drip {
            left,
            calls,
            fails_at,
        }
    }

    #[test]
    fn short_reads_and_interruptions_lose_nothing_and_failures_are_said() {
        assert_eq!(
            read_text_from(drip(1000, None), Kind::Reference).unwrap(),
            "x".repeat(1000)
        );
        for n in 1..100 {
            // Every third call is an interruption.
            let error = read_text_from(drip(1000, Some(n)), Kind::Reference).unwrap_err();
            assert_eq!(error.to_string(), "the disk is gone", "call {n}");
        }
    }

    #[test]
    fn streams_end_or_are_refused() {
        let most = Kind::Reference.most_bytes();
        assert!(read_text_from(drip(most, None), Kind::Reference).is_ok());
        let error = read_text_from(drip(u64::MAX, None), Kind::Reference).unwrap_err();
        assert_eq!(
            error.to_string(),
            "has more than 4096 bytes, expected at most 4096"
        );
        let error = read_text_from(&b"ab\xff"[..], Kind::Program).unwrap_err();
        assert_eq!(error.to_string(), "is not UTF-8 (byte 2)");
    }

    /// There is no address space for so many bytes.
    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let error = read_from(&b"a"[..], u64::MAX, Kind::Weights).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn only_regular_files() {
        for (path, what) in [("/dev/zero", "a device"), ("/", "a folder")] {
            let error = read(Path::new(path), Kind::Config).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("is {what}, expected a regular file")
            );
        }
        // The system says that it has no bytes.
        let status = read_text(Path::new("/proc/self/status"), Kind::Config).unwrap();
        assert!(status.contains("Name:"), "{status}");
    }
}
