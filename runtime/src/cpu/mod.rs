//! The CPU device.

pub mod kernels;
