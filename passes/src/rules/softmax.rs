//! Softmax from its parts.

use crate::rule::{Exactness, Rule, Stage};
use crate::sample::{Build, n};
use lathe_ir::{BinaryFn, DType, NodeId, Op, ReduceFn, UnaryFn};

pub(super) const RULES: &[Rule] = &[SOFTMAX, SOFTMAX_UPCAST];

/// Whether a payload reduces the last axis of a value of this rank and keeps it.
pub(super) fn reduces_last(op: &Op, f: ReduceFn, rank: usize) -> bool {
    *op == Op::Reduce {
        f,
        axis: rank as u8 - 1,
        keepdim: true,
    }
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
        a.add(Op::Softmax, &[s])
    },
    sample: |g| {
        let mut q = Build::new();
        let x = q.input("s", g.float(), &[n(g.dim()), n(g.dim())]);
        let y = parts(&mut q, x);
        q.done(&[y])
    },
    near_misses: &[
        ("the sum is over another axis", |g| {
            let mut q = Build::new();
            let x = q.input("s", DType::F32, &[n(3), n(g.wide())]);
            let m = q.reduce_last(ReduceFn::Amax, x);
            let e = q.bin(BinaryFn::Sub, x, m);
            let e = q.un(UnaryFn::Exp, e);
            let sum = q.op(
                Op::Reduce {
                    f: ReduceFn::Sum,
                    axis: 0,
                    keepdim: true,
                },
                &[e],
            );
            let y = q.bin(BinaryFn::Div, e, sum);
            q.done(&[y])
        }),
        ("the sum is of other scores", |g| {
            let mut q = Build::new();
            let shape = [n(3), n(g.wide())];
            let x = q.input("s", DType::F32, &shape);
            let z = q.input("z", DType::F32, &shape);
            let m = q.reduce_last(ReduceFn::Amax, x);
            let e = q.bin(BinaryFn::Sub, x, m);
            let e = q.un(UnaryFn::Exp, e);
            let mz = q.reduce_last(ReduceFn::Amax, z);
            let ez = q.bin(BinaryFn::Sub, z, mz);
            let ez = q.un(UnaryFn::Exp, ez);
            let sum = q.reduce_last(ReduceFn::Sum, ez);
            let y = q.bin(BinaryFn::Div, e, sum);
            q.done(&[y])
        }),
    ],
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
            || a.op("?d") != Op::Cast(s.dtype)
            || a.op("?f") != Op::Cast(DType::F32)
        {
            return None;
        }
        let s = a.id("?s");
        a.add(Op::Softmax, &[s])
    },
    sample: |g| {
        let mut q = Build::new();
        let d = g.pick(&[DType::BF16, DType::F16]);
        let x = q.input("s", d, &[n(g.dim()), n(g.dim())]);
        let x = q.cast(x, DType::F32);
        let y = q.op(Op::Softmax, &[x]);
        let y = q.cast(y, d);
        q.done(&[y])
    },
    near_misses: &[("the result has another type than the scores", |g| {
        let mut q = Build::new();
        let x = q.input("s", DType::BF16, &[n(g.dim()), n(g.dim())]);
        let x = q.cast(x, DType::F32);
        let y = q.op(Op::Softmax, &[x]);
        let y = q.cast(y, DType::F16);
        q.done(&[y])
    })],
};

/// Softmax over the last axis in parts.
pub(super) fn parts(q: &mut Build, x: NodeId) -> NodeId {
    let m = q.reduce_last(ReduceFn::Amax, x);
    let e = q.bin(BinaryFn::Sub, x, m);
    let e = q.un(UnaryFn::Exp, e);
    let sum = q.reduce_last(ReduceFn::Sum, e);
    q.bin(BinaryFn::Div, e, sum)
}
