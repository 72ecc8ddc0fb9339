//! `prepare-dataset`: makes a benchmark dataset with the flags of trtllm-bench's tool.

use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use lathe_ir::foreign;
use lathe_runtime::text::{TextTokenizer, eos_token_ids};

use super::whole;
use crate::bench::dataset::Request;
use crate::bench::files::write_atomically;
use crate::bench::prepare::{
    LengthDistribution, MAX_LENGTH, SyntheticDataset, TaskIds, TextSource, write_jsonl,
};
use crate::errors::usage_error;
use crate::global_options::GlobalOptions;
use crate::model_folder::model_folder;

/// Make a benchmark dataset (JSONL).
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every dataset")]
pub struct PrepareDataset {
    /// File to write
    #[arg(
        long,
        short,
        global = true,
        default_value = "preprocessed_dataset.json",
        value_name = "FILE"
    )]
    output: PathBuf,
    /// Write to stdout instead of a file
    #[arg(long, global = true)]
    stdout: bool,
    /// The same seed gives the same dataset
    #[arg(long = "random-seed", global = true, default_value_t = 420)]
    random_seed: u64,
    /// Id of every request; -1 numbers them
    #[arg(long = "task-id", global = true, default_value_t = -1, allow_negative_numbers = true)]
    task_id: i64,
    /// Draw the ids of requests from this range, both ends included
    #[arg(long = "rand-task-id", global = true, num_args = 2, value_names = ["LOW", "HIGH"], allow_negative_numbers = true)]
    rand_task_id: Option<Vec<i64>>,
    /// Folder with the tokenizer, in place of --model
    #[arg(long, global = true, value_name = "FOLDER")]
    tokenizer: Option<PathBuf>,
    /// Accepted for compatibility; no code of a checkpoint is ever run
    #[arg(long = "trust-remote-code", global = true, hide = true)]
    _trust_remote_code: bool,
    /// LoRA adapters are not supported
    #[arg(long = "lora-dir", global = true, hide = true)]
    lora_dir: Option<PathBuf>,
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // There is one value a process.
enum Kind {
    /// Random tokens, lengths from a normal distribution
    TokenNormDist {
        /// Number of requests
        #[arg(long = "num-requests", value_parser = positive)]
        num_requests: u64,
        /// Mean prompt length in tokens
        #[arg(long = "input-mean", value_parser = length)]
        input_mean: u32,
        /// Standard deviation of the prompt length
        #[arg(long = "input-stdev", value_parser = length)]
        input_stdev: u32,
        /// Mean output length in tokens
        #[arg(long = "output-mean", value_parser = length)]
        output_mean: u32,
        /// Standard deviation of the output length
        #[arg(long = "output-stdev", value_parser = length)]
        output_stdev: u32,
    },
    /// Random tokens, lengths from a uniform distribution
    TokenUnifDist {
        /// Number of requests
        #[arg(long = "num-requests", value_parser = positive)]
        num_requests: u64,
        /// Least prompt length in tokens
        #[arg(long = "input-min", value_parser = length)]
        input_min: u32,
        /// Greatest prompt length
        #[arg(long = "input-max", value_parser = length)]
        input_max: u32,
        /// Least output length
        #[arg(long = "output-min", value_parser = length)]
        output_min: u32,
        /// Greatest output length
        #[arg(long = "output-max", value_parser = length)]
        output_max: u32,
    },
    /// Text from a local JSONL file, or one prompt a line from a .txt file
    #[command(alias = "dataset")]
    RealDataset(RealDataset),
}

/// A number of tokens.
fn length(text: &str) -> Result<u32, String> {
    whole(text, 0..=MAX_LENGTH)
}

fn positive(text: &str) -> Result<u64, String> {
    whole(text, 1..)
}

#[derive(Debug, Args)]
struct RealDataset {
    /// A .jsonl or .txt file, or a folder that holds SPLIT.jsonl
    #[arg(long = "dataset-name", value_name = "FILE|FOLDER")]
    dataset_name: PathBuf,
    /// Subfolder of the dataset's folder
    #[arg(long = "dataset-config-name")]
    dataset_config_name: Option<String>,
    /// Which file of the folder, such as train; no need for it with a file
    #[arg(long = "dataset-split")]
    dataset_split: Option<String>,
    /// Field with the input text
    #[arg(long = "dataset-input-key")]
    dataset_input_key: Option<String>,
    /// Images are not supported
    #[arg(long = "dataset-image-key", hide = true)]
    dataset_image_key: Option<String>,
    /// Field with a text that goes before the input
    #[arg(long = "dataset-prompt-key", conflicts_with = "dataset_prompt")]
    dataset_prompt_key: Option<String>,
    /// Text that goes before every input
    #[arg(long = "dataset-prompt")]
    dataset_prompt: Option<String>,
    /// Field with the answer; its length becomes the output length
    #[arg(long = "dataset-output-key")]
    dataset_output_key: Option<String>,
    /// Stop after so many requests
    #[arg(long = "num-requests", value_parser = positive)]
    num_requests: Option<u64>,
    /// Skip longer inputs
    #[arg(long = "max-input-len")]
    max_input_len: Option<usize>,
    /// Draw output lengths from a normal distribution
    #[arg(long = "output-len-dist", value_name = "MEAN,STDEV", value_parser = mean_and_stdev)]
    output_len_dist: Option<(f64, f64)>,
}

fn mean_and_stdev(text: &str) -> Result<(f64, f64), String> {
    text.split_once(',')
        .and_then(|(mean, stdev)| Some((mean.trim().parse().ok()?, stdev.trim().parse().ok()?)))
        .filter(|(mean, stdev): &(f64, f64)| mean.is_finite() && stdev.is_finite() && *stdev >= 0.0)
        .ok_or_else(|| "expected MEAN,STDEV, such as 128,16".into())
}

impl PrepareDataset {
    /// Runs the command.
    pub fn run(&self, global: &GlobalOptions) -> anyhow::Result<()> {
        if self.lora_dir.is_some() {
            return Err(usage_error("--lora-dir: LoRA adapters are not supported"));
        }
        let folder = match &self.tokenizer {
            Some(folder) => folder.clone(),
            None => model_folder(global)?,
        };
        let task_ids = match (self.rand_task_id.as_deref(), self.task_id) {
            (Some(&[low, high]), _) if low > high => {
                return Err(usage_error(format!(
                    "--rand-task-id {low} {high}: expected LOW <= HIGH"
                )));
            }
            (Some(&[low, high]), _) => TaskIds::Random(low, high),
            (_, -1) => TaskIds::Index,
            (_, id) => TaskIds::Fixed(id),
        };
        match &self.kind {
            Kind::TokenNormDist {
                num_requests,
                input_mean,
                input_stdev,
                output_mean,
                output_stdev,
            } => {
                let normal = |mean: u32, stdev: u32| LengthDistribution::Normal {
                    mean: mean.into(),
                    stdev: stdev.into(),
                };
                let lengths = (
                    normal(*input_mean, *input_stdev),
                    normal(*output_mean, *output_stdev),
                );
                self.write_synthetic(&folder, *num_requests, lengths, task_ids)
            }
            Kind::TokenUnifDist {
                num_requests,
                input_min,
                input_max,
                output_min,
                output_max,
            } => {
                for (side, min, max) in [
                    ("input", input_min, input_max),
                    ("output", output_min, output_max),
                ] {
                    if !(1..=*max).contains(min) {
                        return Err(usage_error(format!(
                            "--{side}-min {min} --{side}-max {max}: expected 1 <= min <= max"
                        )));
                    }
                }
                let uniform = |min, max| LengthDistribution::Uniform { min, max };
                let lengths = (
                    uniform(*input_min, *input_max),
                    uniform(*output_min, *output_max),
                );
                self.write_synthetic(&folder, *num_requests, lengths, task_ids)
            }
            Kind::RealDataset(real) => self.write_real(&folder, real, task_ids),
        }
    }

    fn write_synthetic(
        &self,
        folder: &Path,
        num_requests: u64,
        (input, output): (LengthDistribution, LengthDistribution),
        task_ids: TaskIds,
    ) -> anyhow::Result<()> {
        let (vocab_size, eos_ids) = vocabulary(folder)?;
        let num_requests = usize::try_from(num_requests)?;
        let seed = self.random_seed;
        let dataset = SyntheticDataset {
            num_requests,
            input,
            output,
            vocab_size,
            eos_ids,
            task_ids,
            seed,
        };
        self.write(dataset.requests()?)
    }

    fn write_real(
        &self,
        folder: &Path,
        real: &RealDataset,
        task_ids: TaskIds,
    ) -> anyhow::Result<()> {
        if real.dataset_image_key.is_some() {
            return Err(usage_error("--dataset-image-key: only text is supported"));
        }
        let path = real.file()?;
        let is_text = path.extension().is_some_and(|extension| extension == "txt");
        match (is_text, &real.dataset_input_key) {
            (false, None) => {
                return Err(usage_error(
                    "--dataset-input-key is needed for a JSONL file",
                ));
            }
            (true, Some(_)) => {
                return Err(usage_error(
                    "--dataset-input-key: a .txt file has no fields",
                ));
            }
            _ => {}
        }
        if is_text && real.output_len_dist.is_none() {
            return Err(usage_error(
                "--output-len-dist is needed for a .txt file, which has no answers",
            ));
        }
        if real.dataset_output_key.is_none() && real.output_len_dist.is_none() {
            return Err(usage_error(
                "output lengths are missing: --dataset-output-key or --output-len-dist",
            ));
        }
        let source = TextSource {
            input_key: real.dataset_input_key.clone(),
            prompt_key: real.dataset_prompt_key.clone(),
            prompt: real.dataset_prompt.clone(),
            output_key: real.dataset_output_key.clone(),
            output_lengths: real.output_len_dist,
            max_input_len: real.max_input_len,
            num_requests: real.num_requests.map(usize::try_from).transpose()?,
        };
        let tokenizer = TextTokenizer::load(folder)?;
        let name = path.display().to_string();
        let file = foreign::open(&path, foreign::Kind::Dataset).with_context(|| name.clone())?;
        let made = source.read(
            &name,
            BufReader::new(file),
            &tokenizer,
            task_ids,
            self.random_seed,
        )?;
        if made.n_too_long > 0 {
            tracing::info!(
                "{} inputs of more than --max-input-len tokens were left out",
                made.n_too_long
            );
        }
        if made.requests.is_empty() {
            bail!("{name}: no input is left");
        }
        if let Some(wanted) = real
            .num_requests
            .filter(|&n| (made.requests.len() as u64) < n)
        {
            tracing::warn!(
                "{name} gives only {} of {wanted} requests",
                made.requests.len()
            );
        }
        self.write(made.requests)
    }

    fn write(&self, requests: impl IntoIterator<Item = Request>) -> anyhow::Result<()> {
        if self.stdout {
            let mut sink = BufWriter::new(std::io::stdout().lock());
            write_jsonl(&mut sink, requests)?;
            return Ok(sink.flush()?);
        }
        write_atomically(&self.output, |sink| write_jsonl(sink, requests))?;
        tracing::info!("wrote {}", self.output.display());
        Ok(())
    }
}

impl RealDataset {
    /// The file that name, config name and split mean together.
    fn file(&self) -> anyhow::Result<PathBuf> {
        let mut path = self.dataset_name.clone();
        if path.is_dir() {
            path.extend(&self.dataset_config_name);
            let Some(split) = &self.dataset_split else {
                return Err(usage_error(
                    "--dataset-split is needed when --dataset-name is a folder",
                ));
            };
            path.push(format!("{split}.jsonl"));
        }
        if !path.is_file() {
            bail!(
                "{}: no such file; --dataset-name takes local files only",
                path.display()
            );
        }
        Ok(path)
    }
}

/// Number of token ids that prompts may use and the ids that end a sequence, from config.json and
/// tokenizer.json; where both are there, the smaller number, since embeddings may be padded.
fn vocabulary(folder: &Path) -> anyhow::Result<(u32, Vec<u32>)> {
    let mut eos_ids = eos_token_ids(folder)?;
    let mut sizes = Vec::new();
    let config = folder.join("config.json");
    if config.is_file() {
        let text = foreign::read_text(&config, foreign::Kind::Config)
            .with_context(|| config.display().to_string())?;
        let value: serde_json::Value = serde_json::from_str(&text)
            .with_context(|| format!("{}: not valid JSON", config.display()))?;
        let field = value
            .get("vocab_size")
            .or_else(|| value.get("text_config")?.get("vocab_size"));
        sizes.extend(field.and_then(serde_json::Value::as_u64));
    }
    if folder.join("tokenizer.json").is_file() {
        let tokenizer = TextTokenizer::load(folder)?;
        sizes.push(tokenizer.vocab_size() as u64);
        eos_ids.extend(&tokenizer.special().eos_ids);
    }
    let Some(size) = sizes.into_iter().min() else {
        bail!(
            "{}: neither vocab_size in a config.json nor a tokenizer.json says how many tokens there are",
            folder.display()
        );
    };
    let size =
        u32::try_from(size).with_context(|| format!("{}: vocab_size {size}", config.display()))?;
    Ok((size, eos_ids))
}
