//! Errors of the CUDA device.

use std::io;
use std::path::PathBuf;

use cudarc::driver::result::DriverError;

use crate::weights::WeightsError;

/// What can go wrong with CUDA. Every message is one line.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// A shared library cannot be loaded.
    #[error(
        "{name} was not found: looked for {file} in the loader's path and in {}; {hint}",
        paths(looked)
    )]
    Library {
        /// What it is.
        name: &'static str,
        /// The file that was looked for.
        file: &'static str,
        /// Folders that were searched after the loader's path.
        looked: Vec<PathBuf>,
        /// What to do.
        hint: &'static str,
    },
    /// A driver call failed.
    #[error("CUDA: {what}: {source}")]
    Driver {
        /// What was attempted.
        what: String,
        /// The driver's error.
        source: DriverError,
    },
    /// There is no such device.
    #[error("CUDA device {ordinal} does not exist: the driver reports {count}")]
    NoDevice {
        /// The device asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device's architecture is not supported.
    #[error(
        "CUDA device {ordinal} ({name}) has compute capability {major}.{minor}; the generated kernels need 9.0 (H100, H200): use --device cpu"
    )]
    Architecture {
        /// The device.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Compute capability, major.
        major: i32,
        /// Compute capability, minor.
        minor: i32,
    },
    /// Memory that would not fit; nothing was allocated.
    #[error("GPU memory: {} wanted, {} free of {}, {} missing; {hint}", wants(wanted),
        gib(*free), gib(*total), gib(sum(wanted).saturating_sub(*free)))]
    Memory {
        /// What was wanted: names and bytes.
        wanted: Vec<(String, usize)>,
        /// Free bytes.
        free: usize,
        /// Bytes of the device.
        total: usize,
        /// What to lower.
        hint: String,
    },
    /// An arena is smaller than what was put into it; the memory plan was wrong.
    #[error(
        "arena {arena} of {capacity} bytes is full: {used} are used, {bytes} more were asked for"
    )]
    ArenaFull {
        /// The arena.
        arena: String,
        /// Its bytes.
        capacity: usize,
        /// Bytes in use.
        used: usize,
        /// Bytes asked for.
        bytes: usize,
    },
    /// A kernel does not compile.
    #[error("kernel {} does not compile: {} ({})", .0.kernel, .0.reason, .0.kept)]
    Compile(Box<CompileFailure>),
    /// An NVRTC call failed for another reason than the source.
    #[error("NVRTC: {what}: {code}")]
    Nvrtc {
        /// What was attempted.
        what: &'static str,
        /// NVRTC's error.
        code: String,
    },
    /// A file of the cache or of a failed compile cannot be written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A tensor map whose parameters the hardware does not take.
    #[error("tensor map of {name}: {reason}")]
    TensorMap {
        /// The tensor.
        name: String,
        /// All reasons.
        reason: String,
    },
    /// A cuBLASLt call failed.
    #[error("cuBLASLt: {what}: {code}")]
    CublasLt {
        /// What was attempted.
        what: String,
        /// cuBLASLt's status.
        code: String,
    },
    /// A step of the plan has no kernel.
    #[error(transparent)]
    Lower(#[from] lathe_codegen::cuda::CudaError),
    /// The plan has no program that decodes with a cache.
    #[error("the plan has no step program with a KV cache")]
    NoStepProgram,
    /// Weights that cannot be read or packed.
    #[error(transparent)]
    Weights(Box<WeightsError>),
}

impl From<WeightsError> for CudaError {
    fn from(error: WeightsError) -> Self {
        CudaError::Weights(Box::new(error))
    }
}

/// What is known of a kernel that does not compile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompileFailure {
    /// The kernel's module.
    pub kernel: String,
    /// The first error of the log, and how many follow.
    pub reason: String,
    /// The whole log.
    pub log: String,
    /// Where source and log lie, or why they could not be written.
    pub kept: String,
    /// The file that the source was written to.
    pub source_path: PathBuf,
    /// The file that the log was written to.
    pub log_path: PathBuf,
}

/// Names the attempted call in a driver error.
pub(crate) trait During<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, CudaError>;
}

impl<T> During<T> for Result<T, DriverError> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Driver {
            what: what(),
            source,
        })
    }
}

/// Bytes in GiB with two digits, as in all messages about memory.
pub(crate) fn gib(bytes: usize) -> String {
    format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64)
}

fn paths(paths: &[PathBuf]) -> String {
    if paths.is_empty() {
        return "no other folder".into();
    }
    paths
        .iter()
        .map(|p| p.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

fn wants(wanted: &[(String, usize)]) -> String {
    let total = gib(sum(wanted));
    let parts: Vec<String> = wanted
        .iter()
        .map(|(name, bytes)| format!("{name} {}", gib(*bytes)))
        .collect();
    format!("{total} ({})", parts.join(" + "))
}

fn sum(wanted: &[(String, usize)]) -> usize {
    wanted.iter().fold(0, |sum, w| sum.saturating_add(w.1))
}
