//! Weights: where they come from, whether they are the expected ones, and how they get into packed layouts.
//!
//! A [`WeightSource`] is a [`Checkpoint`] (safetensors files) or [`RandomWeights`] (a hash, nothing
//! stored). [`check`] compares it with what the model expects; [`pack`] executes a
//! [`PackRecipe`](lathe_codegen::pack::PackRecipe) on it, straight into the memory where the weight will live.

mod check;
mod checkpoint;
mod error;
mod header;
pub mod pack;
mod random;
mod reading;
mod stored;

pub use check::{Checked, check};
pub use checkpoint::Checkpoint;
pub use error::{Misshaped, WeightsError, WrongDtype};
pub use header::{TensorEntry, parse_header};
pub use random::{RandomLaw, RandomTensor, RandomWeights, name_hash};
pub use reading::{Reading, read_folder};
pub use safetensors::Dtype;
pub use stored::ReadAt;

/// Shape and storage type of one tensor of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Type of the stored elements.
    pub dtype: Dtype,
    /// Dimensions, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Rows and columns of the tensor seen as a matrix: all dimensions but the last, and the last. A vector of
    /// N values is `[N, 1]`.
    pub fn matrix(&self) -> (usize, usize) {
        match self.shape.as_slice() {
            [] => (1, 1),
            [n] => (*n, 1),
            // Of a tensor without elements the dimensions may be anything.
            [rows @ .., cols] => (
                rows.iter().fold(1, |n: usize, &d| n.saturating_mul(d)),
                *cols,
            ),
        }
    }
}

/// The values of one tensor.
#[derive(Debug, Clone, Copy)]
pub enum TensorData<'a> {
    /// Little-endian elements of the tensor's dtype, row-major.
    Stored {
        /// The file that holds them.
        file: &'a dyn ReadAt,
        /// Offset of the first byte in it.
        at: u64,
    },
    /// Values computed from their index.
    Random(RandomTensor),
}

/// Something that holds named tensors.
pub trait WeightSource: Sync {
    /// What the source is, for messages: a folder, or that the weights are random.
    fn describe(&self) -> String;

    /// The names of all tensors, sorted.
    fn names(&self) -> Vec<&str>;

    /// Shape and dtype of a tensor.
    fn info(&self, name: &str) -> Option<&TensorInfo>;

    /// The values of a tensor.
    fn data(&self, name: &str) -> Option<TensorData<'_>>;
}

#[cfg(test)]
mod tests;
