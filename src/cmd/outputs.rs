//! What `throughput` and `latency` leave behind: the report on stdout and files.

use std::io::Write;
use std::path::Path;

use lathe_runtime::device::Description;
use lathe_runtime::text::TextTokenizer;

use crate::bench::files::check_writable;
use crate::bench::gpu_state::GpuState;
use crate::bench::metrics::RequestRecord;
use crate::bench::report::{Engine, Machine, Phase, Report};
use crate::bench::report_json::{
    IterationStats, write_iteration_log, write_output_json, write_report_json, write_request_json,
};
use crate::errors::Problems;
use crate::model::CompiledModel;

/// Files to write.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Outputs<'a> {
    /// `--report_json`.
    pub(super) report_json: Option<&'a Path>,
    /// `--request_json`.
    pub(super) request_json: Option<&'a Path>,
    /// `--output_json`.
    pub(super) output_json: Option<&'a Path>,
    /// `--iteration_log`.
    pub(super) iteration_log: Option<&'a Path>,
}

impl Outputs<'_> {
    /// Finds before the run what would lose its results after it.
    ///
    /// # Errors
    /// All files that cannot be written, and flags that name the same file (then it is one of usage).
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let named: Vec<(&str, &Path)> = [
            ("--report_json", self.report_json),
            ("--request_json", self.request_json),
            ("--output_json", self.output_json),
            ("--iteration_log", self.iteration_log),
        ]
        .into_iter()
        .filter_map(|(flag, path)| Some((flag, path?)))
        .collect();
        let mut problems = Vec::new();
        let mut usage = false;
        for (i, (flag, path)) in named.iter().enumerate() {
            // Absolute paths know that ./r.json is r.json.
            let absolute = |path: &Path| std::path::absolute(path).ok();
            let same = |other: &Path| other == *path || absolute(other) == absolute(path);
            let twin = named[..i].iter().find(|(_, other)| same(other));
            // A terminal or /dev/null may take several.
            if let Some((other, _)) = twin.filter(|_| !path.exists() || path.is_file()) {
                problems.push(format!("{other} and {flag} both name {}", path.display()));
                usage = true;
            } else if let Err(error) = check_writable(path) {
                problems.push(format!("{flag}: {error:#}"));
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(match usage {
            true => Problems::of_usage(problems).into(),
            false => Problems::new(problems).into(),
        })
    }

    /// Prints the report, writes all files, and then fails if the run did, or if a file could not be
    /// written. One failure does not keep the rest from being written.
    ///
    /// # Errors
    /// Failed requests, an incomplete run, files that cannot be written.
    pub(super) fn write(
        &self,
        report: &Report,
        records: &[RequestRecord],
        iterations: &[IterationStats],
        tokenizer: Option<&TextTokenizer>,
    ) -> anyhow::Result<()> {
        let printed = print(report);
        let results = [
            self.report_json.map(|path| write_report_json(path, report)),
            self.request_json
                .map(|path| write_request_json(path, records, tokenizer)),
            self.output_json
                .map(|path| write_output_json(path, records, tokenizer)),
            self.iteration_log
                .map(|path| write_iteration_log(path, iterations)),
        ];
        let mut problems: Vec<String> = results
            .into_iter()
            .flatten()
            .filter_map(|result| Some(format!("{:#}", result.err()?)))
            .collect();
        problems.extend(report.failure_lines());
        if let Err(error) = printed {
            // A reader that went away is no failure (see `main`), so that error goes on as it is.
            if problems.is_empty() && report.lathe.incomplete.is_none() {
                return Err(error.into());
            }
            if error.kind() != std::io::ErrorKind::BrokenPipe {
                problems.push(format!("the report cannot be printed: {error}"));
            }
        }
        if let Some(incomplete) = &report.lathe.incomplete {
            problems.push(format!(
                "{}: {} of {} requests finished",
                incomplete.reason, incomplete.finished, incomplete.planned
            ));
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Problems::new(problems).into())
        }
    }
}

fn print(report: &Report) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    write!(out, "{report}")?;
    out.flush()
}

/// The report's description of a model.
pub(super) fn engine(model: &CompiledModel) -> Engine {
    let cache = model.plan.caches.first();
    Engine {
        model: model.name.clone(),
        model_path: Some(model.folder.display().to_string()),
        engine_dir: None,
        version: env!("CARGO_PKG_VERSION").into(),
        backend: "lathe".into(),
        dtype: model.dtype.name().into(),
        kv_cache_dtype: Some(cache.map_or(model.dtype, |cache| cache.dtype).name().into()),
        quantization: None,
    }
}

/// The report's description of the machine that a device is.
pub(super) fn machine(device: Description) -> Machine {
    Machine {
        memory_gib: device.memory_bytes as f64 / f64::from(1u32 << 30),
        memory_clock_ghz: Some(f64::from(device.memory_clock_khz) * 1e-6),
        name: device.name,
    }
}

/// Power and clocks of a device, as far as they are known.
pub(super) fn gpu_state(device: Option<&Description>) -> GpuState {
    device
        .and_then(|device| device.pci_address.as_deref())
        .map(GpuState::read)
        .unwrap_or_default()
}

/// The phases up to here, with the measurement as the last.
pub(super) fn phases(model: &CompiledModel, benchmark_seconds: f64) -> Vec<Phase> {
    model
        .phases
        .iter()
        .map(|(name, time)| ((*name).to_owned(), time.as_secs_f64()))
        .chain([("benchmark".to_owned(), benchmark_seconds)])
        .map(|(name, seconds)| Phase { name, seconds })
        .collect()
}
