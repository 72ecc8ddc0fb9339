//! Gemma 3 (text): Gemma 2 with head norms instead of caps, and rotary frequencies of their own
//! in layers with a window.

use super::gemma::{DEFAULTS, read};
use super::gemma2::read_scaling;
use crate::import::blocks::decoder::{Defaults, Norms, windows_by_type};
use crate::import::blocks::rope::{RopeDefaults, RopeTable};
use crate::import::{Family, HfConfig, ImportError, ImportOptions, Model, Sample};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    import,
    samples: &[Sample {
        name: "gemma3",
        config: r#"{
                "model_type": "gemma3_text", "hidden_size": 256, "intermediate_size": 384,
                "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2,
                "vocab_size": 1000, "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
                "hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0, "tie_word_embeddings": false,
                "head_dim": 32, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 48,
                "sliding_window": 40, "rope_local_base_freq": 10000.0,
                "layer_types": ["sliding_attention", "full_attention"]
            }"#,
    }],
};

const FULL: RopeDefaults = RopeDefaults {
    theta: 1_000_000.0,
    partial: None,
};

fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    // transformers 5 has parameters per layer type; 4 has one set, and `rope_local_base_freq`.
    let per_type = cfg.get("rope_parameters.full_attention").is_some();
    let full_at = if per_type {
        "rope_parameters.full_attention"
    } else {
        "rope_parameters"
    };
    let defaults = Defaults {
        rope: (full_at, FULL),
        ..DEFAULTS
    };
    let mut d = read(cfg, opts, &defaults)?;
    d.norms = Norms::Around;
    read_scaling(cfg, &mut d)?;
    d.attention.head_norm = Some(d.norm);
    d.attention.softcap = cfg.opt_positive("attn_logit_softcapping")?;
    d.logit_cap = cfg.opt_positive("final_logit_softcapping")?;
    let local_theta = cfg
        .opt_positive("rope_local_base_freq")?
        .unwrap_or(10_000.0);
    let local_at = if per_type {
        "rope_parameters.sliding_attention"
    } else {
        "rope_local_parameters"
    };
    d.local_rope = Some(RopeTable::read(
        cfg,
        local_at,
        d.attention.head_dim,
        RopeDefaults {
            theta: local_theta,
            partial: None,
        },
        opts,
    )?);
    let pattern = match cfg.opt_size("sliding_window_pattern")? {
        Some(n) => n,
        None => cfg.opt_size("_sliding_window_pattern")?.unwrap_or(6),
    } as usize;
    let window = cfg.opt_size("sliding_window")?.or(Some(4096));
    d.windows = windows_by_type(cfg, d.layers(), window, |i| (i + 1) % pattern != 0)?;
    d.build(FAMILY.model_type, cfg, opts)
}
