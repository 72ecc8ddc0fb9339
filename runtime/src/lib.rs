//! lathe's runtime: devices, weights, KV cache, sampling and text.

pub mod device;
pub mod engine;
pub mod interrupt;
pub mod progress;
pub mod sampling;
pub mod selftest;
pub mod text;
pub mod weights;
