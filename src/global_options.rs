//! Options of every command.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use lathe_runtime::device::cuda::cubin_cache::CubinCache;

/// Options of every command; they may stand before or after it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct GlobalOptions {
    /// Checkpoint folder, or a hub id that lies in the local Hugging Face cache
    #[arg(short, long, global = true, value_name = "FOLDER|ID")]
    pub model: Option<String>,
    /// Checkpoint folder to read when --model only names the model
    #[arg(long = "model_path", global = true, value_name = "FOLDER")]
    pub model_path: Option<PathBuf>,
    /// auto takes a usable CUDA GPU, else the CPU
    #[arg(long, global = true, default_value_t, value_name = "auto|cpu|cuda[:N]")]
    pub device: DeviceChoice,
    /// Data type of weights and activations; auto is the checkpoint's
    #[arg(long, global = true, value_enum, default_value_t)]
    pub dtype: DtypeChoice,
    /// GPUs to shard the model over
    #[arg(long, global = true, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub tp: u32,
    /// Least severity that is logged to stderr
    #[arg(long = "log_level", global = true, value_enum, default_value_t)]
    pub log_level: LogLevel,
    /// Form of the log lines on stderr
    #[arg(long = "log_format", global = true, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Folder for compiled kernels and the choices among them [default: lathe in the user's cache folder]
    #[arg(short, long, global = true, value_name = "FOLDER")]
    pub workspace: Option<PathBuf>,
}

impl GlobalOptions {
    /// Where compiled kernels lie, for every command: in the workspace if one is named, else in the user's cache
    /// folder, where the next run finds them.
    pub fn kernel_cache(&self) -> PathBuf {
        CubinCache::default_dir(self.workspace.as_deref())
    }
}

/// `--device`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A usable GPU, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this index.
    Cuda(u32),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", index)) if index.parse::<u32>().is_ok() => {
                Ok(Self::Cuda(index.parse().unwrap_or(0)))
            }
            _ => Err("expected auto, cpu, cuda or cuda:N".into()),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// `--dtype`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum DtypeChoice {
    /// What config.json says.
    #[default]
    Auto,
    /// bf16.
    #[value(alias = "bf16")]
    Bfloat16,
    /// f16.
    #[value(aliases = ["fp16", "half"])]
    Float16,
    /// f32.
    #[value(alias = "fp32")]
    Float32,
}

/// `--log_level`, with trtllm-bench's names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum LogLevel {
    /// Nothing but the final error.
    InternalError,
    /// Errors.
    Error,
    /// Warnings and errors.
    Warning,
    /// Progress, too.
    #[default]
    Info,
    /// Details.
    Verbose,
    /// Details for debugging.
    Debug,
    /// Everything.
    Trace,
}

/// `--log_format`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices() {
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        assert!("cuda:x".parse::<DeviceChoice>().is_err());
        assert!("gpu".parse::<DeviceChoice>().is_err());
    }
}
