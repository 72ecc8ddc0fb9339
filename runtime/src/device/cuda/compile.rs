//! Sources to modules: through the cache if there is one, many at a time.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::CudaError;
use super::cubin_cache::CubinCache;
use super::driver::{Device, Function};
use super::nvrtc::{Compiled, Source, compile};
use crate::threads::on_several;

/// Compiles many modules on `threads` threads (NVRTC runs in parallel in one process), through the cache if there
/// is one. `on_done` is called with the number of modules done, from any thread. The result has the order of the
/// sources.
pub fn compile_all(
    sources: &[Source],
    cache: Option<&CubinCache>,
    failed_dir: &Path,
    threads: usize,
    on_done: &(dyn Fn(usize) + Sync),
) -> Vec<Result<Compiled, CudaError>> {
    // The longest sources take longest: none of them should be the last to start.
    let mut order: Vec<usize> = (0..sources.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(sources[i].text.len()));
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let results: Vec<Mutex<Option<Result<Compiled, CudaError>>>> =
        sources.iter().map(|_| Mutex::new(None)).collect();
    let work = || {
        while let Some(&index) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let source = &sources[index];
            let compiled = match cache {
                Some(cache) => cache.get_or_compile(source, failed_dir),
                None => compile(source, failed_dir),
            };
            *results[index].lock().unwrap_or_else(|e| e.into_inner()) = Some(compiled);
            on_done(done.fetch_add(1, Ordering::Relaxed) + 1);
        }
    };
    on_several(threads.min(sources.len()), work);
    let take = |slot: Mutex<Option<_>>| slot.into_inner().unwrap_or_else(|e| e.into_inner());
    results
        .into_iter()
        .map(|slot| take(slot).expect("every index was taken by one thread"))
        .collect()
}

/// The kernel of a module that has the module's name, out of the cache if there is one.
///
/// # Errors
/// The source does not compile, or the driver does not load it.
pub(super) fn load_kernel(
    device: &Device,
    source: &Source,
    cache: Option<&CubinCache>,
) -> Result<Function, CudaError> {
    let failed = failed_dir(cache);
    let compiled = match cache {
        Some(cache) => cache.get_or_compile(source, &failed)?,
        None => compile(source, &failed)?,
    };
    device
        .load_module(&source.name, &compiled.cubin)?
        .function(&source.name, 0)
}

/// The folder for sources that fail to compile: beside the cache's entries, without a cache among temporary files.
pub fn failed_dir(cache: Option<&CubinCache>) -> PathBuf {
    cache
        .map_or_else(super::disk::private_temporary, |c| c.dir().to_owned())
        .join("failed")
}

#[cfg(test)]
mod tests {
    use super::super::CompileFailure;
    use super::super::library::{self, Library};
    use super::*;

    fn ensure_nvrtc() {
        if let Err(error) = library::ensure(Library::Nvrtc) {
            panic!("{error}");
        }
    }

    /// The failure and its message, which is one line.
    fn failure(error: CudaError) -> (Box<CompileFailure>, String) {
        let message = error.to_string();
        assert_eq!(message.lines().count(), 1, "{message}");
        let CudaError::Compile(failure) = error else {
            panic!("{message}")
        };
        (failure, message)
    }

    #[test]
    #[ignore = "NVRTC missing (make nvrtc)"]
    fn kernels_compile_in_parallel() {
        ensure_nvrtc();
        let source = |i: usize| {
            let text = format!(
                "extern \"C\" __global__ void k{i}(float* x) {{ __shared__ float s[64]; s[threadIdx.x] = x[threadIdx.x]; \
                 __syncthreads(); x[threadIdx.x] = s[63 - threadIdx.x] * {i}; }}"
            );
            Source::new(format!("k{i}"), text)
        };
        let mut sources: Vec<Source> = (0..4).map(source).collect();
        let plain = [
            (
                "random_weights",
                lathe_codegen::cuda::random_weights::SOURCE,
            ),
            ("scale_columns", lathe_codegen::cuda::scale_columns::SOURCE),
        ];
        sources.extend(plain.map(|(name, text)| Source::new(name, text)));
        let dir = tempfile::tempdir().unwrap();
        let done = AtomicUsize::new(0);
        let count = |n| {
            done.fetch_max(n, Ordering::Relaxed);
        };
        let compiled = compile_all(&sources, None, dir.path(), 2, &count);
        assert_eq!(done.into_inner(), 6);
        for (source, compiled) in sources.iter().zip(compiled) {
            let compiled = compiled.unwrap();
            assert!(compiled.cubin.starts_with(b"\x7fELF"));
            let [resources] = compiled.resources.as_slice() else {
                panic!("{:?}", compiled.log)
            };
            assert_eq!(resources.kernel, source.name);
            assert!(
                resources.registers > 0
                    && resources.spill_stores == 0
                    && resources.stack_bytes == 0,
                "{resources:?}"
            );
            if !plain.iter().any(|(name, _)| source.name == *name) {
                assert_eq!(
                    (resources.shared_bytes, resources.barriers),
                    (256, 1),
                    "{}",
                    compiled.log
                );
            }
        }
    }

    #[test]
    #[ignore = "NVRTC missing (make nvrtc)"]
    fn a_failed_compile_says_why_and_where_its_source_lies() {
        ensure_nvrtc();
        let dir = tempfile::tempdir().unwrap();
        let cache = CubinCache::open(dir.path().join("cubins"), 1 << 20).unwrap();
        let good = Source::new("good", "extern \"C\" __global__ void good() {}");
        let bad = Source::new(
            "bad/kernel",
            "extern \"C\" __global__ void k(int* x) {\n  *x = undeclared;\n  *x = missing();\n}",
        );
        let sources = [good, bad.clone()];
        // What fails is not cached: the second time it fails in the same way.
        for _ in 0..2 {
            let failed = failed_dir(Some(&cache));
            let mut outcomes = compile_all(&sources, Some(&cache), &failed, 2, &|_| {});
            let (failure, message) = failure(outcomes.pop().unwrap().unwrap_err());
            assert!(outcomes.pop().unwrap().is_ok(), "the others are not lost");
            let source_path = dir.path().join("cubins/failed/bad_kernel.cu");
            let log_path = source_path.with_extension("log");
            assert_eq!(
                message,
                format!(
                    "kernel bad/kernel does not compile: bad/kernel.cu(2): error: identifier \"undeclared\" is undefined, \
                     and 1 more error (source: {}, log: {})",
                    source_path.display(),
                    log_path.display()
                )
            );
            assert_eq!(std::fs::read_to_string(&source_path).unwrap(), bad.text);
            let log = std::fs::read_to_string(&log_path).unwrap();
            assert!(
                log.contains("undeclared") && log.contains("missing"),
                "{log}"
            );
            assert_eq!(failure.log, log);
            std::fs::remove_dir_all(&failed).unwrap();
        }
    }
}
