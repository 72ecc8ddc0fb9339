//! Mistral 7B and models saved under its name: Llama with one attention window for all layers.

use crate::import::blocks::decoder::{Decoder, Defaults, windows_by_type};
use crate::import::{HfConfig, ImportError, ImportOptions, Model};

pub(crate) fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    let mut d = Decoder::read(cfg, opts, &Defaults::PLAIN)?;
    let window = cfg.nullable("sliding_window", cfg.opt_size("sliding_window")?, 4096);
    d.windows = uniform_windows(cfg, d.layers(), window)?;
    d.build("mistral", cfg, opts)
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
