//! Which device a command runs on, and which one it compiles and predicts for.

use crate::errors::usage_error;
use crate::global_options::DeviceChoice;
use anyhow::Context;
use lathe_passes::egraph::cost::DeviceModel;
use lathe_runtime::device::Device;
use lathe_runtime::device::cpu::CpuDevice;
use lathe_runtime::device::cuda::{CudaDevice, CudaError};
use lathe_runtime::selftest::cuda::CudaTester;
use lathe_runtime::selftest::{CpuTester, Tester};
use std::path::PathBuf;

/// What `--device` stands for here. This is the one place that tells devices apart; everything else
/// asks the [`Device`].
#[derive(Clone, Debug)]
pub enum Target {
    /// The CPU.
    Cpu(CpuDevice),
    /// A GPU.
    Cuda(CudaDevice),
}

impl Target {
    /// Resolves `--device`: `auto` takes a usable GPU, else the CPU, and says which. A GPU's compiled
    /// kernels go to the folder `cache`.
    ///
    /// # Errors
    /// A GPU was asked for and cannot be used.
    pub fn resolve(choice: DeviceChoice, cache: PathBuf) -> anyhow::Result<Target> {
        let find = |index: u32| CudaDevice::find(index as usize, Some(cache));
        Ok(match choice {
            DeviceChoice::Cpu => Target::Cpu(CpuDevice),
            DeviceChoice::Cuda(index) => Target::Cuda(find(index)?),
            DeviceChoice::Auto => match find(0) {
                Ok(gpu) => {
                    tracing::info!("device: {}, {}", gpu.name(), gpu.product());
                    Target::Cuda(gpu)
                }
                Err(reason) => {
                    tracing::info!("device: cpu ({reason})");
                    Target::Cpu(CpuDevice)
                }
            },
        })
    }

    /// The device.
    pub fn into_device(self) -> Box<dyn Device> {
        match self {
            Target::Cpu(cpu) => Box::new(cpu),
            Target::Cuda(gpu) => Box::new(gpu),
        }
    }

    /// The device's self-test, of the families of kernels that contain `filter`.
    ///
    /// # Errors
    /// A GPU cannot be used.
    pub fn tester(&self, filter: Option<String>) -> Result<Box<dyn Tester>, CudaError> {
        Ok(match self {
            Target::Cpu(_) => Box::new(CpuTester { filter }),
            Target::Cuda(gpu) => Box::new(CudaTester::open(gpu, filter)?),
        })
    }
}

/// Rates of a device, for cost and prediction.
///
/// # Panics
/// The compiler does not know them (invariant: a device names rates of [`DeviceModel::by_name`]).
pub fn cost_model(device: &dyn Device) -> DeviceModel {
    let model = DeviceModel::by_name(device.cost_model());
    model.expect("invariant: a device names rates that the compiler knows")
}

/// The device that a program is compiled for, which need not be here.
#[derive(Clone, Debug, PartialEq)]
pub struct Predicted {
    /// Its rates.
    pub model: DeviceModel,
    /// Who chose it, for readers.
    pub why: String,
}

impl Predicted {
    /// `--target`, else the device that `--device` stands for.
    ///
    /// # Errors
    /// No such target, or a GPU was asked for and cannot be used.
    pub fn resolve(name: Option<&str>, device: DeviceChoice) -> anyhow::Result<Predicted> {
        let of = |model, why: String| Predicted { model, why };
        let find = |index: u32| CudaDevice::find(index as usize, None);
        let here = |gpu: CudaDevice| {
            of(
                cost_model(&gpu),
                format!("{}, {}", gpu.name(), gpu.product()),
            )
        };
        Ok(match (name, device) {
            (Some(name), _) => of(named(name)?, "by --target".into()),
            (None, DeviceChoice::Cpu) => of(DeviceModel::CPU, "by --device".into()),
            (None, DeviceChoice::Cuda(index)) => here(find(index).with_context(|| {
                format!("--device cuda:{index} (--target h100 or h200 needs no GPU)")
            })?),
            (None, DeviceChoice::Auto) => match find(0) {
                Ok(gpu) => here(gpu),
                Err(_) => of(
                    DeviceModel::CPU,
                    "no usable GPU here; --target h100 or h200 needs none".into(),
                ),
            },
        })
    }
}

/// The rates of a device by name.
///
/// # Errors
/// No such device.
pub fn named(name: &str) -> anyhow::Result<DeviceModel> {
    DeviceModel::by_name(name)
        .ok_or_else(|| usage_error(format!("--target {name}: expected h100, h200 or cpu")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_target_needs_no_device() {
        for device in [DeviceChoice::Auto, DeviceChoice::Cpu, DeviceChoice::Cuda(7)] {
            let p = Predicted::resolve(Some("h200"), device).unwrap();
            assert_eq!(p.model, DeviceModel::H200);
        }
        let e = Predicted::resolve(Some("v100"), DeviceChoice::Cpu).unwrap_err();
        assert_eq!(e.to_string(), "--target v100: expected h100, h200 or cpu");
    }

    #[test]
    fn without_a_name_it_is_what_would_run() {
        let cpu = Predicted::resolve(None, DeviceChoice::Cpu).unwrap();
        assert_eq!(cpu.model, DeviceModel::CPU);
        let auto = Predicted::resolve(None, DeviceChoice::Auto).unwrap();
        let runs = Target::resolve(DeviceChoice::Auto, PathBuf::new()).unwrap();
        assert_eq!(auto.model, cost_model(&*runs.into_device()));
    }

    #[test]
    fn the_rates_of_every_device_are_known() {
        assert_eq!(cost_model(&CpuDevice), DeviceModel::CPU);
        for name in CudaDevice::COST_MODELS {
            assert!(DeviceModel::by_name(name).is_some(), "{name}");
        }
    }
}
