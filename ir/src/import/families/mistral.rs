//! Mistral 7B and models saved under its name: Llama with one attention window for all layers.

use crate::import::blocks::decoder::{Decoder, Defaults, windows_by_type};
use crate::import::{HfConfig, ImportError, ImportOptions, Model};

/// The window of `MistralConfig` where the key is absent; `null` means none.
const DEFAULT_WINDOW: u32 = 4096;

pub(crate) fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    let mut d = Decoder::read(
        cfg,
        opts,
        &Defaults {
            kv_heads_optional: false,
            head_dim: None,
        },
    )?;
    let window = match cfg.opt_size("sliding_window")? {
        None if !cfg.is_written("sliding_window") => Some(DEFAULT_WINDOW),
        w => w,
    };
    let by_type = windows_by_type(cfg, d.windows.len(), window, |_| true)?;
    d.windows = vec![window; by_type.len()];
    if by_type != d.windows {
        return Err(cfg.unsupported(
            "layer_types",
            "the same type for all layers: sliding_attention with a sliding_window, \
             full_attention without",
        ));
    }
    d.build("mistral", cfg, opts)
}
