//! Projections become GEMMs with bias and residual.

use crate::rule::{Exactness, Rule, Stage};
use lathe_ir::{Epilogue, GemmSpec, Op, Type};

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
};
