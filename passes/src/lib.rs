//! lathe's passes: rewrites of the naive graph in one e-graph, stage by stage, and the extraction
//! of step programs under a cost model.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))] // They panic where nothing can be written.
#![forbid(unsafe_code)]

pub mod chains;
pub mod diagnose;
pub mod egraph;
pub mod explain;
pub mod opt;
pub mod pipeline;
pub mod predict;
pub mod region;
pub mod rule;
pub mod rules;
pub mod sample;
pub mod trial;
mod walk;

pub use egraph::{EGraph, Lang};
pub use rule::{Exactness, Rule, Stage};
