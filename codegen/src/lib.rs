//! lathe's plans: device-neutral steps over buffers, packed weights and KV caches, and their
//! lowering to CUDA C.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))] // They panic where nothing can be written.
#![forbid(unsafe_code)]

pub mod chain;
pub mod cuda;
mod fold;
pub mod liveness;
pub mod lower;
pub mod pack;
pub mod plan;
pub mod work;

pub use lower::{LowerError, Programs, lower};
pub use pack::{PackDType, PackRecipe};
pub use plan::{Once, Operand, Plan, Program, ProgramKind, Slot, Step, ValueId};
