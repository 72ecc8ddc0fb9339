//! Extents and strides that the kernel of `plain.cu` is given.

use super::context::Context;
use super::error::CudaError;

/// The structure `Geo` of `plain.cu`.
pub(super) struct Geo {
    pub(super) n: i64,
    pub(super) dims: [i64; 6],
    /// Strides of the operands.
    pub(super) a: [i64; 6],
    pub(super) b: [i64; 6],
    pub(super) c: [i64; 6],
    pub(super) out: [i64; 6],
    pub(super) reduced: [i64; 6],
    /// Element offsets of a, b, c and the output.
    pub(super) offsets: [i64; 4],
}

impl Geo {
    /// A dense output of at most 6 axes.
    pub(super) fn new(dims: &[i64]) -> Geo {
        let mut geo = Geo {
            n: dims.iter().product(),
            dims: [1; 6],
            a: [0; 6],
            b: [0; 6],
            c: [0; 6],
            out: [0; 6],
            reduced: [1; 6],
            offsets: [0; 4],
        };
        geo.dims[..dims.len()].copy_from_slice(dims);
        geo.out[..dims.len()].copy_from_slice(&dense(dims));
        geo
    }

    /// The geometry of a step with these extents.
    ///
    /// # Errors
    /// The kernel does not take so many axes.
    pub(super) fn of(cx: &Context<'_>, dims: &[i64]) -> Result<Geo, CudaError> {
        match dims.len() {
            0..=6 => Ok(Geo::new(dims)),
            n => Err(cx.refuse(format!("{n} axes, the kernel takes 6"))),
        }
    }

    pub(super) fn words(&self) -> Vec<i64> {
        let [a, b, c] = [&self.a, &self.b, &self.c];
        let arrays = [&self.dims, a, b, c, &self.out, &self.reduced];
        std::iter::once(self.n)
            .chain(arrays.into_iter().flatten().copied())
            .chain(self.offsets)
            .collect()
    }
}

/// Strides of a row-major tensor.
pub(super) fn dense(dims: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; dims.len()];
    for i in (1..dims.len()).rev() {
        strides[i - 1] = strides[i] * dims[i];
    }
    strides
}

/// Element strides of an operand along the axes of the result; 0 where it is repeated.
pub(super) fn broadcast_strides(shape: &[i64], dims: &[i64]) -> Vec<i64> {
    let mut strides = vec![0; dims.len()];
    let mut stride = 1;
    for (i, &n) in shape.iter().enumerate().rev() {
        if n != 1 {
            strides[i + dims.len() - shape.len()] = stride;
        }
        stride *= n;
    }
    strides
}
