//! The types of values.

use crate::dtype::DType;
use crate::shape::{Dim, SymEnv, format_shape};

/// The type of a value: a tensor, a KV cache, or a tuple of them.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Type {
    /// A dense tensor.
    Tensor(TensorType),
    /// The KV cache of one layer, of any paging: the layout is the device's business.
    Cache,
    /// Several values made by one operation, taken apart by [`ops::Get`](crate::ops::Get).
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

/// A type as the text shows it: `bf16[T,64]`, `cache`, `(bf16[T,64], cache)`.
pub fn format_type(ty: &Type) -> String {
    match ty {
        Type::Tensor(TensorType { dtype, shape }) => format!("{dtype}{}", format_shape(shape)),
        Type::Cache => "cache".to_string(),
        Type::Tuple(ts) => {
            let ts: Vec<String> = ts.iter().map(format_type).collect();
            format!("({})", ts.join(", "))
        }
    }
}
