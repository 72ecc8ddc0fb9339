//! lathe's runtime: devices, weights, KV cache, sampling and text.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))] // They panic where nothing can be written.

pub mod device;
pub mod engine;
pub mod interrupt;
pub mod process;
pub mod progress;
pub mod sampling;
pub mod selftest;
pub mod text;
pub mod threads;
pub mod weights;
