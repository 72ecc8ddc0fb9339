//! Flags that `throughput` and `latency` share, and those of trtllm-bench that have no meaning here.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::Args;
use lathe_runtime::sampling::SamplingParams;
use serde::Deserialize;

use super::config_file::ConfigFile;
use super::whole;
use crate::config::{Given, Options, Resolved, read_as};
use crate::errors::{Problems, usage_error};

/// Shared flags.
#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// JSON lines with task_id, input_ids (or prompt) and output_tokens; stdin by default
    #[arg(long, value_name = "FILE")]
    dataset: Option<PathBuf>,
    /// Accepted for compatibility: _autodeploy, which this program takes the place of, or lathe
    #[arg(long, default_value = "_autodeploy", value_name = "NAME")]
    backend: String,
    #[command(flatten)]
    config: ConfigFile,
    /// YAML file with temperature, top_k, top_p and seed
    #[arg(long = "sampler_options", value_name = "FILE")]
    sampler_options: Option<PathBuf>,
    /// Longest sequence; the dataset's longest by default
    #[arg(long = "max_seq_len", value_name = "N")]
    max_seq_len: Option<u32>,
    /// Part of the memory left after the weights that the KV cache may take [default: 0.95]
    #[arg(long = "kv_cache_free_gpu_mem_fraction", value_name = "X", value_parser = fraction)]
    kv_cache_free_gpu_mem_fraction: Option<f64>,
    /// Only the first N requests; 0 means all
    #[arg(long = "num_requests", default_value_t = 0, value_name = "N")]
    pub(super) num_requests: usize,
    /// Requests, drawn from the dataset, that run before the clock starts
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = warmup)]
    pub(super) warmup: usize,
    /// Write the report as JSON
    #[arg(long = "report_json", value_name = "FILE")]
    pub(super) report_json: Option<PathBuf>,
    /// Write the engine's state after each iteration, one JSON object a line
    #[arg(long = "iteration_log", value_name = "FILE")]
    pub(super) iteration_log: Option<PathBuf>,
    #[command(flatten)]
    foreign: ForeignArgs,
}

/// Flags of trtllm-bench for what is not here. Values that ask for nothing special are accepted.
#[derive(Debug, Args)]
struct ForeignArgs {
    #[arg(long = "engine_dir", hide = true)]
    engine_dir: Option<PathBuf>,
    #[arg(long, hide = true)]
    pp: Option<u32>,
    #[arg(long, hide = true)]
    ep: Option<u32>,
    #[arg(long = "cluster_size", hide = true)]
    cluster_size: Option<u32>,
    #[arg(long = "beam_width", hide = true)]
    beam_width: Option<u32>,
    #[arg(long = "dry-run", hide = true)]
    dry_run: bool,
    #[arg(long, hide = true)]
    revision: Option<String>,
    #[arg(long = "medusa_choices", hide = true)]
    medusa_choices: Option<PathBuf>,
    #[arg(long, hide = true)]
    modality: Option<String>,
    #[arg(long = "image_data_format", hide = true)]
    image_data_format: Option<String>,
    #[arg(long = "data_device", hide = true)]
    data_device: Option<String>,
    #[arg(long = "max_input_len", hide = true)]
    max_input_len: Option<u32>,
    #[arg(long = "custom_module_dirs", hide = true)]
    custom_module_dirs: Vec<PathBuf>,
}

impl ForeignArgs {
    /// All reasons at once.
    fn refusals(&self) -> impl Iterator<Item = &'static str> {
        /// trtllm-bench's default.
        const MAX_INPUT_LEN: u32 = 4096;
        let above_one = |n: Option<u32>| n.is_some_and(|n| n > 1);
        let refusals = [
            (
                self.engine_dir.is_some(),
                "--engine_dir: there are no engine files; models are compiled at the start",
            ),
            (
                self.dry_run,
                "--dry-run: `lathe compile --dry-run --config FILE` shows the configuration, the plan and the prediction",
            ),
            (
                self.revision.is_some(),
                "--revision: nothing is downloaded; name the folder of that revision as --model",
            ),
            (
                above_one(self.pp),
                "--pp: there is no pipeline parallelism; use --tp",
            ),
            (
                above_one(self.ep),
                "--ep: experts are sharded by --tp alone",
            ),
            (
                above_one(self.cluster_size),
                "--cluster_size: experts are sharded by --tp alone",
            ),
            (
                above_one(self.beam_width),
                "--beam_width: there is no beam search",
            ),
            (
                self.medusa_choices.is_some(),
                "--medusa_choices: there is no speculative decoding",
            ),
            (self.modality.is_some(), "--modality: models of text only"),
            (
                self.image_data_format.as_deref().is_some_and(|f| f != "pt")
                    || self.data_device.as_deref().is_some_and(|d| d != "cuda"),
                "--image_data_format, --data_device: models of text only",
            ),
            (
                self.max_input_len.is_some_and(|n| n != MAX_INPUT_LEN),
                "--max_input_len: concerns images and video; use --max_seq_len",
            ),
            (
                !self.custom_module_dirs.is_empty(),
                "--custom_module_dirs: no Python code is ever run",
            ),
        ];
        refusals
            .into_iter()
            .filter_map(|(refused, reason)| refused.then_some(reason))
    }
}

/// A number of warm-up requests, which are all made before the first one runs.
fn warmup(text: &str) -> Result<usize, String> {
    whole(text, 0..=100_000)
}

fn fraction(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|x| (0.0..=1.0).contains(x))
        .ok_or_else(|| "expected a number from 0 to 1".into())
}

impl BenchArgs {
    /// Refuses what has no meaning here.
    ///
    /// # Errors
    /// A usage error with all reasons.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let mut reasons = Vec::new();
        match &*self.backend {
            "_autodeploy" | "lathe" => {}
            "pytorch" | "tensorrt" => reasons.push(format!(
                "--backend {}: there is only the compiled engine of this program; use _autodeploy",
                self.backend
            )),
            other => reasons.push(format!("--backend {other}: expected _autodeploy or lathe")),
        }
        reasons.extend(self.foreign.refusals().map(str::to_owned));
        if reasons.is_empty() {
            return Ok(());
        }
        Err(Problems::of_usage(reasons).into())
    }

    /// The dataset's path, `-` for stdin.
    ///
    /// # Errors
    /// None was given and stdin is a terminal.
    pub(super) fn dataset(&self) -> anyhow::Result<&Path> {
        match &self.dataset {
            Some(path) => Ok(path),
            None if std::io::stdin().is_terminal() => Err(usage_error(
                "--dataset is missing, and nothing is piped into stdin",
            )),
            None => Ok(Path::new("-")),
        }
    }

    /// Options of the command line.
    pub(super) fn flags(&self) -> Options {
        Options {
            max_seq_len: Given::flag("--max_seq_len", self.max_seq_len.map(Some)),
            free_mem_ratio: Given::flag(
                "--kv_cache_free_gpu_mem_fraction",
                self.kv_cache_free_gpu_mem_fraction,
            ),
            ..Options::default()
        }
    }

    /// The YAML file, if one was named, over these options of the command line.
    ///
    /// # Errors
    /// The file cannot be read or has unknown keys or values.
    pub(super) fn resolve(&self, flags: Options) -> anyhow::Result<Resolved> {
        self.config.resolve(flags)
    }

    /// How tokens are chosen: greedily, unless a file says otherwise.
    ///
    /// # Errors
    /// The file cannot be read, or a value is out of its range.
    pub(super) fn sampling(&self) -> anyhow::Result<SamplingParams> {
        let Some(path) = &self.sampler_options else {
            return Ok(SamplingParams::default());
        };
        let options: SamplerOptions = read_as(path)
            .map_err(|error| anyhow::Error::new(error).context("--sampler_options"))?;
        let params = SamplingParams {
            temperature: options.temperature.unwrap_or(1.0),
            top_k: options.top_k.unwrap_or(0),
            top_p: options.top_p.unwrap_or(1.0),
            seed: options.seed.unwrap_or(0),
        };
        let name = path.display();
        params
            .validate()
            .map_err(|e| usage_error(format!("--sampler_options {name}: {e}")))?;
        Ok(params)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SamplerOptions {
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    seed: Option<u64>,
}

/// The tokens of `--eos_id`; -1 is none.
///
/// # Errors
/// Another negative number.
pub(super) fn stop_tokens(eos_id: i64) -> anyhow::Result<Vec<u32>> {
    if eos_id == -1 {
        return Ok(Vec::new());
    }
    u32::try_from(eos_id)
        .map(|id| vec![id])
        .map_err(|_| usage_error(format!("--eos_id {eos_id} is no token id")))
}
