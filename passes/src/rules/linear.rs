//! Projections become GEMMs with bias and residual.

use super::norm::gemm;
use crate::rule::{Exactness, Rule, Stage};
use crate::sample::{Build, n, t};
use lathe_ir::{BinaryFn, DType, Epilogue, GemmSpec, Op, Type};

pub(super) const RULES: &[Rule] = &[GEMM, GEMM_BIAS, GEMM_RESIDUAL];

const GEMM: Rule = Rule {
    name: "gemm",
    stage: Stage::Fuse,
    equation: "linear(x, w) => gemm(x, w)",
    exactness: Exactness::Exact,
    doc: "The form that takes bias, residual, prologues and epilogues, for rows of a step.",
    lhs: &["(linear ?x ?w)"],
    rhs: |a| {
        if a.ty("?x")?.rank() != 2 {
            return None;
        }
        let (x, w) = (a.id("?x"), a.id("?w"));
        let none = a.none();
        a.add(Op::Gemm(GemmSpec::PLAIN), &[x, w, none, none, none, none])
    },
    sample: |g| {
        let mut q = Build::new();
        let (d, k, o) = (g.float(), g.dim(), g.dim());
        let x = q.input("x", d, &[t(), n(k)]);
        let w = q.weight("w", d, &[o, k]);
        let y = q.op(Op::Linear, &[x, w]);
        q.done(&[y])
    },
    near_misses: &[("x is no matrix of rows", |g| {
        let mut q = Build::new();
        let k = g.dim();
        let x = q.input("x", DType::F32, &[n(2), t(), n(k)]);
        let w = q.weight("w", DType::F32, &[3, k]);
        let y = q.op(Op::Linear, &[x, w]);
        q.done(&[y])
    })],
};

const GEMM_BIAS: Rule = Rule {
    name: "gemm-bias",
    stage: Stage::Fuse,
    equation: "linear(x, w) + b => gemm(x, w, b)   (b a weight vector)",
    exactness: Exactness::Exact,
    doc: "The bias is added to the accumulators before they are rounded.",
    lhs: &["(add (linear ?x ?w) ?b)"],
    rhs: |a| {
        let b = a.id("?b");
        if a.ty("?x")?.rank() != 2 || a.ty("?b")?.rank() != 1 || !a.value(b).weight_only {
            return None;
        }
        let (x, w) = (a.id("?x"), a.id("?w"));
        let none = a.none();
        let y = a.add(Op::Gemm(GemmSpec::PLAIN), &[x, w, b, none, none, none])?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
    sample: |g| {
        let mut q = Build::new();
        let (d, k, o) = (g.float(), g.dim(), g.dim());
        let x = q.input("x", d, &[t(), n(k)]);
        let w = q.weight("w", d, &[o, k]);
        let b = q.weight("b", d, &[o]);
        let y = q.op(Op::Linear, &[x, w]);
        let y = q.bin(BinaryFn::Add, y, b);
        q.done(&[y])
    },
    near_misses: &[("the addend varies with the rows", |g| {
        let mut q = Build::new();
        let (k, o) = (g.dim(), g.dim());
        let x = q.input("x", DType::F32, &[t(), n(k)]);
        let z = q.input("z", DType::F32, &[t(), n(o)]);
        let w = q.weight("w", DType::F32, &[o, k]);
        let y = q.op(Op::Linear, &[x, w]);
        let y = q.bin(BinaryFn::Add, y, z);
        q.done(&[y])
    })],
};

const GEMM_RESIDUAL: Rule = Rule {
    name: "gemm-residual",
    stage: Stage::Fuse,
    equation: "r + gemm(x, w) => gemm{residual}(x, w, r)",
    exactness: Exactness::Exact,
    doc: "A GEMM without another epilogue adds the residual to its accumulators.",
    lhs: &[
        "(add ?r (gemm ?p ?x ?w ?b ?none ?g ?none2))",
        "(add (gemm ?p ?x ?w ?b ?none ?g ?none2) ?r)",
    ],
    rhs: |a| {
        let Op::Gemm(spec) = a.op("?p") else {
            return None;
        };
        let r = a.id("?r");
        let absent = a.is_none("?none") && a.is_none("?none2");
        if spec.epilogue != Epilogue::None || !absent || a.value(r).weight_only {
            return None;
        }
        let spec = GemmSpec {
            epilogue: Epilogue::Residual,
            ..spec
        };
        let ops = [
            a.id("?x"),
            a.id("?w"),
            a.id("?b"),
            r,
            a.id("?g"),
            a.id("?none"),
        ];
        let y = a.add(Op::Gemm(spec), &ops)?;
        (a.value(y).ty == a.value(a.root).ty && a.value(y).ty != Type::None).then_some(y)
    },
    sample: |g| {
        let mut q = Build::new();
        let (d, k, o) = (g.float(), g.dim(), g.dim());
        let x = q.input("x", d, &[t(), n(k)]);
        let r = q.input("r", d, &[t(), n(o)]);
        let y = gemm(&mut q, x, k, o, d);
        let (a, b) = g.pick(&[(r, y), (y, r)]);
        let y = q.bin(BinaryFn::Add, a, b);
        q.done(&[y])
    },
    near_misses: &[("the addend is one row for all", |g| {
        let mut q = Build::new();
        let (k, o) = (g.dim(), g.dim());
        let x = q.input("x", DType::F32, &[t(), n(k)]);
        let r = q.input("r", DType::F32, &[n(o)]);
        let y = gemm(&mut q, x, k, o, DType::F32);
        let y = q.bin(BinaryFn::Add, r, y);
        q.done(&[y])
    })],
};
