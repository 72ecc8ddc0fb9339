//! Attention: opened at softmax·v, its modifiers peeled from outside in, closed at q·kᵀ.
//!
//! One small rule a modifier; each changes the payload. Masks are not matched by spelling: the
//! analysis knows which values are masks (egraph::mask).

use crate::egraph::analysis::Assumption;
use crate::egraph::mask::{Band, Fact, Fill};
use crate::rule::{Apply, Exactness, Rule, Stage};
use egg::Id;
use lathe_ir::ops::{Attn, Expand, Permute, RepeatKv, Reshape, Sdpa, binary};
use lathe_ir::{AttnSpec, Dim, Op, Real, SdpaStage};

pub(super) const RULES: &[Rule] = &[
    REPEAT_KV,
    OPEN,
    PEEL_MASK,
    PEEL_MASK_FILL,
    PEEL_SOFTCAP,
    PEEL_SCALE,
    CLOSE,
    GQA,
];

const REPEAT_KV: Rule = Rule {
    name: "repeat-kv",
    stage: Stage::Recognize,
    equation: "reshape(expand(reshape(x, [B,H,1,S,D]), [B,H,g,S,D]), [B,H*g,S,D]) => repeat_kv{g}(x)",
    exactness: Exactness::Exact,
    doc: "Copies of each KV head for the query heads of its group.",
    lhs: &["(reshape ?r2 (expand ?e (reshape ?r1 ?x)))"],
    rhs: |a| {
        let x = a.ty("?x")?;
        let (Op::Reshape(Reshape(r1)), Op::Expand(Expand(e)), Op::Reshape(Reshape(r2))) =
            (a.op("?r1"), a.op("?e"), a.op("?r2"))
        else {
            return None;
        };
        let [b, h, s, d] = x.shape[..] else {
            return None;
        };
        let g = e.get(2)?.known()?;
        if r1 != [b, h, Dim::new(1), s, d]
            || e != [b, h, Dim::new(g), s, d]
            || r2 != [b, h * g, s, d]
        {
            return None;
        }
        let x = a.id("?x");
        a.add(RepeatKv { groups: g as u32 }, [x])
    },
};

const OPEN: Rule = Rule {
    name: "attention-open",
    stage: Stage::Attention,
    equation: "matmul(softmax(s), v) => sdpa(s, v)",
    exactness: Exactness::Exact,
    doc: "Opens an attention whose scores are still any term [B,H,Q,K].",
    lhs: &["(matmul (softmax ?s) ?v)"],
    rhs: |a| {
        let (s, v) = (a.ty("?s")?, a.ty("?v")?);
        if s.rank() != 4 || v.rank() != 4 || s.shape[..2] != v.shape[..2] {
            return None;
        }
        let (s, v) = (a.id("?s"), a.id("?v"));
        a.add(Sdpa(AttnSpec::open()), [s, v])
    },
};

const PEEL_MASK: Rule = Rule {
    name: "attention-mask",
    stage: Stage::Attention,
    equation: "sdpa{m}(s + mask, v) => sdpa{m and mask}(s, v)   (mask a known additive mask)",
    exactness: Exactness::Approximate(1e-12),
    doc: "Any spelling whose value the analysis can follow. An unknown bias stays where it is, and the \
          attention unfused. Hidden scores must vanish in f32 beside the others, whose size the analysis \
          bounds; where it cannot, a finite fill rests on an assumption.",
    lhs: &["(sdpa ?p (add ?s ?m) ?v)", "(sdpa ?p (add ?m ?s) ?v)"],
    rhs: |a| {
        let Op::Sdpa(Sdpa(spec)) = a.op("?p") else {
            return None;
        };
        let Some(Fact::Additive { band, fill }) = a.fact("?m") else {
            return None;
        };
        let mask = band.as_mask()?;
        let (s, v) = (a.id("?s"), a.id("?v"));
        if spec.stage != SdpaStage::Mask || !keeps_shape(a, s) {
            return None;
        }
        let m = a.id("?m");
        hides(a, s, m, Fill::Added(fill.get()))?;
        let spec = AttnSpec {
            mask: spec.mask.and(mask),
            ..spec
        };
        a.add(Sdpa(spec), [s, v])
    },
};

/// Checks that a fill may be taken for −∞ beside these scores. `mask` is where it comes from.
fn hides(a: &mut Apply<'_>, scores: Id, mask: Id, by: Fill) -> Option<()> {
    // Under another mask that hides a query's own position, a row may be hidden as a whole: then fills
    // are compared with fills.
    let inner = masked_scores(a, scores);
    if inner.iter().any(|(_, band)| band.as_mask().is_none()) {
        return None;
    }
    if by.hides(bound_below_masks(a, scores, MASKS))? {
        let (Fill::Added(fill) | Fill::Instead(fill)) = by;
        let origin = a.value(mask).origin();
        a.assume(Assumption {
            scores_below: Real::new(by.limit()),
            fill: Real::new(fill),
            mask: origin.map_or(String::new(), |p| p.path.to_string()),
        });
    }
    Some(())
}

/// Masks of one attention that are looked through.
const MASKS: usize = 4;

/// The bound of scores where no mask hides them: a mask lowers the others. Every query sees some key, its
/// own position, under all masks that attention can express.
fn bound_below_masks(a: &Apply<'_>, scores: Id, masks: usize) -> Option<f64> {
    let known = a.value(scores).bound;
    let bounds = masked_scores(a, scores)
        .into_iter()
        .filter_map(|(x, band)| {
            band.as_mask().filter(|_| masks > 0)?;
            bound_below_masks(a, x, masks - 1)
        });
    bounds.chain(known).reduce(f64::min)
}

/// What becomes these scores by another mask that is added to it, with the pairs which that leaves.
fn masked_scores(a: &Apply<'_>, scores: Id) -> Vec<(Id, Band)> {
    let sums = a.forms(scores, "add").into_iter();
    let sides = sums.flat_map(|(_, ops)| {
        let (x, y) = (ops[binary::A], ops[binary::B]);
        [(x, y), (y, x)]
    });
    let by_mask = |(x, m): (Id, Id)| match a.value(m).fact {
        Some(Fact::Additive { band, .. }) => Some((x, band)),
        _ => None,
    };
    sides.filter_map(by_mask).collect()
}

/// Whether the inner scores have the full extents: a mask or factor that widens them is no
/// modifier. The key axis is checked against the values by type derivation.
fn keeps_shape(a: &Apply<'_>, scores: Id) -> bool {
    let (Some(s), Some(out)) = (a.tensor(scores), a.tensor(a.root)) else {
        return false;
    };
    s.rank() == 4 && s.shape[..3] == out.shape[..3]
}

const PEEL_MASK_FILL: Rule = Rule {
    name: "attention-mask-fill",
    stage: Stage::Attention,
    equation: "sdpa{m}(where(seen, s, -big), v) => sdpa{m and seen}(s, v)",
    exactness: Exactness::Approximate(1e-12),
    doc: "masked_fill and torch.where spellings: the boolean says what is seen, or what is not.",
    lhs: &[
        "(sdpa ?p (where ?c ?s ?k) ?v)",
        "(sdpa ?p (where ?c ?k ?s) ?v)",
    ],
    rhs: |a| {
        let Op::Sdpa(Sdpa(spec)) = a.op("?p") else {
            return None;
        };
        let Some(Fact::Bool { band, inverted }) = a.fact("?c") else {
            return None;
        };
        if spec.stage != SdpaStage::Mask {
            return None;
        }
        // Which branch holds the scores decides which side of the band is seen.
        let scores_when_true = a.spelling == 0;
        let seen = if inverted == scores_when_true {
            band.complement()?
        } else {
            band
        };
        let (s, v) = (a.id("?s"), a.id("?v"));
        if !keeps_shape(a, s) {
            return None;
        }
        let (c, fill) = (a.id("?c"), a.konst("?k")?);
        hides(a, s, c, Fill::Instead(fill))?;
        let spec = AttnSpec {
            mask: spec.mask.and(seen.as_mask()?),
            ..spec
        };
        a.add(Sdpa(spec), [s, v])
    },
};

const PEEL_SOFTCAP: Rule = Rule {
    name: "attention-softcap",
    stage: Stage::Attention,
    equation: "sdpa(tanh(s / c) * c, v) => sdpa{softcap = c}(s, v)",
    exactness: Exactness::Reassociates,
    doc: "Gemma 2. Divided or multiplied by the reciprocal.",
    lhs: &[
        "(sdpa ?p (mul (tanh (div ?s ?c)) ?c2) ?v)",
        "(sdpa ?p (mul (tanh (mul ?s ?c)) ?c2) ?v)",
    ],
    rhs: |a| {
        let Op::Sdpa(Sdpa(spec)) = a.op("?p") else {
            return None;
        };
        let cap = a.konst("?c2")?;
        let inner = a.konst("?c")?;
        let divisor = if a.spelling == 0 { inner } else { 1.0 / inner };
        let is_cap = cap > 0.0 && cap.is_finite() && (divisor / cap - 1.0).abs() <= 1e-6;
        if spec.stage != SdpaStage::Mask || !is_cap {
            return None;
        }
        let spec = AttnSpec {
            softcap: Some(Real::new(cap)),
            stage: SdpaStage::Cap,
            ..spec
        };
        let (s, v) = (a.id("?s"), a.id("?v"));
        if !keeps_shape(a, s) {
            return None;
        }
        a.add(Sdpa(spec), [s, v])
    },
};

const PEEL_SCALE: Rule = Rule {
    name: "attention-scale",
    stage: Stage::Attention,
    equation: "sdpa{k}(s * c, v) => sdpa{k*c}(s, v);  s / c likewise",
    exactness: Exactness::Reassociates,
    doc: "Constant factors of the scores, under masks and caps.",
    lhs: &["(sdpa ?p (mul ?s ?c) ?v)", "(sdpa ?p (div ?s ?c) ?v)"],
    rhs: |a| {
        let Op::Sdpa(Sdpa(spec)) = a.op("?p") else {
            return None;
        };
        let c = a.konst("?c")?;
        let factor = if a.spelling == 0 { c } else { 1.0 / c };
        let scale = spec.scale.get() * factor;
        let (s, v) = (a.id("?s"), a.id("?v"));
        // Scores over zero are no numbers that a factor could give.
        if scale.abs() > f64::from(f32::MAX) || scale.is_nan() {
            return None;
        }
        if spec.stage == SdpaStage::Closed || !keeps_shape(a, s) {
            return None;
        }
        let spec = AttnSpec {
            scale: Real::new(scale),
            stage: SdpaStage::Scale,
            ..spec
        };
        a.add(Sdpa(spec), [s, v])
    },
};

const CLOSE: Rule = Rule {
    name: "attention-close",
    stage: Stage::Attention,
    equation: "sdpa(matmul(q, transpose(k)), v) => attn(q, k, v)",
    exactness: Exactness::Exact,
    doc: "The scores are the product of queries and keys: nothing is left to peel.",
    lhs: &["(sdpa ?p (matmul ?q (permute ?t ?k)) ?v)"],
    rhs: |a| {
        let Op::Sdpa(Sdpa(spec)) = a.op("?p") else {
            return None;
        };
        if a.op("?t") != Op::Permute(Permute(vec![0, 1, 3, 2])) {
            return None;
        }
        let spec = AttnSpec {
            stage: SdpaStage::Closed,
            ..spec
        };
        let ops = [a.id("?q"), a.id("?k"), a.id("?v")];
        a.add(Attn(spec), ops)
    },
};

const GQA: Rule = Rule {
    name: "attention-gqa",
    stage: Stage::Attention,
    equation: "attn(q, repeat_kv{g}(k), repeat_kv{g}(v)) => attn{groups = g}(q, k, v)",
    exactness: Exactness::Exact,
    doc: "Grouped query attention reads each KV head once.",
    lhs: &["(attn ?p ?q (repeat_kv ?g ?k) (repeat_kv ?g ?v))"],
    rhs: |a| {
        let (Op::Attn(Attn(spec)), Op::RepeatKv(RepeatKv { groups })) = (a.op("?p"), a.op("?g"))
        else {
            return None;
        };
        let spec = AttnSpec {
            groups: spec.groups * groups,
            ..spec
        };
        let ops = [a.id("?q"), a.id("?k"), a.id("?v")];
        a.add(Attn(spec), ops)
    },
};
