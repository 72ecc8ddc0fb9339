//! When a value is known: in every step anew, or before the first.
//!
//! Decided once. The e-graph's rules ask whether a factor can be folded into a weight, its costs what is free, and the
//! code generator what the loader lays out or computes.

use crate::{Graph, Op, Type};

/// When a value is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Known {
    /// In a step: it depends on inputs or on the cache.
    #[default]
    InStep,
    /// From the program alone: constants, tables, and what is computed from them.
    Given,
    /// Once the checkpoint is loaded: a weight, and what is computed from weights and given values.
    Loaded,
}

impl Known {
    /// When the result of an operation is known, by when its operands are. Only float tensors of known extents are
    /// computed before the first step.
    pub fn of(op: &Op, operands: impl IntoIterator<Item = Known>, result: &Type) -> Known {
        let Some(ty) = result.as_tensor() else {
            return Known::InStep;
        };
        let extents = ty.shape.iter().all(|d| d.known().is_some());
        match op {
            Op::Weight(_) => return Known::Loaded,
            Op::Const(_) | Op::Table(_) | Op::Iota(_) if extents => return Known::Given,
            Op::Win(_) | Op::Sdpa(_) | Op::Proj(_) | Op::Get(_) => return Known::InStep,
            op if op.is_leaf() || !extents || !ty.dtype.is_float() => return Known::InStep,
            _ => {}
        }
        let latest = |a: Known, b: Known| match (a, b) {
            (Known::InStep, _) | (_, Known::InStep) => Known::InStep,
            (a, b) => a.max(b),
        };
        (operands.into_iter().reduce(latest)).unwrap_or_default()
    }

    /// When each node of a graph is known.
    pub fn of_graph(graph: &Graph) -> Vec<Known> {
        let mut known = vec![Known::InStep; graph.nodes().len()];
        for id in graph.ids() {
            let node = graph.node(id);
            let operands = node.inputs.iter().map(|i| known[i.index()]);
            known[id.index()] = Known::of(&node.op, operands, &node.ty);
        }
        known
    }

    /// Whether it is known before the first step.
    pub fn before_steps(self) -> bool {
        self != Known::InStep
    }
}
