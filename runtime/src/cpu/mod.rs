//! The CPU device.

pub mod kernels;
pub mod pages;
