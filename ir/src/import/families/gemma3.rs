//! Gemma 3 (text): Gemma 2 with head norms instead of caps, and rotary frequencies of their own
//! in layers with a window.

use super::gemma::{DEFAULTS, read};
use super::gemma2::read_scaling;
use crate::import::blocks::decoder::{Defaults, windows_by_type};
use crate::import::blocks::rope::{RopeDefaults, RopeTable};
use crate::import::{HfConfig, ImportError, ImportOptions, Model};

const FULL: RopeDefaults = RopeDefaults {
    theta: 1_000_000.0,
    partial: None,
};

pub(crate) fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
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
    d.post_norms = true;
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
    d.build("gemma3_text", cfg, opts)
}
