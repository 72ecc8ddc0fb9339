//! Appends typed nodes with provenance: the vocabulary in which the blocks are written.

use super::error::ImportError;
use crate::ops::{
    Cast, Concat, Const, Expand, Matmul, Op, Permute, Reduce, Reshape, Slice, Weight, WeightRef,
};
use crate::{BinaryFn, DType, Dim, Graph, NodeId, Prov, Real, ReduceFn, Sym, UnaryFn};
use indexmap::IndexSet;

/// Result of every building step.
pub(crate) type Built = Result<NodeId, ImportError>;

/// A graph under construction with a current module path.
pub(crate) struct Builder {
    /// The program so far.
    pub(crate) graph: Graph,
    /// Element type of weights and activations.
    pub(crate) dtype: DType,
    /// Tensors of the checkpoint in the order of their first use.
    pub(crate) weights: IndexSet<WeightRef>,
    file: String,
    prov: Prov,
}

/// Extent of the batch axis.
pub(crate) fn batch() -> Dim {
    Dim::sym(Sym::B)
}

/// Extent of the sequence axis.
pub(crate) fn seq() -> Dim {
    Dim::sym(Sym::S)
}

impl Builder {
    /// An empty graph; `file` names the configuration in errors.
    pub(crate) fn new(name: &str, file: &str, dtype: DType) -> Builder {
        Builder {
            graph: Graph::new(name),
            dtype,
            weights: IndexSet::new(),
            file: file.to_string(),
            prov: Prov::global(""),
        }
    }

    /// Runs `f` with the module path extended by `name`.
    pub(crate) fn within<T>(
        &mut self,
        name: &str,
        f: impl FnOnce(&mut Builder) -> Result<T, ImportError>,
    ) -> Result<T, ImportError> {
        let outer = self.prov.clone();
        self.prov.path = self.path_of(name).into();
        let out = f(self);
        self.prov = outer;
        out
    }

    /// Runs `f` inside decoder layer `i`, which stands at `name` (e.g. `layers.3`).
    pub(crate) fn in_layer<T>(
        &mut self,
        i: u32,
        name: &str,
        f: impl FnOnce(&mut Builder) -> Result<T, ImportError>,
    ) -> Result<T, ImportError> {
        let outer = self.prov.layer.replace(i);
        let out = self.within(name, f);
        self.prov.layer = outer;
        out
    }

    fn path_of(&self, name: &str) -> String {
        if self.prov.path.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.prov.path)
        }
    }

    /// Appends any operation.
    pub(crate) fn add(&mut self, op: impl Into<Op>, inputs: &[NodeId]) -> Built {
        self.graph
            .add(op, inputs, &self.prov)
            .map_err(|source| ImportError::Type {
                file: self.file.clone(),
                path: self.prov.path.to_string(),
                source,
            })
    }

    /// The extents of a tensor.
    pub(crate) fn shape(&self, x: NodeId) -> Vec<Dim> {
        self.graph.tensor(x).map_or(Vec::new(), |t| t.shape.clone())
    }

    /// The element type of a tensor.
    pub(crate) fn dtype_of(&self, x: NodeId) -> DType {
        self.graph.tensor(x).map_or(self.dtype, |t| t.dtype)
    }

    /// The tensor `<module path>.<name>` of the checkpoint.
    pub(crate) fn weight(&mut self, name: &str, shape: &[u32]) -> Built {
        let weight = WeightRef {
            name: self.path_of(name),
            shape: shape.iter().map(|&n| i64::from(n)).collect(),
        };
        self.weights.insert(weight.clone());
        let dtype = self.dtype;
        self.add(Weight { weight, dtype }, &[])
    }

    /// A number as the model's element type holds it.
    pub(crate) fn rounded(&self, v: f64) -> f64 {
        match self.dtype {
            DType::BF16 => half::bf16::from_f64(v).to_f64(),
            DType::F16 => half::f16::from_f64(v).to_f64(),
            _ => f64::from(v as f32),
        }
    }

    /// A scalar.
    pub(crate) fn konst(&mut self, value: f64, dtype: DType) -> Built {
        let value = Real::new(value);
        self.add(Const { value, dtype }, &[])
    }

    /// `x` in another element type; nothing is appended if it already has it.
    pub(crate) fn cast(&mut self, x: NodeId, to: DType) -> Built {
        if self.dtype_of(x) == to {
            Ok(x)
        } else {
            self.add(Cast(to), &[x])
        }
    }

    /// An elementwise function.
    pub(crate) fn unary(&mut self, f: UnaryFn, x: NodeId) -> Built {
        self.add(f, &[x])
    }

    /// An elementwise function of two operands.
    pub(crate) fn binary(&mut self, f: BinaryFn, a: NodeId, b: NodeId) -> Built {
        self.add(f, &[a, b])
    }

    /// `f(x, value)` with the constant in x's element type.
    pub(crate) fn scalar(&mut self, f: BinaryFn, x: NodeId, value: f64) -> Built {
        let c = self.konst(value, self.dtype_of(x))?;
        self.binary(f, x, c)
    }

    /// A reduction over the last axis that keeps it.
    pub(crate) fn reduce_last(&mut self, f: ReduceFn, x: NodeId) -> Built {
        let axis = self.last_axis(x);
        self.add(
            Reduce {
                f,
                axis,
                keepdim: true,
            },
            &[x],
        )
    }

    /// Index of the last axis.
    pub(crate) fn last_axis(&self, x: NodeId) -> u8 {
        self.shape(x).len().saturating_sub(1) as u8
    }

    /// Extent of the last axis, 0 if it is symbolic.
    pub(crate) fn last_extent(&self, x: NodeId) -> u32 {
        self.shape(x).last().and_then(|d| d.known()).unwrap_or(0) as u32
    }

    /// A matrix product.
    pub(crate) fn matmul(&mut self, a: NodeId, b: NodeId) -> Built {
        self.add(Matmul, &[a, b])
    }

    /// The same elements under other extents.
    pub(crate) fn reshape(&mut self, x: NodeId, shape: &[Dim]) -> Built {
        self.add(Reshape(shape.to_vec()), &[x])
    }

    /// Axes in another order.
    pub(crate) fn permute(&mut self, x: NodeId, perm: &[u8]) -> Built {
        self.add(Permute(perm.to_vec()), &[x])
    }

    /// Extents of 1 stretched.
    pub(crate) fn expand(&mut self, x: NodeId, shape: &[Dim]) -> Built {
        self.add(Expand(shape.to_vec()), &[x])
    }

    /// Part of an axis.
    pub(crate) fn slice(&mut self, x: NodeId, axis: u8, start: u32, end: u32) -> Built {
        self.add(
            Slice {
                axis,
                start: start.into(),
                end: end.into(),
            },
            &[x],
        )
    }

    /// Two values along the last axis.
    pub(crate) fn concat_last(&mut self, a: NodeId, b: NodeId) -> Built {
        let axis = self.last_axis(a);
        self.add(Concat { axis }, &[a, b])
    }
}
