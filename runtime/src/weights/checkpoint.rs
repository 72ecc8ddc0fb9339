//! A checkpoint folder: `model.safetensors`, or shards named by `model.safetensors.index.json`.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use lathe_ir::foreign::{self, Kind};
use serde::Deserialize;

use super::header::{MAX_HEADER, parse_header};
use super::stored::read_exact_at;
use super::{ReadAt, TensorData, TensorInfo, WeightSource, WeightsError};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An open checkpoint. Opening reads the headers only.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    shards: Vec<File>,
    tensors: BTreeMap<String, Located>,
}

#[derive(Debug)]
struct Located {
    info: TensorInfo,
    shard: usize,
    start: u64,
    end: u64,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens the weights in `folder`. A single file wins over an index, as in transformers.
    ///
    /// # Errors
    /// No weights, unreadable files, invalid headers, a malformed index, absent shards, tensors that the index
    /// places wrongly, a tensor in two shards.
    pub fn open(folder: &Path) -> Result<Self, WeightsError> {
        let mut checkpoint = Checkpoint {
            folder: folder.to_owned(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
        };
        let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
        if single.exists() {
            checkpoint.add_shard(&single)?;
        } else if index.exists() {
            checkpoint.open_sharded(&index)?;
        } else {
            let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
            let hint = if pickled.iter().any(|name| folder.join(name).exists()) {
                "; pytorch_model.bin is not read, convert it to safetensors"
            } else {
                ""
            };
            return Err(WeightsError::NoWeights {
                folder: folder.to_owned(),
                hint,
            });
        }
        Ok(checkpoint)
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.end - t.start).sum()
    }

    fn open_sharded(&mut self, path: &Path) -> Result<(), WeightsError> {
        let bad = |reason: String| WeightsError::Index {
            path: path.to_owned(),
            reason,
        };
        let text = foreign::read(path, Kind::Index).map_err(|source| WeightsError::Io {
            path: path.to_owned(),
            source,
        })?;
        let index: Index =
            serde_json::from_slice(&text).map_err(|e| bad(format!("malformed index: {e}")))?;
        let files: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
        // A shard lies in the folder itself; a name with separators could reach any file of the machine.
        if let Some(file) = files
            .iter()
            .find(|f| Path::new(f).file_name().is_none_or(|n| n != **f))
        {
            return Err(bad(format!("shard {file:?} is not a plain file name")));
        }
        let is_absent = |file: &&&str| !self.folder.join(file).is_file();
        let absent: Vec<String> = files
            .iter()
            .filter(is_absent)
            .map(|f| f.to_string())
            .collect();
        if !absent.is_empty() {
            return Err(WeightsError::AbsentShards {
                path: path.to_owned(),
                files: absent,
            });
        }
        let mut shard_of = BTreeMap::new();
        for file in files {
            shard_of.insert(file, self.add_shard(&self.folder.join(file))?);
        }
        let is_misplaced = |(name, file): &(&String, &String)| {
            self.tensors
                .get(*name)
                .is_none_or(|t| shard_of.get(file.as_str()) != Some(&t.shard))
        };
        let misplaced: Vec<String> = index
            .weight_map
            .iter()
            .filter(is_misplaced)
            .map(|(name, file)| format!("{name} in {file}"))
            .collect();
        if misplaced.is_empty() {
            Ok(())
        } else {
            Err(bad(format!(
                "tensors that are not where the index says: {}",
                misplaced.join(", ")
            )))
        }
    }

    /// Opens a file and adds its tensors; returns the shard's number.
    fn add_shard(&mut self, path: &Path) -> Result<usize, WeightsError> {
        let io = |source| WeightsError::Io {
            path: path.to_owned(),
            source,
        };
        let bad = |reason| WeightsError::Header {
            path: path.to_owned(),
            reason,
        };
        let file = foreign::open(path, Kind::Weights).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        if bytes == 0 {
            return Err(bad("it is empty".into()));
        }
        let start = read_start(&file, bytes).map_err(io)?;
        let shard = self.shards.len();
        for entry in parse_header(&start, bytes).map_err(bad)? {
            let located = Located {
                info: entry.info,
                shard,
                start: entry.start,
                end: entry.end,
            };
            if self.tensors.insert(entry.name.clone(), located).is_some() {
                return Err(bad(format!(
                    "tensor {} is in another shard too",
                    entry.name
                )));
            }
        }
        self.shards.push(file);
        Ok(shard)
    }
}

/// The first bytes of a file of `bytes`: length and header, as far as there are so many.
fn read_start(file: &dyn ReadAt, bytes: u64) -> std::io::Result<Vec<u8>> {
    let mut start = vec![0; usize::try_from(bytes.min(8)).unwrap_or_default()];
    read_exact_at(file, &mut start, 0)?;
    let claimed = start.first_chunk().map_or(0, |n| u64::from_le_bytes(*n));
    // A claim is not believed beyond what the file has and what a header can have.
    let length = claimed.min(MAX_HEADER).min(bytes.saturating_sub(8));
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    start
        .try_reserve_exact(length)
        .map_err(|_| std::io::ErrorKind::OutOfMemory)?;
    let prefix = start.len();
    start.resize(prefix + length, 0);
    let (_, header) = start.split_at_mut(prefix);
    read_exact_at(file, header, prefix as u64)?;
    Ok(start)
}

impl WeightSource for Checkpoint {
    fn describe(&self) -> String {
        self.folder.display().to_string()
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|t| &t.info)
    }

    fn data(&self, name: &str) -> Option<TensorData<'_>> {
        let tensor = self.tensors.get(name)?;
        let file = self.shards.get(tensor.shard)?;
        let at = tensor.start;
        Some(TensorData::Stored { file, at })
    }
}

#[cfg(test)]
mod tests {
    use super::super::stored::tests::Flaky;
    use super::*;

    /// The first bytes of a file come whole out of short reads; a claim beyond the file is not believed, and whichever
    /// read fails is an error.
    #[test]
    fn headers_are_read_from_a_bad_disk() {
        let file = |claim: u64, most, fails_at| {
            let bytes = [&claim.to_le_bytes()[..], b"{\"a\":1}", b"data"].concat();
            Flaky::new(bytes, most, fails_at)
        };
        for most in [1, 3, usize::MAX] {
            let start = read_start(&file(7, most, None), 19).unwrap();
            assert_eq!(&start[8..], b"{\"a\":1}");
            let start = read_start(&file(u64::MAX, most, None), 19).unwrap();
            assert_eq!(start.len(), 19);
        }
        for call in 1..=18 {
            // Every fifth call is an interruption, the others give a byte each.
            let error = read_start(&file(7, 1, Some(call)), 19).unwrap_err();
            assert_eq!(error.to_string(), "the disk is gone");
        }
        let error = read_start(&file(100, 9, None), 500).unwrap_err();
        assert!(
            error.to_string().contains("it ends at byte 19 now"),
            "{error}"
        );
    }
}
