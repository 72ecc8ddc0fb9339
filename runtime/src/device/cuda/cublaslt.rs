//! cuBLASLt's GEMM: the yardstick of the generated kernels, and an alternative that autotuning may choose when the
//! user allows it. Never needed.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::driver::Stream;
use super::library::{self, Library};
use super::timing::time_runs;
use super::{CudaError, DevicePtr};

/// Workspace that NVIDIA recommends on Hopper.
pub const WORKSPACE_BYTES: usize = 32 << 20;
/// Algorithms asked for.
const MAX_ALGORITHMS: usize = 32;

/// `y[M, N] = x[M, K] · w[N, K]ᵀ`, all row-major bf16, accumulated in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct GemmShape {
    /// Rows of x and y.
    pub m: usize,
    /// Rows of w, columns of y.
    pub n: usize,
    /// Columns of x and w.
    pub k: usize,
}

/// Operands of a GEMM on the device, aligned to 16 bytes.
#[derive(Debug, Clone, Copy)]
pub struct GemmOperands {
    /// x `[M, K]`.
    pub x: DevicePtr,
    /// w `[N, K]`.
    pub w: DevicePtr,
    /// y `[M, N]`.
    pub y: DevicePtr,
}

/// A handle of the library with its workspace; clones share both.
#[derive(Debug, Clone)]
pub struct CublasLt(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    handle: sys::cublasLtHandle_t,
    workspace: DevicePtr,
}

// SAFETY: cuBLASLt handles may be used from several threads at once; the workspace is only an address, and the
// streams that share it are the caller's concern (see `Gemm::run`).
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl CublasLt {
    /// Opens the library. `workspace` has [`WORKSPACE_BYTES`] on the device and outlives the handle.
    ///
    /// # Errors
    /// cuBLASLt is absent or fails to start.
    pub fn new(workspace: DevicePtr) -> Result<Self, CudaError> {
        library::ensure(Library::CublasLt)?;
        let handle = result::create_handle().during(|| "starting".into())?;
        Ok(CublasLt(Arc::new(Shared { handle, workspace })))
    }

    /// The library's version, as it counts.
    pub fn version(&self) -> usize {
        // SAFETY: the library is loaded; the call has no parameters.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// Prepares a GEMM with every algorithm that the heuristic proposes (up to 32), its first choice first.
    ///
    /// # Errors
    /// A shape without any algorithm.
    pub fn gemm(&self, shape: GemmShape) -> Result<Gemm, CudaError> {
        use sys::cublasLtMatmulDescAttributes_t as D;
        let what = || format!("preparing M={} N={} K={}", shape.m, shape.n, shape.k);
        let (bf16, f32) = (
            sys::cudaDataType_t::CUDA_R_16BF,
            sys::cudaDataType_t::CUDA_R_32F,
        );
        // cuBLAS is column-major: our row-major y is its yᵀ = w · xᵀ, with w stored as its transpose.
        let layout = |rows: usize, cols: usize| {
            result::create_matrix_layout(bf16, rows as u64, cols as u64, rows as i64).map(Layout)
        };
        let a = layout(shape.k, shape.n).during(what)?;
        let b = layout(shape.k, shape.m).during(what)?;
        let d = layout(shape.n, shape.m).during(what)?;
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc = result::create_matmul_desc(compute, f32)
            .map(Desc)
            .during(what)?;
        let transpose: i32 = 1;
        let (value, size) = (ptr::from_ref(&transpose).cast::<c_void>(), size_of::<i32>());
        // SAFETY: the descriptor is alive and the attribute is a 32-bit integer.
        unsafe {
            result::set_matmul_desc_attribute(desc.0, D::CUBLASLT_MATMUL_DESC_TRANSA, value, size)
        }
        .during(what)?;
        let mut gemm = Gemm {
            lt: self.clone(),
            desc,
            a,
            b,
            d,
            shape,
            algorithms: Vec::new(),
            chosen: 0,
        };
        gemm.algorithms = gemm.find_algorithms()?;
        Ok(gemm)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed only here.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// A GEMM of one shape with its algorithms.
pub struct Gemm {
    lt: CublasLt,
    desc: Desc,
    a: Layout,
    b: Layout,
    d: Layout,
    shape: GemmShape,
    algorithms: Vec<sys::cublasLtMatmulHeuristicResult_t>,
    chosen: usize,
}

// SAFETY: descriptors are plain memory of the library that calls only read; they are destroyed once.
unsafe impl Send for Gemm {}
// SAFETY: as above.
unsafe impl Sync for Gemm {}

impl std::fmt::Debug for Gemm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gemm({:?}, algorithm {})", self.shape, self.chosen)
    }
}

impl Gemm {
    /// How many algorithms there are.
    pub fn algorithms(&self) -> usize {
        self.algorithms.len()
    }

    /// The algorithm that [`Gemm::run`] uses: the heuristic's first until [`Gemm::tune`] finds a better one.
    pub fn chosen(&self) -> usize {
        self.chosen
    }

    fn find_algorithms(&self) -> Result<Vec<sys::cublasLtMatmulHeuristicResult_t>, CudaError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        let GemmShape { m, n, k } = self.shape;
        let what = || format!("asking for algorithms for M={m} N={n} K={k}");
        let preference = result::create_matmul_pref().map(Preference).during(what)?;
        let attribute = P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let (value, size) = (
            ptr::from_ref(&WORKSPACE_BYTES).cast::<c_void>(),
            size_of::<usize>(),
        );
        // SAFETY: the preference is alive and the attribute is a 64-bit integer.
        unsafe { result::set_matmul_pref_attribute(preference.0, attribute, value, size) }
            .during(what)?;
        let mut found: Vec<MaybeUninit<sys::cublasLtMatmulHeuristicResult_t>> =
            vec![MaybeUninit::zeroed(); MAX_ALGORITHMS];
        let mut count = 0;
        // SAFETY: all descriptors are alive and there is room for as many results as are asked for.
        let code = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.lt.0.handle,
                self.desc.0,
                self.a.0,
                self.b.0,
                self.d.0,
                self.d.0,
                preference.0,
                MAX_ALGORITHMS as i32,
                found.as_mut_ptr().cast(),
                &mut count,
            )
        };
        code.result().during(what)?;
        let count = usize::try_from(count).unwrap_or(0).min(MAX_ALGORITHMS);
        // SAFETY: the library has written the first `count` results.
        let found = found
            .into_iter()
            .take(count)
            .map(|r| unsafe { r.assume_init() });
        let good: Vec<_> = found
            .filter(|r| r.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS)
            .collect();
        if good.is_empty() {
            return Err(CublasError(
                sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            ))
            .during(what);
        }
        Ok(good)
    }

    /// Runs the chosen algorithm.
    ///
    /// # Safety
    /// The operands have the shape's sizes and are valid until the stream has run it; no other stream uses the
    /// workspace meanwhile.
    ///
    /// # Errors
    /// cuBLASLt refuses.
    pub unsafe fn run(&self, stream: &Stream, operands: &GemmOperands) -> Result<(), CudaError> {
        // SAFETY: by the contract of this function.
        unsafe { self.run_with(stream, operands, None, self.chosen) }
    }

    /// Takes an algorithm by its place in the list.
    ///
    /// # Errors
    /// There are not so many.
    pub fn choose(&mut self, algorithm: usize) -> Result<(), CudaError> {
        if algorithm >= self.algorithms.len() {
            let what = format!("algorithm {algorithm} of {}", self.algorithms.len());
            return Err(CudaError::CublasLt {
                what,
                code: "it does not exist".into(),
            });
        }
        self.chosen = algorithm;
        Ok(())
    }

    /// Runs the chosen algorithm and adds a residual `[M, N]`, if there is one, before the result is rounded.
    ///
    /// # Safety
    /// As [`Gemm::run`], for the residual too.
    ///
    /// # Errors
    /// cuBLASLt refuses.
    pub unsafe fn run_added(
        &self,
        stream: &Stream,
        operands: &GemmOperands,
        residual: Option<DevicePtr>,
    ) -> Result<(), CudaError> {
        // SAFETY: by the contract of this function.
        unsafe { self.run_with(stream, operands, residual, self.chosen) }
    }

    /// As [`Gemm::run`], by one of the [`Gemm::algorithms`].
    ///
    /// # Safety
    /// As [`Gemm::run`].
    pub(super) unsafe fn run_with(
        &self,
        stream: &Stream,
        operands: &GemmOperands,
        residual: Option<DevicePtr>,
        algorithm: usize,
    ) -> Result<(), CudaError> {
        let (alpha, beta) = (1.0f32, if residual.is_some() { 1.0f32 } else { 0.0 });
        let c = residual.unwrap_or(operands.y) as *const c_void;
        let d = operands.y as *mut c_void;
        // SAFETY: descriptors, scalars and the algorithm live through the call; the rest is the caller's contract.
        let outcome = unsafe {
            result::matmul(
                self.lt.0.handle,
                self.desc.0,
                ptr::from_ref(&alpha).cast(),
                ptr::from_ref(&beta).cast(),
                operands.w as *const c_void,
                self.a.0,
                operands.x as *const c_void,
                self.b.0,
                c,
                self.d.0,
                d,
                self.d.0,
                &self.algorithms[algorithm].algo,
                self.lt.0.workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.raw().cast(),
            )
        };
        outcome.during(|| format!("M={} N={} K={}", self.shape.m, self.shape.n, self.shape.k))
    }

    /// Times every algorithm and keeps the fastest; returns the median of its times in microseconds. A sample runs
    /// once over all of `operands`, which together should exceed the L2 so that weights come from memory.
    ///
    /// # Safety
    /// As [`Gemm::run`] for each of the operands.
    ///
    /// # Errors
    /// Errors of the device; an algorithm that refuses is passed over.
    ///
    /// # Panics
    /// If there are no operands.
    pub unsafe fn tune(
        &mut self,
        stream: &Stream,
        operands: &[GemmOperands],
        runs: usize,
    ) -> Result<f64, CudaError> {
        assert!(!operands.is_empty(), "operands to time with");
        let mut best = (f64::INFINITY, self.chosen);
        let mut refusal = None;
        for algorithm in 0..self.algorithms.len() {
            let run = |stream: &Stream| {
                // SAFETY: by the contract of this function.
                operands
                    .iter()
                    .try_for_each(|o| unsafe { self.run_with(stream, o, None, algorithm) })
            };
            match time_runs(stream, 1, runs.max(1), run) {
                Ok(samples) if samples.median() < best.0 => best = (samples.median(), algorithm),
                Ok(_) => {}
                Err(error @ CudaError::CublasLt { .. }) => refusal = Some(error),
                Err(error) => return Err(error),
            }
        }
        match refusal {
            Some(error) if best.0.is_infinite() => Err(error),
            _ => {
                self.chosen = best.1;
                Ok(best.0 / operands.len() as f64)
            }
        }
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);
struct Desc(sys::cublasLtMatmulDesc_t);
struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed only here.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

impl Drop for Desc {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed only here.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed only here.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

trait During<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, CudaError>;
}

impl<T> During<T> for Result<T, CublasError> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, CudaError> {
        self.map_err(|e| CudaError::CublasLt {
            what: what(),
            code: format!("{:?}", e.0),
        })
    }
}
