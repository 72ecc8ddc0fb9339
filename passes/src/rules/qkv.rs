//! Packed projections of q, k and v with head norms and RoPE, joined in the attention step.

use crate::rule::{Apply, Exactness, Rule, Stage};
use crate::sample::{Build, Gen, n, t};
use egg::Id;
use lathe_ir::{
    AttnSpec, BinaryFn, DType, GemmSpec, Graph, Mask, NodeId, Op, PackKind, ProjSpec, QkvSpec,
    Real, RopeSpec, SdpaStage,
};

pub(super) const RULES: &[Rule] = &[PROJ, PROJ_BIAS, PROJ_NORM, PROJ_ROPE, QKV_JOIN];

const PROJ: Rule = Rule {
    name: "proj",
    stage: Stage::Fuse,
    equation: "reshape(linear(x, w), [T,heads,D]) => proj(x, w)",
    exactness: Exactness::Exact,
    doc: "One form for bias, head norm and RoPE keeps the QKV join one rule.",
    lhs: &["(reshape ?r (linear ?x ?w))"],
    rhs: |a| {
        let none = a.none();
        project(a, none)
    },
    sample: |g| {
        let mut q = Build::new();
        let y = heads(&mut q, g, false);
        q.done(&[y])
    },
    near_misses: &[("the rows are split, not the features", |g| {
        let mut q = Build::new();
        let k = g.dim();
        let x = q.input("x", DType::F32, &[t(), n(2), n(k)]);
        let w = q.weight("w", DType::F32, &[6, k]);
        let y = q.op(Op::Linear, &[x, w]);
        let y = q.reshape(y, &[t(), n(4), n(3)]);
        q.done(&[y])
    })],
};

const PROJ_BIAS: Rule = Rule {
    name: "proj-bias",
    stage: Stage::Fuse,
    equation: "reshape(linear(x, w) + b, [T,heads,D]) => proj(x, w, b)",
    exactness: Exactness::Exact,
    doc: "As proj, for attention biases.",
    lhs: &["(reshape ?r (add (linear ?x ?w) ?b))"],
    rhs: |a| {
        let b = a.id("?b");
        if !a.value(b).weight_only {
            return None;
        }
        project(a, b)
    },
    sample: |g| {
        let mut q = Build::new();
        let y = heads(&mut q, g, true);
        q.done(&[y])
    },
    near_misses: &[("the bias is no weight", |g| {
        let mut q = Build::new();
        let k = g.dim();
        let x = q.input("x", DType::F32, &[t(), n(k)]);
        let b = q.input("b", DType::F32, &[n(6)]);
        let w = q.weight("w", DType::F32, &[6, k]);
        let y = q.op(Op::Linear, &[x, w]);
        let y = q.bin(BinaryFn::Add, y, b);
        let y = q.reshape(y, &[t(), n(2), n(3)]);
        q.done(&[y])
    })],
};

fn project(a: &mut Apply<'_>, bias: Id) -> Option<Id> {
    let Op::Reshape(shape) = a.op("?r") else {
        return None;
    };
    let x = a.ty("?x")?;
    let (rows, heads, head_dim) = match shape[..] {
        [r, h, d] => (r, h.known()?, d.known()?),
        _ => return None,
    };
    if x.rank() != 2 || x.shape[0] != rows {
        return None;
    }
    let spec = ProjSpec {
        heads: heads as u32,
        head_dim: head_dim as u32,
        head_norm: None,
        rope: None,
    };
    let (x, w) = (a.id("?x"), a.id("?w"));
    let none = a.none();
    a.add(Op::Proj(spec), &[x, w, bias, none, none, none])
}

const PROJ_NORM: Rule = Rule {
    name: "proj-norm",
    stage: Stage::Fuse,
    equation: "rmsnorm(proj(x, w, b), g) => proj{head_norm}(x, w, b, g)",
    exactness: Exactness::Exact,
    doc: "Qwen 3 normalises each query and key head before RoPE.",
    lhs: &["(rmsnorm ?e (proj ?p ?x ?w ?b ?g0 ?n1 ?n2) ?g)"],
    rhs: |a| {
        let (Op::RmsNorm { eps }, Op::Proj(spec)) = (a.op("?e"), a.op("?p")) else {
            return None;
        };
        if spec.head_norm.is_some() || spec.rope.is_some() {
            return None;
        }
        let spec = ProjSpec {
            head_norm: Some(eps),
            ..spec
        };
        let ops = [
            a.id("?x"),
            a.id("?w"),
            a.id("?b"),
            a.id("?g"),
            a.id("?n1"),
            a.id("?n2"),
        ];
        a.add(Op::Proj(spec), &ops)
    },
    sample: |g| {
        let mut q = Build::new();
        let y = proj(&mut q, g, None);
        let w = q.weight("g", DType::F32, &[6]);
        let y = q.op(
            Op::RmsNorm {
                eps: Real::new(1e-6),
            },
            &[y, w],
        );
        q.done(&[y])
    },
    near_misses: &[("RoPE came first", |g| {
        let mut q = Build::new();
        let y = proj(
            &mut q,
            g,
            Some(RopeSpec {
                scaling: Real::new(1.0),
            }),
        );
        let w = q.weight("g", DType::F32, &[6]);
        let y = q.op(
            Op::RmsNorm {
                eps: Real::new(1e-6),
            },
            &[y, w],
        );
        q.done(&[y])
    })],
};

const PROJ_ROPE: Rule = Rule {
    name: "proj-rope",
    stage: Stage::Fuse,
    equation: "rope(proj(x, w, b, g), reshape(pos, [T,1]), f) => proj{rope}(x, w, b, g, pos, f)",
    exactness: Exactness::Exact,
    doc: "RoPE is the last thing that happens to a query or key head.",
    lhs: &["(rope ?r (proj ?p ?x ?w ?b ?g ?n1 ?n2) (reshape ?s ?pos) ?f)"],
    rhs: |a| {
        let (Op::Rope(rope), Op::Proj(spec)) = (a.op("?r"), a.op("?p")) else {
            return None;
        };
        let rows = a.ty("?x")?.shape[0];
        if spec.rope.is_some()
            || a.ty("?pos")?.shape != [rows]
            || a.op("?s") != Op::Reshape(vec![rows, n(1)])
        {
            return None;
        }
        let spec = ProjSpec {
            rope: Some(rope),
            ..spec
        };
        let ops = [
            a.id("?x"),
            a.id("?w"),
            a.id("?b"),
            a.id("?g"),
            a.id("?pos"),
            a.id("?f"),
        ];
        a.add(Op::Proj(spec), &ops)
    },
    sample: |g| {
        let mut q = Build::new();
        let y = proj(&mut q, g, None);
        let pos = q.input("positions", DType::I64, &[t()]);
        let pos = q.reshape(pos, &[t(), n(1)]);
        let f = q.freqs(3);
        let y = q.op(
            Op::Rope(RopeSpec {
                scaling: Real::new(1.0),
            }),
            &[y, pos, f],
        );
        q.done(&[y])
    },
    near_misses: &[("each head has its own position", |g| {
        let mut q = Build::new();
        let y = proj(&mut q, g, None);
        let pos = q.input("positions", DType::I64, &[n(2)]);
        let pos = q.reshape(pos, &[n(1), n(2)]);
        let f = q.freqs(3);
        let y = q.op(
            Op::Rope(RopeSpec {
                scaling: Real::new(1.0),
            }),
            &[y, pos, f],
        );
        q.done(&[y])
    })],
};

const QKV_JOIN: Rule = Rule {
    name: "qkv-join",
    stage: Stage::Fuse,
    equation: "attn_step(proj(x, wq), proj(x, wk), proj(x, wv), c) => attn_qkv(gemm(x, pack(wq, wk, wv)), c)",
    exactness: Exactness::Exact,
    doc: "One GEMM for the three projections; head norms, RoPE and the append move into the attention \
          step. Placed at the join: the tuple of the step. All or none of the projections have a bias; \
          queries and keys share epsilon, RoPE and positions; values have neither norm nor RoPE.",
    lhs: &[
        "(attn_step ?a (proj ?pq ?x ?wq ?bq ?gq ?pos ?f) (proj ?pk ?x ?wk ?bk ?gk ?pos ?f) (proj ?pv ?x ?wv ?bv ?n ?n ?n) ?c)",
    ],
    rhs: |a| {
        let (Op::AttnStep(attn), Op::Proj(pq), Op::Proj(pk), Op::Proj(pv)) =
            (a.op("?a"), a.op("?pq"), a.op("?pk"), a.op("?pv"))
        else {
            return None;
        };
        let plain_v = pv.head_norm.is_none() && pv.rope.is_none();
        if pq.head_norm != pk.head_norm || pq.rope != pk.rope || !plain_v {
            return None;
        }
        let kind = PackKind::Qkv {
            head_dim: pq.head_dim,
            interleave: pq.rope.is_some(),
        };
        let weights = [a.id("?wq"), a.id("?wk"), a.id("?wv")];
        if !weights.iter().all(|&w| a.value(w).weight_only) {
            return None;
        }
        let w = a.add(Op::Pack(kind), &weights)?;
        let none = a.none();
        let biases = [a.id("?bq"), a.id("?bk"), a.id("?bv")];
        let bias = match ["?bq", "?bk", "?bv"].map(|b| a.is_none(b)) {
            [true, true, true] => none,
            [false, false, false] => a.add(Op::Pack(kind), &biases)?,
            _ => return None,
        };
        let (gq, gk) = (a.id("?gq"), a.id("?gk"));
        let (gq, gk) = if pq.head_norm.is_some() && pq.rope.is_some() {
            let head = PackKind::Head {
                head_dim: pq.head_dim,
            };
            (a.add(Op::Pack(head), &[gq])?, a.add(Op::Pack(head), &[gk])?)
        } else {
            (gq, gk)
        };
        let x = a.id("?x");
        let qkv = a.add(Op::Gemm(GemmSpec::PLAIN), &[x, w, bias, none, none, none])?;
        let spec = QkvSpec {
            attn,
            heads: pq.heads,
            kv_heads: pk.heads,
            head_dim: pq.head_dim,
            head_norm: pq.head_norm,
            rope: pq.rope,
        };
        let ops = [qkv, gq, gk, a.id("?pos"), a.id("?f"), a.id("?c")];
        a.add(Op::AttnQkv(spec), &ops)
    },
    sample: |g| {
        let with = (
            g.pick(&[false, true]),
            g.pick(&[false, true]),
            g.pick(&[false, true]),
        );
        step(g, with, false)
    },
    near_misses: &[
        ("keys are projected from other rows", |g| {
            step(g, (false, false, true), true)
        }),
        ("a head of 8 features has no interleaved layout", |g| {
            step_of(g, (false, false, true), false, 8)
        }),
    ],
};

fn step(g: &mut Gen, with: (bool, bool, bool), foreign: bool) -> Graph {
    step_of(g, with, foreign, 16)
}

/// A step from three projections, with biases, head norms and RoPE as asked for.
fn step_of(g: &mut Gen, (bias, norm, rope): (bool, bool, bool), foreign: bool, d: i64) -> Graph {
    let mut q = Build::new();
    let (dt, k, kv, groups) = (g.float(), g.dim(), g.pick(&[1, 2]), g.pick(&[1, 3]));
    let x = q.input("x", dt, &[t(), n(k)]);
    let other = if foreign {
        q.input("z", dt, &[t(), n(k)])
    } else {
        x
    };
    let none = q.none();
    let (pos, f) = if rope {
        (q.input("positions", DType::I64, &[t()]), q.freqs(d / 2))
    } else {
        (none, none)
    };
    let mut part = |name: &str, x: NodeId, heads: i64, query_or_key: bool| {
        let spec = ProjSpec {
            heads: heads as u32,
            head_dim: d as u32,
            head_norm: (norm && query_or_key).then(|| Real::new(1e-6)),
            rope: (rope && query_or_key).then(|| RopeSpec {
                scaling: Real::new(1.0),
            }),
        };
        let w = q.weight(&format!("w{name}"), dt, &[heads * d, k]);
        let b = if bias {
            q.weight(&format!("b{name}"), dt, &[heads * d])
        } else {
            none
        };
        let gamma = if spec.head_norm.is_some() {
            q.weight(&format!("g{name}"), dt, &[d])
        } else {
            none
        };
        let (p, f) = if spec.rope.is_some() {
            (pos, f)
        } else {
            (none, none)
        };
        q.op(Op::Proj(spec), &[x, w, b, gamma, p, f])
    };
    let query = part("q", x, kv * groups, true);
    let key = part("k", other, kv, true);
    let value = part("v", x, kv, false);
    let cache = q.op(
        Op::Cache {
            layer: 0,
            kv_heads: kv as u32,
            head_dim: d as u32,
        },
        &[],
    );
    let spec = AttnSpec {
        groups: groups as u32,
        mask: Mask::CAUSAL,
        stage: SdpaStage::Closed,
        ..AttnSpec::open()
    };
    let y = q.op(Op::AttnStep(spec), &[query, key, value, cache]);
    let y = q.op(Op::Get(0), &[y]);
    q.done(&[y])
}

fn heads(q: &mut Build, g: &mut Gen, bias: bool) -> NodeId {
    let (dt, k, h, d) = (g.float(), g.dim(), g.dim(), g.dim());
    let x = q.input("x", dt, &[t(), n(k)]);
    let w = q.weight("w", dt, &[h * d, k]);
    let mut y = q.op(Op::Linear, &[x, w]);
    if bias {
        let b = q.weight("b", dt, &[h * d]);
        y = q.bin(BinaryFn::Add, y, b);
    }
    q.reshape(y, &[t(), n(h), n(d)])
}

/// A projection into two heads of six features.
fn proj(q: &mut Build, g: &mut Gen, rope: Option<RopeSpec>) -> NodeId {
    let k = g.dim();
    let x = q.input("x", DType::F32, &[t(), n(k)]);
    let w = q.weight("w", DType::F32, &[12, k]);
    let none = q.none();
    let (p, f) = if rope.is_some() {
        (q.input("positions", DType::I64, &[t()]), q.freqs(3))
    } else {
        (none, none)
    };
    let spec = ProjSpec {
        heads: 2,
        head_dim: 6,
        head_norm: None,
        rope,
    };
    q.op(Op::Proj(spec), &[x, w, none, none, p, f])
}
