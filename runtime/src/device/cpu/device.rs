//! The CPU as a device.

use super::executor::{load, run_full};
use super::memory::{meminfo, token_bytes};
use super::profile::ceilings;
use crate::device::executor::Executor;
use crate::device::load::{Backend, LoadOptions, Loadable};
use crate::device::profile::Ceilings;
use crate::device::{Capabilities, Description, Device, DeviceError, Memory};
use lathe_codegen::Plan;
use lathe_ir::DType;

/// This machine's CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuDevice;

impl Device for CpuDevice {
    fn name(&self) -> String {
        "cpu".into()
    }

    fn cost_model(&self) -> &'static str {
        "cpu"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            is_asynchronous: false,
            compiles: false,
            has_known_rates: false,
            has_own_memory: false,
            // It is bound by arithmetic long before; more sequences would only cost memory.
            useful_batch: Some(64),
            f32_error: 5e-6,
        }
    }

    /// What is available; a cache takes never more than a quarter of all, so that a laptop stays
    /// usable.
    fn memory(&self) -> Result<Memory, DeviceError> {
        /// Where the system does not say.
        const GUESS: u64 = 8 << 30;
        Ok(Memory {
            free: meminfo("MemAvailable").unwrap_or(GUESS),
            cache_limit: meminfo("MemTotal").unwrap_or(u64::MAX) / 4,
            reserve: 0,
        })
    }

    fn token_bytes(&self, plan: &Plan) -> usize {
        token_bytes(plan)
    }

    fn load(
        &self,
        model: Loadable<'_>,
        options: LoadOptions,
        _backend: &Backend,
    ) -> Result<Box<dyn Executor>, DeviceError> {
        load(model, options).map_err(|e| DeviceError::new("loading the model on the CPU", e))
    }

    fn run_full(
        &self,
        model: Loadable<'_>,
        tokens: &[i32],
        batch: usize,
    ) -> Result<Vec<f32>, DeviceError> {
        run_full(model, tokens, batch)
            .map_err(|e| DeviceError::new("running whole sequences on the CPU", e))
    }

    fn ceilings(&self, dtype: DType) -> Result<Ceilings, DeviceError> {
        Ok(ceilings(dtype))
    }

    fn describe(&self) -> Option<Description> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_laptop_keeps_its_memory() {
        let memory = CpuDevice.memory().unwrap();
        let total = meminfo("MemTotal").unwrap();
        assert!(memory.free <= total && total > 1 << 27);
        assert_eq!(memory.for_cache(u64::MAX), (total / 4, 0));
        assert_eq!(memory.for_cache(1 << 20), (1 << 20, 0));
    }
}
