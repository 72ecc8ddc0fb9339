//! A terse builder of programs for tests.

use lathe_ir::ops::{Const, Input, Permute, Reduce, Reshape, Weight};
use lathe_ir::{
    BinaryFn, DType, Dim, Graph, NodeId, Op, Prov, Real, ReduceFn, Sym, UnaryFn, WeightRef,
};

/// Builds a program. Methods panic on ill-typed operations.
#[derive(Debug)]
pub struct Build {
    graph: Graph,
    prov: Prov,
}

/// The batch symbol as an extent.
pub fn b() -> Dim {
    Dim::sym(Sym::B)
}

/// The sequence symbol as an extent.
pub fn s() -> Dim {
    Dim::sym(Sym::S)
}

/// A constant extent.
pub fn n(v: i64) -> Dim {
    Dim::new(v)
}

impl Default for Build {
    fn default() -> Self {
        Build::new()
    }
}

impl Build {
    /// An empty sample.
    pub fn new() -> Build {
        Build {
            graph: Graph::new("sample"),
            prov: Prov::layer(0, "sample"),
        }
    }

    /// Any operation.
    pub fn op(&mut self, op: impl Into<Op>, inputs: &[NodeId]) -> NodeId {
        self.graph
            .add(op, inputs, &self.prov)
            .unwrap_or_else(|e| panic!("sample: {e}"))
    }

    /// A run-time input.
    pub fn input(&mut self, name: &str, dtype: DType, shape: &[Dim]) -> NodeId {
        self.op(
            Input {
                name: name.to_string(),
                dtype,
                shape: shape.to_vec(),
            },
            &[],
        )
    }

    /// A weight.
    pub fn weight(&mut self, name: &str, dtype: DType, shape: &[i64]) -> NodeId {
        self.op(
            Weight {
                weight: WeightRef {
                    name: name.to_string(),
                    shape: shape.to_vec(),
                },
                dtype,
            },
            &[],
        )
    }

    /// A constant.
    pub fn konst(&mut self, value: f64, dtype: DType) -> NodeId {
        self.op(
            Const {
                value: Real::new(value),
                dtype,
            },
            &[],
        )
    }

    /// A unary function.
    pub fn un(&mut self, f: UnaryFn, x: NodeId) -> NodeId {
        self.op(f, &[x])
    }

    /// A binary function.
    pub fn bin(&mut self, f: BinaryFn, a: NodeId, b: NodeId) -> NodeId {
        self.op(f, &[a, b])
    }

    /// A reduction of the last axis that keeps it with extent 1.
    pub fn reduce_last(&mut self, f: ReduceFn, x: NodeId) -> NodeId {
        let rank = self.graph.tensor(x).expect("a tensor").rank();
        let axis = rank as u8 - 1;
        self.op(
            Reduce {
                f,
                axis,
                keepdim: true,
            },
            &[x],
        )
    }

    /// A reshape.
    pub fn reshape(&mut self, x: NodeId, shape: &[Dim]) -> NodeId {
        self.op(Reshape(shape.to_vec()), &[x])
    }

    /// A permutation of axes.
    pub fn permute(&mut self, x: NodeId, perm: &[u8]) -> NodeId {
        self.op(Permute(perm.to_vec()), &[x])
    }

    /// The finished sample, with one output for each given value.
    pub fn done(mut self, outputs: &[NodeId]) -> Graph {
        for (i, &id) in outputs.iter().enumerate() {
            self.graph.set_output(&format!("y{i}"), id);
        }
        self.graph
    }
}
