//! placeholder
pub mod cuda;
pub mod weights;
