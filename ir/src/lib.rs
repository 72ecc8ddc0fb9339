//! lathe's tensor IR.
//!
//! A [`Graph`] is a list of typed operations in topological order. Importers build it from a
//! Hugging Face configuration with primitive operations only; the e-graph passes rewrite it into
//! composites and lowered operations; the code generator turns the result into a plan. This crate
//! knows nothing of e-graphs, of CUDA, or of weights beyond their names and shapes.
#![forbid(unsafe_code)]

pub mod chain;
pub mod dtype;
mod error_norm;
pub mod functions;
pub mod graph;
pub mod import;
pub mod infer;
pub mod interp;
pub mod operands;
pub mod ops;
mod printable;
mod program;
mod real;
pub mod shape;
mod step_input;
pub mod text;
pub mod verify;

pub use chain::{Chain, ChainArg, ChainOp};
pub use dtype::DType;
pub use error_norm::relative_error;
pub use functions::{BinaryFn, ReduceFn, UnaryFn};
pub use graph::{Graph, Node, NodeId, Prov};
pub use infer::{TypeError, infer};
pub use operands::{Operands, Slot};
pub use ops::{
    AttnSpec, Class, Epilogue, Level, Mask, Op, Pack, Prologue, SdpaStage, WeightRef,
    interleaved_source, kernel_name,
};
pub use printable::printable;
pub use program::{Both, ProgramKind};
pub use real::Real;
pub use shape::{Dim, Sym, SymEnv};
pub use step_input::{Output, StepInput};
pub use verify::{VerifyError, verify};

/// The type of a value: a tensor, a KV cache, or a tuple of them.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Type {
    /// A dense tensor.
    Tensor(TensorType),
    /// The KV cache of one layer, of any paging: the layout is the device's business.
    Cache,
    /// Several values made by one operation, taken apart by [`ops::Get`].
    Tuple(Vec<Type>),
}

/// Element type and extents of a dense, row-major tensor.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first. Rank 0 is a scalar.
    pub shape: Vec<Dim>,
}

impl Type {
    /// A tensor type.
    pub fn tensor(dtype: DType, shape: impl Into<Vec<Dim>>) -> Type {
        Type::Tensor(TensorType {
            dtype,
            shape: shape.into(),
        })
    }

    /// The tensor type, or `None` for caches and tuples.
    pub fn as_tensor(&self) -> Option<&TensorType> {
        match self {
            Type::Tensor(t) => Some(t),
            _ => None,
        }
    }
}

impl TensorType {
    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Number of elements under an assignment of the symbols. Untrusted text may write any extents: numbers
    /// that `usize` does not hold become its greatest one, negative extents 0.
    pub fn elements(&self, env: &SymEnv) -> usize {
        let extent = |d: &Dim| usize::try_from(d.eval(env).max(0)).unwrap_or(usize::MAX);
        let product = |n: usize, d| n.saturating_mul(extent(d));
        self.shape.iter().fold(1, product)
    }

    /// Size in bytes under an assignment of the symbols; saturates as [`TensorType::elements`].
    pub fn bytes(&self, env: &SymEnv) -> usize {
        self.elements(env).saturating_mul(self.dtype.size())
    }
}
