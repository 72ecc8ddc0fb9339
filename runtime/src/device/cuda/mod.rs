//! The CUDA substrate: everything between a plan's CUDA C and a running step on an H100.
//!
//! All libraries are loaded at run time. Nothing here is needed to build, and nothing panics when the driver,
//! NVRTC or cuBLASLt is absent: [`library::ensure`] is called first and its error says where it looked.
//!
//! | module | job |
//! |---|---|
//! | [`library`] | finds and loads the shared libraries |
//! | [`nvrtc`], [`cubin_cache`], [`compile`] | CUDA C to cubins, in parallel, once |
//! | [`driver`] | device, streams, events, modules |
//! | [`launch`] | kernel launches with clusters and programmatic dependent launch |
//! | [`memory`] | arenas checked before they are allocated, pinned host memory |
//! | [`tensor_map`] | descriptors of the tensor memory accelerator |
//! | [`graph`], [`timing`] | CUDA graphs, and how long things take |
//! | `programs` | the plan lowered for every bucket |
//! | `resident` | the memory plan, and what lies where on the device |
//! | [`executor`] | steps: the program and graph of a bucket, what goes in and comes back |
//! | [`upload`] | weights into their packed layout on the device |
//! | `autotune`, `tuner` | GEMM kernels chosen by timing, kept on disk (`tuning_cache`) |
//! | [`cublaslt`] | the vendor's GEMM, for comparison and on request |

mod autotune;
mod autotune_bench;
pub(crate) mod buckets;
mod ceilings;
pub mod compile;
pub mod cubin_cache;
pub mod cublaslt;
mod device;
mod disk;
pub mod driver;
mod error;
pub mod executor;
pub mod graph;
pub mod launch;
pub mod library;
pub mod memory;
mod noise;
pub mod nvrtc;
mod once;
pub(crate) mod prepare;
mod profile;
pub(crate) mod programs;
mod resident;
pub(crate) mod state;
pub mod tensor_map;
#[cfg(test)]
mod test_plans;
pub mod timing;
mod tuner;
mod tuning_cache;
pub mod upload;
mod yardstick;

pub use autotune::Tuned;
pub use buckets::DecodeBuckets;
pub use cudarc::driver::sys::CUdeviceptr as DevicePtr;
pub use device::CudaDevice;
pub use error::{CompileFailure, CudaError};
pub use executor::{CudaExecutor, CudaLoad, load};
pub use programs::steps;
