//! GEMMs: the families of kernels, what tells their kernels apart, and how a step is launched.
//!
//! [`key`] says what a GEMM is, [`family`] what a family of kernels answers about it. The families are [`gemv`] up to
//! 4 rows, [`skinny`] up to 128, [`tiled`] above, and [`plain`] for other element types and ragged sizes; [`kernel`]
//! is a kernel of any of them. [`variant`] and [`choices`] are what autotuning sees. [`step`] launches what was decided
//! for a step (`fusion`).

pub(super) mod choices;
mod family;
mod gemv;
pub(super) mod kernel;
pub(super) mod key;
pub(super) mod operands;
mod plain;
mod request;
mod skinny;
pub(super) mod step;
mod tiled;
pub(super) mod variant;

pub(super) use family::NormSupport;
pub use skinny::SkinnyForm;
pub use tiled::Tile;
