//! Rules with a mistake in them, one of each kind that rules can have: fuzzing has to find them.

use crate::campaign::{Plan, run};
use crate::cases::Kind;
use egg::Id;
use lathe_ir::ops::{
    Attn, AttnStep, Cache, Expand, Gemm, Get, RepeatKv, Reshape, RmsNorm, Sdpa, Softmax, SwiGlu,
    Win,
};
use lathe_ir::{AttnSpec, Epilogue, Operands, Real, SdpaStage};
use lathe_passes::egraph::mask::Fact;
use lathe_passes::rule::Apply;
use lathe_passes::{Rule, rules};

/// Programs within which each has to be found.
const WITHIN: u64 = 10_000;

/// A rule whose action is another.
fn wrong(name: &str, rhs: fn(&mut Apply<'_>) -> Option<Id>) -> Rule {
    let rule = *rules::by_name(name).expect("a rule");
    Rule { rhs, ..rule }
}

/// An additive mask that is taken for another one.
fn masked(a: &mut Apply<'_>, as_mask: fn(Fact) -> Option<lathe_ir::Mask>) -> Option<Id> {
    let Sdpa(spec) = a.payload("?p")?;
    let mask = as_mask(a.fact("?m")?)?;
    if spec.stage != SdpaStage::Mask || a.ty("?s")?.rank() != 4 {
        return None;
    }
    let mask = spec.mask.and(mask);
    let (s, v) = (a.id("?s"), a.id("?v"));
    a.add(Sdpa(AttnSpec { mask, ..spec }), [s, v])
}

#[allow(clippy::too_many_lines)]
fn mistakes() -> Vec<(&'static str, Rule)> {
    vec![
        (
            "a dropped cast",
            Rule {
                lhs: &["(cast ?c (cast ?d ?x))"],
                ..wrong("mul-one", |a| Some(a.id("?x")))
            },
        ),
        (
            "another axis",
            wrong("softmax", |a| {
                let s = a.id("?s");
                a.add(Softmax, [s])
            }),
        ),
        (
            "a mask shifted by one",
            wrong("attention-mask", |a| {
                masked(a, |fact| match fact {
                    Fact::Additive { mut band, .. } => {
                        band.hi = band.hi.map(|hi| if hi == 1 || hi == -1 { 0 } else { hi });
                        band.as_mask()
                    }
                    _ => None,
                })
            }),
        ),
        (
            "a window that is one wider",
            wrong("attention-mask", |a| {
                masked(a, |fact| match fact {
                    Fact::Additive { mut band, .. } => {
                        band.lo = band.lo.map(|lo| lo - 1);
                        band.as_mask()
                    }
                    _ => None,
                })
            }),
        ),
        (
            "a scale instead of its reciprocal",
            wrong("attention-scale", |a| {
                let (Sdpa(spec), c) = (a.payload("?p")?, a.konst("?c")?);
                let (s, v) = (a.id("?s"), a.id("?v"));
                let scale = Real::new(spec.scale.get() * c);
                let stage = SdpaStage::Scale;
                a.add(
                    Sdpa(AttnSpec {
                        scale,
                        stage,
                        ..spec
                    }),
                    [s, v],
                )
            }),
        ),
        (
            "gate and up exchanged",
            wrong("swiglu", |a| {
                let (g, u) = (a.id("?g"), a.id("?u"));
                a.add(SwiGlu, [u, g])
            }),
        ),
        (
            "no residual",
            wrong("gemm-residual", |a| {
                let spec = a.payload::<Gemm>("?p")?;
                let operands = Operands::from([a.id("?x"), a.id("?w")]);
                let plain = spec == Gemm::PLAIN && spec.epilogue == Epilogue::None;
                plain.then(|| a.add(Gemm::PLAIN, operands))?
            }),
        ),
        (
            "no epsilon",
            wrong("rmsnorm", |a| {
                let (x, w) = (a.id("?x"), a.id("?w"));
                let eps = Real::new(0.0);
                (a.konst("?two") == Some(2.0)).then(|| a.add(RmsNorm { eps }, [x, w]))?
            }),
        ),
        (
            "KV heads of other groups",
            wrong("repeat-kv", |a| {
                let x = a.ty("?x")?;
                let (Reshape(r1), Expand(e)) = (a.payload("?r1")?, a.payload("?e")?);
                let [b, h, s, d] = x.shape[..] else {
                    return None;
                };
                let groups = e.get(1)?.known()?;
                if r1 != [b, 1_i64.into(), h, s, d] || e != [b, groups.into(), h, s, d] {
                    return None;
                }
                let (x, groups) = (a.id("?x"), groups as u32);
                a.add(RepeatKv { groups }, [x])
            }),
        ),
        (
            "the cache of another layer",
            wrong("insert-kv-cache", |a| {
                let (Attn(p), w) = (a.payload("?p")?, a.payload::<Win>("?w")?);
                let k = a.ty("?k")?;
                if !p.mask.causal || w.batch != Some(0) || w.seq != Some(2) {
                    return None;
                }
                let mut ops = Vec::new();
                for v in ["?q", "?k", "?v"] {
                    let x = a.id(v);
                    ops.push(a.add(w, [x])?);
                }
                let cache = Cache {
                    layer: 0,
                    kv_heads: k.shape[1].known()? as u32,
                    head_dim: k.shape[3].known()? as u32,
                };
                ops.push(a.add(cache, [])?);
                let step = a.add(AttnStep(p), &ops)?;
                a.add(Get(0), [step])
            }),
        ),
    ]
}

#[test]
fn every_mistake_is_found() {
    crate::begin();
    let mut missed = Vec::new();
    for (what, rule) in mistakes() {
        let rule: &'static Rule = Box::leak(Box::new(rule));
        let plan = Plan {
            first: 0,
            seeds: WITHIN,
            time: None,
            threads: crate::threads(),
            defects: 1,
            kind: Some(Kind::Made),
            shrink: false,
            instead: &[rule],
        };
        let totals = run(plan, &mut |_, _, _| {});
        match totals.defects.values().next() {
            Some(report) => {
                let first = report.lines().next().unwrap_or_default();
                println!("{what}: after {} programs, {first}", totals.programs());
            }
            None => missed.push(what),
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}
