//! Autotuning of a loaded plan: its cache, and the vendor's library if it may be chosen.

use super::CudaError;
use super::autotune::{Tuned, choices, tune};
use super::autotune_bench::{GpuBench, places};
use super::buckets::DecodeBuckets;
use super::cubin_cache::CubinCache;
use super::cublaslt::{CublasLt, WORKSPACE_BYTES};
use super::disk::fingerprint;
use super::driver::{Device, Stream};
use super::memory::Arena;
use super::nvrtc;
use super::prepare::Modules;
use super::resident::Resident;
use super::tuning_cache::TuningCache;
use crate::device::load::LoadOptions;
use lathe_codegen::Plan;
use lathe_codegen::cuda::{Choices, CudaOptions, gemm_text};
use std::fmt;
use std::time::Duration;

/// Time after which the remaining shapes are left to the heuristics.
const LIMIT: Duration = Duration::from_secs(40);

/// What is needed to tune; nothing where tuning is off.
#[derive(Default)]
pub(super) struct Tuner {
    cache: Option<TuningCache>,
    /// The library, and the memory of its workspace.
    library: Option<(CublasLt, Arena)>,
}

/// A plan on the device.
pub(super) struct Loaded<'a> {
    pub(super) stream: &'a Stream,
    pub(super) plan: &'a Plan,
    pub(super) options: &'a LoadOptions,
    pub(super) kernels: CudaOptions,
    pub(super) decode: &'a DecodeBuckets,
    pub(super) resident: &'a Resident,
    pub(super) modules: &'a mut Modules,
    pub(super) cubins: Option<&'a CubinCache>,
}

impl Tuner {
    /// Opens the cache of this device and toolchain, and cuBLASLt if it may be chosen. Without the
    /// library, or without a folder for the cache, there is less to choose from or more to time.
    ///
    /// # Errors
    /// The device fails.
    pub(super) fn open(
        device: &Device,
        cublaslt: bool,
        cubins: Option<&CubinCache>,
    ) -> Result<Tuner, CudaError> {
        let library = match cublaslt {
            true => open_library(device)?,
            false => None,
        };
        let properties = device.properties();
        let context = format!(
            "{}, {} multiprocessors, driver {}, NVRTC {:?}, cuBLASLt {:?}, kernels {:016x}",
            properties.name,
            properties.sm_count,
            properties.driver_version,
            nvrtc::version()?,
            library.as_ref().map(|l| l.0.version()),
            fingerprint(&gemm_text())
        );
        Ok(Tuner {
            cache: Some(TuningCache::open(cubins.map(CubinCache::dir), &context)),
            library,
        })
    }

    /// The library that launches may use.
    pub(super) fn library(&self) -> Option<&CublasLt> {
        self.library.as_ref().map(|l| &l.0)
    }

    /// The choices that earlier runs have made for a plan.
    ///
    /// # Errors
    /// A GEMM's operands are not what they should be.
    pub(super) fn known(
        &self,
        plan: &Plan,
        options: &LoadOptions,
        kernels: CudaOptions,
        decode: &DecodeBuckets,
    ) -> Result<Choices, CudaError> {
        let Some(cache) = &self.cache else {
            return Ok(Choices::default());
        };
        let (keys, _) = places(plan, options, kernels, decode)?;
        Ok(choices(cache, &keys, kernels.sms as usize))
    }

    /// Tunes a plan that lies on the device; no step of it may be in flight.
    ///
    /// # Errors
    /// The device fails.
    pub(super) fn tune(&mut self, on: Loaded<'_>) -> Result<(Choices, Tuned), CudaError> {
        let Some(cache) = &mut self.cache else {
            return Ok(Default::default());
        };
        let (keys, places) = places(on.plan, on.options, on.kernels, on.decode)?;
        let mut bench = GpuBench::new(
            on.stream,
            on.plan,
            on.kernels,
            on.resident,
            on.modules,
            places,
        )?;
        bench.cache = on.cubins;
        bench.library = self.library.as_ref().map(|l| &l.0);
        let sms = on.kernels.sms as usize;
        let tuned = tune(&mut bench, &keys, sms, cache, LIMIT)?;
        bench.finish()?;
        Ok(tuned)
    }
}

fn open_library(device: &Device) -> Result<Option<(CublasLt, Arena)>, CudaError> {
    let hint = "switch transforms.autotune.cublaslt off";
    let workspace = Arena::new(device, "cuBLASLt's workspace", WORKSPACE_BYTES, hint)?;
    match CublasLt::new(workspace.base()) {
        Ok(library) => Ok(Some((library, workspace))),
        Err(error) => {
            tracing::warn!("autotune: own kernels only: {error}");
            Ok(None)
        }
    }
}

impl fmt::Display for Tuned {
    /// One line for the log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "autotune: {} GEMM shapes, {} timed now, {} not with the heuristic's kernel ({:.1} % of its time), {:.1} s",
            self.shapes,
            self.timed,
            self.changed,
            100.0 * self.relative_time,
            self.seconds
        )?;
        match self.left {
            0 => Ok(()),
            left => write!(f, "; {left} left to the heuristics for want of time"),
        }
    }
}
