//! Devices: what a plan runs on.
//!
//! A [`Device`] tells what it is and has, and loads plans. What it gives is an
//! [`Executor`], which runs steps for the engine. Nobody above this folder asks which device it
//! is, except where the user's choice is turned into one.

pub mod cpu;
pub mod cuda;
pub mod executor;
pub mod load;
pub mod profile;
pub mod step;

use executor::Executor;
use lathe_codegen::Plan;
use lathe_ir::DType;
use load::{Backend, LoadOptions, Loadable};
use profile::Ceilings;
use std::fmt;

/// Memory of a device while no model is loaded, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// What is free now.
    pub free: u64,
    /// Most that a cache may take, however much is free.
    pub cache_limit: u64,
    /// What stays free beside a cache, for the device's own needs.
    pub reserve: u64,
}

impl Memory {
    /// What a cache may be taken from, and how much of that stays free, when `left` bytes are left
    /// beside everything else.
    pub fn for_cache(&self, left: u64) -> (u64, u64) {
        (left.min(self.cache_limit), self.reserve.min(left))
    }
}

/// What callers have to know of a device to use it well.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capabilities {
    /// Steps run while the host goes on: one can be submitted before the last one is read.
    pub is_asynchronous: bool,
    /// Kernels are made for the model. There is something to warm up, and a [`Backend`] matters.
    pub compiles: bool,
    /// The cost model's rates are those of the machine, so that times can be predicted.
    pub has_known_rates: bool,
    /// The memory is the device's own: little of it for the cache is worth a warning.
    pub has_own_memory: bool,
    /// Sequences beyond which a larger batch gains nothing.
    pub useful_batch: Option<usize>,
    /// Largest relative error of float32 logits against a reference that is right.
    pub f32_error: f64,
}

/// What a device is, for reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// The maker's name of it.
    pub name: String,
    /// All of its memory.
    pub memory_bytes: u64,
    /// Clock of the memory in kHz.
    pub memory_clock_khz: u32,
    /// Address on the bus, where the system says.
    pub pci_address: Option<String>,
}

/// A device refuses or fails. It is never the fault of the plan: that was checked when it was made.
#[derive(Debug, thiserror::Error)]
#[error("{doing}")]
pub struct DeviceError {
    doing: &'static str,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl DeviceError {
    /// The failure of `doing`, such as `loading the model on the CPU`.
    pub fn new(
        doing: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            doing,
            source: source.into(),
        }
    }
}

/// What plans run on.
pub trait Device: fmt::Debug + Send + Sync {
    /// Name in logs and reports: `cpu`, `cuda:0`.
    fn name(&self) -> String;

    /// The compiler's name of the rates that costs are computed with: `cpu`, `h100`, `h200`.
    fn cost_model(&self) -> &'static str;

    /// What callers have to know.
    fn capabilities(&self) -> Capabilities;

    /// Its memory, now.
    ///
    /// # Errors
    /// The device cannot be opened.
    fn memory(&self) -> Result<Memory, DeviceError>;

    /// Bytes of one token in all caches of a plan, as this device stores them.
    fn token_bytes(&self, plan: &Plan) -> usize;

    /// Puts a plan on the device.
    ///
    /// # Errors
    /// The weights do not fit the plan, or the model does not fit the device.
    fn load(
        &self,
        model: Loadable<'_>,
        options: LoadOptions,
        backend: &Backend,
    ) -> Result<Box<dyn Executor>, DeviceError>;

    /// Runs the whole-sequence program without a cache: `tokens` `[batch, len]` to logits
    /// `[batch, len, vocab]`.
    ///
    /// # Errors
    /// The device runs step programs only, or as [`Device::load`].
    fn run_full(
        &self,
        model: Loadable<'_>,
        tokens: &[i32],
        batch: usize,
    ) -> Result<Vec<f32>, DeviceError>;

    /// The best rates of the device, measured now; the matrix rate is that of products in `dtype`.
    ///
    /// # Errors
    /// The device cannot be opened, or its memory does not suffice.
    fn ceilings(&self, dtype: DType) -> Result<Ceilings, DeviceError>;

    /// What the device is; nothing where there is nothing to say beside the name.
    fn describe(&self) -> Option<Description>;
}
