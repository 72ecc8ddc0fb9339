//! lathe's runtime: devices, weights, KV cache, sampling and text.

pub mod cpu;
pub mod cuda;
pub mod interrupt;
pub mod load;
pub mod profile;
pub mod progress;
pub mod sampling;
pub mod scheduler;
pub mod selftest;
pub mod session;
pub mod step;
pub mod text;
pub mod weights;
