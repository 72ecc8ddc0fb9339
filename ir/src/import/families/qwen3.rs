//! Qwen 3 (dense): an RMSNorm of each query and key head, no biases unless `attention_bias`.

use super::qwen2::upper_windows;
use crate::import::blocks::decoder::{Decoder, Defaults};
use crate::import::{HfConfig, ImportError, ImportOptions, Model};

pub(crate) fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    let mut d = Decoder::read(
        cfg,
        opts,
        &Defaults {
            kv_heads_optional: false,
            head_dim: Some(128),
        },
    )?;
    let bias = cfg.bool_or("attention_bias", false)?;
    d.attention.qkv_bias = bias;
    d.attention.o_bias = bias;
    d.attention.head_norm = Some(d.eps);
    d.windows = upper_windows(cfg, d.windows.len())?;
    d.build("qwen3", cfg, opts)
}
