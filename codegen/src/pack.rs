//! Recipes that turn a checkpoint's tensors into the packed weights of a plan.
//!
//! A recipe says for every row of one packed `[rows, cols]` weight which row of which checkpoint tensor it
//! holds. It is the only mechanism for QKV and gate|up packing, tensor-parallel shards, replication of KV
//! heads, stacking of experts, transposed (`Conv1D`) weights and already fused checkpoints. Recipes hold names
//! and ranges, never values: `lathe-runtime` executes them while it reads the files.
//!
//! A checkpoint tensor is seen as a matrix, its *view*: the last dimension gives the columns and all others
//! together the rows; a 1-D tensor of N values is `[N, 1]`, a scalar `[1, 1]`; with [`Segment::transpose`] a
//! 2-D tensor's rows and columns change places first. All ranges of a segment are in the view's coordinates.

mod cover;

use std::fmt;
use std::ops::Range;

use cover::{Fault, fault};
use lathe_ir::DType;
use serde::{Deserialize, Serialize};

/// Rows of one partner in an interleaved block: both the RoPE halves and gate|up alternate by this many rows.
pub const INTERLEAVE: usize = 8;

/// The type in which a packed weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PackDType {
    /// IEEE single precision.
    F32,
    /// The upper half of a single.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl From<DType> for PackDType {
    fn from(dtype: DType) -> PackDType {
        match dtype {
            DType::BF16 => PackDType::Bf16,
            DType::F16 => PackDType::F16,
            _ => PackDType::F32,
        }
    }
}

impl PackDType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            PackDType::F32 => 4,
            PackDType::Bf16 | PackDType::F16 => 2,
        }
    }

    /// The number by which the kernels that work on loaded weights know it.
    pub fn code(self) -> u32 {
        match self {
            PackDType::F32 => 0,
            PackDType::Bf16 => 1,
            PackDType::F16 => 2,
        }
    }
}

impl fmt::Display for PackDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PackDType::F32 => "f32",
            PackDType::Bf16 => "bf16",
            PackDType::F16 => "f16",
        })
    }
}

/// Where the rows of a segment go, relative to its first destination row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowPerm {
    /// Row i goes to row i.
    Identity,
    /// Inside each head of `head_dim` rows the two halves alternate by 8 rows, so that the pair (i, i + D/2)
    /// of a rotate-half RoPE lies 8 rows apart: with half = D/2, row i < half goes to `16*(i/8) + i%8` and row
    /// i + half to `16*(i/8) + 8 + i%8`.
    RopeHalves {
        /// Rows of a head (D); D/2 must be a multiple of 8.
        head_dim: usize,
    },
    /// One of two equally long segments that alternate by 8 rows (gate is part 0, up is part 1): row `8b + j`
    /// goes to `16b + 8*part + j`.
    Interleave8 {
        /// 0 or 1.
        part: usize,
    },
}

impl RowPerm {
    /// The destination row of local row `i`, relative to the segment's first destination row.
    pub fn apply(self, i: usize) -> usize {
        let pair = |i: usize, part: usize| {
            2 * INTERLEAVE * (i / INTERLEAVE) + INTERLEAVE * part + i % INTERLEAVE
        };
        match self {
            RowPerm::Identity => i,
            RowPerm::RopeHalves { head_dim } => {
                let (head, r, half) = (i / head_dim, i % head_dim, head_dim / 2);
                head * head_dim
                    + if r < half {
                        pair(r, 0)
                    } else {
                        pair(r - half, 1)
                    }
            }
            RowPerm::Interleave8 { part } => pair(i, part),
        }
    }

    /// Why this permutation cannot be applied to `rows` rows, if it cannot.
    fn misfit(self, rows: usize) -> Option<String> {
        match self {
            RowPerm::Identity => None,
            RowPerm::RopeHalves { head_dim } => {
                if head_dim == 0 || !head_dim.is_multiple_of(2 * INTERLEAVE) {
                    Some(format!("head_dim {head_dim} is not a multiple of 16"))
                } else if !rows.is_multiple_of(head_dim) {
                    Some(format!("{rows} rows are not whole heads of {head_dim}"))
                } else {
                    None
                }
            }
            RowPerm::Interleave8 { part } => {
                if part > 1 {
                    Some(format!("part {part} is neither 0 nor 1"))
                } else if !rows.is_multiple_of(INTERLEAVE) {
                    Some(format!("{rows} rows are not a multiple of 8"))
                } else {
                    None
                }
            }
        }
    }
}

/// A block of a checkpoint tensor's view and where its rows go.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Segment {
    /// The tensor's name in the checkpoint.
    pub tensor: String,
    /// Rows of the view that are taken.
    pub src_rows: Range<usize>,
    /// Columns of the view that are taken; as many as the recipe has columns.
    pub src_cols: Range<usize>,
    /// First destination row.
    pub dst_row: usize,
    /// Order of the rows from there on.
    pub perm: RowPerm,
    /// The tensor is stored `[K, N]` and its view is its transpose.
    pub transpose: bool,
}

impl Segment {
    /// All rows and columns of a `[rows, cols]` tensor in their order, from destination row `dst_row` on.
    pub fn whole(tensor: impl Into<String>, rows: usize, cols: usize, dst_row: usize) -> Self {
        Segment {
            tensor: tensor.into(),
            src_rows: 0..rows,
            src_cols: 0..cols,
            dst_row,
            perm: RowPerm::Identity,
            transpose: false,
        }
    }

    /// The same segment with another order of rows.
    pub fn with_perm(mut self, perm: RowPerm) -> Self {
        self.perm = perm;
        self
    }

    /// The destination row of view row `row`, which must lie in `src_rows`.
    pub fn dst_row_of(&self, row: usize) -> usize {
        self.dst_row + self.perm.apply(row - self.src_rows.start)
    }
}

/// Where a destination row comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowSource {
    /// Index into [`PackRecipe::segments`].
    pub segment: u32,
    /// Row of the segment's view.
    pub row: u32,
}

/// One packed weight `[rows, cols]`, row-major, made of checkpoint tensors. A packed vector has one column.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PackRecipe {
    /// Rows of the packed weight (output features).
    pub rows: usize,
    /// Columns of the packed weight (input features).
    pub cols: usize,
    /// Storage type of the packed weight.
    pub dtype: PackDType,
    /// Where the rows come from; together the segments cover each destination row exactly once.
    pub segments: Vec<Segment>,
}

/// A recipe that contradicts itself; always a bug of whoever wrote it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// A segment's ranges do not fit the recipe or its permutation.
    #[error("pack recipe [{rows}, {cols}], segment {index} ({tensor}): {reason}")]
    Segment {
        /// Rows of the recipe.
        rows: usize,
        /// Columns of the recipe.
        cols: usize,
        /// Index of the segment.
        index: usize,
        /// Its tensor.
        tensor: String,
        /// What does not fit.
        reason: String,
    },
    /// A destination row is written twice.
    #[error("pack recipe [{rows}, {cols}]: row {row} is written by {first} and by {second}")]
    Overlap {
        /// Rows of the recipe.
        rows: usize,
        /// Columns of the recipe.
        cols: usize,
        /// The first such row.
        row: usize,
        /// Tensor of the earlier segment.
        first: String,
        /// Tensor of the later segment.
        second: String,
    },
    /// Destination rows are not written.
    #[error("pack recipe [{rows}, {cols}]: {count} rows are not written, the first is row {row}")]
    Uncovered {
        /// Rows of the recipe.
        rows: usize,
        /// Columns of the recipe.
        cols: usize,
        /// The first such row.
        row: usize,
        /// How many there are.
        count: usize,
    },
}

impl PackRecipe {
    /// A single tensor `[rows, cols]` as it is.
    pub fn identity(tensor: impl Into<String>, rows: usize, cols: usize, dtype: PackDType) -> Self {
        PackRecipe {
            rows,
            cols,
            dtype,
            segments: vec![Segment::whole(tensor, rows, cols, 0)],
        }
    }

    /// Bytes of the packed weight.
    pub fn bytes(&self) -> usize {
        self.rows * self.row_bytes()
    }

    /// Bytes of one packed row.
    pub fn row_bytes(&self) -> usize {
        self.cols * self.dtype.size()
    }

    /// The destination row of row `row` of the view of segment `segment`.
    pub fn dst_row_of(&self, segment: usize, row: usize) -> usize {
        self.segments[segment].dst_row_of(row)
    }

    /// Checks every segment and that each destination row is written exactly once. Takes no longer for
    /// more rows.
    pub fn validate(&self) -> Result<(), PackError> {
        let (rows, cols) = (self.rows, self.cols);
        for (index, segment) in self.segments.iter().enumerate() {
            if let Some(reason) = self.segment_misfit(segment) {
                let tensor = segment.tensor.clone();
                return Err(PackError::Segment {
                    rows,
                    cols,
                    index,
                    tensor,
                    reason,
                });
            }
        }
        match fault(rows, &self.segments) {
            None => Ok(()),
            Some(Fault::Overlap { row, first, second }) => Err(PackError::Overlap {
                rows,
                cols,
                row,
                first: self.segments[first].tensor.clone(),
                second: self.segments[second].tensor.clone(),
            }),
            Some(Fault::Uncovered { row, count }) => Err(PackError::Uncovered {
                rows,
                cols,
                row,
                count,
            }),
        }
    }

    /// The source of every destination row, in the order of the destination.
    ///
    /// # Errors
    /// Any error of [`PackRecipe::validate`].
    pub fn row_sources(&self) -> Result<Vec<RowSource>, PackError> {
        self.validate()?;
        let mut sources = vec![RowSource { segment: 0, row: 0 }; self.rows];
        for (index, segment) in self.segments.iter().enumerate() {
            for row in segment.src_rows.clone() {
                sources[segment.dst_row_of(row)] = RowSource {
                    segment: index as u32,
                    row: row as u32,
                };
            }
        }
        Ok(sources)
    }

    fn segment_misfit(&self, s: &Segment) -> Option<String> {
        if s.src_rows.start > s.src_rows.end || s.src_cols.start > s.src_cols.end {
            return Some(format!(
                "rows {:?} or columns {:?} run backwards",
                s.src_rows, s.src_cols
            ));
        }
        if s.src_cols.len() != self.cols {
            return Some(format!(
                "takes columns {:?}, the weight has {}",
                s.src_cols, self.cols
            ));
        }
        if s.src_rows.end > u32::MAX as usize || self.segments.len() >= u32::MAX as usize {
            return Some("more rows than a row index holds".into());
        }
        if let Some(reason) = s.perm.misfit(s.src_rows.len()) {
            return Some(reason);
        }
        // Each permutation reaches furthest with its last row.
        let last = s
            .src_rows
            .len()
            .checked_sub(1)
            .map(|i| s.dst_row.saturating_add(s.perm.apply(i)));
        last.filter(|&d| d >= self.rows)
            .map(|d| format!("writes row {d}, the weight has {}", self.rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn qkv(hq: usize, hkv: usize, d: usize, k: usize) -> PackRecipe {
        let rope = RowPerm::RopeHalves { head_dim: d };
        PackRecipe {
            rows: (hq + 2 * hkv) * d,
            cols: k,
            dtype: PackDType::Bf16,
            segments: vec![
                Segment::whole("q", hq * d, k, 0).with_perm(rope),
                Segment::whole("k", hkv * d, k, hq * d).with_perm(rope),
                Segment::whole("v", hkv * d, k, (hq + hkv) * d),
            ],
        }
    }

    fn gate_up(i: usize, k: usize) -> PackRecipe {
        let part = |part| RowPerm::Interleave8 { part };
        PackRecipe {
            rows: 2 * i,
            cols: k,
            dtype: PackDType::F32,
            segments: vec![
                Segment::whole("gate", i, k, 0).with_perm(part(0)),
                Segment::whole("up", i, k, 0).with_perm(part(1)),
            ],
        }
    }

    #[test]
    fn rope_partners_lie_eight_rows_apart() {
        let recipe = qkv(2, 1, 32, 4);
        // i = 8b + j of head 1 with b = 1, j = 3: local rows 16b + j and 16b + 8 + j.
        assert_eq!(recipe.dst_row_of(0, 32 + 11), 32 + 19);
        assert_eq!(recipe.dst_row_of(0, 32 + 11 + 16), 32 + 27);
        assert_eq!(recipe.dst_row_of(2, 5), 96 + 5);
    }

    #[test]
    fn gate_and_up_alternate_by_eight() {
        let recipe = gate_up(24, 4);
        assert_eq!(
            (recipe.dst_row_of(0, 17), recipe.dst_row_of(1, 17)),
            (33, 41)
        );
    }

    #[test]
    fn contradictions_are_named() {
        let mut recipe = gate_up(16, 4);
        recipe.segments[1].perm = RowPerm::Interleave8 { part: 0 };
        assert!(matches!(
            recipe.validate(),
            Err(PackError::Overlap { row: 0, .. })
        ));
        recipe.segments.pop();
        assert!(matches!(
            recipe.validate(),
            Err(PackError::Uncovered {
                row: 8,
                count: 16,
                ..
            })
        ));
        recipe.segments[0].src_cols = 0..3;
        let message = recipe.validate().unwrap_err().to_string();
        assert!(
            message.contains("segment 0 (gate): takes columns 0..3, the weight has 4"),
            "{message}"
        );
        let mut recipe = qkv(1, 1, 16, 4);
        recipe.segments[2].dst_row = 33;
        assert!(
            recipe
                .validate()
                .unwrap_err()
                .to_string()
                .contains("writes row 48, the weight has 48")
        );
        recipe.segments[0].perm = RowPerm::RopeHalves { head_dim: 24 };
        assert!(
            recipe
                .validate()
                .unwrap_err()
                .to_string()
                .contains("head_dim 24 is not a multiple of 16")
        );
    }

    proptest! {
        #[test]
        fn every_row_has_one_source(hq in 1usize..5, hkv in 1usize..3, d16 in 1usize..9, i8 in 1usize..40) {
            for recipe in [qkv(hq, hkv, 16 * d16, 3), gate_up(8 * i8, 3)] {
                let sources = recipe.row_sources().unwrap();
                prop_assert_eq!(sources.len(), recipe.rows);
                for (dst, source) in sources.iter().enumerate() {
                    prop_assert_eq!(recipe.dst_row_of(source.segment as usize, source.row as usize), dst);
                }
            }
        }

        #[test]
        fn shards_select_whole_heads(rank in 0usize..2, heads in 1usize..4) {
            // Half of the heads of q for one of two ranks.
            let (d, n) = (32, heads * 32);
            let segment = Segment { src_rows: rank * n..(rank + 1) * n, ..Segment::whole("q", 2 * n, 4, 0) }
                .with_perm(RowPerm::RopeHalves { head_dim: d });
            let recipe = PackRecipe { rows: n, cols: 4, dtype: PackDType::F32, segments: vec![segment] };
            let sources = recipe.row_sources().unwrap();
            prop_assert!(sources.iter().all(|s| (rank * n..(rank + 1) * n).contains(&(s.row as usize))));
        }
    }
}
