//! A program at the sizes of a bucket: what fusions are decided and kernels are generated for.

use super::launch::{CudaOptions, Sampling, Sizes};
use crate::plan::{Plan, Program};

/// A program at the sizes of a bucket.
#[derive(Clone, Copy)]
pub(super) struct Bucket<'a> {
    pub(super) plan: &'a Plan,
    pub(super) program: &'a Program,
    pub(super) sizes: Sizes,
    pub(super) sampling: Sampling,
    pub(super) options: CudaOptions,
}
