//! Whether a source holds the tensors that a model expects.

use std::collections::BTreeSet;

use safetensors::Dtype;

use super::{Misshaped, WeightSource, WeightsError, WrongDtype};

/// What [`check`] let pass.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Checked {
    /// Tensors that the model does not read and whose presence means nothing: buffers that older versions of
    /// transformers saved (rotary frequencies, causal masks) and the copy of a tied `lm_head.weight`.
    pub ignored: Vec<String>,
    /// Tensors of layers that the model was asked to do without.
    pub cut: Vec<String>,
}

/// Compares a source with the expected names and shapes. Any float type of 16 or 32 bits is a good dtype.
/// Tensors of layers from number `cut_at` on are let pass: the model was asked to end there.
///
/// # Errors
/// [`WeightsError::Mismatch`] with every missing, unexpected, mis-shaped and wrongly typed tensor at once.
pub fn check(
    source: &dyn WeightSource,
    expected: &[(String, Vec<usize>)],
    cut_at: Option<u32>,
) -> Result<Checked, WeightsError> {
    let names: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    let (mut missing, mut misshaped, mut wrong_dtype) = (Vec::new(), Vec::new(), Vec::new());
    for (name, shape) in expected {
        let Some(info) = source.info(name) else {
            missing.push(name.clone());
            continue;
        };
        if &info.shape != shape {
            misshaped.push(Misshaped {
                name: name.clone(),
                found: info.shape.clone(),
                expected: shape.clone(),
            });
        }
        if !matches!(info.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            wrong_dtype.push(WrongDtype {
                name: name.clone(),
                found: info.dtype,
            });
        }
    }
    let extra = source
        .names()
        .into_iter()
        .filter(|name| !names.contains(name))
        .map(str::to_owned);
    let (ignored, extra): (Vec<String>, Vec<String>) = extra.partition(|name| is_ignorable(name));
    let is_cut = |name: &String| cut_at.is_some_and(|n| is_beyond(name, n, &names));
    let (cut, unexpected): (Vec<String>, Vec<String>) = extra.into_iter().partition(is_cut);
    if missing.is_empty() && unexpected.is_empty() && misshaped.is_empty() && wrong_dtype.is_empty()
    {
        return Ok(Checked { ignored, cut });
    }
    Err(WeightsError::Mismatch {
        origin: source.describe(),
        missing,
        unexpected,
        misshaped,
        wrong_dtype,
    })
}

/// Whether a tensor is that of a layer from number `layers` on, which the first layer has, too.
fn is_beyond(name: &str, layers: u32, expected: &BTreeSet<&str>) -> bool {
    let parts: Vec<&str> = name.split('.').collect();
    (0..parts.len()).any(|i| {
        let number = parts[i].parse::<u32>();
        let first = [&parts[..i], &["0"], &parts[i + 1..]].concat().join(".");
        number.is_ok_and(|n| n >= layers) && expected.contains(first.as_str())
    })
}

fn is_ignorable(name: &str) -> bool {
    const BUFFERS: [&str; 4] = [
        ".rotary_emb.inv_freq",
        ".attn.bias",
        ".attention.bias",
        ".masked_bias",
    ];
    BUFFERS.iter().any(|suffix| name.ends_with(suffix))
        || matches!(name, "lm_head.weight" | "embed_out.weight")
}
