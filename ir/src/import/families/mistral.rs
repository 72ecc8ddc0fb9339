//! Mistral 7B and models saved under its name: Llama with one attention window for all layers.

use crate::import::blocks::decoder::{Decoder, Defaults, windows_by_type};
use crate::import::{Family, HfConfig, ImportError, ImportOptions, Model, Sample};

pub(super) const FAMILY: Family = Family {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    import,
    samples: &[Sample {
        name: "mistral-window",
        config: r#"{
                "model_type": "mistral", "hidden_size": 256, "intermediate_size": 384,
                "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2,
                "vocab_size": 1000, "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
                "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": false,
                "sliding_window": 40
            }"#,
    }],
};

fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    let mut d = Decoder::read(cfg, opts, &Defaults::PLAIN)?;
    let window = cfg.nullable("sliding_window", cfg.opt_size("sliding_window")?, 4096);
    d.windows = uniform_windows(cfg, d.layers(), window)?;
    d.build(FAMILY.model_type, cfg, opts)
}

/// The same window for all layers; `layer_types` may only repeat it.
pub(super) fn uniform_windows(
    cfg: &HfConfig,
    layers: usize,
    window: Option<u32>,
) -> Result<Vec<Option<u32>>, ImportError> {
    let by_type = windows_by_type(cfg, layers, window, |_| true)?;
    if by_type.iter().all(|w| *w == window) {
        Ok(by_type)
    } else {
        Err(cfg.unsupported(
            "layer_types",
            "the same type for all layers: sliding_attention with a sliding_window, \
             full_attention without",
        ))
    }
}
