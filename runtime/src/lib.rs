//! lathe's runtime: devices, weights, KV cache, sampling and text.

pub mod cpu;
pub mod cuda;
pub mod sampling;
pub mod step;
pub mod text;
pub mod weights;
