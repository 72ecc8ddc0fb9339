//! RMSNorm from its parts, and its fusion with residual adds and GEMMs.

use super::softmax::reduces_last;
use crate::rule::{Apply, Exactness, Rule, Stage};
use egg::Id;
use lathe_ir::{BinaryFn, DType, GemmSpec, Op, Prologue, Real, ReduceFn};

pub(super) const RECOGNIZE: &[Rule] = &[RMSNORM, RMSNORM_UPCAST];
pub(super) const FUSE: &[Rule] = &[
    ADD_RMSNORM,
    PROLOGUE_RMS,
    GAMMA_INTO_WEIGHT,
    PROLOGUE_ADD_RMS,
];

const RMSNORM: Rule = Rule {
    name: "rmsnorm",
    stage: Stage::Recognize,
    equation: "x * rsqrt(mean(x^2) + eps) * w => rmsnorm(x, w)",
    exactness: Exactness::Exact,
    doc: "In f32, over the last axis, with a gamma vector of its extent.",
    lhs: &["(mul (mul ?x (rsqrt (add (mean ?m (pow ?x ?two)) ?eps))) ?w)"],
    rhs: |a| {
        let x = a.id("?x");
        recognize(a, x)
    },
};

const RMSNORM_UPCAST: Rule = Rule {
    name: "rmsnorm-upcast",
    stage: Stage::Recognize,
    equation: "cast(x32 * rsqrt(mean(x32^2) + eps), d) * w => rmsnorm(x, w)   (x32 = cast(x, f32))",
    exactness: Exactness::Exact,
    doc: "Hugging Face norms in f32 and returns to the model's type before gamma.",
    lhs: &[
        "(mul (cast ?d (mul (cast ?f ?x) (rsqrt (add (mean ?m (pow (cast ?f ?x) ?two)) ?eps)))) ?w)",
    ],
    rhs: |a| {
        let d = a.ty("?x")?.dtype;
        if a.op("?d") != Op::Cast(d) || a.op("?f") != Op::Cast(DType::F32) {
            return None;
        }
        let x = a.id("?x");
        recognize(a, x)
    },
};

fn recognize(a: &mut Apply<'_>, x: Id) -> Option<Id> {
    let rank = a.tensor(x)?.rank();
    if !reduces_last(&a.op("?m"), ReduceFn::Mean, rank) || a.konst("?two") != Some(2.0) {
        return None;
    }
    let eps = Real::new(a.konst("?eps")?);
    let w = a.id("?w");
    let y = a.add(Op::RmsNorm { eps }, &[x, w])?;
    (a.value(y).ty == a.value(a.root).ty).then_some(y)
}

const ADD_RMSNORM: Rule = Rule {
    name: "add-rmsnorm",
    stage: Stage::Fuse,
    equation: "rmsnorm(r + d, w) => get1(addrms(r, d, w));  r + d = get0(addrms(r, d, w))",
    exactness: Exactness::Exact,
    doc: "The residual add and the norm read the same row. The sum stays available as element 0.",
    lhs: &["(rmsnorm ?e (add ?r ?d) ?w)"],
    rhs: |a| {
        let Op::RmsNorm { eps } = a.op("?e") else {
            return None;
        };
        let (r, d, w) = (a.id("?r"), a.id("?d"), a.id("?w"));
        let both = a.add(Op::AddRms { eps }, &[r, d, w])?;
        let sum = a.add(Op::Binary(BinaryFn::Add), &[r, d])?;
        let first = a.add(Op::Get(0), &[both])?;
        a.unite(sum, first);
        a.add(Op::Get(1), &[both])
    },
};

const PROLOGUE_RMS: Rule = Rule {
    name: "norm-into-gemm",
    stage: Stage::Fuse,
    equation: "gemm(rmsnorm(x, g), w) => gemm{rms}(x, w, g)",
    exactness: Exactness::Exact,
    doc: "Worth it while the rows are few: every unit repeats the norm. The cost decides.",
    lhs: &["(gemm ?p (rmsnorm ?e ?x ?g) ?w ?b ?res ?none ?none)"],
    rhs: |a| {
        let (Op::Gemm(spec), Op::RmsNorm { eps }) = (a.op("?p"), a.op("?e")) else {
            return None;
        };
        if spec.prologue != Prologue::None || a.ty("?x")?.rank() != 2 {
            return None;
        }
        let spec = GemmSpec {
            prologue: Prologue::Rms { eps },
            ..spec
        };
        let ops = [a.id("?x"), a.id("?w"), a.id("?b"), a.id("?res"), a.id("?g")];
        let none = a.none();
        a.add(
            Op::Gemm(spec),
            &[ops[0], ops[1], ops[2], ops[3], ops[4], none],
        )
    },
};

const GAMMA_INTO_WEIGHT: Rule = Rule {
    name: "gamma-into-weight",
    stage: Stage::Fuse,
    equation: "gemm{rms}(x, w, g) => gemm{rms}(x, w * g)",
    exactness: Exactness::Reassociates,
    doc: "What is left of the norm is one factor a row, which the GEMM applies to its accumulators. The \
          columns are multiplied while the weight is loaded, in its place: not if others read it as it is.",
    lhs: &["(gemm ?p ?x ?w ?b ?res ?g ?none)"],
    rhs: |a| {
        let Op::Gemm(spec) = a.op("?p") else {
            return None;
        };
        let (w, g) = (a.id("?w"), a.id("?g"));
        let fixed = |v: &crate::egraph::analysis::Value| v.weight_only && !v.shared;
        if !matches!(spec.prologue, Prologue::Rms { .. }) || a.is_none("?g") {
            return None;
        }
        if !fixed(a.value(w)) || !a.value(g).weight_only {
            return None;
        }
        let scaled = a.add(Op::Binary(BinaryFn::Mul), &[w, g])?;
        if a.value(scaled).ty != a.value(w).ty {
            return None;
        }
        let (x, b, res, none) = (a.id("?x"), a.id("?b"), a.id("?res"), a.none());
        a.add(Op::Gemm(spec), &[x, scaled, b, res, none, none])
    },
};

const PROLOGUE_ADD_RMS: Rule = Rule {
    name: "add-norm-into-gemm",
    stage: Stage::Fuse,
    equation: "gemm(get1(addrms(r, d, g)), w) => get1(gemm{addrms}(r, w, g, d));  get0 = get0",
    exactness: Exactness::Exact,
    doc: "As norm-into-gemm, with the residual add in the same prologue; one unit writes the sum.",
    lhs: &["(gemm ?p (get ?i (addrms ?e ?r ?d ?g)) ?w ?b ?res ?none ?none)"],
    rhs: |a| {
        let (Op::Gemm(spec), Op::AddRms { eps }) = (a.op("?p"), a.op("?e")) else {
            return None;
        };
        if spec.prologue != Prologue::None || a.op("?i") != Op::Get(1) || a.ty("?r")?.rank() != 2 {
            return None;
        }
        let spec = GemmSpec {
            prologue: Prologue::AddRms { eps },
            ..spec
        };
        let (r, d, g) = (a.id("?r"), a.id("?d"), a.id("?g"));
        let ops = [r, a.id("?w"), a.id("?b"), a.id("?res"), g, d];
        let both = a.add(Op::Gemm(spec), &ops)?;
        let addrms = a.add(Op::AddRms { eps }, &[r, d, g])?;
        let old_sum = a.add(Op::Get(0), &[addrms])?;
        let new_sum = a.add(Op::Get(0), &[both])?;
        a.unite(old_sum, new_sum);
        a.add(Op::Get(1), &[both])
    },
};
