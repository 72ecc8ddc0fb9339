//! The Llama shape: pre-norm decoder layers of rotary attention and a gated MLP.

use super::attention::{Attention, self_attention};
use super::embed::{embedding, tokens};
use super::linear::{linear, matmul_t};
use super::mask::layer_masks;
use super::mlp::{Activation, gated_mlp};
use super::norm::rms_norm;
use super::rope::{CosSin, RopeTable, rotary_embedding};
use crate::import::builder::{Builder, Built};
use crate::import::{HfConfig, ImportError, ImportOptions, Model, ModelInfo};
use crate::{BinaryFn, NodeId};

/// Everything in which the families of the Llama shape differ.
#[derive(Clone, Debug)]
pub(crate) struct Decoder {
    /// Vocabulary size.
    pub(crate) vocab: u32,
    /// Features of the MLP.
    pub(crate) intermediate: u32,
    /// Longest sequence of the model.
    pub(crate) max_position: u32,
    /// The attention modules.
    pub(crate) attention: Attention,
    /// Activation of the gate.
    pub(crate) activation: Activation,
    /// Whether the MLP's projections have biases.
    pub(crate) mlp_bias: bool,
    /// Epsilon of the norms.
    pub(crate) eps: f64,
    /// Attention window of each layer.
    pub(crate) windows: Vec<Option<u32>>,
    /// Rotary frequencies.
    pub(crate) rope: RopeTable,
    /// Whether lm_head is the embedding.
    pub(crate) tied: bool,
}

/// How a family fills in keys that a configuration leaves out: the defaults of its configuration
/// class in transformers.
pub(crate) struct Defaults {
    /// `num_key_value_heads` may be left out and is then `num_attention_heads`.
    pub(crate) kv_heads_optional: bool,
    /// `head_dim`; without a default it is `hidden_size / num_attention_heads`.
    pub(crate) head_dim: Option<u32>,
}

impl Decoder {
    /// Reads the keys that all families of the shape share. No biases, no head norms, no windows.
    pub(crate) fn read(
        cfg: &HfConfig,
        opts: &ImportOptions,
        defaults: &Defaults,
    ) -> Result<Decoder, ImportError> {
        let hidden = cfg.size("hidden_size")?;
        let heads = cfg.size("num_attention_heads")?;
        let kv_heads = match cfg.opt_size("num_key_value_heads")? {
            Some(n) => n,
            None if defaults.kv_heads_optional || cfg.is_written("num_key_value_heads") => heads,
            None => return Err(cfg.missing("num_key_value_heads", "a positive integer")),
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(cfg.invalid(
                "num_key_value_heads",
                &format!("a divisor of num_attention_heads, which is {heads}"),
            ));
        }
        let head_dim = match cfg.opt_size("head_dim")?.or(defaults.head_dim) {
            Some(d) => d,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(cfg.missing(
                    "head_dim",
                    &format!(
                        "a positive integer, because {heads} heads do not divide \
                         hidden_size {hidden}"
                    ),
                ));
            }
        };
        Ok(Decoder {
            vocab: cfg.size("vocab_size")?,
            intermediate: cfg.size("intermediate_size")?,
            max_position: cfg.size("max_position_embeddings")?,
            attention: Attention {
                hidden,
                heads,
                kv_heads,
                head_dim,
                scaling: f64::from(head_dim).powf(-0.5),
                qkv_bias: false,
                o_bias: false,
                head_norm: None,
            },
            activation: Activation::read(cfg, "hidden_act", Activation::Silu)?,
            mlp_bias: false,
            eps: cfg.opt_f64("rms_norm_eps")?.unwrap_or(1e-6),
            windows: vec![None; cfg.size("num_hidden_layers")? as usize],
            rope: RopeTable::read(cfg, head_dim, opts.max_seq_len)?,
            tied: cfg.bool_or("tie_word_embeddings", false)?,
        })
    }

    /// Builds the graph and describes the model.
    pub(crate) fn build(
        &self,
        family: &str,
        cfg: &HfConfig,
        opts: &ImportOptions,
    ) -> Result<Model, ImportError> {
        let mut b = Builder::new(family, cfg.file(), opts.dtype);
        let hidden = self.attention.hidden;
        let table_shape = [self.vocab, hidden];
        let (table, h) = b.within("model", |b| {
            let ids = tokens(b)?;
            let (table, mut h) = embedding(b, "embed_tokens", ids, table_shape)?;
            let masks = layer_masks(b, &self.windows)?;
            let rope = rotary_embedding(b, &self.rope)?;
            for (i, &mask) in masks.iter().enumerate() {
                h = b.in_layer(i as u32, &format!("layers.{i}"), |b| {
                    self.layer(b, h, rope, mask)
                })?;
            }
            Ok((table, rms_norm(b, "norm", h, hidden, self.eps)?))
        })?;
        let logits = if self.tied {
            b.within("lm_head", |b| matmul_t(b, h, table))?
        } else {
            linear(&mut b, "lm_head", h, table_shape, false)?
        };
        b.graph.set_output("logits", logits);
        let aliases = if self.tied {
            vec![(
                "lm_head.weight".to_string(),
                "model.embed_tokens.weight".to_string(),
            )]
        } else {
            Vec::new()
        };
        Ok(Model {
            arch: ModelInfo {
                family: family.to_string(),
                vocab: self.vocab,
                hidden,
                layers: self.windows.len() as u32,
                heads: self.attention.heads,
                kv_heads: self.attention.kv_heads,
                head_dim: self.attention.head_dim,
                intermediate: self.intermediate,
                max_position: self.max_position,
                tied: self.tied,
                bos: cfg.token_ids("bos_token_id")?.first().copied(),
                eos: cfg.token_ids("eos_token_id")?,
                dtype: cfg.dtype()?,
                weights: b.weights,
                aliases,
                ignored_suffixes: vec!["rotary_emb.inv_freq".to_string()],
            },
            graph: b.graph,
        })
    }

    /// One decoder layer on h `[B,S,hidden]`.
    fn layer(&self, b: &mut Builder, h: NodeId, rope: CosSin, mask: NodeId) -> Built {
        let hidden = self.attention.hidden;
        let x = rms_norm(b, "input_layernorm", h, hidden, self.eps)?;
        let x = self_attention(b, &self.attention, x, rope, mask)?;
        let h = b.binary(BinaryFn::Add, h, x)?;
        let x = rms_norm(b, "post_attention_layernorm", h, hidden, self.eps)?;
        let x = gated_mlp(
            b,
            x,
            hidden,
            self.intermediate,
            self.activation,
            self.mlp_bias,
        )?;
        b.binary(BinaryFn::Add, h, x)
    }
}

/// The window of each layer by `layer_types`, or by `derived` where the key is absent.
///
/// # Errors
/// The list has another length than the model, an unknown entry, or asks for sliding attention
/// where the model has no window.
pub(crate) fn windows_by_type(
    cfg: &HfConfig,
    layers: usize,
    window: Option<u32>,
    derived: impl Fn(usize) -> bool,
) -> Result<Vec<Option<u32>>, ImportError> {
    let key = "layer_types";
    let Some(types) = cfg.opt_strs(key)? else {
        return Ok((0..layers).map(|i| window.filter(|_| derived(i))).collect());
    };
    if types.len() != layers {
        return Err(cfg.invalid(
            key,
            &format!("a list of num_hidden_layers = {layers} entries"),
        ));
    }
    types
        .iter()
        .map(|&t| match (t, window) {
            ("full_attention", _) => Ok(None),
            ("sliding_attention", Some(w)) => Ok(Some(w)),
            ("sliding_attention", None) => Err(cfg.unsupported(
                key,
                "full_attention only, because the model has no sliding_window",
            )),
            _ => Err(cfg.unsupported(key, "full_attention, sliding_attention")),
        })
        .collect()
}
