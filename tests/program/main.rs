//! The program as a user runs it, on the CPU: commands, options files, errors and tokens. One program, so that it is
//! linked once and its tests share the machine's cores.

mod backends;
mod check;
mod common;
mod compare;
mod compile;
mod config;
mod errors;
mod foreign;
mod fuzz_seeds;
mod hostile;
mod kernels;
mod prepare_dataset;
mod selftest;
mod serving;
mod serving_tokens;
mod settings;
mod soak;
mod verify_goldens;
