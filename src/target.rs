//! Which device a command runs on, and which one it compiles and predicts for.

use crate::errors::usage_error;
use crate::global_options::DeviceChoice;
use anyhow::Context;
use lathe_passes::egraph::cost::DeviceModel;
use lathe_runtime::device::cuda::driver;

/// The device that a command runs on.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// The CPU.
    Cpu,
    /// A GPU by index, with its cost model.
    Cuda(u32, DeviceModel),
}

impl Target {
    /// Resolves `--device`: `auto` takes a usable GPU, else the CPU, and says which.
    ///
    /// # Errors
    /// A GPU was asked for and cannot be used.
    pub fn resolve(choice: DeviceChoice) -> anyhow::Result<Target> {
        match choice {
            DeviceChoice::Cpu => Ok(Target::Cpu),
            DeviceChoice::Cuda(index) => Ok(gpu(index)?.0),
            DeviceChoice::Auto => Ok(match gpu(0) {
                Ok((target, name)) => {
                    tracing::info!("device: {}, {name}", target.name());
                    target
                }
                Err(reason) => {
                    tracing::info!("device: cpu ({reason:#})");
                    Target::Cpu
                }
            }),
        }
    }

    /// Rates for cost and prediction.
    pub fn cost_model(&self) -> DeviceModel {
        match self {
            Target::Cpu => DeviceModel::CPU,
            Target::Cuda(_, m) => m.clone(),
        }
    }

    /// The name in logs and reports.
    pub fn name(&self) -> String {
        match self {
            Target::Cpu => "cpu".into(),
            Target::Cuda(i, _) => format!("cuda:{i}"),
        }
    }
}

/// A usable GPU with its marketing name.
fn gpu(index: u32) -> anyhow::Result<(Target, String)> {
    let p = driver::properties(index as usize)?;
    let model = if p.name.contains("H200") {
        DeviceModel::H200
    } else {
        DeviceModel::H100
    };
    Ok((Target::Cuda(index, model), p.name))
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
        let of = |model, why: &str| Predicted {
            model,
            why: why.to_string(),
        };
        Ok(match (name, device) {
            (Some(name), _) => of(named(name)?, "by --target"),
            (None, DeviceChoice::Cpu) => of(DeviceModel::CPU, "by --device"),
            (None, DeviceChoice::Cuda(index)) => {
                let (target, name) = gpu(index).with_context(|| {
                    format!("--device cuda:{index} (--target h100 or h200 needs no GPU)")
                })?;
                of(target.cost_model(), &format!("cuda:{index}, {name}"))
            }
            (None, DeviceChoice::Auto) => match gpu(0) {
                Ok((target, name)) => of(target.cost_model(), &format!("cuda:0, {name}")),
                Err(_) => of(
                    DeviceModel::CPU,
                    "no usable GPU here; --target h100 or h200 needs none",
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
        let runs = Target::resolve(DeviceChoice::Auto).unwrap();
        assert_eq!(auto.model, runs.cost_model());
    }
}
