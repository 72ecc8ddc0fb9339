//! Devices: what runs the steps of a plan, and the interface between them and the engine.

pub mod cpu;
pub mod cuda;
pub mod load;
pub mod profile;
pub mod step;
