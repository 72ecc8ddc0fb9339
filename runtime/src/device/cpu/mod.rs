//! The CPU device.

mod chain;
mod exec;
mod executor;
pub mod kernels;
mod memory;
pub mod pages;
mod plain;
mod profile;
mod twin;

#[cfg(test)]
pub(crate) use executor::check_batch;
pub use executor::{CpuLoadError, load, run_full};
pub use memory::token_bytes;
pub use profile::ceilings;
pub(crate) use twin::{Snapshot, Twin, load_twin};
