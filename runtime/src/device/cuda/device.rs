//! A GPU as a device.

use super::CudaError;
use super::ceilings::ceilings;
use super::driver::{self, DeviceProperties};
use super::executor::{CudaLoad, load};
use crate::device::executor::Executor;
use crate::device::load::{Backend, LoadOptions, Loadable};
use crate::device::profile::Ceilings;
use crate::device::{Capabilities, Description, Device, DeviceError, Memory};
use lathe_codegen::Plan;
use lathe_ir::DType;
use std::path::PathBuf;

/// A GPU by number.
#[derive(Clone, Debug)]
pub struct CudaDevice {
    properties: DeviceProperties,
    cache: Option<PathBuf>,
}

impl CudaDevice {
    /// The rates that a GPU may name: without and with the memory of an H200.
    pub const COST_MODELS: [&'static str; 2] = ["h100", "h200"];

    /// Looks a device up; compiled kernels go to the folder `cache`, by default the user's.
    ///
    /// # Errors
    /// No driver, no such device, or one that the kernels are not made for.
    pub fn find(ordinal: usize, cache: Option<PathBuf>) -> Result<Self, CudaError> {
        let properties = driver::properties(ordinal)?;
        Ok(Self { properties, cache })
    }

    /// The maker's name of it.
    pub fn product(&self) -> &str {
        &self.properties.name
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.properties.ordinal
    }

    /// The folder of compiled kernels; none: the user's.
    pub fn cache(&self) -> Option<&PathBuf> {
        self.cache.as_ref()
    }
}

impl Device for CudaDevice {
    fn name(&self) -> String {
        format!("cuda:{}", self.properties.ordinal)
    }

    fn cost_model(&self) -> &'static str {
        Self::COST_MODELS[usize::from(self.properties.name.contains("H200"))]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            is_asynchronous: true,
            compiles: true,
            has_known_rates: true,
            has_own_memory: true,
            useful_batch: None,
            f32_error: 1e-4,
        }
    }

    fn memory(&self) -> Result<Memory, DeviceError> {
        /// For CUDA graphs, modules and libraries.
        const RESERVE: u64 = 1 << 30;
        let device = driver::Device::open(self.properties.ordinal);
        let (free, _) = device
            .and_then(|device| device.memory())
            .map_err(|e| DeviceError::new("asking the GPU for its memory", e))?;
        Ok(Memory {
            free: free as u64,
            cache_limit: u64::MAX,
            reserve: RESERVE,
        })
    }

    fn token_bytes(&self, plan: &Plan) -> usize {
        plan.token_bytes()
    }

    fn load(
        &self,
        model: Loadable<'_>,
        options: LoadOptions,
        backend: &Backend,
    ) -> Result<Box<dyn Executor>, DeviceError> {
        let how = CudaLoad {
            ordinal: self.properties.ordinal,
            graphs: backend.graphs,
            graph_sizes: backend.graph_sizes.clone(),
            per_op: backend.per_op,
            autotune: backend.autotune,
            cublaslt: backend.cublaslt,
            cache: self.cache.clone(),
            ..CudaLoad::default()
        };
        load(model, options, &how).map_err(|e| DeviceError::new("loading the model on the GPU", e))
    }

    fn run_full(
        &self,
        _model: Loadable<'_>,
        _tokens: &[i32],
        _batch: usize,
    ) -> Result<Vec<f32>, DeviceError> {
        let why = "it is done on the CPU only; use --device cpu";
        Err(DeviceError::new("running whole sequences on the GPU", why))
    }

    fn ceilings(&self, dtype: DType) -> Result<Ceilings, DeviceError> {
        let mut rates = ceilings(self.properties.ordinal, self.cache.clone())
            .map_err(|e| DeviceError::new("measuring the GPU's ceilings", e))?;
        // cuBLASLt was measured in 16 bits.
        if dtype == DType::F32 {
            rates.matrix = None;
        }
        Ok(rates)
    }

    fn describe(&self) -> Option<Description> {
        Some(Description {
            name: self.properties.name.clone(),
            memory_bytes: self.properties.memory_bytes as u64,
            memory_clock_khz: self.properties.memory_clock_khz,
            pci_address: driver::pci_address(self.properties.ordinal).ok(),
        })
    }
}
