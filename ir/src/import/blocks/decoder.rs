//! The Llama shape: decoder layers of rotary attention and a gated MLP with RMSNorms.

use super::attention::{Attention, self_attention, softcap};
use super::embed::{embedding, tokens};
use super::linear::lm_head;
use super::mask::layer_masks;
use super::mlp::{Activation, Mlp};
use super::model::{Sizes, finish};
use super::norm::{RmsNorm, rms_norm};
use super::rope::{CosSin, RopeDefaults, RopeTable, rotary_embedding};
use crate::import::builder::{Builder, Built};
use crate::import::{HfConfig, ImportError, ImportOptions, Model};
use crate::{BinaryFn, NodeId};

/// Everything in which the families of the Llama shape differ.
#[derive(Clone, Debug)]
pub(crate) struct Decoder {
    /// Vocabulary, lengths, tying.
    pub(crate) sizes: Sizes,
    /// The attention modules.
    pub(crate) attention: Attention,
    /// The feed-forward networks.
    pub(crate) mlp: Mlp,
    /// Their activation.
    pub(crate) activation: Activation,
    /// What is normed.
    pub(crate) norms: Norms,
    /// How.
    pub(crate) norm: RmsNorm,
    /// Factor of the embeddings (Gemma).
    pub(crate) embed_scale: Option<f64>,
    /// Cap of the logits (Gemma 2).
    pub(crate) logit_cap: Option<f64>,
    /// Attention window of each layer.
    pub(crate) windows: Vec<Option<u32>>,
    /// Rotary frequencies.
    pub(crate) rope: RopeTable,
    /// Rotary frequencies of layers with a window, if they have others (Gemma 3).
    pub(crate) local_rope: Option<RopeTable>,
}

/// Which values of a layer are normed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Norms {
    /// What attention and MLP read.
    Before,
    /// Their results, too (Gemma 2, 3).
    Around,
}

/// How a family fills in keys that a configuration leaves out: the defaults of its configuration
/// class in transformers. Sizes for which no published configuration relies on the default have
/// none here.
pub(crate) struct Defaults {
    /// `num_key_value_heads` may be left out and is then `num_attention_heads`.
    pub(crate) kv_heads_optional: bool,
    /// `head_dim`; without a default it is `hidden_size / num_attention_heads`.
    pub(crate) head_dim: Option<u32>,
    /// Name and default of the activation's key.
    pub(crate) activation: (&'static str, Activation),
    /// `tie_word_embeddings`.
    pub(crate) tied: bool,
    /// The rotary embedding, and where its parameters stand.
    pub(crate) rope: (&'static str, RopeDefaults),
}

impl Defaults {
    /// Those of Qwen 2 and many others.
    pub(crate) const PLAIN: Defaults = Defaults {
        kv_heads_optional: false,
        head_dim: None,
        activation: ("hidden_act", Activation::Silu),
        tied: false,
        rope: ("rope_parameters", RopeDefaults::PLAIN),
    };
}

/// `num_key_value_heads`; null means `heads`, and so does an absent key if it is `optional`.
pub(crate) fn kv_heads(cfg: &HfConfig, heads: u32, optional: bool) -> Result<u32, ImportError> {
    let key = "num_key_value_heads";
    let n = match cfg.opt_size(key)? {
        Some(n) => n,
        None if optional || cfg.is_written(key) => heads,
        None => return Err(cfg.missing(key, "a positive integer")),
    };
    if heads.is_multiple_of(n) {
        Ok(n)
    } else {
        let expected = format!("a divisor of num_attention_heads, which is {heads}");
        Err(cfg.invalid(key, &expected))
    }
}

/// Features of a head: a table is made of their frequencies.
const MAX_HEAD_DIM: u32 = 1 << 16;
/// Features of all query heads; with as many of keys and of values they are still indexed by 32 bits.
const MAX_HEAD_FEATURES: u64 = 1 << 29;

/// `head_dim`, or `default`, or the heads' share of the hidden size.
pub(crate) fn head_dim(
    cfg: &HfConfig,
    default: Option<u32>,
    hidden: u32,
    heads: u32,
) -> Result<u32, ImportError> {
    let head_dim = match cfg.opt_size("head_dim")?.or(default) {
        Some(d) => d,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let expected = format!(
                "a positive integer, because {heads} heads do not divide hidden size {hidden}"
            );
            return Err(cfg.missing("head_dim", &expected));
        }
    };
    let features = u64::from(heads) * u64::from(head_dim);
    if head_dim <= MAX_HEAD_DIM && features <= MAX_HEAD_FEATURES {
        return Ok(head_dim);
    }
    Err(ImportError::Invalid {
        file: cfg.file().to_string(),
        key: "head_dim".to_string(),
        found: head_dim.to_string(),
        expected: format!(
            "at most {MAX_HEAD_DIM} features a head and {MAX_HEAD_FEATURES} of all {heads} heads"
        ),
    })
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
        let kv_heads = kv_heads(cfg, heads, defaults.kv_heads_optional)?;
        let head_dim = head_dim(cfg, defaults.head_dim, hidden, heads)?;
        let (act_key, act) = defaults.activation;
        let (rope_at, rope) = defaults.rope;
        Ok(Decoder {
            sizes: Sizes::read(cfg, defaults.tied)?,
            attention: Attention::plain(hidden, heads, kv_heads, head_dim),
            mlp: Mlp::Gated { bias: false },
            activation: Activation::read(cfg, act_key, act)?,
            norms: Norms::Before,
            norm: RmsNorm {
                eps: cfg.opt_f64("rms_norm_eps")?.unwrap_or(1e-6),
                unit_offset: false,
            },
            embed_scale: None,
            logit_cap: None,
            windows: vec![None; cfg.layers("num_hidden_layers")? as usize],
            rope: RopeTable::read(cfg, rope_at, head_dim, rope, opts)?,
            local_rope: None,
        })
    }

    /// `attention_bias`: of all four projections.
    pub(crate) fn read_attention_bias(&mut self, cfg: &HfConfig) -> Result<(), ImportError> {
        let bias = cfg.bool_or("attention_bias", false)?;
        self.attention.qkv_bias = bias;
        self.attention.o_bias = bias;
        Ok(())
    }

    /// Number of layers.
    pub(crate) fn layers(&self) -> usize {
        self.windows.len()
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
        let table_shape = [self.sizes.vocab, hidden];
        let (table, h) = b.within("model", |b| {
            let ids = tokens(b)?;
            let (table, mut h) = embedding(b, "embed_tokens", ids, table_shape)?;
            if let Some(scale) = self.embed_scale {
                // A buffer of the model's element type in transformers.
                let scale = b.rounded(scale);
                h = b.within("embed_tokens", |b| b.scalar(BinaryFn::Mul, h, scale))?;
            }
            let masks = layer_masks(b, &self.windows)?;
            let rope = rotary_embedding(b, "rotary_emb", &self.rope)?;
            let local = match &self.local_rope {
                Some(table) => rotary_embedding(b, "rotary_emb_local", table)?,
                None => rope,
            };
            for (i, (&mask, window)) in masks.iter().zip(&self.windows).enumerate() {
                let rope = if window.is_some() { local } else { rope };
                h = b.in_layer(i as u32, &format!("layers.{i}"), |b| {
                    self.layer(b, h, rope, mask)
                })?;
            }
            Ok((table, rms_norm(b, "norm", h, hidden, self.norm)?))
        })?;
        let tied = self.sizes.tied.then_some(table);
        let mut logits = lm_head(&mut b, "lm_head", h, tied, table_shape, false)?;
        if let Some(cap) = self.logit_cap {
            logits = b.within("lm_head", |b| softcap(b, logits, cap))?;
        }
        let layers = self.layers() as u32;
        let mut model = finish(b, logits, family, cfg, &self.sizes, &self.attention, layers)?;
        if self.sizes.tied {
            model.alias("lm_head.weight", "model.embed_tokens.weight");
        }
        Ok(model)
    }

    /// One decoder layer on h `[B,S,hidden]`.
    fn layer(&self, b: &mut Builder, h: NodeId, rope: CosSin, mask: NodeId) -> Built {
        let hidden = self.attention.hidden;
        let norm = |b: &mut Builder, name, x| rms_norm(b, name, x, hidden, self.norm);
        let (after_attention, before_mlp, after_mlp) = match self.norms {
            Norms::Before => (None, "post_attention_layernorm", None),
            Norms::Around => (
                Some("post_attention_layernorm"),
                "pre_feedforward_layernorm",
                Some("post_feedforward_layernorm"),
            ),
        };
        let x = norm(b, "input_layernorm", h)?;
        let mut x = self_attention(b, &self.attention, "o_proj", x, rope, mask)?;
        if let Some(name) = after_attention {
            x = norm(b, name, x)?;
        }
        let h = b.binary(BinaryFn::Add, h, x)?;
        let x = norm(b, before_mlp, h)?;
        let shape = [hidden, self.sizes.intermediate];
        let mut x = self.mlp.build(b, x, shape, self.activation)?;
        if let Some(name) = after_mlp {
            x = norm(b, name, x)?;
        }
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
