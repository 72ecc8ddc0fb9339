//! Gemma 2: Gemma with norms after attention and MLP, capped scores and logits, and a window in
//! every other layer.

use super::gemma::{DEFAULTS, read};
use crate::import::blocks::decoder::{Decoder, Norms, windows_by_type};
use crate::import::{Family, HfConfig, ImportError, ImportOptions, Model, Sample};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    import,
    samples: &[Sample {
        name: "gemma2",
        config: r#"{
                "model_type": "gemma2", "hidden_size": 256, "intermediate_size": 384,
                "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2,
                "vocab_size": 1000, "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
                "hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0, "tie_word_embeddings": false,
                "head_dim": 64, "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 20.0,
                "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 48, "sliding_window": 40,
                "layer_types": ["sliding_attention", "full_attention"]
            }"#,
    }],
};

fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    let mut d = read(cfg, opts, &DEFAULTS)?;
    d.norms = Norms::Around;
    read_scaling(cfg, &mut d)?;
    let cap = |key: &str, default| {
        let cap = cfg.opt_positive(key)?;
        Ok::<_, ImportError>(cfg.nullable(key, cap, default))
    };
    d.attention.softcap = cap("attn_logit_softcapping", 50.0)?;
    d.logit_cap = cap("final_logit_softcapping", 30.0)?;
    let window = cfg.opt_size("sliding_window")?.or(Some(4096));
    d.windows = windows_by_type(cfg, d.layers(), window, |i| i % 2 == 0)?;
    d.build(FAMILY.model_type, cfg, opts)
}

/// `query_pre_attn_scalar` takes the place of the head's width in the scale of the scores.
pub(super) fn read_scaling(cfg: &HfConfig, d: &mut Decoder) -> Result<(), ImportError> {
    let scalar = cfg.opt_positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    d.attention.scaling = scalar.powf(-0.5);
    Ok(())
}
