//! How fast a checkpoint folder can be read: the ceiling of loading it.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::WeightsError;
use super::stored::read_exact_at;
use crate::threads::on_several;
use lathe_ir::foreign::{self, Kind};

/// Bytes of one read.
const CHUNK: usize = 1 << 20;

/// What reading took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Bytes read.
    pub bytes: u64,
    /// Threads that read.
    pub threads: usize,
    /// Wall time.
    pub duration: Duration,
}

impl Reading {
    /// Bytes a second.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.duration.as_secs_f64().max(1e-9)
    }
}

/// Reads all safetensors files of `folder` on `threads` threads, each into one buffer that stays in its
/// core's cache. A second call shows what the page cache gives.
///
/// # Errors
/// A folder or file that cannot be read, or a folder without safetensors files.
pub fn read_folder(folder: &Path, threads: usize) -> Result<Reading, WeightsError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| WeightsError::Io { path, source }
    };
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .map_err(io(folder))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    paths.sort();
    if paths.is_empty() {
        return Err(WeightsError::NoWeights {
            folder: folder.to_owned(),
            hint: "",
        });
    }
    let mut files = Vec::new();
    let mut pieces: Vec<(usize, Range<u64>)> = Vec::new();
    for path in &paths {
        let file = foreign::open(path, Kind::Weights).map_err(io(path))?;
        let len = file.metadata().map_err(io(path))?.len();
        let starts = (0..len).step_by(CHUNK);
        pieces.extend(starts.map(|at| (files.len(), at..(at + CHUNK as u64).min(len))));
        files.push(file);
    }
    let next = AtomicUsize::new(0);
    let read = || -> Result<u64, WeightsError> {
        let mut buffer = vec![0; CHUNK];
        let mut bytes = 0;
        while let Some((file, range)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let part = &mut buffer[..(range.end - range.start) as usize];
            read_exact_at(&files[*file], part, range.start).map_err(io(&paths[*file]))?;
            bytes += part.len() as u64;
        }
        Ok(bytes)
    };
    let start = Instant::now();
    let counts = on_several(threads, read);
    let duration = start.elapsed();
    let threads = counts.len();
    let bytes = counts.into_iter().sum::<Result<u64, WeightsError>>()?;
    Ok(Reading {
        bytes,
        threads,
        duration,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_the_weights_is_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: usize| {
            std::fs::write(dir.path().join(name), vec![7u8; bytes]).unwrap();
        };
        write("a.safetensors", 3 * CHUNK + 5);
        write("b.safetensors", 11);
        write("config.json", 100);
        let reading = read_folder(dir.path(), 3).unwrap();
        assert_eq!(reading.bytes, 3 * CHUNK as u64 + 16);
        assert!(reading.rate() > 0.0);
    }

    #[test]
    fn a_folder_without_weights_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read_folder(dir.path(), 1).is_err());
        assert!(read_folder(&dir.path().join("absent"), 1).is_err());
    }
}
