//! The program's library: command line, benchmark driver, datasets, metrics and reports.
//!
//! The compiler and the engine live in the member crates; this crate ties them to the user.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))] // They panic where nothing can be written.
#![forbid(unsafe_code)]

pub mod bench;
pub mod cli;
pub mod cmd;
pub mod config;
pub mod console;
pub mod dump;
pub mod errors;
pub mod frontend;
pub mod global_options;
pub mod golden;
pub mod model;
pub mod model_folder;
pub mod phases;
pub mod selftest;
pub mod target;
mod usage;
