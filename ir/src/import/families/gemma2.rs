//! Gemma 2: Gemma with norms after attention and MLP, capped scores and logits, and a window in
//! every other layer.

use super::gemma::{DEFAULTS, read};
use crate::import::blocks::decoder::{Decoder, windows_by_type};
use crate::import::{HfConfig, ImportError, ImportOptions, Model};

pub(crate) fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    let mut d = read(cfg, opts, &DEFAULTS)?;
    d.post_norms = true;
    read_scaling(cfg, &mut d)?;
    let cap = |key: &str, default| {
        let cap = cfg.opt_positive(key)?;
        Ok::<_, ImportError>(cfg.nullable(key, cap, default))
    };
    d.attention.softcap = cap("attn_logit_softcapping", 50.0)?;
    d.logit_cap = cap("final_logit_softcapping", 30.0)?;
    let window = cfg.opt_size("sliding_window")?.or(Some(4096));
    d.windows = windows_by_type(cfg, d.layers(), window, |i| i % 2 == 0)?;
    d.build("gemma2", cfg, opts)
}

/// `query_pre_attn_scalar` takes the place of the head's width in the scale of the scores.
pub(super) fn read_scaling(cfg: &HfConfig, d: &mut Decoder) -> Result<(), ImportError> {
    let scalar = cfg.opt_positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    d.attention.scaling = scalar.powf(-0.5);
    Ok(())
}
