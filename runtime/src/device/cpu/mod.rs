//! The CPU device.

mod chain;
mod device;
mod exec;
pub(crate) mod executor;
pub mod kernels;
pub(crate) mod memory;
pub mod pages;
mod plain;
mod profile;
pub(crate) mod run;

pub use device::CpuDevice;
pub use executor::{CpuLoadError, load, run_full};
