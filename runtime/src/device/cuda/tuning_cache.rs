//! Tuned choices on disk, beside the compiled kernels: one file for each GPU, toolchain and text of
//! the kernels. A file that is damaged or of another format is ignored and written anew.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use super::disk::{fingerprint, replace};
use lathe_codegen::cuda::{GemmKey, Variant};
use lathe_ir::foreign::{self, Kind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Changes with the format of the files and with how times are taken.
const FORMAT: u32 = 1;

/// A choice with its times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The variant.
    pub(super) variant: Variant,
    /// Its time.
    pub(super) nanoseconds: u64,
    /// Time of the heuristic's variant.
    pub(super) heuristic_nanoseconds: u64,
}

/// A file's content: a checksum of the entries, and the entries as `[variant, ns, heuristic ns]`.
#[derive(Serialize, Deserialize)]
struct File {
    format: u32,
    context: String,
    checksum: u64,
    entries: BTreeMap<String, (String, u64, u64)>,
}

/// Choices of one context.
#[derive(Debug)]
pub(super) struct TuningCache {
    /// `None` keeps choices for this process alone.
    path: Option<PathBuf>,
    context: String,
    entries: BTreeMap<String, Entry>,
}

impl TuningCache {
    /// Reads the file of a context, which names everything that times depend on. Without a folder there is none.
    pub(super) fn open(folder: Option<&Path>, context: &str) -> TuningCache {
        let name = format!("tuning-{:016x}.json", fingerprint(&(FORMAT, context)));
        let path = folder.map(|folder| folder.join(name));
        let bytes = path.as_deref().map(|path| foreign::read(path, Kind::Cache));
        let entries = match (bytes, &path) {
            (Some(Ok(bytes)), Some(path)) => decode(&bytes, context).unwrap_or_else(|| {
                tracing::warn!("{}: damaged, tuned anew", path.display());
                BTreeMap::new()
            }),
            _ => BTreeMap::new(),
        };
        TuningCache {
            path,
            context: context.to_owned(),
            entries,
        }
    }

    /// The choice for a GEMM.
    pub(super) fn get(&self, key: &GemmKey) -> Option<Entry> {
        self.entries.get(&key.to_string()).copied()
    }

    /// Enters a choice; it is on disk after [`TuningCache::save`].
    pub(super) fn insert(&mut self, key: &GemmKey, entry: Entry) {
        self.entries.insert(key.to_string(), entry);
    }

    /// Writes the file, all or nothing. A file that cannot be written is only warned of.
    pub(super) fn save(&self) {
        let Some(path) = &self.path else {
            return;
        };
        let entry = |e: &Entry| {
            let times = (e.nanoseconds, e.heuristic_nanoseconds);
            (e.variant.to_string(), times.0, times.1)
        };
        let entries: BTreeMap<_, _> = self
            .entries
            .iter()
            .map(|(key, e)| (key.clone(), entry(e)))
            .collect();
        let file = File {
            format: FORMAT,
            context: self.context.clone(),
            checksum: fingerprint(&entries),
            entries,
        };
        let write = || replace(path, &[&serde_json::to_vec_pretty(&file)?]);
        if let Err(error) = write() {
            tracing::warn!("{}: cannot keep tuned kernels: {error}", path.display());
        }
    }
}

fn decode(bytes: &[u8], context: &str) -> Option<BTreeMap<String, Entry>> {
    let file: File = serde_json::from_slice(bytes).ok()?;
    let is_same = file.format == FORMAT
        && file.context == context
        && file.checksum == fingerprint(&file.entries);
    if !is_same {
        return None;
    }
    file.entries
        .into_iter()
        .map(|(key, (variant, nanoseconds, heuristic_nanoseconds))| {
            let entry = Entry {
                variant: variant.parse().ok()?,
                nanoseconds,
                heuristic_nanoseconds,
            };
            Some((key, entry))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::Epilogue;
    use proptest::prelude::*;
    use proptest::sample::Index;

    fn key(m: usize) -> GemmKey {
        GemmKey {
            m,
            n: 6144,
            k: 4096,
            norm: true,
            epilogue: Epilogue::None,
            bias: m == 1,
        }
    }

    fn entry(variant: &str) -> Entry {
        Entry {
            variant: variant.parse().unwrap(),
            nanoseconds: 12_345,
            heuristic_nanoseconds: 13_000,
        }
    }

    #[test]
    fn entries_come_back_in_their_context_only() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = TuningCache::open(Some(dir.path()), "H100, NVRTC 13.0");
        let all = [
            (key(1), entry("gemv")),
            (key(16), entry("skinny_w1_p4_even")),
            (key(384), entry("tiled_64x192_c2x1")),
            (key(512), entry("cublaslt_5")),
        ];
        for (key, entry) in &all {
            assert_eq!(cache.get(key), None);
            cache.insert(key, *entry);
        }
        cache.save();
        let again = TuningCache::open(Some(dir.path()), "H100, NVRTC 13.0");
        for (key, entry) in &all {
            assert_eq!(again.get(key), Some(*entry));
        }
        let other = TuningCache::open(Some(dir.path()), "H100, NVRTC 13.1");
        assert_eq!(other.get(&key(16)), None);
        // No temporary file is left.
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn damaged_files_are_ignored_and_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = TuningCache::open(Some(dir.path()), "c");
        cache.insert(&key(8), entry("skinny_w2_p1"));
        cache.save();
        let path = cache.path.clone().unwrap();
        let whole = std::fs::read_to_string(&path).unwrap();
        for damaged in [
            whole[..whole.len() / 2].to_owned(),
            whole.replace("12345", "12346"),
            whole.replace("skinny_w2_p1", "skinny_w1_p1"),
            whole.replace("\"format\": 1", "\"format\": 2"),
            String::new(),
        ] {
            assert_ne!(damaged, whole);
            std::fs::write(&path, damaged).unwrap();
            let mut damaged = TuningCache::open(Some(dir.path()), "c");
            assert_eq!(damaged.get(&key(8)), None);
            damaged.insert(&key(8), entry("skinny_w2_p1"));
            damaged.save();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
        }
    }

    proptest! {
        /// Any characters anywhere, with a checksum that fits: what is read is a variant, which computes a GEMM or
        /// says that it does not.
        #[test]
        fn changed_files_do_not_panic(
            edits in prop::collection::vec((any::<Index>(), 0_usize..8, any::<char>()), 1..4),
            whole: bool,
        ) {
            let entries = BTreeMap::from([
                (key(8).to_string(), ("skinny_w2_p1_even".to_owned(), 12_345, 13_000)),
                (key(384).to_string(), ("tiled_64x192_c2x1".to_owned(), 1, 2)),
                (key(1).to_string(), ("cublaslt_3".to_owned(), 1, 2)),
            ]);
            let damage = |text: &str| {
                let mut text: Vec<char> = text.chars().collect();
                for &(at, what, c) in &edits {
                    let i = at.index(text.len());
                    let pieces = ["0", "99999999999999999999", "18446744073709551615", "x", "_", "-"];
                    match pieces.get(what) {
                        Some(piece) => { text.splice(i..i, piece.chars()); }
                        None => text[i] = c,
                    }
                }
                String::from_iter(text)
            };
            let file = |entries| File {
                format: FORMAT,
                context: "c".into(),
                checksum: fingerprint(&entries),
                entries,
            };
            let text = match whole {
                true => damage(&serde_json::to_string(&file(entries)).unwrap()),
                false => {
                    let damaged = entries.into_iter().map(|(k, (v, a, b))| (k, (damage(&v), a, b)));
                    serde_json::to_string(&file(damaged.collect())).unwrap()
                }
            };
            for entry in decode(text.as_bytes(), "c").into_iter().flatten() {
                for m in [1, 8, 384] {
                    let _ = entry.1.variant.check(&key(m), 132);
                }
            }
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = TuningCache::open(Some(&dir.path().join("absent")), "c");
        cache.insert(&key(8), entry("gemv"));
        cache.save();
        assert_eq!(cache.get(&key(8)), Some(entry("gemv")));
    }
}
