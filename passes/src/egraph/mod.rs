//! The e-graph: language, analysis, conversion from and to graphs, cost and extraction.

pub mod analysis;
mod bound;
mod constant;
pub mod convert;
pub mod cost;
pub mod extract;
pub mod lang;
pub mod mask;
pub mod pattern;

pub use analysis::{Data, TensorAnalysis};
pub use lang::Lang;

/// An e-graph of tensor programs.
pub type EGraph = egg::EGraph<Lang, TensorAnalysis>;
