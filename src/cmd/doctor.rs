//! `doctor`: what this machine has and what is missing.

use clap::Args;
use lathe_runtime::device::cuda::driver::{self, DeviceProperties};
use lathe_runtime::device::cuda::library::{Library, ensure, loaded_from, search_folders};
use lathe_runtime::device::cuda::nvrtc;
use lathe_runtime::weights::read_folder;
use std::io::Write;
use std::path::PathBuf;

use crate::global_options::GlobalOptions;

/// Say what this machine has, where, and what is missing.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Also read the weights in this folder, twice: how fast they can be loaded at most.
    #[arg(long, value_name = "FOLDER")]
    read: Option<PathBuf>,
}

/// A GPU in words; memory in GiB, the greatest clocks in GHz.
fn describe(gpu: &DeviceProperties) -> String {
    let (major, minor) = gpu.compute_capability;
    format!(
        "{}, compute capability {major}.{minor}, {:.1} GiB at {:.2} GHz, {} SMs at {:.2} GHz, driver for CUDA {}.{}",
        gpu.name,
        gpu.memory_bytes as f64 / f64::from(1u32 << 30),
        f64::from(gpu.memory_clock_khz) * 1e-6,
        gpu.sm_count,
        f64::from(gpu.clock_khz) * 1e-6,
        gpu.driver_version / 1000,
        gpu.driver_version % 1000 / 10,
    )
}

impl Doctor {
    /// Prints one line a part; a missing part is no failure.
    pub fn run(&self, global: &GlobalOptions) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "lathe     {}", env!("CARGO_PKG_VERSION"))?;
        let isa = lathe_runtime::device::cpu::kernels::Isa::detected();
        let threads = lathe_runtime::device::cpu::kernels::pool::threads();
        writeln!(out, "cpu       {isa:?} kernels, {threads} threads")?;
        for library in [
            Library::Driver,
            Library::Nvrtc,
            Library::CublasLt,
            Library::Nccl,
        ] {
            let name = match library {
                Library::Driver => "driver",
                other => other.name(),
            };
            match ensure(library) {
                Ok(()) => {
                    let place = loaded_from(library)
                        .map_or("the loader's path".into(), |p| p.display().to_string());
                    let version = match library {
                        Library::Nvrtc => {
                            nvrtc::version().map_or(String::new(), |(a, b)| format!(" {a}.{b}"))
                        }
                        _ => String::new(),
                    };
                    writeln!(out, "{name:<9} found{version} in {place}")?;
                }
                Err(e) => writeln!(out, "{name:<9} missing: {e}")?,
            }
        }
        match driver::device_count() {
            Ok(0) => writeln!(out, "gpu       none; --device cpu runs the same plans")?,
            Ok(n) => {
                for i in 0..n {
                    match driver::properties(i) {
                        Ok(p) => writeln!(out, "cuda:{i}    {}", describe(&p))?,
                        Err(e) => writeln!(out, "cuda:{i}    not usable: {e}")?,
                    }
                }
            }
            Err(_) => writeln!(out, "gpu       none; --device cpu runs the same plans")?,
        }
        let folders: Vec<String> = search_folders()
            .iter()
            .map(|p| p.display().to_string())
            .collect();
        writeln!(
            out,
            "searched  {}",
            if folders.is_empty() {
                "the loader's path only".into()
            } else {
                folders.join(", ")
            }
        )?;
        let cache = global.kernel_cache();
        writeln!(out, "cubins    {}", cache.display())?;
        if let Some(folder) = &self.read {
            let threads = std::thread::available_parallelism().map_or(4, |n| n.get());
            for pass in ["first", "again"] {
                let r = read_folder(folder, threads)?;
                writeln!(
                    out,
                    "read      {pass}: {:.2} GB in {:.2} s, {:.1} GB/s on {threads} threads",
                    r.bytes as f64 * 1e-9,
                    r.duration.as_secs_f64(),
                    r.rate() * 1e-9
                )?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_one_line() {
        let gpu = DeviceProperties {
            ordinal: 0,
            name: "NVIDIA H100 80GB HBM3".into(),
            compute_capability: (9, 0),
            sm_count: 132,
            clock_khz: 1_980_000,
            memory_clock_khz: 2_619_000,
            memory_bus_bits: 5120,
            l2_bytes: 50 << 20,
            memory_bytes: 79 << 30,
            shared_per_block: 227 << 10,
            shared_per_sm: 228 << 10,
            driver_version: 13_000,
        };
        assert_eq!(
            describe(&gpu),
            "NVIDIA H100 80GB HBM3, compute capability 9.0, 79.0 GiB at 2.62 GHz, 132 SMs at 1.98 GHz, driver for CUDA 13.0"
        );
    }
}
