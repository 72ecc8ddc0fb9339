//! Executes pack recipes: reads, permutes, transposes and converts rows of a source into a packed weight.
//!
//! A packer fills any range of destination rows on its own, so that a 1 GB weight can pass piece by piece
//! through a small pinned staging buffer. Rows that follow each other in source and destination are moved as one
//! run. All work on a piece is shared out over the current rayon pool.

use std::ops::Range;

use half::{bf16, f16};
use lathe_codegen::pack::{PackDType, PackRecipe, RowSource};
use rayon::prelude::*;

use super::stored::Part;
use super::{Dtype, ReadAt, TensorData, TensorInfo, WeightSource, WeightsError};

/// Bytes of the destination that one task fills.
const TASK_BYTES: usize = 256 << 10;
/// Bytes that a task reads of each row of a tensor that is transposed, at least; fewer would be mostly calls.
const TRANSPOSED_BYTES: usize = 1024;
/// Columns that are transposed together: a cache line of the destination.
const COLUMNS: usize = 32;

/// A recipe bound to a source, checked: filling cannot go out of bounds.
pub struct Packer<'a> {
    recipe: &'a PackRecipe,
    rows: Vec<RowSource>,
    segments: Vec<View<'a>>,
    origin: String,
}

/// The view of a segment's tensor: element (r, c) is `data[r * row_stride + c * col_stride]`.
struct View<'a> {
    data: TensorData<'a>,
    dtype: Dtype,
    row_stride: usize,
    col_stride: usize,
    first_col: usize,
}

impl<'a> Packer<'a> {
    /// Binds `recipe` to the tensors of `source`.
    ///
    /// # Errors
    /// A recipe that contradicts itself, a tensor that is absent, too small or not of a float type.
    pub fn new(recipe: &'a PackRecipe, source: &'a dyn WeightSource) -> Result<Self, WeightsError> {
        let rows = recipe.row_sources()?;
        let origin = source.describe();
        let mut segments = Vec::with_capacity(recipe.segments.len());
        for s in &recipe.segments {
            let fail = |reason| WeightsError::Pack {
                origin: origin.clone(),
                tensor: s.tensor.clone(),
                reason,
            };
            let (Some(info), Some(data)) = (source.info(&s.tensor), source.data(&s.tensor)) else {
                return Err(fail("there is no such tensor".into()));
            };
            let (rows, cols) = view_shape(info, s.transpose).map_err(fail)?;
            if s.src_rows.end > rows || s.src_cols.end > cols {
                let (r, c) = (&s.src_rows, &s.src_cols);
                return Err(fail(format!(
                    "rows {r:?} and columns {c:?} are asked for, it has [{rows}, {cols}]"
                )));
            }
            if !matches!(info.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
                return Err(fail(format!(
                    "it is {}, expected BF16, F16 or F32",
                    info.dtype
                )));
            }
            let (row_stride, col_stride) = if s.transpose { (1, rows) } else { (cols, 1) };
            let dtype = info.dtype;
            segments.push(View {
                data,
                dtype,
                row_stride,
                col_stride,
                first_col: s.src_cols.start,
            });
        }
        Ok(Packer {
            recipe,
            rows,
            segments,
            origin,
        })
    }

    /// The recipe.
    pub fn recipe(&self) -> &PackRecipe {
        self.recipe
    }

    /// Fills `out` with the packed rows `rows`; `out` must have exactly their bytes.
    ///
    /// # Errors
    /// A file that cannot be read.
    ///
    /// # Panics
    /// If `rows` are not rows of the recipe or `out` has another length.
    pub fn fill(&self, rows: Range<usize>, out: &mut [u8]) -> Result<(), WeightsError> {
        let row_bytes = self.recipe.row_bytes();
        self.assert_room(&rows, out);
        if out.is_empty() {
            return Ok(());
        }
        let transposed = self.segments.iter().any(|view| view.col_stride != 1);
        let least = match transposed {
            true => TRANSPOSED_BYTES / self.recipe.dtype.size(),
            false => 1,
        };
        let rows_per_task = (TASK_BYTES / row_bytes).max(least).clamp(1, rows.len());
        out.par_chunks_mut(rows_per_task * row_bytes)
            .enumerate()
            .try_for_each(|(i, out)| self.fill_from(rows.start + i * rows_per_task, out))
    }

    /// As [`Packer::fill`], on the calling thread alone.
    ///
    /// # Errors
    /// A file that cannot be read.
    ///
    /// # Panics
    /// As [`Packer::fill`].
    pub fn fill_serial(&self, rows: Range<usize>, out: &mut [u8]) -> Result<(), WeightsError> {
        self.assert_room(&rows, out);
        self.fill_from(rows.start, out)
    }

    fn assert_room(&self, rows: &Range<usize>, out: &[u8]) {
        let fits =
            rows.end <= self.recipe.rows && out.len() == rows.len() * self.recipe.row_bytes();
        assert!(
            fits,
            "rows {rows:?} into {} bytes of a {} weight",
            out.len(),
            self.recipe.rows
        );
    }

    /// Fills `out` with the packed rows from `first` on, run by run.
    fn fill_from(&self, first: usize, mut out: &mut [u8]) -> Result<(), WeightsError> {
        let row_bytes = self.recipe.row_bytes();
        let mut at = first;
        while !out.is_empty() {
            let start = self.rows[at];
            let follows = |k: usize| {
                self.rows
                    .get(at + k)
                    .is_some_and(|r| r.segment == start.segment && r.row == start.row + k as u32)
            };
            let len = (1..out.len() / row_bytes)
                .find(|&k| !follows(k))
                .unwrap_or(out.len() / row_bytes);
            let (run, rest) = out.split_at_mut(len * row_bytes);
            self.fill_run(start, len, run)?;
            (out, at) = (rest, at + len);
        }
        Ok(())
    }

    /// Fills `out` with `len` view rows of a segment.
    fn fill_run(&self, start: RowSource, len: usize, out: &mut [u8]) -> Result<(), WeightsError> {
        let view = &self.segments[start.segment as usize];
        let (cols, dtype) = (self.recipe.cols, self.recipe.dtype);
        let first = start.row as usize * view.row_stride + view.first_col * view.col_stride;
        match view.data {
            TensorData::Random(values) => {
                for (r, row) in out.chunks_exact_mut(cols * dtype.size()).enumerate() {
                    let first = first + r * view.row_stride;
                    write(row, dtype, |c| {
                        values.value((first + c * view.col_stride) as u64).to_f32()
                    });
                }
                Ok(())
            }
            TensorData::Stored { file, at } => {
                let size = view.dtype.bitsize() / 8;
                let at = at + (first * size) as u64;
                let read = if view.col_stride == 1 {
                    let part = Part {
                        at,
                        rows: len,
                        cols,
                        stride: view.row_stride,
                        size,
                    };
                    self.fill_rows(part, view.dtype, file, out)
                } else {
                    // The view's rows are columns of what is stored.
                    let part = Part {
                        at,
                        rows: cols,
                        cols: len,
                        stride: view.col_stride,
                        size,
                    };
                    self.fill_columns(part, view.dtype, file, out)
                };
                read.map_err(|e| WeightsError::Pack {
                    origin: self.origin.clone(),
                    tensor: self.tensor_of(start).to_owned(),
                    reason: format!("its file cannot be read: {e}"),
                })
            }
        }
    }

    /// Fills rows of `out` with the rows of a part.
    fn fill_rows(
        &self,
        part: Part,
        stored: Dtype,
        file: &dyn ReadAt,
        out: &mut [u8],
    ) -> std::io::Result<()> {
        let dtype = self.recipe.dtype;
        if same_type(stored, dtype) {
            return part.read_into(file, out);
        }
        let mut rows = out.chunks_exact_mut(part.cols * dtype.size());
        part.each_row(file, |_, from| {
            if let Some(row) = rows.next() {
                convert(row, dtype, from, stored);
            }
        })
    }

    /// Fills columns of `out` with the rows of a part.
    fn fill_columns(
        &self,
        part: Part,
        stored: Dtype,
        file: &dyn ReadAt,
        out: &mut [u8],
    ) -> std::io::Result<()> {
        let dtype = self.recipe.dtype;
        let column_bytes = part.cols * dtype.size();
        // Several at a time: a row of `out` takes them next to each other.
        let mut columns = vec![0; COLUMNS.min(part.rows) * column_bytes];
        part.each_row(file, |c, from| {
            let n = c % COLUMNS;
            let column = &mut columns[n * column_bytes..][..column_bytes];
            if same_type(stored, dtype) {
                column.copy_from_slice(from);
            } else {
                convert(column, dtype, from, stored);
            }
            if n + 1 == COLUMNS || c + 1 == part.rows {
                let columns = &columns[..(n + 1) * column_bytes];
                match dtype.size() {
                    2 => transpose::<2>(columns, part.cols, out, part.rows, c - n),
                    _ => transpose::<4>(columns, part.cols, out, part.rows, c - n),
                }
            }
        })
    }

    fn tensor_of(&self, row: RowSource) -> &str {
        &self.recipe.segments[row.segment as usize].tensor
    }
}

/// Packs a whole weight into f32 values.
///
/// # Errors
/// As [`Packer::new`] and [`Packer::fill`]; a recipe of another dtype.
pub fn pack_f32(recipe: &PackRecipe, source: &dyn WeightSource) -> Result<Vec<f32>, WeightsError> {
    pack_vec(
        recipe,
        source,
        PackDType::F32,
        vec![0.0f32; recipe.rows * recipe.cols],
    )
}

/// Packs a whole weight into bf16 values.
///
/// # Errors
/// As [`Packer::new`] and [`Packer::fill`]; a recipe of another dtype.
pub fn pack_bf16(
    recipe: &PackRecipe,
    source: &dyn WeightSource,
) -> Result<Vec<bf16>, WeightsError> {
    pack_vec(
        recipe,
        source,
        PackDType::Bf16,
        vec![bf16::ZERO; recipe.rows * recipe.cols],
    )
}

/// Packs a whole weight into f16 values.
///
/// # Errors
/// As [`Packer::new`] and [`Packer::fill`]; a recipe of another dtype.
pub fn pack_f16(recipe: &PackRecipe, source: &dyn WeightSource) -> Result<Vec<f16>, WeightsError> {
    pack_vec(
        recipe,
        source,
        PackDType::F16,
        vec![f16::ZERO; recipe.rows * recipe.cols],
    )
}

fn pack_vec<T>(
    recipe: &PackRecipe,
    source: &dyn WeightSource,
    dtype: PackDType,
    mut values: Vec<T>,
) -> Result<Vec<T>, WeightsError> {
    let packer = Packer::new(recipe, source)?;
    if recipe.dtype != dtype {
        let tensor = recipe
            .segments
            .first()
            .map_or(String::new(), |s| s.tensor.clone());
        let reason = format!("the recipe gives {}, asked for {dtype}", recipe.dtype);
        return Err(WeightsError::Pack {
            origin: source.describe(),
            tensor,
            reason,
        });
    }
    // SAFETY: T is f32, bf16 or f16 (the three callers): plain old data without padding, for which every byte
    // pattern is a value; the length in bytes is that of the vector's initialised elements. All supported
    // machines are little-endian (x86-64, aarch64), as the bytes written.
    let bytes = unsafe {
        std::slice::from_raw_parts_mut(
            values.as_mut_ptr().cast::<u8>(),
            std::mem::size_of_val(values.as_slice()),
        )
    };
    packer.fill(0..recipe.rows, bytes)?;
    Ok(values)
}

fn view_shape(info: &TensorInfo, transpose: bool) -> Result<(usize, usize), String> {
    let (rows, cols) = info.matrix();
    match (transpose, info.shape.len()) {
        (false, _) => Ok((rows, cols)),
        (true, 2) => Ok((cols, rows)),
        (true, _) => Err(format!(
            "it is {:?}, only a matrix can be transposed",
            info.shape
        )),
    }
}

fn same_type(stored: Dtype, packed: PackDType) -> bool {
    matches!(
        (stored, packed),
        (Dtype::F32, PackDType::F32)
            | (Dtype::BF16, PackDType::Bf16)
            | (Dtype::F16, PackDType::F16)
    )
}

/// Puts columns of `rows` elements of `N` bytes side by side into the rows of `out`, which have `cols` elements, from
/// column `first` on.
fn transpose<const N: usize>(
    columns: &[u8],
    rows: usize,
    out: &mut [u8],
    cols: usize,
    first: usize,
) {
    let (columns, _) = columns.as_chunks::<N>();
    let (out, _) = out.as_chunks_mut::<N>();
    let n = columns.len() / rows;
    for (r, row) in out.chunks_exact_mut(cols).enumerate() {
        for (c, value) in row[first..][..n].iter_mut().enumerate() {
            *value = columns[c * rows + r];
        }
    }
}

/// Converts the elements of `from`, one after the other.
fn convert(row: &mut [u8], dtype: PackDType, from: &[u8], stored: Dtype) {
    let two = |c: usize| [from[2 * c], from[2 * c + 1]];
    match stored {
        Dtype::F32 => write(row, dtype, |c| {
            let at = 4 * c;
            f32::from_le_bytes([from[at], from[at + 1], from[at + 2], from[at + 3]])
        }),
        Dtype::BF16 => write(row, dtype, |c| bf16::from_le_bytes(two(c)).to_f32()),
        Dtype::F16 => write(row, dtype, |c| f16::from_le_bytes(two(c)).to_f32()),
        other => unreachable!("{other} was refused when the recipe was bound"),
    }
}

/// Writes `value(0), value(1), …` as `dtype`. Going through f32 is exact for values that already have the type.
#[inline]
fn write(row: &mut [u8], dtype: PackDType, value: impl Fn(usize) -> f32) {
    match dtype {
        PackDType::F32 => write_as(row, value, f32::to_le_bytes),
        PackDType::Bf16 => write_as(row, value, |v| bf16::from_f32(v).to_le_bytes()),
        PackDType::F16 => write_as(row, value, |v| f16::from_f32(v).to_le_bytes()),
    }
}

#[inline]
fn write_as<const N: usize>(
    row: &mut [u8],
    value: impl Fn(usize) -> f32,
    to: impl Fn(f32) -> [u8; N],
) {
    row.chunks_exact_mut(N)
        .enumerate()
        .for_each(|(c, out)| out.copy_from_slice(&to(value(c))));
}

#[cfg(test)]
mod tests;
