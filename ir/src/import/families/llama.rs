//! Llama 1 to 3.2 and models saved under its name (SmolLM2, TinyLlama, Yi, …).

use crate::import::blocks::decoder::{Decoder, Defaults, windows_by_type};
use crate::import::{HfConfig, ImportError, ImportOptions, Model};

pub(crate) fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    // Slices of the projections, summed separately: other rounding, no known checkpoint left.
    cfg.only("pretraining_tp", &1.into())?;
    let defaults = Defaults {
        kv_heads_optional: true,
        ..Defaults::PLAIN
    };
    let mut d = Decoder::read(cfg, opts, &defaults)?;
    d.read_attention_bias(cfg)?;
    d.mlp_bias = cfg.bool_or("mlp_bias", false)?;
    d.windows = windows_by_type(cfg, d.layers(), None, |_| false)?;
    d.build("llama", cfg, opts)
}
