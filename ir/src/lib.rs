//! lathe's tensor IR.
//!
//! A [`Graph`] is a list of typed operations in topological order. Importers build it from a
//! Hugging Face configuration with primitive operations only; the e-graph passes rewrite it into
//! composites and lowered operations; the code generator turns the result into a plan. This crate
//! knows nothing of e-graphs, of CUDA, or of weights beyond their names and shapes.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))] // They panic where nothing can be written.
#![forbid(unsafe_code)]

pub mod chain;
pub mod dtype;
mod error_norm;
pub mod foreign;
pub mod functions;
pub mod graph;
pub mod import;
pub mod infer;
pub mod interp;
mod kernel_limits;
mod known;
pub mod operands;
pub mod ops;
mod printable;
mod program;
mod real;
pub mod shape;
mod step_input;
pub mod text;
mod types;
pub mod verify;
mod work;

pub use chain::{Chain, ChainArg, ChainOp};
pub use dtype::DType;
pub use error_norm::relative_error;
pub use functions::{BinaryFn, ReduceFn, UnaryFn};
pub use graph::{Graph, Node, NodeId, Prov};
pub use infer::{TypeError, infer};
pub use kernel_limits::KernelLimits;
pub use known::Known;
pub use operands::{Operands, Slot};
pub use ops::{
    AttnSpec, Class, Epilogue, Level, Mask, Op, Pack, Prologue, SdpaStage, WeightRef,
    interleaved_source, kernel_name,
};
pub use printable::printable;
pub use program::{Both, ProgramKind};
pub use real::Real;
pub use shape::{Dim, Sym, SymEnv};
pub use step_input::{Output, StepInput};
pub use types::{TensorType, Type};
pub use verify::{VerifyError, verify};
pub use work::{Heads, OpWork, Product};
