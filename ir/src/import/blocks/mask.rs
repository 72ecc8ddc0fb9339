//! Additive causal masks.

use super::embed::positions;
use crate::import::builder::{Builder, Built, seq};
use crate::ops::Where;
use crate::{BinaryFn, DType, Dim, NodeId};

/// The most negative finite value of an element type, `torch.finfo(dtype).min`.
pub(crate) fn finfo_min(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => f64::from(half::f16::MIN),
        DType::BF16 => f64::from(half::bf16::MIN),
        _ => f64::from(f32::MIN),
    }
}

/// `[1,1,S,S]`: 0 where key j is visible to query i (`j <= i`, and `j > i - window` if there is
/// one), the most negative finite value elsewhere.
pub(crate) fn causal_mask(b: &mut Builder, window: Option<u32>) -> Built {
    let one = Dim::new(1);
    b.within("causal_mask", |b| {
        let keys = positions(b, &[one, seq()])?;
        let queries = positions(b, &[seq(), one])?;
        let mut allowed = b.binary(BinaryFn::Le, keys, queries)?;
        if let Some(w) = window {
            let oldest = b.scalar(BinaryFn::Sub, queries, f64::from(w))?;
            let recent = b.binary(BinaryFn::Gt, keys, oldest)?;
            allowed = b.binary(BinaryFn::And, allowed, recent)?;
        }
        let dtype = b.dtype;
        let shown = b.konst(0.0, dtype)?;
        let hidden = b.konst(finfo_min(dtype), dtype)?;
        let mask = b.add(Where, &[allowed, shown, hidden])?;
        b.reshape(mask, &[one, one, seq(), seq()])
    })
}

/// The masks of all layers, each kind computed once: `windows[i]` is layer i's window.
pub(crate) fn layer_masks(
    b: &mut Builder,
    windows: &[Option<u32>],
) -> Result<Vec<NodeId>, crate::import::ImportError> {
    let mut made: Vec<(Option<u32>, NodeId)> = Vec::new();
    let mut masks = Vec::with_capacity(windows.len());
    for &w in windows {
        let mask = match made.iter().find(|(k, _)| *k == w) {
            Some(&(_, mask)) => mask,
            None => {
                let mask = causal_mask(b, w)?;
                made.push((w, mask));
                mask
            }
        };
        masks.push(mask);
    }
    Ok(masks)
}
