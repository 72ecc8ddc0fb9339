//! Finds and loads the shared libraries: driver, NVRTC, cuBLASLt, NCCL.
//!
//! cudarc opens libraries by bare names through the loader's path and panics when that fails. Before it does, a
//! library that is only in a toolkit folder or in a Python wheel is opened here by its path: the loader then
//! answers later requests for its name with the copy already in the process.

use std::collections::BTreeSet;
use std::ffi::{CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::CudaError;

/// A library that is loaded at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Library {
    /// The CUDA driver.
    Driver,
    /// The run-time compiler; needs no GPU and no driver.
    Nvrtc,
    /// The vendor's GEMM.
    CublasLt,
    /// Collectives.
    Nccl,
}

impl Library {
    /// What it is, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Library::Driver => "the CUDA driver",
            Library::Nvrtc => "NVRTC",
            Library::CublasLt => "cuBLASLt",
            Library::Nccl => "NCCL",
        }
    }

    /// The file that is looked for.
    pub fn file(self) -> &'static str {
        match self {
            Library::Driver => "libcuda.so.1",
            Library::Nvrtc => "libnvrtc.so.13",
            Library::CublasLt => "libcublasLt.so.13",
            Library::Nccl => "libnccl.so.2",
        }
    }

    /// Prefix of a file beside it that it opens by bare name itself.
    fn companion(self) -> Option<&'static str> {
        match self {
            Library::Nvrtc => Some("libnvrtc-builtins.so"),
            _ => None,
        }
    }

    fn hint(self) -> &'static str {
        match self {
            Library::Driver => "install the NVIDIA driver or use --device cpu",
            Library::Nvrtc => {
                "pip install nvidia-cuda-nvrtc, or put a CUDA 13 toolkit's lib64 into LD_LIBRARY_PATH"
            }
            Library::CublasLt => {
                "pip install nvidia-cublas, or put a CUDA 13 toolkit's lib64 into LD_LIBRARY_PATH"
            }
            Library::Nccl => "pip install nvidia-nccl-cu13, or put its folder into LD_LIBRARY_PATH",
        }
    }

    /// Whether cudarc would find it now.
    fn is_visible(self) -> bool {
        // SAFETY: these only open a library by name and close it again; NVIDIA's libraries have no constructors
        // that depend on the state of the process.
        unsafe {
            match self {
                Library::Driver => cudarc::driver::sys::is_culib_present(),
                Library::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
                Library::CublasLt => cudarc::cublaslt::sys::is_culib_present(),
                Library::Nccl => cudarc::nccl::sys::is_culib_present(),
            }
        }
    }
}

/// Libraries known to be loadable.
static READY: Mutex<BTreeSet<Library>> = Mutex::new(BTreeSet::new());

/// Makes sure that a library can be used; cheap after the first time.
///
/// # Errors
/// [`CudaError::Library`] with the folders that were searched.
pub fn ensure(library: Library) -> Result<(), CudaError> {
    let mut ready = READY.lock().unwrap_or_else(|e| e.into_inner());
    if ready.contains(&library) {
        return Ok(());
    }
    let mut looked = Vec::new();
    if !library.is_visible() {
        looked = search_folders();
        // A folder is good only if the name then resolves: a broken copy does not end the search.
        let found = looked
            .iter()
            .any(|folder| preload(library, folder) && library.is_visible());
        if !found {
            return Err(CudaError::Library {
                name: library.name(),
                file: library.file(),
                looked,
                hint: library.hint(),
            });
        }
    }
    tracing::debug!(library = library.name(), searched = looked.len(), "loaded");
    ready.insert(library);
    Ok(())
}

/// The file from which a library is loaded into this process, if it is; for `doctor`.
pub fn loaded_from(library: Library) -> Option<PathBuf> {
    let stem = library.file().split(".so").next()?;
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .map(PathBuf::from)
        .find(|path| {
            path.file_name()
                .and_then(|n| n.to_str())
                .is_some_and(|n| n.starts_with(&format!("{stem}.so")))
        })
}

/// Existing folders of toolkits and Python wheels in the order of preference.
pub fn search_folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = std::env::var_os(variable) {
            folders.push(Path::new(&home).join("lib64"));
            folders.push(Path::new(&home).join("lib"));
        }
    }
    for site in site_packages() {
        folders.extend(
            children(&site.join("nvidia"))
                .into_iter()
                .map(|package| package.join("lib")),
        );
    }
    let mut toolkits: Vec<PathBuf> = children(Path::new("/usr/local"))
        .into_iter()
        .filter(|p| starts_with(p, "cuda"))
        .collect();
    toolkits.push("/opt/cuda".into());
    for toolkit in toolkits {
        folders.push(toolkit.join("lib64"));
        folders.push(toolkit.join("targets/x86_64-linux/lib"));
    }
    let system = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64",
        "/usr/local/nvidia/lib64",
        "/usr/lib/wsl/lib",
        "/run/opengl-driver/lib",
    ];
    folders.extend(system.map(PathBuf::from));
    let mut seen = BTreeSet::new();
    folders.retain(|folder| folder.is_dir() && seen.insert(folder.clone()));
    folders
}

/// `site-packages` of the active environment, of PYTHONPATH, of the user and of the system.
fn site_packages() -> Vec<PathBuf> {
    let mut roots = Vec::new();
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        roots.extend(std::env::var_os(variable).map(|root| Path::new(&root).join("lib")));
    }
    // The Python that the shell finds, which may live in an environment that is not activated.
    let bins: Vec<PathBuf> = std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .collect();
    let pythons = bins.iter().filter(|bin| bin.join("python3").exists());
    roots.extend(
        pythons
            .filter_map(|bin| bin.parent())
            .map(|prefix| prefix.join("lib")),
    );
    roots.extend(std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/lib")));
    roots.extend(["/usr/local/lib", "/usr/lib"].map(PathBuf::from));
    let mut sites: Vec<PathBuf> = std::env::var_os("PYTHONPATH")
        .iter()
        .flat_map(std::env::split_paths)
        .collect();
    for root in roots {
        for python in children(&root)
            .into_iter()
            .filter(|p| starts_with(p, "python3"))
        {
            sites.push(python.join("site-packages"));
            sites.push(python.join("dist-packages"));
        }
    }
    sites
}

/// Entries of a folder, sorted; none if it cannot be read.
fn children(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect();
    entries.sort();
    entries
}

fn starts_with(path: &Path, prefix: &str) -> bool {
    path.file_name()
        .and_then(|n| n.to_str())
        .is_some_and(|n| n.starts_with(prefix))
}

/// Opens a library and its companion by path and keeps them; whether that worked.
fn preload(library: Library, folder: &Path) -> bool {
    let path = folder.join(library.file());
    if !path.exists() {
        return false;
    }
    if let Some(prefix) = library.companion() {
        // Not `libnvrtc-builtins.alt.so`, the variant of another compiler in the same wheel.
        for path in children(folder).iter().filter(|p| starts_with(p, prefix)) {
            dlopen(path);
        }
    }
    dlopen(&path)
}

unsafe extern "C" {
    #[link_name = "dlopen"]
    fn c_dlopen(file: *const c_char, mode: c_int) -> *mut c_void;
}

fn dlopen(path: &Path) -> bool {
    const RTLD_NOW: c_int = 2;
    const RTLD_GLOBAL: c_int = 0x100;
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: the path is a NUL-terminated string that outlives the call. The library stays in the process for
    // good (the handle is dropped on purpose), so nothing taken from it can dangle.
    !unsafe { c_dlopen(path.as_ptr(), RTLD_NOW | RTLD_GLOBAL) }.is_null()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_library_says_where_it_was_looked_for() {
        match ensure(Library::Driver) {
            Ok(()) => assert!(loaded_from(Library::Driver).is_none_or(|p| p.exists())),
            Err(error) => {
                let message = error.to_string();
                assert!(
                    message
                        .starts_with("the CUDA driver was not found: looked for libcuda.so.1 in"),
                    "{message}"
                );
                assert!(
                    message.ends_with("use --device cpu") && !message.contains('\n'),
                    "{message}"
                );
            }
        }
    }

    #[test]
    fn search_folders_exist_and_are_distinct() {
        let folders = search_folders();
        assert!(folders.iter().all(|f| f.is_dir()));
        assert_eq!(folders.iter().collect::<BTreeSet<_>>().len(), folders.len());
    }
}
