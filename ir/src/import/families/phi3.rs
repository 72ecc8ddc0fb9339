//! Phi-3 and Phi-4: Llama with q, k, v in one tensor and gate, up in another, and possibly only
//! part of each head rotated.

use super::mistral::uniform_windows;
use crate::import::blocks::attention::Qkv;
use crate::import::blocks::decoder::{Decoder, Defaults};
use crate::import::blocks::mlp::Mlp;
use crate::import::blocks::rope::RopeDefaults;
use crate::import::{Family, HfConfig, ImportError, ImportOptions, Model, Sample};

pub(super) const FAMILY: Family = Family {
    model_type: "phi3",
    architecture: "Phi3ForCausalLM",
    import,
    samples: &[Sample {
        name: "phi3",
        config: r#"{
                "model_type": "phi3", "hidden_size": 384, "intermediate_size": 384,
                "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
                "vocab_size": 1000, "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
                "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": false,
                "original_max_position_embeddings": 1024
            }"#,
    }],
};

fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    let defaults = Defaults {
        kv_heads_optional: true,
        rope: (
            "rope_parameters",
            RopeDefaults {
                theta: 10_000.0,
                partial: Some(1.0),
            },
        ),
        ..Defaults::PLAIN
    };
    let mut d = Decoder::read(cfg, opts, &defaults)?;
    if cfg.get("rms_norm_eps").is_none() {
        d.norm.eps = 1e-5;
    }
    d.attention.qkv = Qkv::Fused;
    d.mlp = Mlp::Fused;
    d.windows = uniform_windows(cfg, d.layers(), cfg.opt_size("sliding_window")?)?;
    d.build(FAMILY.model_type, cfg, opts)
}
