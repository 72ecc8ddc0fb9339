//! RMSNorm from its parts, and its fusion with residual adds and GEMMs.

use super::softmax::reduces_last;
use crate::rule::{Apply, Exactness, Rule, Stage};
use egg::Id;
use lathe_ir::Operands;
use lathe_ir::ops::gemm;
use lathe_ir::ops::{AddRms, Cast, Gemm, Get, RmsNorm};
use lathe_ir::{BinaryFn, DType, Prologue, Real, ReduceFn};

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
        if a.payload::<Cast>("?d")? != Cast(d) || a.payload::<Cast>("?f")? != Cast(DType::F32) {
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
    let eps = a.konst("?eps").filter(|e| e.is_finite() && *e >= 0.0)?;
    let eps = Real::new(eps);
    let w = a.id("?w");
    let y = a.add(RmsNorm { eps }, [x, w])?;
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
        let RmsNorm { eps } = a.payload("?e")?;
        let (r, d, w) = (a.id("?r"), a.id("?d"), a.id("?w"));
        let both = a.add(AddRms { eps }, [r, d, w])?;
        let sum = a.add(BinaryFn::Add, [r, d])?;
        let first = a.add(Get(0), [both])?;
        a.unite(sum, first);
        a.add(Get(1), [both])
    },
};

const PROLOGUE_RMS: Rule = Rule {
    name: "norm-into-gemm",
    stage: Stage::Fuse,
    equation: "gemm(rmsnorm(x, g), w) => gemm{rms}(x, w, g)",
    exactness: Exactness::Exact,
    doc: "Worth it while the rows are few: every unit repeats the norm. The cost decides.",
    lhs: &["(gemm ?p (rmsnorm ?e ?x ?g) ?w bias=?b residual=?res)"],
    rhs: |a| {
        let (spec, RmsNorm { eps }) = (a.payload::<Gemm>("?p")?, a.payload("?e")?);
        if spec.prologue != Prologue::None || a.ty("?x")?.rank() != 2 {
            return None;
        }
        let spec = Gemm {
            prologue: Prologue::Rms { eps },
            ..spec
        };
        let (x, w) = (a.id("?x"), a.id("?w"));
        let operands = product(a, x, w).with(gemm::GAMMA, a.id("?g"));
        a.add(spec, operands)
    },
};

/// Operands of a GEMM with the bias and residual that were matched, if there are any.
fn product(a: &Apply<'_>, x: Id, w: Id) -> Operands<Id> {
    Operands::from([x, w])
        .with(gemm::BIAS, a.opt("?b"))
        .with(gemm::RESIDUAL, a.opt("?res"))
}

const GAMMA_INTO_WEIGHT: Rule = Rule {
    name: "gamma-into-weight",
    stage: Stage::Fuse,
    equation: "gemm{rms}(x, w, g) => gemm{rms}(x, w * g)",
    exactness: Exactness::Reassociates,
    doc: "What is left of the norm is one factor a row, which the GEMM applies to its accumulators. The \
          columns are multiplied while the weight is loaded, in its place: not if others read it as it is.",
    lhs: &["(gemm ?p ?x ?w bias=?b residual=?res gamma=?g)"],
    rhs: |a| {
        let (spec, w, g) = (a.payload::<Gemm>("?p")?, a.id("?w"), a.opt("?g")?);
        let fixed = |v: &crate::egraph::analysis::Value| v.is_loaded() && !v.shared;
        if !matches!(spec.prologue, Prologue::Rms { .. }) {
            return None;
        }
        if !fixed(a.value(w)) || !a.value(g).is_loaded() {
            return None;
        }
        let scaled = a.add(BinaryFn::Mul, [w, g])?;
        if a.value(scaled).ty != a.value(w).ty {
            return None;
        }
        let x = a.id("?x");
        let operands = product(a, x, scaled);
        a.add(spec, operands)
    },
};

const PROLOGUE_ADD_RMS: Rule = Rule {
    name: "add-norm-into-gemm",
    stage: Stage::Fuse,
    equation: "gemm(get1(addrms(r, d, g)), w) => get1(gemm{addrms}(r, w, g, d));  get0 = get0",
    exactness: Exactness::Exact,
    doc: "As norm-into-gemm, with the residual add in the same prologue; one unit writes the sum.",
    lhs: &["(gemm ?p (get ?i (addrms ?e ?r ?d ?g)) ?w bias=?b residual=?res)"],
    rhs: |a| {
        let (spec, AddRms { eps }) = (a.payload::<Gemm>("?p")?, a.payload("?e")?);
        let normed = a.payload::<Get>("?i")? == Get(1);
        if spec.prologue != Prologue::None || !normed || a.ty("?r")?.rank() != 2 {
            return None;
        }
        let spec = Gemm {
            prologue: Prologue::AddRms { eps },
            ..spec
        };
        let (r, d, g) = (a.id("?r"), a.id("?d"), a.id("?g"));
        let w = a.id("?w");
        let operands = product(a, r, w).with(gemm::GAMMA, g).with(gemm::DELTA, d);
        let both = a.add(spec, operands)?;
        let addrms = a.add(AddRms { eps }, [r, d, g])?;
        let old_sum = a.add(Get(0), [addrms])?;
        let new_sum = a.add(Get(0), [both])?;
        a.unite(old_sum, new_sum);
        a.add(Get(1), [both])
    },
};
