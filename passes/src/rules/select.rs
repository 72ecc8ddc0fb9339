//! Row selection moves down through the head, so that logits are made only for rows that are
//! sampled.

use crate::rule::{Exactness, Rule, Stage};
use crate::sample::{Build, n, t};
use lathe_ir::{BinaryFn, DType, Dim, Op, Real, Sym};

pub(super) const RULES: &[Rule] = &[SELECT_LINEAR, SELECT_RMSNORM, SELECT_ADD];

fn r() -> Dim {
    Dim::sym(Sym::R)
}

const SELECT_LINEAR: Rule = Rule {
    name: "select-linear",
    stage: Stage::KvCache,
    equation: "select(linear(x, w), rows) => linear(select(x, rows), w)",
    exactness: Exactness::Exact,
    doc: "A prefill of 2,048 tokens needs one row of logits a sequence, not 2,048.",
    lhs: &["(select (linear ?x ?w) ?r)"],
    rhs: |a| {
        if a.ty("?x")?.rank() < 2 {
            return None;
        }
        let (x, w, r) = (a.id("?x"), a.id("?w"), a.id("?r"));
        let x = a.add(Op::Select, &[x, r])?;
        a.add(Op::Linear, &[x, w])
    },
    sample: |g| {
        let mut q = Build::new();
        let (d, k, o) = (g.float(), g.dim(), g.dim());
        let x = q.input("x", d, &[t(), n(k)]);
        let w = q.weight("w", d, &[o, k]);
        let y = q.op(Op::Linear, &[x, w]);
        let rows = q.input("rows", DType::I32, &[r()]);
        let y = q.op(Op::Select, &[y, rows]);
        q.done(&[y])
    },
    near_misses: &[("x is one row", |g| {
        let mut q = Build::new();
        let k = g.dim();
        let x = q.input("x", DType::F32, &[n(k)]);
        let w = q.weight("w", DType::F32, &[5, k]);
        let y = q.op(Op::Linear, &[x, w]);
        let rows = q.input("few", DType::I32, &[n(2)]);
        let y = q.op(Op::Select, &[y, rows]);
        q.done(&[y])
    })],
};

const SELECT_RMSNORM: Rule = Rule {
    name: "select-rmsnorm",
    stage: Stage::KvCache,
    equation: "select(rmsnorm(x, w), rows) => rmsnorm(select(x, rows), w)",
    exactness: Exactness::Exact,
    doc: "A norm is row-wise over the last axis, so any earlier axis may be selected first.",
    lhs: &["(select (rmsnorm ?e ?x ?w) ?r)"],
    rhs: |a| {
        if a.ty("?x")?.rank() < 2 {
            return None;
        }
        let (x, w, r, e) = (a.id("?x"), a.id("?w"), a.id("?r"), a.op("?e"));
        let x = a.add(Op::Select, &[x, r])?;
        a.add(e, &[x, w])
    },
    sample: |g| {
        let mut q = Build::new();
        let (d, k) = (g.float(), g.dim());
        let x = q.input("x", d, &[t(), n(k)]);
        let w = q.weight("w", d, &[k]);
        let y = q.op(
            Op::RmsNorm {
                eps: Real::new(1e-5),
            },
            &[x, w],
        );
        let rows = q.input("rows", DType::I32, &[r()]);
        let y = q.op(Op::Select, &[y, rows]);
        q.done(&[y])
    },
    near_misses: &[("features are selected, not rows", |g| {
        let mut q = Build::new();
        let k = g.wide();
        let x = q.input("x", DType::F32, &[n(k)]);
        let w = q.weight("w", DType::F32, &[k]);
        let y = q.op(
            Op::RmsNorm {
                eps: Real::new(1e-5),
            },
            &[x, w],
        );
        let rows = q.input("few", DType::I32, &[n(2)]);
        let y = q.op(Op::Select, &[y, rows]);
        q.done(&[y])
    })],
};

const SELECT_ADD: Rule = Rule {
    name: "select-add",
    stage: Stage::KvCache,
    equation: "select(a + b, rows) => select(a, rows) + select(b, rows)",
    exactness: Exactness::Exact,
    doc: "The residual add before the final norm; both sides have all the rows.",
    lhs: &["(select (add ?a ?b) ?r)"],
    rhs: |a| {
        if a.ty("?a")?.shape != a.ty("?b")?.shape {
            return None;
        }
        let (x, y, r) = (a.id("?a"), a.id("?b"), a.id("?r"));
        let x = a.add(Op::Select, &[x, r])?;
        let y = a.add(Op::Select, &[y, r])?;
        a.add(Op::Binary(BinaryFn::Add), &[x, y])
    },
    sample: |g| {
        let mut q = Build::new();
        let (d, k) = (g.float(), g.dim());
        let x = q.input("x", d, &[t(), n(k)]);
        let z = q.input("z", d, &[t(), n(k)]);
        let y = q.bin(BinaryFn::Add, x, z);
        let rows = q.input("rows", DType::I32, &[r()]);
        let y = q.op(Op::Select, &[y, rows]);
        q.done(&[y])
    },
    near_misses: &[("one side has no rows", |g| {
        let mut q = Build::new();
        let k = g.dim();
        let x = q.input("x", DType::F32, &[t(), n(k)]);
        let z = q.input("z", DType::F32, &[n(k)]);
        let y = q.bin(BinaryFn::Add, x, z);
        let rows = q.input("rows", DType::I32, &[r()]);
        let y = q.op(Op::Select, &[y, rows]);
        q.done(&[y])
    })],
};
