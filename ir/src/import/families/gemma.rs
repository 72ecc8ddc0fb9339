//! Gemma 1: Llama with scaled embeddings, norms with `1 + weight`, and a tanh GELU gate.

use crate::import::blocks::decoder::{Decoder, Defaults};
use crate::import::blocks::mlp::Activation;
use crate::import::{Family, HfConfig, ImportError, ImportOptions, Model, Sample};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma",
    architecture: "GemmaForCausalLM",
    import,
    samples: &[Sample {
        name: "gemma",
        config: r#"{
                "model_type": "gemma", "hidden_size": 256, "intermediate_size": 384,
                "num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 2,
                "vocab_size": 1000, "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
                "hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0, "tie_word_embeddings": false,
                "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"
            }"#,
    }],
};

/// What Gemma 1, 2 and 3 leave out of their configurations.
pub(super) const DEFAULTS: Defaults = Defaults {
    head_dim: Some(256),
    activation: ("hidden_activation", Activation::GeluTanh),
    tied: true,
    ..Defaults::PLAIN
};

fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    let mut d = read(cfg, opts, &DEFAULTS)?;
    // transformers reads hidden_activation in some versions and hidden_act in others.
    let act = Activation::read(cfg, "hidden_act", d.activation)?;
    if cfg.get("hidden_activation").is_some() && act != d.activation {
        return Err(cfg.invalid("hidden_act", "the same activation as hidden_activation"));
    }
    d.activation = act;
    d.build(FAMILY.model_type, cfg, opts)
}

/// The shape that all Gemmas share.
pub(super) fn read(
    cfg: &HfConfig,
    opts: &ImportOptions,
    defaults: &Defaults,
) -> Result<Decoder, ImportError> {
    cfg.only("use_bidirectional_attention", &false.into())?;
    let mut d = Decoder::read(cfg, opts, defaults)?;
    d.read_attention_bias(cfg)?;
    d.norm.unit_offset = true;
    d.embed_scale = Some(f64::from(d.attention.hidden).sqrt());
    Ok(d)
}
