//! Qwen 3 (dense): an RMSNorm of each query and key head, no biases unless `attention_bias`.

use super::qwen2::upper_windows;
use crate::import::blocks::decoder::{Decoder, Defaults};
use crate::import::{Family, HfConfig, ImportError, ImportOptions, Model, Sample};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    import,
    samples: &[Sample {
        name: "qwen3",
        config: r#"{
                "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 384,
                "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2,
                "vocab_size": 1000, "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
                "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": false, "head_dim": 64,
                "attention_bias": false
            }"#,
    }],
};

fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    let defaults = Defaults {
        head_dim: Some(128),
        ..Defaults::PLAIN
    };
    let mut d = Decoder::read(cfg, opts, &defaults)?;
    d.read_attention_bias(cfg)?;
    d.attention.head_norm = Some(d.norm);
    d.windows = upper_windows(cfg, d.layers())?;
    d.build(FAMILY.model_type, cfg, opts)
}
