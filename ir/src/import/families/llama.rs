//! Llama 1 to 3.2 and models saved under its name (SmolLM2, TinyLlama, Yi, …).

use crate::import::blocks::decoder::{Decoder, Defaults, windows_by_type};
use crate::import::blocks::mlp::Mlp;
use crate::import::{Family, HfConfig, ImportError, ImportOptions, Model, Sample};

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    import,
    samples: &[
        // 1003 logits are no multiple of 8: the plain GEMM's.
        Sample {
            name: "llama-d64",
            config: r#"{
                "model_type": "llama", "hidden_size": 512, "intermediate_size": 768,
                "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2,
                "vocab_size": 1003, "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
                "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": true, "head_dim": 64,
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 128
                }
            }"#,
        },
        Sample {
            name: "llama-d128",
            config: r#"{
                "model_type": "llama", "hidden_size": 512, "intermediate_size": 776,
                "num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 2,
                "vocab_size": 1024, "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
                "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": false, "head_dim": 128
            }"#,
        },
        Sample {
            name: "llama-mha-bias",
            config: r#"{
                "model_type": "llama", "hidden_size": 128, "intermediate_size": 384,
                "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2,
                "vocab_size": 1000, "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
                "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": false,
                "attention_bias": true, "mlp_bias": true
            }"#,
        },
    ],
};

fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    // Slices of the projections, summed separately: other rounding, no known checkpoint left.
    cfg.only("pretraining_tp", &1.into())?;
    let defaults = Defaults {
        kv_heads_optional: true,
        ..Defaults::PLAIN
    };
    let mut d = Decoder::read(cfg, opts, &defaults)?;
    d.read_attention_bias(cfg)?;
    d.mlp = Mlp::Gated {
        bias: cfg.bool_or("mlp_bias", false)?,
    };
    d.windows = windows_by_type(cfg, d.layers(), None, |_| false)?;
    d.build(FAMILY.model_type, cfg, opts)
}
