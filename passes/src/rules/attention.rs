//! Attention: opened at softmax·v, its modifiers peeled from outside in, closed at q·kᵀ.
//!
//! One small rule a modifier; each changes the payload. Masks are not matched by spelling: the
//! analysis knows which values are masks (egraph::mask).

use crate::egraph::mask::{Fact, HIDDEN};
use crate::rule::{Apply, Exactness, Rule, Stage};
use crate::sample::{Build, Gen, b, n, s};
use egg::Id;
use lathe_ir::{AttnSpec, BinaryFn, DType, Graph, Mask, NodeId, Op, Real, SdpaStage, UnaryFn};

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
        let (Op::Reshape(r1), Op::Expand(e), Op::Reshape(r2)) =
            (a.op("?r1"), a.op("?e"), a.op("?r2"))
        else {
            return None;
        };
        let [b, h, s, d] = x.shape[..] else {
            return None;
        };
        let g = e.get(2)?.known()?;
        if r1 != [b, h, n(1), s, d] || e != [b, h, n(g), s, d] || r2 != [b, h * g, s, d] {
            return None;
        }
        let x = a.id("?x");
        a.add(Op::RepeatKv { groups: g as u32 }, &[x])
    },
    sample: |g| repeat(g, 2),
    near_misses: &[("whole rounds of heads, not copies of each", |g| {
        repeat(g, 1)
    })],
};

/// Repeats heads `g` times: each head in a row when the new axis is 2, in rounds when it is 1.
fn repeat(g: &mut Gen, axis: usize) -> Graph {
    let mut q = Build::new();
    let (h, copies, d) = (g.wide(), g.wide(), g.dim());
    let x = q.input("x", g.float(), &[b(), n(h), s(), n(d)]);
    let mut one = vec![b(), n(h), s(), n(d)];
    one.insert(axis, n(1));
    let mut many = one.clone();
    many[axis] = n(copies);
    let y = q.reshape(x, &one);
    let y = q.op(Op::Expand(many), &[y]);
    let y = q.reshape(y, &[b(), n(h * copies), s(), n(d)]);
    q.done(&[y])
}

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
        a.add(Op::Sdpa(AttnSpec::open()), &[s, v])
    },
    sample: |g| {
        let mut q = Build::new();
        let (scores, v) = operands(&mut q, g, DType::F32);
        let p = q.op(Op::Softmax, &[scores]);
        let y = q.op(Op::Matmul, &[p, v]);
        q.done(&[y])
    },
    near_misses: &[("the weights are not normalised", |g| {
        let mut q = Build::new();
        let (scores, v) = operands(&mut q, g, DType::F32);
        let p = q.un(UnaryFn::Exp, scores);
        let y = q.op(Op::Matmul, &[p, v]);
        q.done(&[y])
    })],
};

const PEEL_MASK: Rule = Rule {
    name: "attention-mask",
    stage: Stage::Attention,
    equation: "sdpa{m}(s + mask, v) => sdpa{m and mask}(s, v)   (mask a known additive mask)",
    exactness: Exactness::Approximate(1e-12),
    doc: "Any spelling whose value the analysis can follow. An unknown bias stays where it is, and the \
          attention unfused. Hidden scores are at most -1e4, so that their weights are 0 in f32.",
    lhs: &["(sdpa ?p (add ?s ?m) ?v)", "(sdpa ?p (add ?m ?s) ?v)"],
    rhs: |a| {
        let Op::Sdpa(spec) = a.op("?p") else {
            return None;
        };
        let Some(Fact::Additive { band }) = a.fact("?m") else {
            return None;
        };
        let mask = band.as_mask()?;
        let (s, v) = (a.id("?s"), a.id("?v"));
        if spec.stage != SdpaStage::Mask || !keeps_shape(a, s) {
            return None;
        }
        let spec = AttnSpec {
            mask: spec.mask.and(mask),
            ..spec
        };
        a.add(Op::Sdpa(spec), &[s, v])
    },
    sample: |g| {
        let mut q = Build::new();
        let dt = g.float();
        let (scores, v) = operands(&mut q, g, dt);
        let (window, spelling) = (g.pick(&[None, Some(3)]), g.pick(&[0, 1, 2, 3]));
        let m = mask(&mut q, dt, window, spelling);
        let (x, y) = g.pick(&[(scores, m), (m, scores)]);
        let y = q.bin(BinaryFn::Add, x, y);
        let y = q.op(Op::Sdpa(AttnSpec::open()), &[y, v]);
        q.done(&[y])
    },
    near_misses: &[
        ("an arbitrary bias", |g| {
            let mut q = Build::new();
            let (scores, v) = operands(&mut q, g, DType::F32);
            let m = q.input("bias", DType::F32, &[s(), s()]);
            let y = q.bin(BinaryFn::Add, scores, m);
            let y = q.op(Op::Sdpa(AttnSpec::open()), &[y, v]);
            q.done(&[y])
        }),
        ("only later keys are seen", |g| {
            let mut q = Build::new();
            let (scores, v) = operands(&mut q, g, DType::F32);
            let (i, j) = indices(&mut q);
            let seen = q.bin(BinaryFn::Gt, j, i);
            let m = additive(&mut q, seen, DType::F32);
            let y = q.bin(BinaryFn::Add, scores, m);
            let y = q.op(Op::Sdpa(AttnSpec::open()), &[y, v]);
            q.done(&[y])
        }),
        ("the mask is under a scale that was peeled already", |g| {
            let mut q = Build::new();
            let (scores, v) = operands(&mut q, g, DType::F32);
            let m = mask(&mut q, DType::F32, None, 0);
            let y = q.bin(BinaryFn::Add, scores, m);
            let spec = AttnSpec {
                scale: Real::new(0.5),
                stage: SdpaStage::Scale,
                ..AttnSpec::open()
            };
            let y = q.op(Op::Sdpa(spec), &[y, v]);
            q.done(&[y])
        }),
    ],
};

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
        let Op::Sdpa(spec) = a.op("?p") else {
            return None;
        };
        let Some(Fact::Bool { band, inverted }) = a.fact("?c") else {
            return None;
        };
        if a.konst("?k")? > HIDDEN || spec.stage != SdpaStage::Mask {
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
        let spec = AttnSpec {
            mask: spec.mask.and(seen.as_mask()?),
            ..spec
        };
        a.add(Op::Sdpa(spec), &[s, v])
    },
    sample: |g| fill(g, true),
    near_misses: &[
        ("the seen pairs are filled", |g| fill(g, false)),
        ("the filler is a score", |g| {
            let mut q = Build::new();
            let (scores, v) = operands(&mut q, g, DType::F32);
            let (i, j) = indices(&mut q);
            let seen = q.bin(BinaryFn::Le, j, i);
            let small = q.konst(-1.0, DType::F32);
            let y = q.op(Op::Where, &[seen, scores, small]);
            let y = q.op(Op::Sdpa(AttnSpec::open()), &[y, v]);
            q.done(&[y])
        }),
    ],
};

fn fill(g: &mut Gen, keep_seen: bool) -> Graph {
    let mut q = Build::new();
    let (scores, v) = operands(&mut q, g, DType::F32);
    let (i, j) = indices(&mut q);
    let big = q.konst(-1e9, DType::F32);
    // `masked_fill` says what is hidden, `where` what is seen.
    let says_seen = g.pick(&[true, false]);
    let f = if says_seen {
        BinaryFn::Le
    } else {
        BinaryFn::Gt
    };
    let said = q.bin(f, j, i);
    let y = if says_seen == keep_seen {
        q.op(Op::Where, &[said, scores, big])
    } else {
        q.op(Op::Where, &[said, big, scores])
    };
    let y = q.op(Op::Sdpa(AttnSpec::open()), &[y, v]);
    q.done(&[y])
}

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
        let Op::Sdpa(spec) = a.op("?p") else {
            return None;
        };
        let cap = a.konst("?c2")?;
        let inner = a.konst("?c")?;
        let divisor = if a.spelling == 0 { inner } else { 1.0 / inner };
        if spec.stage != SdpaStage::Mask || cap <= 0.0 || (divisor / cap - 1.0).abs() > 1e-6 {
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
        a.add(Op::Sdpa(spec), &[s, v])
    },
    sample: |g| softcap(g, 5.0, 5.0),
    near_misses: &[("the factors differ", |g| softcap(g, 5.0, 4.0))],
};

fn softcap(g: &mut Gen, inner: f64, outer: f64) -> Graph {
    let mut q = Build::new();
    let (scores, v) = operands(&mut q, g, DType::F32);
    let y = if g.pick(&[true, false]) {
        let c = q.konst(inner, DType::F32);
        q.bin(BinaryFn::Div, scores, c)
    } else {
        let c = q.konst(1.0 / inner, DType::F32);
        q.bin(BinaryFn::Mul, scores, c)
    };
    let y = q.un(UnaryFn::Tanh, y);
    let c = q.konst(outer, DType::F32);
    let y = q.bin(BinaryFn::Mul, y, c);
    let y = q.op(Op::Sdpa(AttnSpec::open()), &[y, v]);
    q.done(&[y])
}

const PEEL_SCALE: Rule = Rule {
    name: "attention-scale",
    stage: Stage::Attention,
    equation: "sdpa{k}(s * c, v) => sdpa{k*c}(s, v);  s / c likewise",
    exactness: Exactness::Reassociates,
    doc: "Constant factors of the scores, under masks and caps.",
    lhs: &["(sdpa ?p (mul ?s ?c) ?v)", "(sdpa ?p (div ?s ?c) ?v)"],
    rhs: |a| {
        let Op::Sdpa(spec) = a.op("?p") else {
            return None;
        };
        let c = a.konst("?c")?;
        let factor = if a.spelling == 0 { c } else { 1.0 / c };
        let (s, v) = (a.id("?s"), a.id("?v"));
        if spec.stage == SdpaStage::Closed || !keeps_shape(a, s) {
            return None;
        }
        let spec = AttnSpec {
            scale: Real::new(spec.scale.get() * factor),
            stage: SdpaStage::Scale,
            ..spec
        };
        a.add(Op::Sdpa(spec), &[s, v])
    },
    sample: |g| {
        let mut q = Build::new();
        let (scores, v) = operands(&mut q, g, DType::F32);
        let c = q.konst(0.25, DType::F32);
        let f = g.pick(&[BinaryFn::Mul, BinaryFn::Div]);
        let y = q.bin(f, scores, c);
        let y = q.op(Op::Sdpa(AttnSpec::open()), &[y, v]);
        q.done(&[y])
    },
    near_misses: &[("the factor is no constant", |g| {
        let mut q = Build::new();
        let (scores, v) = operands(&mut q, g, DType::F32);
        let c = q.input("c", DType::F32, &[]);
        let y = q.bin(BinaryFn::Mul, scores, c);
        let y = q.op(Op::Sdpa(AttnSpec::open()), &[y, v]);
        q.done(&[y])
    })],
};

const CLOSE: Rule = Rule {
    name: "attention-close",
    stage: Stage::Attention,
    equation: "sdpa(matmul(q, transpose(k)), v) => attn(q, k, v)",
    exactness: Exactness::Exact,
    doc: "The scores are the product of queries and keys: nothing is left to peel.",
    lhs: &["(sdpa ?p (matmul ?q (permute ?t ?k)) ?v)"],
    rhs: |a| {
        let Op::Sdpa(spec) = a.op("?p") else {
            return None;
        };
        if a.op("?t") != Op::Permute(vec![0, 1, 3, 2]) {
            return None;
        }
        let spec = AttnSpec {
            stage: SdpaStage::Closed,
            ..spec
        };
        let ops = [a.id("?q"), a.id("?k"), a.id("?v")];
        a.add(Op::Attn(spec), &ops)
    },
    sample: |g| close(g, false),
    near_misses: &[("scores of other rows than the values", |g| close(g, true))],
};

fn close(g: &mut Gen, foreign: bool) -> Graph {
    let mut q = Build::new();
    let (dt, h, d) = (g.float(), g.dim(), g.wide());
    let shape = [b(), n(h), s(), n(d)];
    let x = q.input("q", dt, &shape);
    let v = q.input("v", dt, &shape);
    let kt = if foreign {
        // Keys that come transposed along the heads are no keys of these values.
        let k = q.input("k", dt, &[b(), s(), n(h), n(d)]);
        q.permute(k, &[0, 2, 3, 1])
    } else {
        let k = q.input("k", dt, &shape);
        q.permute(k, &[0, 1, 3, 2])
    };
    let y = q.op(Op::Matmul, &[x, kt]);
    let y = q.op(Op::Sdpa(AttnSpec::open()), &[y, v]);
    q.done(&[y])
}

const GQA: Rule = Rule {
    name: "attention-gqa",
    stage: Stage::Attention,
    equation: "attn(q, repeat_kv{g}(k), repeat_kv{g}(v)) => attn{groups = g}(q, k, v)",
    exactness: Exactness::Exact,
    doc: "Grouped query attention reads each KV head once.",
    lhs: &["(attn ?p ?q (repeat_kv ?g ?k) (repeat_kv ?g ?v))"],
    rhs: |a| {
        let (Op::Attn(spec), Op::RepeatKv { groups }) = (a.op("?p"), a.op("?g")) else {
            return None;
        };
        let spec = AttnSpec {
            groups: spec.groups * groups,
            ..spec
        };
        let ops = [a.id("?q"), a.id("?k"), a.id("?v")];
        a.add(Op::Attn(spec), &ops)
    },
    sample: |g| gqa(g, true),
    near_misses: &[("only the keys are repeated", |g| gqa(g, false))],
};

fn gqa(g: &mut Gen, both: bool) -> Graph {
    let mut q = Build::new();
    let (dt, h, groups, d) = (g.float(), g.dim(), g.wide(), g.dim());
    let few = [b(), n(h), s(), n(d)];
    let many = [b(), n(h * groups), s(), n(d)];
    let repeat = Op::RepeatKv {
        groups: groups as u32,
    };
    let x = q.input("q", dt, &many);
    let k = q.input("k", dt, &few);
    let k = q.op(repeat.clone(), &[k]);
    let v = if both {
        let v = q.input("v", dt, &few);
        q.op(repeat, &[v])
    } else {
        q.input("v", dt, &many)
    };
    let spec = AttnSpec {
        stage: SdpaStage::Closed,
        mask: Mask::CAUSAL,
        ..AttnSpec::open()
    };
    let y = q.op(Op::Attn(spec), &[x, k, v]);
    q.done(&[y])
}

/// Scores `[B,H,S,S]` and values `[B,H,S,D]`.
fn operands(q: &mut Build, g: &mut Gen, dt: DType) -> (NodeId, NodeId) {
    let (h, d) = (g.dim(), g.dim());
    let scores = q.input("scores", dt, &[b(), n(h), s(), s()]);
    let v = q.input("v", dt, &[b(), n(h), s(), n(d)]);
    (scores, v)
}

/// Query indices `[S,1]` and key indices `[1,S]`.
fn indices(q: &mut Build) -> (NodeId, NodeId) {
    let i = q.op(
        Op::Iota {
            len: s(),
            dtype: DType::I64,
        },
        &[],
    );
    let rows = q.reshape(i, &[s(), n(1)]);
    let cols = q.reshape(i, &[n(1), s()]);
    (rows, cols)
}

fn additive(q: &mut Build, seen: NodeId, dt: DType) -> NodeId {
    let zero = q.konst(0.0, dt);
    let min = q.konst(-1e9, dt);
    q.op(Op::Where, &[seen, zero, min])
}

/// A causal mask, with a window if given, in one of four spellings.
fn mask(q: &mut Build, dt: DType, window: Option<i64>, spelling: u8) -> NodeId {
    let (i, j) = indices(q);
    let mut seen = match spelling {
        0 => q.bin(BinaryFn::Le, j, i),
        1 => q.bin(BinaryFn::Ge, i, j),
        2 => {
            let one = q.konst(1.0, DType::I64);
            let next = q.bin(BinaryFn::Add, i, one);
            q.bin(BinaryFn::Lt, j, next)
        }
        _ => {
            let later = q.bin(BinaryFn::Gt, j, i);
            q.un(UnaryFn::Not, later)
        }
    };
    if let Some(w) = window {
        let w = q.konst(w as f64, DType::I64);
        let first = q.bin(BinaryFn::Sub, i, w);
        let recent = q.bin(BinaryFn::Gt, j, first);
        seen = q.bin(BinaryFn::And, seen, recent);
    }
    let m = if spelling == 3 {
        // (1 - seen) * min, as in older models.
        let one = q.konst(1.0, dt);
        let seen = q.op(Op::Cast(dt), &[seen]);
        let hidden = q.bin(BinaryFn::Sub, one, seen);
        let min = q.konst(-1e9, dt);
        q.bin(BinaryFn::Mul, hidden, min)
    } else {
        additive(q, seen, dt)
    };
    q.reshape(m, &[n(1), n(1), s(), s()])
}
