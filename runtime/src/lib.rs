//! lathe's runtime: devices, kernels, weights, KV cache and scheduling.

pub mod cpu;
