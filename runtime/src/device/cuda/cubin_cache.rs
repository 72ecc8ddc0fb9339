//! Compiled modules on disk, so that a second start compiles nothing.
//!
//! One file a module, named by the hash of source, options, NVRTC version and architecture (a cubin does not depend
//! on the driver). A file is one line of JSON and the cubin. Files are written under another name and renamed, so a
//! reader sees all or nothing; a checksum finds what a crash or a disk did to them, and such files are rebuilt. The
//! folder is kept under a size by removing the files that were used longest ago.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use lathe_ir::foreign::{self, Kind};
use serde::{Deserialize, Serialize};

use super::CudaError;
use super::disk::{TEMPORARY, fingerprint, private_folder, private_temporary, replace};
use super::nvrtc::{self, ARCH, Compiled, KernelResources, Source};

/// Bytes that the folder may hold by default.
pub const DEFAULT_LIMIT: u64 = 512 << 20;
/// Changes with the format of the files.
const FORMAT: u32 = 1;
const EXTENSION: &str = "cubin";

/// A folder of compiled modules.
#[derive(Debug, Clone)]
pub struct CubinCache {
    dir: PathBuf,
    limit: u64,
    nvrtc: (i32, i32),
}

/// The first line of a file.
#[derive(Serialize, Deserialize)]
struct Header {
    format: u32,
    name: String,
    options: Vec<String>,
    nvrtc: (i32, i32),
    arch: String,
    source_bytes: usize,
    cubin_bytes: usize,
    checksum: u64,
    log: String,
    resources: Vec<KernelResources>,
}

impl CubinCache {
    /// Opens or creates the folder `dir`, for modules of the NVRTC version in use.
    ///
    /// # Errors
    /// The folder cannot be created, or is not this user's alone; NVRTC is absent.
    pub fn open(dir: impl Into<PathBuf>, limit: u64) -> Result<Self, CudaError> {
        Self::with_version(dir.into(), limit, nvrtc::version()?)
    }

    /// As [`CubinCache::open`], for modules of the given NVRTC version, which need not be there.
    ///
    /// # Errors
    /// The folder cannot be created, or is not this user's alone.
    pub fn with_version(dir: PathBuf, limit: u64, nvrtc: (i32, i32)) -> Result<Self, CudaError> {
        private_folder(&dir).map_err(|source| CudaError::Io {
            path: dir.clone(),
            source,
        })?;
        Ok(CubinCache { dir, limit, nvrtc })
    }

    /// The cache in `dir`, by default the user's; none, with a warning, if the folder cannot be made or others may write
    /// into it.
    ///
    /// # Errors
    /// NVRTC is absent.
    pub fn if_usable(dir: Option<PathBuf>) -> Result<Option<Self>, CudaError> {
        let dir = dir.unwrap_or_else(|| Self::default_dir(None));
        match Self::open(dir, DEFAULT_LIMIT) {
            Ok(cache) => Ok(Some(cache)),
            Err(CudaError::Io { path, source }) => {
                tracing::warn!("{}: no kernel cache: {source}", path.display());
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Where the cache lies: in the workspace if there is one, else in the user's cache folder.
    pub fn default_dir(workspace: Option<&Path>) -> PathBuf {
        let absolute = |variable| {
            std::env::var_os(variable)
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
        };
        let base = match workspace {
            Some(workspace) => workspace.to_owned(),
            None => absolute("XDG_CACHE_HOME")
                .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
                .map_or_else(private_temporary, |cache| cache.join("lathe")),
        };
        base.join("cubins")
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The module from the cache, or compiled and put there.
    ///
    /// # Errors
    /// As [`nvrtc::compile`]; a cache that cannot be written is only warned of.
    pub fn get_or_compile(
        &self,
        source: &Source,
        failed_dir: &Path,
    ) -> Result<Compiled, CudaError> {
        if let Some(compiled) = self.get(source) {
            return Ok(compiled);
        }
        let compiled = nvrtc::compile(source, failed_dir)?;
        if let Err(error) = self.put(source, &compiled) {
            tracing::warn!(
                "{}: cannot cache {}: {error}",
                self.dir.display(),
                source.name
            );
        }
        Ok(compiled)
    }

    /// The module, if the cache has it undamaged.
    pub fn get(&self, source: &Source) -> Option<Compiled> {
        let path = self.path(source);
        let bytes = foreign::read(&path, Kind::Cache).ok()?;
        let Some(compiled) = self.decode(source, &bytes) else {
            tracing::warn!("{}: damaged, compiled anew", path.display());
            return None;
        };
        // Its time of use, for `trim`; failing to set it only makes the file look older.
        let touched = std::fs::File::options()
            .append(true)
            .open(&path)
            .and_then(|f| f.set_modified(SystemTime::now()));
        if let Err(error) = touched {
            tracing::debug!("{}: {error}", path.display());
        }
        Some(compiled)
    }

    /// The module that the bytes of an entry hold, if they are undamaged and of this source.
    pub fn decode(&self, source: &Source, bytes: &[u8]) -> Option<Compiled> {
        let end = bytes.iter().position(|&b| b == b'\n')?;
        let (line, rest) = bytes.split_at_checked(end)?;
        let (_, cubin) = rest.split_first()?;
        let header: Header = serde_json::from_slice(line).ok()?;
        let is_same = header.format == FORMAT
            && header.nvrtc == self.nvrtc
            && header.arch == ARCH
            && header.options == source.all_options()
            && header.source_bytes == source.text.len()
            && header.cubin_bytes == cubin.len()
            && header.checksum == checksum(cubin);
        is_same.then(|| Compiled {
            name: source.name.clone(),
            cubin: cubin.to_vec(),
            log: header.log,
            resources: header.resources,
            duration: Duration::ZERO,
            cached: true,
        })
    }

    fn put(&self, source: &Source, compiled: &Compiled) -> std::io::Result<()> {
        let header = Header {
            format: FORMAT,
            name: source.name.clone(),
            options: source.all_options(),
            nvrtc: self.nvrtc,
            arch: ARCH.to_owned(),
            source_bytes: source.text.len(),
            cubin_bytes: compiled.cubin.len(),
            checksum: checksum(&compiled.cubin),
            log: compiled.log.clone(),
            resources: compiled.resources.clone(),
        };
        let line = serde_json::to_string(&header)?;
        let parts = [line.as_bytes(), b"\n", &compiled.cubin];
        replace(&self.path(source), &parts)?;
        self.trim()
    }

    /// Removes the files used longest ago until the folder is below its limit, and temporary files that a killed
    /// process left behind.
    fn trim(&self) -> std::io::Result<()> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.dir)?.flatten() {
            let (path, Ok(meta)) = (entry.path(), entry.metadata()) else {
                continue;
            };
            let modified = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            match path.extension().and_then(|e| e.to_str()) {
                Some(EXTENSION) => files.push((modified, path, meta.len())),
                Some(TEMPORARY)
                    if modified
                        .elapsed()
                        .is_ok_and(|age| age > Duration::from_secs(3600)) =>
                {
                    // Another process may have removed it already.
                    let _ = std::fs::remove_file(&path);
                }
                _ => {}
            }
        }
        files.sort();
        let mut total: u64 = files.iter().map(|f| f.2).sum();
        for (_, path, bytes) in files {
            if total <= self.limit {
                break;
            }
            let _ = std::fs::remove_file(&path);
            total -= bytes;
        }
        Ok(())
    }

    fn path(&self, source: &Source) -> PathBuf {
        let (a, b) = self.key(source);
        self.dir.join(format!("{a:016x}{b:016x}.{EXTENSION}"))
    }

    /// 128 bits of source, options, version and architecture.
    fn key(&self, source: &Source) -> (u64, u64) {
        let half = |salt: u64| {
            let options = source.all_options();
            fingerprint(&(salt, FORMAT, &source.text, options, self.nvrtc, ARCH))
        };
        (half(0x6C61), half(0x7468))
    }
}

/// FNV-1a over 8-byte words, then the rest: finds damage, protects from nothing else.
fn checksum(bytes: &[u8]) -> u64 {
    let step = |h: u64, v: u64| (h ^ v).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(23);
    let (words, rest) = bytes.as_chunks::<8>();
    let h = words.iter().fold(0xCBF2_9CE4_8422_2325, |h, w| {
        step(h, u64::from_le_bytes(*w))
    });
    rest.iter()
        .fold(step(h, bytes.len() as u64), |h, &b| step(h, u64::from(b)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::Index;

    fn compiled(name: &str, bytes: usize) -> Compiled {
        Compiled {
            name: name.into(),
            cubin: (0..bytes).map(|i| (i * 7) as u8).collect(),
            log: "ptxas info\nsecond line".into(),
            resources: vec![KernelResources {
                kernel: name.into(),
                registers: 40,
                ..Default::default()
            }],
            duration: Duration::from_millis(5),
            cached: false,
        }
    }

    fn cache(dir: &Path, limit: u64, version: (i32, i32)) -> CubinCache {
        CubinCache::with_version(dir.to_owned(), limit, version).unwrap()
    }

    #[test]
    fn entries_come_back_for_the_same_key_only() {
        let dir = tempfile::tempdir().unwrap();
        let cubins = cache(dir.path(), DEFAULT_LIMIT, (13, 0));
        let source = Source::new("k", "text");
        assert!(cubins.get(&source).is_none());
        let module = compiled("k", 1003);
        cubins.put(&source, &module).unwrap();
        let found = cubins.get(&source).unwrap();
        assert_eq!(
            found,
            Compiled {
                duration: Duration::ZERO,
                cached: true,
                ..module
            }
        );
        let other = [
            Source {
                text: "texu".into(),
                ..source.clone()
            },
            Source {
                options: vec!["--use_fast_math".into()],
                ..source.clone()
            },
        ];
        assert!(other.iter().all(|s| cubins.get(s).is_none()));
        assert!(
            cache(dir.path(), DEFAULT_LIMIT, (13, 1))
                .get(&source)
                .is_none()
        );
    }

    #[test]
    fn damaged_entries_are_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let cubins = cache(dir.path(), DEFAULT_LIMIT, (13, 0));
        let source = Source::new("k", "text");
        cubins.put(&source, &compiled("k", 1003)).unwrap();
        let path = cubins.path(&source);
        let whole = std::fs::read(&path).unwrap();
        for cut in [0, 5, whole.len() - 1003, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(cubins.get(&source).is_none(), "cut at {cut}");
        }
        for at in [0, whole.len() - 1003, whole.len() - 1] {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x40;
            std::fs::write(&path, bytes).unwrap();
            assert!(cubins.get(&source).is_none(), "flip at {at}");
        }
        cubins.put(&source, &compiled("k", 1003)).unwrap();
        assert!(cubins.get(&source).is_some());
    }

    proptest! {
        /// Any bytes anywhere: the entry is not used, or its code is what it was.
        #[test]
        fn changed_entries_do_not_panic(
            edits in prop::collection::vec((any::<Index>(), any::<u8>(), any::<bool>()), 1..4),
            cut in prop::option::of(any::<Index>()),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let cubins = cache(dir.path(), DEFAULT_LIMIT, (13, 0));
            let source = Source::new("k", "text");
            let intact = compiled("k", 40);
            cubins.put(&source, &intact).unwrap();
            let mut bytes = std::fs::read(cubins.path(&source)).unwrap();
            for (at, byte, insert) in edits {
                let at = at.index(bytes.len());
                match insert {
                    true => bytes.insert(at, byte),
                    false => bytes[at] = byte,
                }
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Some(found) = cubins.decode(&source, &bytes) {
                prop_assert_eq!(found.cubin, intact.cubin);
            }
        }
    }

    #[test]
    fn the_oldest_entries_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let cubins = cache(dir.path(), 40_000, (13, 0));
        let sources: Vec<Source> = (0..4)
            .map(|i| Source::new(format!("k{i}"), format!("text {i}")))
            .collect();
        let age = |source: &Source, seconds: u64| {
            let file = std::fs::File::options()
                .append(true)
                .open(cubins.path(source))
                .unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(seconds))
                .unwrap();
        };
        for (i, source) in sources[..3].iter().enumerate() {
            cubins.put(source, &compiled("k", 12_000)).unwrap();
            age(source, 1000 - i as u64);
        }
        // Used now, so the second oldest has to go.
        assert!(cubins.get(&sources[0]).is_some());
        cubins.put(&sources[3], &compiled("k", 12_000)).unwrap();
        let kept: Vec<bool> = sources.iter().map(|s| cubins.path(s).exists()).collect();
        assert_eq!(kept, [true, false, true, true]);
    }
}
