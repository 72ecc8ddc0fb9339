//! From a Hugging Face `config.json` to the naive graph of the model.
//!
//! The graph is what transformers' eager modelling code computes on whole sequences, in primitive
//! operations only: input `tokens i64[B,S]`, output `logits [B,S,V]` in the model's element type.
//! Everything clever is the passes' business. Nothing is guessed: an option that changes the
//! computation and is not implemented is an error that names it.

mod blocks;
mod builder;
mod config;
mod error;
mod families;
#[cfg(test)]
mod tests;

pub use config::HfConfig;
pub use error::ImportError;

use crate::{DType, Graph, WeightRef};

/// What the importer is asked for beside the configuration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ImportOptions {
    /// Element type of weights, activations and logits: f32, bf16 or f16.
    pub dtype: DType,
    /// Longest sequence that will be run, if it is not `max_position_embeddings`. Only rotary
    /// embeddings whose frequencies depend on the length look at it.
    pub max_seq_len: Option<u32>,
}

/// An imported model.
#[derive(Clone, PartialEq, Debug)]
pub struct Model {
    /// The naive program.
    pub graph: Graph,
    /// Its sizes and its checkpoint.
    pub arch: ModelInfo,
}

/// Sizes of a model and what its checkpoint holds.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelInfo {
    /// `model_type` of the family that was imported.
    pub family: String,
    /// Vocabulary size (rows of the embedding).
    pub vocab: u32,
    /// Features of the residual stream.
    pub hidden: u32,
    /// Decoder layers.
    pub layers: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Features per head.
    pub head_dim: u32,
    /// Features of the MLP.
    pub intermediate: u32,
    /// `max_position_embeddings`.
    pub max_position: u32,
    /// Whether lm_head is the embedding.
    pub tied: bool,
    /// Token that starts a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// Element type of the checkpoint, by the configuration.
    pub dtype: Option<DType>,
    /// The tensors that the graph reads, in the order of their first use.
    pub weights: Vec<WeightRef>,
    /// `(alias, name)`: a checkpoint may repeat the tensor `name` under `alias` (tied weights), or
    /// carry it under `alias` alone.
    pub aliases: Vec<(String, String)>,
    /// Tensors whose names end so may lie in a checkpoint and are not read.
    pub ignored_suffixes: Vec<String>,
}

impl ModelInfo {
    /// Whether a tensor of a checkpoint is expected but not read: an alias, or a buffer that
    /// older versions saved.
    pub fn ignores(&self, name: &str) -> bool {
        self.aliases.iter().any(|(a, _)| a == name)
            || self.ignored_suffixes.iter().any(|s| name.ends_with(s))
    }

    /// Parameters of the model, tied ones once.
    pub fn parameters(&self) -> u64 {
        self.weights
            .iter()
            .map(|w| w.shape.iter().map(|&n| n as u64).product::<u64>())
            .sum()
    }
}

type Importer = fn(&HfConfig, &ImportOptions) -> Result<Model, ImportError>;

/// A family of models.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// `model_type` of its configurations.
    pub model_type: &'static str,
    /// Its name in their `architectures`.
    pub architecture: &'static str,
    /// Small models of it, for self-tests.
    pub samples: &'static [Sample],
    import: Importer,
}

/// A small model: extents are odd where the family allows it, but for those that decide between
/// kernels.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// The family's name, with what is particular to the model if there are several.
    pub name: &'static str,
    /// Its `config.json`.
    pub config: &'static str,
}

/// The supported families, sorted by `model_type`.
pub fn families() -> &'static [Family] {
    families::ALL
}

/// Builds the naive graph of a model.
///
/// # Errors
/// The family is unknown; a key is missing, malformed, or asks for something that is not
/// implemented.
pub fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    let family = find_family(cfg)?;
    if cfg.get("quantization_config").is_some() {
        return Err(cfg.unsupported(
            "quantization_config",
            "unquantised checkpoints in float32, float16 or bfloat16",
        ));
    }
    if !opts.dtype.is_float() {
        return Err(ImportError::Unsupported {
            file: cfg.file().to_string(),
            key: "dtype".to_string(),
            found: opts.dtype.to_string(),
            supported: "f32, bf16, f16".to_string(),
        });
    }
    (family.import)(cfg, opts)
}

fn find_family(cfg: &HfConfig) -> Result<&'static Family, ImportError> {
    let list =
        |name: fn(&Family) -> &str| families().iter().map(name).collect::<Vec<_>>().join(", ");
    let architectures = cfg.opt_strs("architectures")?.unwrap_or_default();
    let Some(model_type) = cfg.opt_str("model_type")? else {
        let mut known = families().iter();
        return known
            .find(|f| architectures.contains(&f.architecture))
            .ok_or_else(|| match architectures.is_empty() {
                true => cfg.missing("model_type", &format!("one of {}", list(|f| f.model_type))),
                false => cfg.unsupported("architectures", &list(|f| f.architecture)),
            });
    };
    let family = families()
        .iter()
        .find(|f| f.model_type == model_type)
        .ok_or_else(|| cfg.unsupported("model_type", &list(|f| f.model_type)))?;
    if architectures.is_empty() || architectures.contains(&family.architecture) {
        Ok(family)
    } else {
        Err(cfg.unsupported("architectures", family.architecture))
    }
}
