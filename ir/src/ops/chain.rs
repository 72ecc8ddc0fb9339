//! The chain of pointwise operations as an operation; its programs are told in [`crate::chain`].

use super::{Cast, Class, Fields, Level, Op, Operation, Signature};
use crate::Type;
use crate::chain::{Chain, ChainOp};
use crate::operands::Operands;

impl Operation for Chain {
    const NAMES: &'static [&'static str] = &["chain"];
    const SIGNATURE: Signature = Signature::variadic(Level::Lowered, Class::Elementwise);

    fn class(&self) -> Class {
        if self.reduces() {
            Class::Norm
        } else {
            Class::Elementwise
        }
    }

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.parsed("expr", self, "a chain of operations")
    }

    fn ty(&self, x: &Operands<&Type>) -> Result<Type, String> {
        let operands: Vec<&Type> = x.iter().copied().collect();
        Chain::ty(self, &operands)
    }
}

impl ChainOp {
    /// What an operation is inside a chain, if chains have it. Whether its operands allow it is for
    /// [`Chain::types`] to say.
    pub fn of(op: &Op) -> Option<ChainOp> {
        let inside = match op {
            Op::Cast(Cast(dtype)) => ChainOp::Cast(*dtype),
            Op::Unary(f) => ChainOp::Unary(*f),
            Op::Binary(f) => ChainOp::Binary(*f),
            Op::Silu(_) => ChainOp::Silu,
            Op::SwiGlu(_) => ChainOp::SwiGlu,
            Op::Softmax(_) => ChainOp::Softmax,
            Op::RmsNorm(norm) => ChainOp::RmsNorm { eps: norm.eps },
            Op::Reduce(r) if r.keepdim => ChainOp::Reduce {
                f: r.f,
                axis: r.axis,
            },
            _ => return None,
        };
        inside.is_legal().then_some(inside)
    }
}

impl Chain {
    /// Its name in lists of kernels. A long chain is told by what is in it beside sums and products.
    pub fn kernel_name(&self) -> String {
        let mut names = self.names();
        if names.len() > 3 {
            names.retain(|n| !matches!(*n, "add" | "sub" | "mul" | "div"));
        }
        format!("chain{}({})", self.statements.len(), names.join("·"))
    }
}
