//! placeholder
#![forbid(unsafe_code)]
pub mod cuda;
pub mod pack;
