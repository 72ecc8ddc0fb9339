//! CUDA C to sm_90a cubins by NVRTC. Needs neither a GPU nor a driver.

use std::ffi::{CString, c_char};
use std::path::Path;
use std::time::{Duration, Instant};

use cudarc::nvrtc::{result, sys};
use serde::{Deserialize, Serialize};

use super::library::{self, Library};
use super::{CompileFailure, CudaError};

/// The architecture of all kernels: Hopper with its architecture-specific instructions (wgmma, setmaxnreg).
pub const ARCH: &str = "sm_90a";

/// A module to compile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Name for messages and files.
    pub name: String,
    /// Header-free CUDA C.
    pub text: String,
    /// Options beside those that every module gets.
    pub options: Vec<String>,
}

impl Source {
    /// A module without options of its own.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        Source {
            name: name.into(),
            text: text.into(),
            options: Vec::new(),
        }
    }

    /// All options, in their order.
    pub fn all_options(&self) -> Vec<String> {
        let fixed = [
            &format!("--gpu-architecture={ARCH}"),
            "--std=c++17",
            "-default-device",
            "--ptxas-options=-v",
        ];
        fixed
            .iter()
            .map(|o| (*o).to_owned())
            .chain(self.options.iter().cloned())
            .collect()
    }
}

/// What ptxas reports of one kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelResources {
    /// Entry name.
    pub kernel: String,
    /// Registers of a thread (at entry, where setmaxnreg changes them).
    pub registers: u32,
    /// Bytes of local memory of a thread; anything but 0 in a hot kernel is a bug (a copied tensor map, say).
    pub stack_bytes: u32,
    /// Bytes of spill stores.
    pub spill_stores: u32,
    /// Bytes of spill loads.
    pub spill_loads: u32,
    /// Bytes of static shared memory.
    pub shared_bytes: u32,
    /// Barriers in use.
    pub barriers: u32,
}

/// A compiled module.
#[derive(Debug, Clone, PartialEq)]
pub struct Compiled {
    /// Name of its source.
    pub name: String,
    /// The cubin.
    pub cubin: Vec<u8>,
    /// NVRTC's and ptxas' log.
    pub log: String,
    /// One entry a kernel, in the order of the log.
    pub resources: Vec<KernelResources>,
    /// Time in NVRTC; zero if it came from the cache.
    pub duration: Duration,
    /// Whether it came from the cache.
    pub cached: bool,
}

impl Compiled {
    /// Lines of the log that tell of a wgmma pipeline that ptxas serialised or a setmaxnreg that it ignored
    /// (C7508, C7510-C7516). They are mere remarks to NVRTC and cost most of a kernel's speed.
    pub fn serialisation_lines(&self) -> Vec<&str> {
        const CODES: [&str; 8] = [
            "C7508", "C7510", "C7511", "C7512", "C7513", "C7514", "C7515", "C7516",
        ];
        self.log
            .lines()
            .filter(|line| CODES.iter().any(|code| line.contains(code)))
            .collect()
    }
}

/// Version of the NVRTC in use, (major, minor).
///
/// # Errors
/// NVRTC is absent.
pub fn version() -> Result<(i32, i32), CudaError> {
    library::ensure(Library::Nvrtc)?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is loaded and both pointers are valid for a write.
    let code = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    code.result()
        .map_err(|e| nvrtc_error("asking for its version", e))?;
    Ok((major, minor))
}

/// Compiles one module. A source that fails is written, with its log, into `failed_dir`.
///
/// # Errors
/// NVRTC is absent; [`CudaError::Compile`].
pub fn compile(source: &Source, failed_dir: &Path) -> Result<Compiled, CudaError> {
    library::ensure(Library::Nvrtc)?;
    let start = Instant::now();
    let nul = |_| CudaError::Nvrtc {
        what: "reading a source",
        code: "it contains a NUL byte".into(),
    };
    let text = CString::new(source.text.as_str()).map_err(nul)?;
    let name = CString::new(format!("{}.cu", source.name)).map_err(nul)?;
    let options = source.all_options();
    if options.iter().any(|o| o.contains('\0')) {
        return Err(CudaError::Nvrtc {
            what: "reading options",
            code: "one contains a NUL byte".into(),
        });
    }
    let program = Program(
        result::create_program(&text, Some(&name))
            .map_err(|e| nvrtc_error("creating a program", e))?,
    );
    // SAFETY: the program was just created, is destroyed only by its guard, and no other thread has it.
    let outcome = unsafe { result::compile_program(program.0, &options) };
    let log = program.log()?;
    if let Err(code) = outcome {
        return Err(failed(source, log, code, failed_dir));
    }
    Ok(Compiled {
        name: source.name.clone(),
        cubin: program.cubin()?,
        resources: parse_resources(&log),
        log,
        duration: start.elapsed(),
        cached: false,
    })
}

fn nvrtc_error(what: &'static str, error: result::NvrtcError) -> CudaError {
    CudaError::Nvrtc {
        what,
        code: error.to_string(),
    }
}

/// The error for a source that does not compile, with source and log on disk.
fn failed(source: &Source, log: String, code: result::NvrtcError, dir: &Path) -> CudaError {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let stem: String = source
        .name
        .chars()
        .map(|c| if is_plain(c) { c } else { '_' })
        .collect();
    let (source_path, log_path) = (
        dir.join(format!("{stem}.cu")),
        dir.join(format!("{stem}.log")),
    );
    let written = super::disk::private_folder(dir)
        .and_then(|()| std::fs::write(&source_path, &source.text))
        .and_then(|()| std::fs::write(&log_path, &log));
    let kept = match written {
        Ok(()) => format!(
            "source: {}, log: {}",
            source_path.display(),
            log_path.display()
        ),
        Err(error) => format!(
            "source and log cannot be kept in {}: {error}",
            dir.display()
        ),
    };
    // Not the lines that close a log: "2 errors detected in the compilation", "aborted due to errors".
    let is_error = |line: &&str| {
        line.contains("error")
            && !line.contains("errors detected")
            && !line.contains("due to error")
            && !line.contains("error detected")
    };
    let mut errors = log.lines().filter(is_error);
    let first = errors
        .next()
        .map_or_else(|| code.to_string(), |line| line.trim().to_owned());
    let reason = match errors.count() {
        0 => first,
        1 => format!("{first}, and 1 more error"),
        more => format!("{first}, and {more} more errors"),
    };
    CudaError::Compile(Box::new(CompileFailure {
        kernel: source.name.clone(),
        reason,
        log,
        kept,
        source_path,
        log_path,
    }))
}

/// A program of NVRTC, destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> Result<String, CudaError> {
        // SAFETY: the program is alive; the call allocates exactly what NVRTC asks for.
        let bytes = unsafe { result::get_program_log(self.0) }
            .map_err(|e| nvrtc_error("reading a log", e))?;
        let bytes: Vec<u8> = bytes
            .into_iter()
            .map(|c| c as u8)
            .take_while(|&b| b != 0)
            .collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn cubin(&self) -> Result<Vec<u8>, CudaError> {
        let mut size = 0;
        // SAFETY: the program is alive and `size` is valid for a write.
        let code = unsafe { sys::nvrtcGetCUBINSize(self.0, &mut size) };
        code.result()
            .map_err(|e| nvrtc_error("asking for a cubin's size", e))?;
        let mut cubin = vec![0u8; size];
        // SAFETY: the buffer has the size that NVRTC just named.
        let code = unsafe { sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast::<c_char>()) };
        code.result()
            .map_err(|e| nvrtc_error("reading a cubin", e))?;
        Ok(cubin)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by create_program and destroyed only here.
        if let Err(error) = unsafe { result::destroy_program(self.0) } {
            tracing::debug!("NVRTC: destroying a program: {error}");
        }
    }
}

/// The reports of `--ptxas-options=-v` in a log.
pub fn parse_resources(log: &str) -> Vec<KernelResources> {
    let mut kernels: Vec<KernelResources> = Vec::new();
    // Whether the properties that follow are those of the last entry, not of some device function.
    let mut in_entry = false;
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            kernels.push(KernelResources {
                kernel,
                ..Default::default()
            });
            in_entry = true;
        } else if let Some(name) = line.split("Function properties for ").nth(1) {
            in_entry = kernels.last().is_some_and(|k| k.kernel == name.trim());
        }
        let Some(kernel) = kernels.last_mut() else {
            continue;
        };
        for part in line.split(',') {
            let before = |what: &str| {
                let head = part.split(what).next().filter(|_| part.contains(what))?;
                head.split_whitespace().last()?.parse::<u32>().ok()
            };
            let set = |field: &mut u32, value: Option<u32>| *field = value.unwrap_or(*field);
            if in_entry {
                set(&mut kernel.stack_bytes, before(" bytes stack frame"));
                set(&mut kernel.spill_stores, before(" bytes spill stores"));
                set(&mut kernel.spill_loads, before(" bytes spill loads"));
            }
            set(&mut kernel.registers, before(" registers"));
            set(&mut kernel.barriers, before(" barriers"));
            set(&mut kernel.shared_bytes, before(" bytes smem"));
        }
    }
    kernels
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn resources_are_read_from_the_log() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'a' for 'sm_90a'\n\
            ptxas info    : Function properties for a\n\
            \x20   8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
            ptxas info    : Used 168 registers, used 2 barriers, 8 bytes cumulative stack size, 1024 bytes smem\n\
            ptxas info    : Function properties for helper\n\
            \x20   64 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Compiling entry function 'b' for 'sm_90a'\n\
            ptxas info    : Used 10 registers, used 0 barriers\n";
        let a = KernelResources {
            kernel: "a".into(),
            registers: 168,
            stack_bytes: 8,
            spill_stores: 4,
            spill_loads: 12,
            shared_bytes: 1024,
            barriers: 2,
        };
        let b = KernelResources {
            kernel: "b".into(),
            registers: 10,
            ..Default::default()
        };
        assert_eq!(parse_resources(log), [a, b]);
    }

    #[test]
    fn serialised_wgmma_is_reported() {
        let log = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n\
            ptxas info    : (C7519) benign\n";
        let mut compiled = Compiled {
            name: "k".into(),
            cubin: vec![],
            log: log.into(),
            resources: vec![],
            duration: Duration::ZERO,
            cached: false,
        };
        assert_eq!(compiled.serialisation_lines().len(), 1);
        compiled.log.clear();
        assert!(compiled.serialisation_lines().is_empty());
    }

    /// Needs no NVRTC: a log of ptxas, one without any error, and a folder that cannot be made.
    #[test]
    fn a_failure_names_the_first_error_and_what_was_kept() {
        let dir = tempfile::tempdir().unwrap();
        let source = Source::new("k", "text");
        let told = |log: &str, dir: &Path| {
            let code = result::NvrtcError(sys::nvrtcResult::NVRTC_ERROR_COMPILATION);
            failure(failed(&source, log.to_owned(), code, dir)).1
        };
        let log = "ptxas info : 0 bytes gmem\nptxas k.ptx, line 7; error   : Arguments mismatch\n\
                   ptxas fatal   : Ptx assembly aborted due to errors\n";
        let message = told(log, dir.path());
        assert!(
            message.contains("line 7; error   : Arguments mismatch"),
            "{message}"
        );
        assert!(
            message.contains(&dir.path().join("k.cu").display().to_string()),
            "{message}"
        );
        assert!(told("", dir.path()).contains("NVRTC_ERROR_COMPILATION"));
        let taken = dir.path().join("k.cu/failed");
        let message = told(log, &taken);
        assert!(
            message.contains("cannot be kept in") && message.contains("Not a directory"),
            "{message}"
        );
    }
}
