//! Reference logits and tokens of a model, as `verify` compares with them.
//!
//! A reference decides whether a model is right, so one that could let anything pass is refused: numbers that are
//! not finite, logits that are all zero, a bf16 run that is far from what rounding does.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::path::Path;

use lathe_ir::foreign::{self, Kind};
use lathe_ir::relative_error;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// Largest relative error that a comparison may allow. Rounding to bf16 costs the references of all families less
/// than a third of it; an output of zeros is ten times as far off.
pub const MOST_ERROR: f64 = 0.1;

/// A reference file. `B` sequences of `T` tokens, a vocabulary of `V`.
#[derive(Debug)]
pub struct Golden {
    /// Tokens, `[B, T]`.
    pub input_ids: Vec<u32>,
    /// `B`.
    pub batch: usize,
    /// `T`.
    pub len: usize,
    /// Logits in float32, `[B, T, V]`; all finite, not all zero.
    pub logits: Vec<f32>,
    /// `V`.
    pub vocab: usize,
    /// Relative error of the reference's own run in bf16, if it has one; at most [`MOST_ERROR`].
    pub bf16_error: Option<f64>,
    /// The inputs with the tokens that follow them greedily, and their number `N` for each sequence: `[B, N]`,
    /// `N > T`.
    pub generated: Option<(Vec<u32>, usize)>,
}

/// A reference that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {reason}")]
pub struct GoldenError {
    file: String,
    reason: String,
}

impl Golden {
    /// Reads a reference.
    ///
    /// # Errors
    /// It cannot be read, is no safetensors file, or its tensors are absent, do not fit each other, or have values
    /// that nothing can be compared with.
    pub fn read(path: &Path) -> Result<Golden, GoldenError> {
        let file = path.display().to_string();
        match foreign::read(path, Kind::Golden) {
            Ok(bytes) => Golden::parse(&file, &bytes),
            Err(error) => {
                let reason = error.to_string();
                Err(GoldenError { file, reason })
            }
        }
    }

    /// Reads the bytes of a reference; `file` names it in errors.
    ///
    /// # Errors
    /// As [`Golden::read`], but for reading.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Golden, GoldenError> {
        parse(bytes).map_err(|reason| GoldenError {
            file: file.to_owned(),
            reason,
        })
    }
}

fn parse(bytes: &[u8]) -> Result<Golden, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let tensor = |name: &str| {
        let found = file.tensor(name);
        found.map_err(|error| format!("tensor {name}: {error}"))
    };
    let (ids, logits) = (tensor("input_ids")?, tensor("logits")?);
    let (&[batch, len], &[b2, l2, vocab]) = (ids.shape(), logits.shape()) else {
        return Err(format!(
            "input_ids are {:?} and logits {:?}, expected [B,T] and [B,T,V]",
            ids.shape(),
            logits.shape()
        ));
    };
    if (batch, len) != (b2, l2) || logits.data().is_empty() {
        return Err(format!(
            "input_ids {:?} and logits {:?} do not fit",
            ids.shape(),
            logits.shape()
        ));
    }
    let input_ids = tokens("input_ids", &ids)?;
    let values = floats("logits", &logits)?;
    if values.iter().all(|&x| x == 0.0) {
        return Err("logits are all zero, nothing can be compared with them".into());
    }
    let bf16_error = match file.tensor("logits_bf16") {
        Ok(view) if view.shape() != logits.shape() => {
            return Err(format!(
                "logits_bf16 are {:?}, expected {:?} as logits",
                view.shape(),
                logits.shape()
            ));
        }
        Ok(view) => Some(relative_error(&floats("logits_bf16", &view)?, &values)),
        Err(_) => None,
    };
    let is_near = |&error: &f64| error <= MOST_ERROR;
    if let Some(error) = bf16_error.filter(|error| !is_near(error)) {
        return Err(format!(
            "logits_bf16 are {error:.3e} away from logits, rounding alone stays below {MOST_ERROR}"
        ));
    }
    let generated = match file.tensor("generated") {
        Ok(view) => Some(continued(&view, &input_ids, batch, len)?),
        Err(_) => None,
    };
    Ok(Golden {
        input_ids,
        batch,
        len,
        logits: values,
        vocab,
        bf16_error,
        generated,
    })
}

/// The tokens of `generated`, which begin with the inputs, and how many a sequence has.
fn continued(
    view: &TensorView<'_>,
    input_ids: &[u32],
    batch: usize,
    len: usize,
) -> Result<(Vec<u32>, usize), String> {
    let &[b, n] = view.shape() else {
        return Err(format!("generated is {:?}, expected [B,T+N]", view.shape()));
    };
    if b != batch || n <= len {
        return Err(format!(
            "generated is [{b}, {n}], expected {batch} sequences of more than {len} tokens"
        ));
    }
    let tokens = tokens("generated", view)?;
    let mut pairs = tokens.chunks(n).zip(input_ids.chunks(len));
    if !pairs.all(|(all, inputs)| all.starts_with(inputs)) {
        return Err("generated does not begin with input_ids".into());
    }
    Ok((tokens, n))
}

/// Token ids.
fn tokens(name: &str, view: &TensorView<'_>) -> Result<Vec<u32>, String> {
    if view.dtype() != Dtype::I64 {
        return Err(format!("{name} are {:?}, expected I64", view.dtype()));
    }
    let (ids, _) = view.data().as_chunks::<8>();
    ids.iter()
        .map(|&bytes| {
            let id = i64::from_le_bytes(bytes);
            u32::try_from(id).map_err(|_| format!("{name} has {id}, which is no token id"))
        })
        .collect()
}

/// Finite numbers.
fn floats(name: &str, view: &TensorView<'_>) -> Result<Vec<f32>, String> {
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => {
            let (values, _) = view.data().as_chunks::<4>();
            values.iter().map(|&x| f32::from_le_bytes(x)).collect()
        }
        Dtype::BF16 => {
            let (values, _) = view.data().as_chunks::<2>();
            let value = |&x| half::bf16::from_le_bytes(x).to_f32();
            values.iter().map(value).collect()
        }
        other => return Err(format!("{name} are {other:?}, expected F32 or BF16")),
    };
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(format!(
            "{name} have {} at index {at}, expected finite numbers",
            values.get(at).copied().unwrap_or_default()
        )),
        None => Ok(values),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reference of one sequence of two tokens, three logits each, with something changed.
    fn parsed(change: impl FnOnce(&mut [Vec<f32>; 2], &mut Vec<i64>)) -> Result<Golden, String> {
        let mut logits = [vec![1.0, -2.0, 3.0, 4.0, 5.0, 6.0], vec![]];
        logits[1] = logits[0].iter().map(|x| x * 1.01).collect();
        let mut generated = vec![1, 2, 0];
        change(&mut logits, &mut generated);
        let ids: Vec<u8> = [1i64, 2].iter().flat_map(|x| x.to_le_bytes()).collect();
        let floats = logits.map(|v| {
            let bytes = v.iter().flat_map(|x| x.to_le_bytes());
            (v.len(), bytes.collect::<Vec<u8>>())
        });
        let all: Vec<u8> = generated.iter().flat_map(|x| x.to_le_bytes()).collect();
        let view = |dtype, shape: &[usize], data| TensorView::new(dtype, shape.to_vec(), data);
        let tensors = [
            ("input_ids", view(Dtype::I64, &[1, 2], &ids).unwrap()),
            (
                "logits",
                view(Dtype::F32, &[1, 2, 3], &floats[0].1).unwrap(),
            ),
            (
                "logits_bf16",
                view(Dtype::F32, &[1, 2, floats[1].0 / 2], &floats[1].1).unwrap(),
            ),
            (
                "generated",
                view(Dtype::I64, &[1, generated.len()], &all).unwrap(),
            ),
        ];
        let bytes = safetensors::serialize(tensors, None).unwrap();
        Golden::parse("g", &bytes).map_err(|error| error.to_string())
    }

    #[test]
    fn an_intact_reference() {
        let golden = parsed(|_, _| {}).unwrap();
        assert_eq!((golden.batch, golden.len, golden.vocab), (1, 2, 3));
        assert!((golden.bf16_error.unwrap() - 0.01).abs() < 1e-6);
        assert_eq!(golden.generated, Some((vec![1, 2, 0], 3)));
    }

    /// Nothing that a reference says makes the comparison an empty one.
    #[test]
    fn references_that_let_anything_pass_are_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for which in [0, 1] {
                let error = parsed(|logits, _| logits[which][4] = bad).unwrap_err();
                let name = ["logits", "logits_bf16"][which];
                let expected = format!("g: {name} have {bad} at index 4, expected finite numbers");
                assert_eq!(error, expected);
            }
        }
        let error = parsed(|logits, _| logits[0].fill(0.0)).unwrap_err();
        assert!(error.starts_with("g: logits are all zero"), "{error}");
        let error = parsed(|logits, _| logits[1][0] = 40.0).unwrap_err();
        assert!(
            error.contains("away from logits, rounding alone"),
            "{error}"
        );
        let error = parsed(|logits, _| logits[1].truncate(2)).unwrap_err();
        assert!(
            error.contains("logits_bf16 are [1, 2, 1], expected"),
            "{error}"
        );
        let error = parsed(|_, tokens| tokens[1] = 7).unwrap_err();
        assert_eq!(error, "g: generated does not begin with input_ids");
        let error = parsed(|_, tokens| tokens[2] = -1).unwrap_err();
        assert_eq!(error, "g: generated has -1, which is no token id");
        let error = parsed(|_, tokens| tokens.truncate(2)).unwrap_err();
        assert!(error.contains("more than 2 tokens"), "{error}");
    }
}
