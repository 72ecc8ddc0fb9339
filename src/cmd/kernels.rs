//! `kernels`: how long each kernel of a compiled model takes, beside what the machine can do.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use lathe_codegen::work::Span;
use lathe_passes::egraph::cost::{CostPoint, DeviceModel};
use lathe_passes::predict::predict;
use lathe_runtime::device::load::LoadOptions;
use lathe_runtime::device::profile::{Ceilings, ProfileOptions, StepProfile, sample_batch};
use lathe_runtime::device::step::StepKind;
use lathe_runtime::weights::{Checkpoint, WeightsError};

use super::config_file::ConfigFile;
use super::whole;
use crate::bench::files::{check_writable, write_json};
use crate::bench::kernels::{KernelsReport, Profiled, StepPoint};
use crate::config::{Given, Options, Resolved, Run};
use crate::global_options::GlobalOptions;
use crate::model::{CompiledModel, WeightChoice};
use crate::target::cost_model;

/// Time each kernel of a compiled model: GB/s, TFLOP/s, per cent of the ceilings measured in the same run, and
/// cuBLASLt beside each GEMM.
#[derive(Debug, Args)]
pub struct Kernels {
    /// Decode steps of so many sequences [default: 1, unless --prefill is given]
    #[arg(long, value_delimiter = ',', value_name = "N,...", value_parser = sequences)]
    batch: Vec<usize>,
    /// Prefill steps of one sequence of so many tokens [default: 128, unless --batch is given]
    #[arg(long, value_delimiter = ',', value_name = "N,...", value_parser = positive)]
    prefill: Vec<usize>,
    /// Cached tokens of each decoding sequence [default: 300, or what the model allows]
    #[arg(long, value_name = "N", value_parser = positive)]
    context: Option<usize>,
    /// Samples of each time; medians are shown
    #[arg(long, default_value_t = 7, value_name = "N", value_parser = positive)]
    runs: usize,
    /// Random weights; also used when the folder has none
    #[arg(long = "skip_loading_weights")]
    skip_loading_weights: bool,
    /// Write the table as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigFile,
}

fn positive(text: &str) -> Result<usize, String> {
    whole(text, 1..=1 << 24)
}

/// Sequences of a step: more only take memory.
fn sequences(text: &str) -> Result<usize, String> {
    whole(text, 1..=1 << 16)
}

impl Kernels {
    /// Measures and prints the table.
    pub fn run(&self, global: &GlobalOptions) -> anyhow::Result<()> {
        let flags = Options {
            skip_loading_weights: Given::flag(
                "--skip_loading_weights",
                self.skip_loading_weights.then_some(true),
            ),
            ..Options::default()
        };
        if let Some(path) = &self.json {
            check_writable(path)?;
        }
        let resolved = self.config.resolve(flags)?;
        let mut model = CompiledModel::compile(global, &resolved)?;
        for line in model.remarks(&resolved, Run::Kernels) {
            tracing::warn!("{line}");
        }
        model.require_cache()?;
        let points = self.points(&model)?;
        let options = load_options(&points, resolved.attn_page_size.value as usize);
        let weights = weights(&resolved, &model)?;
        // Before the model takes its memory.
        tracing::info!("measuring the ceilings of {}", model.device.name());
        let ceilings = model.device.ceilings(model.dtype)?;
        let mut executor = model.load(weights, options)?;
        // Autotuning, too: the kernels are those of a benchmark.
        model.warm_up(&mut *executor)?;
        let capacity = executor.capacity();
        let mut profiles = Vec::with_capacity(points.len());
        for point in &points {
            tracing::info!("timing {point}");
            let span = Span {
                rows: point.rows(),
                len: point.cached(),
            };
            let batch = sample_batch(&vec![span; point.sequences], &capacity);
            let profile = executor
                .profile(
                    &batch,
                    ProfileOptions {
                        runs: self.runs,
                        vendor: true,
                    },
                )
                .with_context(|| point.to_string())?
                .context("the device does not tell kernels apart")?;
            profiles.push(profile);
        }
        drop(executor);
        let report = report(&model, &resolved, weights, ceilings, &points, profiles);
        let mut out = std::io::stdout().lock();
        write!(out, "{report}")?;
        out.flush()?;
        if let Some(path) = &self.json {
            write_json(path, b"  ", &report)?;
        }
        Ok(())
    }

    /// The steps to time: those asked for, or one of each kind.
    fn points(&self, model: &CompiledModel) -> anyhow::Result<Vec<StepPoint>> {
        /// Unless the user or the model says otherwise.
        const CONTEXT: usize = 300;
        const PREFILL: usize = 128;
        let most = model.info.max_position as usize;
        let context = self
            .context
            .unwrap_or(CONTEXT.min(most.saturating_sub(1).max(1)));
        let (mut batch, mut prefill) = (self.batch.clone(), self.prefill.clone());
        if batch.is_empty() && prefill.is_empty() {
            batch.push(1);
            prefill.push(PREFILL.min(most));
        }
        let decode = batch.into_iter().map(|sequences| StepPoint {
            kind: StepKind::Decode,
            sequences,
            tokens: sequences,
            context,
        });
        let general = prefill.into_iter().map(|tokens| StepPoint {
            kind: StepKind::General,
            sequences: 1,
            tokens,
            context: 0,
        });
        let points: Vec<StepPoint> = decode.chain(general).collect();
        for point in &points {
            model.check_length(point.cached())?;
        }
        Ok(points)
    }
}

/// Limits that hold every step.
fn load_options(points: &[StepPoint], page_size: usize) -> LoadOptions {
    let most = |f: &dyn Fn(&StepPoint) -> usize| points.iter().map(f).max().unwrap_or(1);
    let sequences = most(&|p| p.sequences);
    LoadOptions {
        max_tokens: most(&|p| p.tokens),
        max_rows: sequences,
        max_sequences: sequences,
        max_seq_len: most(&StepPoint::cached),
        page_size,
        pages: most(&|p| p.sequences * p.cached().div_ceil(page_size)),
    }
}

/// The checkpoint's weights, or random ones if there are none or nobody wants them.
fn weights(resolved: &Resolved, model: &CompiledModel) -> anyhow::Result<WeightChoice> {
    if resolved.skip_loading_weights.value {
        return Ok(WeightChoice::Random(0));
    }
    match Checkpoint::open(&model.folder) {
        Ok(_) => Ok(WeightChoice::Checkpoint),
        Err(WeightsError::NoWeights { .. }) => Ok(WeightChoice::Random(0)),
        Err(error) => Err(error.into()),
    }
}

fn report(
    model: &CompiledModel,
    resolved: &Resolved,
    weights: WeightChoice,
    mut ceilings: Ceilings,
    points: &[StepPoint],
    profiles: Vec<StepProfile>,
) -> KernelsReport {
    // Our own kernels are the ceiling where nothing better was seen.
    let rates = profiles
        .iter()
        .flat_map(|p| &p.kernels)
        .map(|k| k.flop_rate());
    let own = rates.filter(|&r| r > 0.0).max_by(f64::total_cmp);
    if own > ceilings.matrix {
        ceilings.matrix = own;
        ceilings.matrix_source = "own kernels of this run";
    }
    let device = measured(cost_model(&*model.device), &ceilings);
    let profiled = points.iter().zip(profiles).map(|(point, profile)| {
        let (graph, at) = match point.kind {
            StepKind::Decode => (
                model.compiled.steps.decode.as_ref(),
                CostPoint::decode(
                    point.sequences as i64,
                    point.cached() as i64,
                    device.clone(),
                ),
            ),
            StepKind::General => (
                model.compiled.steps.general.as_ref(),
                CostPoint::prefill(point.tokens as i64, device.clone()),
            ),
        };
        Profiled {
            point: *point,
            profile,
            prediction: graph.map(|graph| predict(graph, &at)),
        }
    });
    let profiled: Vec<Profiled> = profiled.collect();
    let gpu = model.device.describe().map(|device| device.name);
    KernelsReport::new(
        &model.name,
        model.dtype.name(),
        &model.device.name(),
        gpu,
        weights == WeightChoice::Checkpoint,
        &resolved.compile_backend.value.to_string(),
        &ceilings,
        &profiled,
    )
}

/// The cost model with the rates that were measured.
fn measured(base: DeviceModel, ceilings: &Ceilings) -> DeviceModel {
    DeviceModel {
        bandwidth: ceilings.read,
        matrix_flops: ceilings.matrix.unwrap_or(base.matrix_flops),
        launch: ceilings.launch_pdl.unwrap_or(base.launch),
        ..base
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_every_step() {
        let decode = StepPoint {
            kind: StepKind::Decode,
            sequences: 4,
            tokens: 4,
            context: 100,
        };
        let prefill = StepPoint {
            kind: StepKind::General,
            sequences: 1,
            tokens: 70,
            context: 0,
        };
        let options = load_options(&[decode, prefill], 64);
        assert_eq!(
            options,
            LoadOptions {
                max_tokens: 70,
                max_rows: 4,
                max_sequences: 4,
                max_seq_len: 101,
                page_size: 64,
                pages: 8,
            }
        );
    }

    #[test]
    fn the_roofline_takes_the_measured_rates() {
        let ceilings = Ceilings {
            read: 3e12,
            copy: 2.8e12,
            matrix: Some(8e14),
            matrix_source: "cuBLASLt",
            launch: Some(1.1e-6),
            launch_pdl: Some(0.7e-6),
        };
        let device = measured(DeviceModel::H100, &ceilings);
        assert_eq!(
            (device.bandwidth, device.matrix_flops, device.launch),
            (3e12, 8e14, 0.7e-6)
        );
        let cpu = Ceilings {
            launch_pdl: None,
            matrix: None,
            ..ceilings
        };
        let device = measured(DeviceModel::CPU, &cpu);
        assert_eq!(device.launch, DeviceModel::CPU.launch);
        assert_eq!(device.matrix_flops, DeviceModel::CPU.matrix_flops);
    }
}
