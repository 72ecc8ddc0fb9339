use std::collections::BTreeMap;

use lathe_codegen::pack::{RowPerm, Segment};
use proptest::prelude::*;

use super::*;
use crate::weights::RandomWeights;
use crate::weights::stored::tests::Flaky;

/// Tensors in memory.
struct Memory(BTreeMap<String, (TensorInfo, Flaky)>);

impl WeightSource for Memory {
    fn describe(&self) -> String {
        "memory".into()
    }
    fn names(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.0.get(name).map(|t| &t.0)
    }
    fn data(&self, name: &str) -> Option<TensorData<'_>> {
        self.0
            .get(name)
            .map(|t| TensorData::Stored { file: &t.1, at: 0 })
    }
}

/// A value that tells tensor, row and column and that f16 and bf16 hold exactly.
fn marker(tensor: usize, r: usize, c: usize) -> f32 {
    let v = ((tensor * 61 + r * 7 + c) % 251) as f32;
    if (r + c).is_multiple_of(2) { v } else { -v }
}

fn tensor(id: usize, rows: usize, cols: usize, dtype: Dtype) -> (TensorInfo, Flaky) {
    let values = (0..rows * cols).map(|i| marker(id, i / cols, i % cols));
    let bytes = match dtype {
        Dtype::F32 => values.flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::BF16 => values
            .flat_map(|v| bf16::from_f32(v).to_le_bytes())
            .collect(),
        _ => values
            .flat_map(|v| f16::from_f32(v).to_le_bytes())
            .collect(),
    };
    (
        TensorInfo {
            dtype,
            shape: vec![rows, cols],
        },
        Flaky::new(bytes, usize::MAX, None),
    )
}

fn read(bytes: &[u8], dtype: PackDType) -> Vec<f32> {
    match dtype {
        PackDType::F32 => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect(),
        PackDType::Bf16 => bytes
            .chunks_exact(2)
            .map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
            .collect(),
        PackDType::F16 => bytes
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f32())
            .collect(),
    }
}

const STORED: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];
const PACKED: [PackDType; 3] = [PackDType::F32, PackDType::Bf16, PackDType::F16];

proptest! {
    /// A tensor-parallel shard of a QKV with v stored transposed, filled in pieces of any size, holds each source
    /// element where the recipe says.
    #[test]
    fn packed_rows_are_the_source_rows(
        heads in 1usize..4, d16 in 1usize..4, cols in 1usize..40, skip in 0usize..5, piece in 1usize..70,
        stored in 0usize..3, packed in 0usize..3,
    ) {
        let (d, full) = (16 * d16, cols + skip + 2);
        let n = heads * d;
        let source = Memory(BTreeMap::from([
            ("q".into(), tensor(0, 2 * n, full, STORED[stored])),
            ("v".into(), {
                let (info, bytes) = tensor(1, full, n, STORED[stored]);
                (info, bytes)
            }),
        ]));
        let dtype = PACKED[packed];
        let recipe = PackRecipe {
            rows: 2 * n,
            cols,
            dtype,
            segments: vec![
                Segment { src_rows: n..2 * n, src_cols: skip..skip + cols, ..Segment::whole("q", 0, 0, 0) }
                    .with_perm(RowPerm::RopeHalves { head_dim: d }),
                Segment { src_cols: skip..skip + cols, transpose: true, ..Segment::whole("v", n, 0, n) },
            ],
        };
        let packer = Packer::new(&recipe, &source).unwrap();
        let mut out = Vec::new();
        for first in (0..recipe.rows).step_by(piece) {
            let rows = first..(first + piece).min(recipe.rows);
            let mut bytes = vec![0xAA; rows.len() * recipe.row_bytes()];
            packer.fill(rows, &mut bytes).unwrap();
            out.extend(read(&bytes, dtype));
        }
        for r in 0..n {
            for c in 0..cols {
                let q = out[recipe.dst_row_of(0, n + r) * cols + c];
                let v = out[recipe.dst_row_of(1, r) * cols + c];
                prop_assert_eq!(q, marker(0, n + r, skip + c));
                prop_assert_eq!(v, marker(1, skip + c, r));
            }
        }
    }

    /// Random weights are the same elements in every layout and piece.
    #[test]
    fn random_weights_do_not_depend_on_the_layout(i8 in 1usize..9, k in 1usize..50) {
        let n = 8 * i8;
        let names = [("gate".to_owned(), vec![n, k]), ("up".to_owned(), vec![n, k])];
        let source = RandomWeights::new(&names, 3);
        let part = |name, part| Segment::whole(name, n, k, 0).with_perm(RowPerm::Interleave8 { part });
        let packed = PackRecipe { rows: 2 * n, cols: k, dtype: PackDType::F32, segments: vec![part("gate", 0), part("up", 1)] };
        let values = pack_f32(&packed, &source).unwrap();
        for (s, name) in ["gate", "up"].into_iter().enumerate() {
            let alone = pack_f32(&PackRecipe::identity(name, n, k, PackDType::F32), &source).unwrap();
            let half = pack_bf16(&PackRecipe::identity(name, n, k, PackDType::Bf16), &source).unwrap();
            for r in 0..n {
                let dst = packed.dst_row_of(s, r);
                prop_assert_eq!(&alone[r * k..(r + 1) * k], &values[dst * k..(dst + 1) * k]);
                prop_assert!((0..k).all(|c| half[r * k + c].to_f32() == alone[r * k + c]));
            }
        }
    }
}

/// Whichever read fails: the error names tensor and reason. Short reads and interruptions change nothing.
#[test]
fn a_disk_that_fails_at_any_call() {
    let (rows, cols) = (6, 40);
    for transpose in [false, true] {
        for dtype in [PackDType::F32, PackDType::Bf16] {
            let segment = Segment {
                transpose,
                ..Segment::whole("w", rows, cols, 0)
            };
            let recipe = PackRecipe {
                rows,
                cols,
                dtype,
                segments: vec![segment],
            };
            let pack = |most, fails_at| {
                let (stored_rows, stored_cols) = if transpose {
                    (cols, rows)
                } else {
                    (rows, cols)
                };
                let (info, Flaky { bytes, .. }) = tensor(0, stored_rows, stored_cols, Dtype::F32);
                let file = Flaky::new(bytes, most, fails_at);
                let source = Memory(BTreeMap::from([("w".into(), (info, file))]));
                let mut out = vec![0; rows * recipe.row_bytes()];
                Packer::new(&recipe, &source)?.fill_serial(0..rows, &mut out)?;
                Ok::<_, WeightsError>(out)
            };
            let whole = pack(usize::MAX, None).unwrap();
            let mut n_failed = 0;
            loop {
                // At most 96 bytes a call: ten calls, and interruptions between them.
                match pack(96, Some(n_failed + 1)) {
                    Ok(out) => break assert_eq!(out, whole),
                    Err(error) => assert_eq!(
                        error.to_string(),
                        "memory: cannot pack w: its file cannot be read: the disk is gone"
                    ),
                }
                n_failed += 1;
            }
            assert!(n_failed >= 10, "{n_failed} calls");
        }
    }
}

#[test]
fn rounding_is_to_nearest_even() {
    let values = [
        1.0f32 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
        f32::INFINITY,
        f32::NAN,
    ];
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let bytes = Flaky::new(bytes, 3, None);
    let info = TensorInfo {
        dtype: Dtype::F32,
        shape: vec![4],
    };
    let source = Memory(BTreeMap::from([("w".into(), (info, bytes))]));
    let packed = pack_bf16(&PackRecipe::identity("w", 4, 1, PackDType::Bf16), &source).unwrap();
    assert_eq!(
        packed[..3],
        [1.0, 1.0 + 4.0 / 256.0, f32::INFINITY].map(bf16::from_f32)
    );
    assert!(packed[3].is_nan());
}

#[test]
fn misfits_are_named() {
    let source = Memory(BTreeMap::from([
        ("w".into(), tensor(0, 4, 6, Dtype::F32)),
        (
            "i".into(),
            (
                TensorInfo {
                    dtype: Dtype::I8,
                    shape: vec![4, 6],
                },
                Flaky::new(vec![0; 24], 3, None),
            ),
        ),
    ]));
    let message = |name: &str, rows, cols| {
        let recipe = PackRecipe::identity(name, rows, cols, PackDType::F32);
        Packer::new(&recipe, &source)
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default()
    };
    assert_eq!(
        message("x", 4, 6),
        "memory: cannot pack x: there is no such tensor"
    );
    assert_eq!(
        message("w", 5, 6),
        "memory: cannot pack w: rows 0..5 and columns 0..6 are asked for, it has [4, 6]"
    );
    assert_eq!(
        message("i", 4, 6),
        "memory: cannot pack i: it is I8, expected BF16, F16 or F32"
    );
    assert_eq!(message("w", 4, 6), "");
}
