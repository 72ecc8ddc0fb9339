//! Phi-3 and Phi-4: Llama with q, k, v in one tensor and gate, up in another, and possibly only
//! part of each head rotated.

use super::mistral::uniform_windows;
use crate::import::blocks::decoder::{Decoder, Defaults};
use crate::import::blocks::rope::RopeDefaults;
use crate::import::{HfConfig, ImportError, ImportOptions, Model};

pub(crate) fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
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
    d.attention.fused = true;
    d.mlp_fused = true;
    d.windows = uniform_windows(cfg, d.layers(), cfg.opt_size("sliding_window")?)?;
    d.build("phi3", cfg, opts)
}
