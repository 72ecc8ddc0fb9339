//! Projections become GEMMs with bias and residual.

use crate::rule::{Exactness, Rule, Stage};
use lathe_ir::Epilogue;
use lathe_ir::Operands;
use lathe_ir::ops::Gemm;
use lathe_ir::ops::gemm;

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
        a.add(Gemm::PLAIN, [x, w])
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
        if a.ty("?x")?.rank() != 2 || a.ty("?b")?.rank() != 1 || !a.value(b).is_loaded() {
            return None;
        }
        let rows = Operands::from([a.id("?x"), a.id("?w")]);
        let y = a.add(Gemm::PLAIN, rows.with(gemm::BIAS, b))?;
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
        "(add ?r (gemm ?p ?x ?w bias=?b gamma=?g))",
        "(add (gemm ?p ?x ?w bias=?b gamma=?g) ?r)",
    ],
    rhs: |a| {
        let (spec, r) = (a.payload::<Gemm>("?p")?, a.id("?r"));
        if spec.epilogue != Epilogue::None || a.value(r).is_loaded() {
            return None;
        }
        let spec = Gemm {
            epilogue: Epilogue::Residual,
            ..spec
        };
        let operands = Operands::from([a.id("?x"), a.id("?w")])
            .with(gemm::BIAS, a.opt("?b"))
            .with(gemm::RESIDUAL, r)
            .with(gemm::GAMMA, a.opt("?g"));
        let y = a.add(spec, operands)?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
};
