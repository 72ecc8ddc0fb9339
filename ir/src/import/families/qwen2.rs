//! Qwen 2 and 2.5: Llama with biases on q, k and v, and windows in the upper layers.

use crate::import::blocks::decoder::{Decoder, Defaults, windows_by_type};
use crate::import::{Family, HfConfig, ImportError, ImportOptions, Model, Sample};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    import,
    samples: &[Sample {
        name: "qwen2",
        config: r#"{
                "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 384,
                "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2,
                "vocab_size": 1000, "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
                "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": false,
                "use_sliding_window": false
            }"#,
    }],
};

fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    let mut d = Decoder::read(cfg, opts, &Defaults::PLAIN)?;
    d.attention.qkv_bias = true;
    d.windows = upper_windows(cfg, d.layers())?;
    d.build(FAMILY.model_type, cfg, opts)
}

/// `use_sliding_window` turns the window on, in the layers from `max_window_layers` upwards
/// unless `layer_types` names them.
pub(super) fn upper_windows(
    cfg: &HfConfig,
    layers: usize,
) -> Result<Vec<Option<u32>>, ImportError> {
    let window = if !cfg.bool_or("use_sliding_window", false)? {
        None
    } else if cfg.is_written("sliding_window") {
        cfg.opt_size("sliding_window")?
    } else {
        return Err(cfg.missing("sliding_window", "a positive integer or null"));
    };
    let first = match (window, cfg.opt_u32("max_window_layers")?) {
        (_, Some(n)) => n as usize,
        (None, None) => layers,
        (Some(_), None) if cfg.get("layer_types").is_some() => layers,
        (Some(_), None) => {
            return Err(cfg.missing("max_window_layers", "a non-negative integer"));
        }
    };
    windows_by_type(cfg, layers, window, |i| i >= first)
}
