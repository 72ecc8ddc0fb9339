//! Softmax from its parts.

use crate::rule::{Exactness, Rule, Stage};
use lathe_ir::ops::{Cast, Reduce, Softmax};
use lathe_ir::{DType, Op, ReduceFn};

pub(super) const RULES: &[Rule] = &[SOFTMAX, SOFTMAX_UPCAST];

/// Whether a payload reduces the last axis of a value of this rank and keeps it.
pub(super) fn reduces_last(op: &Op, f: ReduceFn, rank: usize) -> bool {
    *op == Op::Reduce(Reduce {
        f,
        axis: rank as u8 - 1,
        keepdim: true,
    })
}

const SOFTMAX: Rule = Rule {
    name: "softmax",
    stage: Stage::Recognize,
    equation: "exp(s - max(s)) / sum(exp(s - max(s))) => softmax(s)",
    exactness: Exactness::Exact,
    doc: "The numerically safe spelling, over the last axis. Both reductions must be over it.",
    lhs: &["(div (exp (sub ?s (amax ?m ?s))) (sum ?n (exp (sub ?s (amax ?m ?s)))))"],
    rhs: |a| {
        let rank = a.ty("?s")?.rank();
        let s = a.id("?s");
        if !reduces_last(&a.op("?m"), ReduceFn::Amax, rank)
            || !reduces_last(&a.op("?n"), ReduceFn::Sum, rank)
        {
            return None;
        }
        a.add(Softmax, [s])
    },
};

const SOFTMAX_UPCAST: Rule = Rule {
    name: "softmax-upcast",
    stage: Stage::Recognize,
    equation: "cast(softmax(cast(s, f32)), d) => softmax(s)   (s of type d)",
    exactness: Exactness::Exact,
    doc: "Softmax computes in f32 inside, whatever it reads and writes.",
    lhs: &["(cast ?d (softmax (cast ?f ?s)))"],
    rhs: |a| {
        let s = a.ty("?s")?;
        if !s.dtype.is_float()
            || a.op("?d") != Op::Cast(Cast(s.dtype))
            || a.op("?f") != Op::Cast(Cast(DType::F32))
        {
            return None;
        }
        let s = a.id("?s");
        a.add(Softmax, [s])
    },
};
