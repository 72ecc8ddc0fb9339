//! The CPU device.

mod exec;
mod executor;
pub mod kernels;
mod memory;
pub mod pages;
mod plain;

pub use executor::{CpuLoadError, load, run_full};
pub use memory::token_bytes;
