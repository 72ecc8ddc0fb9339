//! From the command line to an imported model: what every command that compiles does first.

use crate::config::{self, Options, Resolved};
use crate::errors::usage_error;
use crate::global_options::{DtypeChoice, GlobalOptions};
use crate::model_folder::{model_folder, model_name};
use crate::phases::Phases;
use lathe_codegen::{LowerError, Plan, Programs, lower};
use lathe_ir::DType;
use lathe_ir::import::{HfConfig, ImportError, ImportOptions, Model, import};
use lathe_passes::pipeline::Compiled;
use std::path::{Path, PathBuf};

/// A model with where it came from.
#[derive(Debug)]
pub struct Imported {
    /// What the user calls it.
    pub name: String,
    /// The checkpoint's folder.
    pub folder: PathBuf,
    /// Element type of weights and activations.
    pub dtype: DType,
    /// The naive graph and the model's sizes.
    pub model: Model,
}

impl Imported {
    /// The plan of the compiled model: its step programs, or the whole-sequence program where there
    /// are none.
    ///
    /// # Errors
    /// An operation without a kernel, or a weight without a layout.
    pub fn lower(&self, compiled: &Compiled) -> Result<Plan, LowerError> {
        plan(&self.name, self.dtype, compiled)
    }
}

/// The plan of a compiled model: its step programs, or the whole-sequence program where there are none.
///
/// # Errors
/// An operation without a kernel, or a weight without a layout.
pub fn plan(name: &str, dtype: DType, compiled: &Compiled) -> Result<Plan, LowerError> {
    let programs = Programs {
        decode: compiled.steps.decode.as_ref(),
        general: compiled.steps.general.as_ref(),
        full: compiled.steps.general.is_none().then_some(&compiled.full),
    };
    lower(name, dtype, &programs)
}

/// Merges the YAML file, if one was named, over the options of the command line.
///
/// # Errors
/// The file cannot be read or is not a valid configuration.
pub fn resolve(flags: Options, yaml: Option<&Path>) -> anyhow::Result<Resolved> {
    let yaml = match yaml {
        Some(path) => config::read(path)?,
        None => Options::default(),
    };
    Ok(Resolved::new(flags, yaml))
}

/// The error with the place of the override whose value it is about, if it is one: then it is one of usage.
fn blame_overrides(mut error: ImportError, config: &Resolved) -> anyhow::Error {
    if let ImportError::Missing { file, key, .. }
    | ImportError::Invalid { file, key, .. }
    | ImportError::Unsupported { file, key, .. } = &mut error
        && let Some(given) = config.model_kwargs.get(key)
    {
        *file = format!("{}: model_kwargs over {file}", given.source);
        return usage_error(error.to_string());
    }
    error.into()
}

/// Reads config.json (no weights) and builds the naive graph.
///
/// # Errors
/// There is no such model, or it is one that cannot be imported.
pub fn import_model(
    global: &GlobalOptions,
    config: &Resolved,
    phases: &mut Phases,
) -> anyhow::Result<Imported> {
    let folder = model_folder(global)?;
    anyhow::ensure!(
        folder.join("config.json").exists(),
        "{}: no config.json; expected the folder of a Hugging Face checkpoint",
        folder.display()
    );
    let file = HfConfig::from_file(&folder)?;
    for (key, _) in config.overrides() {
        let top = key.split('.').next().unwrap_or(key);
        if !file.is_written(top) {
            tracing::warn!("model_kwargs.{key} is no key of {}", file.file());
        }
    }
    let blame = |error| blame_overrides(error, config);
    let file = file.with_overrides(config.overrides()).map_err(blame)?;
    let dtype = match global.dtype {
        DtypeChoice::Auto => file.dtype().map_err(blame)?.unwrap_or(DType::BF16),
        DtypeChoice::Bfloat16 => DType::BF16,
        DtypeChoice::Float16 => DType::F16,
        DtypeChoice::Float32 => DType::F32,
    };
    config.check_kv_cache_dtype(dtype).map_err(usage_error)?;
    phases.end("config");
    let options = ImportOptions {
        dtype,
        max_seq_len: config.max_seq_len.value,
    };
    let model = import(&file, &options).map_err(blame)?;
    phases.end("import");
    Ok(Imported {
        name: model_name(global, &folder),
        folder,
        dtype,
        model,
    })
}
