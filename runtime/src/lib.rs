//! Devices, weight loading, KV cache, sampling and text for lathe.

pub mod sampling;
pub mod text;
