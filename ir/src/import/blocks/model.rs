//! What all families end with: the output and the description of the model.

use super::attention::Attention;
use crate::NodeId;
use crate::import::builder::Builder;
use crate::import::{HfConfig, ImportError, Model, ModelInfo};

/// Sizes beside those of attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Vocabulary size.
    pub(crate) vocab: u32,
    /// Features of the MLP.
    pub(crate) intermediate: u32,
    /// Longest sequence of the model.
    pub(crate) max_position: u32,
    /// Whether lm_head is the embedding.
    pub(crate) tied: bool,
}

impl Sizes {
    /// Reads the keys under their most common names; `tied` is the default of
    /// `tie_word_embeddings`.
    pub(crate) fn read(cfg: &HfConfig, tied: bool) -> Result<Sizes, ImportError> {
        Ok(Sizes {
            vocab: cfg.size("vocab_size")?,
            intermediate: cfg.size("intermediate_size")?,
            max_position: cfg.size("max_position_embeddings")?,
            tied: cfg.bool_or("tie_word_embeddings", tied)?,
        })
    }
}

/// Declares the logits as the output and describes the model.
pub(crate) fn finish(
    mut b: Builder,
    logits: NodeId,
    family: &str,
    cfg: &HfConfig,
    sizes: &Sizes,
    attention: &Attention,
    layers: u32,
) -> Result<Model, ImportError> {
    b.graph.set_output("logits", logits);
    Ok(Model {
        arch: ModelInfo {
            family: family.to_string(),
            vocab: sizes.vocab,
            hidden: attention.hidden,
            layers,
            heads: attention.heads,
            kv_heads: attention.kv_heads,
            head_dim: attention.head_dim,
            intermediate: sizes.intermediate,
            max_position: sizes.max_position,
            tied: sizes.tied,
            bos: cfg.token_ids("bos_token_id")?.first().copied(),
            eos: cfg.token_ids("eos_token_id")?,
            dtype: cfg.dtype()?,
            weights: b.weights.into_iter().collect(),
            aliases: Vec::new(),
            ignored_suffixes: vec!["rotary_emb.inv_freq".to_string()],
        },
        graph: b.graph,
    })
}

impl Model {
    /// Adds a name that a checkpoint may use or repeat for a tensor.
    pub(crate) fn alias(&mut self, alias: &str, name: &str) {
        self.arch
            .aliases
            .push((alias.to_string(), name.to_string()));
    }

    /// Adds endings of tensors that a checkpoint may carry and that are not read.
    pub(crate) fn ignore(&mut self, suffixes: &[&str]) {
        let new = suffixes.iter().map(|s| s.to_string());
        self.arch.ignored_suffixes.extend(new);
    }
}
