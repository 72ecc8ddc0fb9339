//! Packed projections of q, k and v with head norms and RoPE, joined in the attention step.

use crate::rule::{Apply, Exactness, Rule, Stage};
use egg::Id;
use lathe_ir::{Dim, GemmSpec, Op, PackKind, ProjSpec, QkvSpec};

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
            || a.op("?s") != Op::Reshape(vec![rows, Dim::new(1)])
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
};
