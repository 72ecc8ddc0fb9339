//! Qwen 3 (dense): an RMSNorm of each query and key head, no biases unless `attention_bias`.

use super::qwen2::upper_windows;
use crate::import::blocks::decoder::{Decoder, Defaults};
use crate::import::{HfConfig, ImportError, ImportOptions, Model};

pub(crate) fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    let defaults = Defaults {
        head_dim: Some(128),
        ..Defaults::PLAIN
    };
    let mut d = Decoder::read(cfg, opts, &defaults)?;
    d.read_attention_bias(cfg)?;
    d.attention.head_norm = Some(d.norm);
    d.windows = upper_windows(cfg, d.layers())?;
    d.build("qwen3", cfg, opts)
}
