//! placeholder
pub mod weights;
