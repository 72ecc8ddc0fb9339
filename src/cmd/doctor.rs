//! `doctor`: what this machine has and what is missing.

use clap::Args;
use lathe_runtime::cuda::library::{Library, ensure, loaded_from, search_folders};
use lathe_runtime::cuda::{driver, nvrtc};
use lathe_runtime::weights::read_folder;
use std::io::Write;
use std::path::PathBuf;

use crate::cli::GlobalOptions;

/// Say what this machine has, where, and what is missing.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Also read the weights in this folder, twice: how fast they can be loaded at most.
    #[arg(long, value_name = "FOLDER")]
    read: Option<PathBuf>,
}

impl Doctor {
    /// Prints one line a part; a missing part is no failure.
    pub fn run(&self, global: &GlobalOptions) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "lathe     {}", env!("CARGO_PKG_VERSION"))?;
        let isa = lathe_runtime::cpu::kernels::Isa::detected();
        let threads = lathe_runtime::cpu::kernels::pool::threads();
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
                        Ok(p) => writeln!(out, "cuda:{i}    {p:?}")?,
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
