//! Stored elements, read from their file piece by piece.
//!
//! Files are read and not mapped: a mapped file that somebody shortens ends the process with a signal, a read of it is
//! an error. Runs of rows that are wanted as they are go straight to their destination; others pass through a block
//! that each thread keeps.

use std::cell::RefCell;
use std::fmt::Debug;
use std::fs::File;
use std::io::{self, ErrorKind};

/// Bytes of the blocks that pass through a thread's own memory.
const BLOCK: usize = 256 << 10;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Bytes that can be read at any place, by several threads at once.
pub trait ReadAt: Sync + Debug {
    /// Reads some bytes from `at` on into `out`; returns how many. None means that the end is reached.
    ///
    /// # Errors
    /// They cannot be read.
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<usize>;
}

impl ReadAt for File {
    #[cfg(unix)]
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(self, out, at)
    }

    #[cfg(not(unix))]
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<usize> {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = self.try_clone()?;
        file.seek(SeekFrom::Start(at))?;
        file.read(out)
    }
}

/// Fills `out` with the bytes from `at` on.
///
/// # Errors
/// They cannot be read, or end too early.
pub(super) fn read_exact_at(
    source: &dyn ReadAt,
    mut out: &mut [u8],
    mut at: u64,
) -> io::Result<()> {
    while !out.is_empty() {
        match source.read_at(out, at) {
            Ok(0) => {
                return Err(io::Error::new(
                    ErrorKind::UnexpectedEof,
                    format!("it ends at byte {at} now, it was longer when it was opened"),
                ));
            }
            Ok(n) => {
                out = out.split_at_mut(n.min(out.len())).1;
                at += n as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A part of a stored matrix: `rows` rows of `cols` elements of `size` bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    /// Place of its first element in the source.
    pub(super) at: u64,
    /// Rows.
    pub(super) rows: usize,
    /// Elements that are wanted of a row.
    pub(super) cols: usize,
    /// Elements between the beginnings of two rows, `cols` or more.
    pub(super) stride: usize,
    /// Bytes of an element.
    pub(super) size: usize,
}

impl Part {
    /// Reads the part into `out`, which has exactly its bytes: row after row, with nothing between them.
    ///
    /// # Errors
    /// The source cannot be read.
    pub(super) fn read_into(self, source: &dyn ReadAt, out: &mut [u8]) -> io::Result<()> {
        if self.cols == self.stride || self.rows == 1 {
            return read_exact_at(source, out, self.at);
        }
        let row_bytes = self.cols * self.size;
        if self.is_sparse() {
            for (r, row) in out.chunks_exact_mut(row_bytes).enumerate() {
                read_exact_at(source, row, self.row_at(r))?;
            }
            return Ok(());
        }
        let mut rows = out.chunks_exact_mut(row_bytes);
        self.each_row(source, |_, bytes| {
            if let Some(row) = rows.next() {
                row.copy_from_slice(bytes);
            }
        })
    }

    /// Hands the rows to `take`, in order, each with its number.
    ///
    /// # Errors
    /// The source cannot be read.
    pub(super) fn each_row(
        self,
        source: &dyn ReadAt,
        mut take: impl FnMut(usize, &[u8]),
    ) -> io::Result<()> {
        let (row_bytes, stride_bytes) = (self.cols * self.size, self.stride * self.size);
        // Rows of one block; where little of a row is wanted, its rest is not read.
        let most = match self.is_sparse() {
            true => 1,
            false => (BLOCK / stride_bytes.max(1)).max(1),
        };
        SCRATCH.with_borrow_mut(|scratch| {
            let mut first = 0;
            while first < self.rows {
                let rows = most.min(self.rows - first);
                let bytes = (rows - 1) * stride_bytes + row_bytes;
                if scratch.len() < bytes {
                    scratch.resize(bytes, 0);
                }
                let block = &mut scratch[..bytes];
                read_exact_at(source, block, self.row_at(first))?;
                for r in 0..rows {
                    take(first + r, &block[r * stride_bytes..][..row_bytes]);
                }
                first += rows;
            }
            Ok(())
        })
    }

    fn row_at(self, r: usize) -> u64 {
        self.at + (r * self.stride * self.size) as u64
    }

    /// Whether most of what lies between the first and the last element is not wanted, by whole pages.
    fn is_sparse(self) -> bool {
        self.stride.saturating_sub(self.cols) * self.size >= (4 << 10).max(self.cols * self.size)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Bytes in memory, of which a call gives at most `most`; every fifth call is interrupted, and the `fails_at`-th
    /// fails.
    #[derive(Debug)]
    pub(in super::super) struct Flaky {
        pub(in super::super) bytes: Vec<u8>,
        pub(in super::super) most: usize,
        pub(in super::super) fails_at: Option<usize>,
        pub(in super::super) calls: AtomicUsize,
    }

    impl Flaky {
        pub(in super::super) fn new(bytes: Vec<u8>, most: usize, fails_at: Option<usize>) -> Flaky {
            Flaky {
                bytes,
                most,
                fails_at,
                calls: AtomicUsize::new(0),
            }
        }
    }

    impl ReadAt for Flaky {
        fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<usize> {
            let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
            if self.fails_at == Some(call) {
                return Err(io::Error::other("the disk is gone"));
            }
            if call.is_multiple_of(5) {
                return Err(ErrorKind::Interrupted.into());
            }
            let from = self.bytes.get(at as usize..).unwrap_or_default();
            let n = from.len().min(out.len()).min(self.most);
            out[..n].copy_from_slice(&from[..n]);
            Ok(n)
        }
    }

    #[test]
    fn parts_of_any_shape_come_whole_out_of_short_reads() {
        let bytes: Vec<u8> = (0..100_000u32)
            .map(|i| (i.wrapping_mul(i) >> 3) as u8)
            .collect();
        for (rows, cols, stride) in [
            (1, 7, 7),
            (9, 5, 5),
            (9, 5, 8),
            (3, 10, 9_000),
            (4, 4_500, 9_000),
            (2_000, 3, 20),
        ] {
            let (size, at) = (2, 11);
            let part = Part {
                at,
                rows,
                cols,
                stride,
                size,
            };
            let row = |r: usize| &bytes[11 + r * stride * size..][..cols * size];
            let expected: Vec<u8> = (0..rows).flat_map(|r| row(r).to_vec()).collect();
            for most in [1, 1000, usize::MAX] {
                let source = Flaky::new(bytes.clone(), most, None);
                let mut out = vec![0; expected.len()];
                part.read_into(&source, &mut out).unwrap();
                assert!(out == expected, "{part:?}, {most} at once");
                let mut rows = Vec::new();
                part.each_row(&source, |r, row| rows.push((r, row.to_vec())))
                    .unwrap();
                let numbered: Vec<_> = (0..part.rows).map(|r| (r, row(r).to_vec())).collect();
                assert!(rows == numbered, "{part:?}, {most} at once");
            }
        }
    }

    #[test]
    fn an_early_end_and_a_failure_are_errors() {
        let mut out = [0; 10];
        let source = Flaky::new(vec![1; 9], 4, None);
        let error = read_exact_at(&source, &mut out, 0).unwrap_err();
        assert!(
            error.to_string().starts_with("it ends at byte 9 now"),
            "{error}"
        );
        for call in 1..=3 {
            let source = Flaky::new(vec![1; 10], 4, Some(call));
            let error = read_exact_at(&source, &mut out, 0).unwrap_err();
            assert_eq!(error.to_string(), "the disk is gone");
        }
    }
}
