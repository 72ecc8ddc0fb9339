//! Packed projections of q, k and v with head norms and RoPE, joined in the attention step.

use crate::rule::{Apply, Exactness, Rule, Stage};
use egg::Id;
use lathe_ir::ops::{AttnQkv, AttnStep, Gemm, Pack, Proj, Reshape, RmsNorm};
use lathe_ir::ops::{attn_qkv, gemm, proj};
use lathe_ir::{Dim, Op, Operands, StepInput};

pub(super) const RULES: &[Rule] = &[PROJ, PROJ_BIAS, PROJ_NORM, PROJ_ROPE, QKV_JOIN];

const PROJ: Rule = Rule {
    name: "proj",
    stage: Stage::Fuse,
    equation: "reshape(linear(x, w), [T,heads,D]) => proj(x, w)",
    exactness: Exactness::Exact,
    doc: "One form for bias, head norm and RoPE keeps the QKV join one rule.",
    lhs: &["(reshape ?r (linear ?x ?w))"],
    rhs: |a| project(a, None),
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
        if !a.value(b).is_loaded() {
            return None;
        }
        project(a, Some(b))
    },
};

fn project(a: &mut Apply<'_>, bias: Option<Id>) -> Option<Id> {
    let Reshape(shape) = a.payload("?r")?;
    let x = a.ty("?x")?;
    let (rows, heads, head_dim) = match shape[..] {
        [r, h, d] => (r, h.known()?, d.known()?),
        _ => return None,
    };
    if x.rank() != 2 || x.shape[0] != rows {
        return None;
    }
    let spec = Proj {
        heads: heads as u32,
        head_dim: head_dim as u32,
        head_norm: None,
        rope: None,
    };
    let rows = Operands::from([a.id("?x"), a.id("?w")]);
    a.add(spec, rows.with(proj::BIAS, bias))
}

const PROJ_NORM: Rule = Rule {
    name: "proj-norm",
    stage: Stage::Fuse,
    equation: "rmsnorm(proj(x, w, b), g) => proj{head_norm}(x, w, b, g)",
    exactness: Exactness::Exact,
    doc: "Qwen 3 normalises each query and key head before RoPE.",
    lhs: &["(rmsnorm ?e (proj ?p ?x ?w bias=?b) ?g)"],
    rhs: |a| {
        let (RmsNorm { eps }, spec) = (a.payload("?e")?, a.payload::<Proj>("?p")?);
        let spec = Proj {
            head_norm: Some(eps),
            ..spec
        };
        let rows = Operands::from([a.id("?x"), a.id("?w")]);
        let operands = rows
            .with(proj::BIAS, a.opt("?b"))
            .with(proj::GAMMA, a.id("?g"));
        a.add(spec, operands)
    },
};

const PROJ_ROPE: Rule = Rule {
    name: "proj-rope",
    stage: Stage::Fuse,
    equation: "rope(proj(x, w, b, g), reshape(pos, [T,1]), f) => proj{rope}(x, w, b, g, pos, f)",
    exactness: Exactness::Exact,
    doc: "RoPE is the last thing that happens to a query or key head.",
    lhs: &["(rope ?r (proj ?p ?x ?w bias=?b gamma=?g) (reshape ?s ?pos) ?f)"],
    rhs: |a| {
        let (rope, spec) = (a.payload("?r")?, a.payload::<Proj>("?p")?);
        let rows = a.ty("?x")?.shape[0];
        let column = Reshape(vec![rows, Dim::new(1)]);
        if a.ty("?pos")?.shape != [rows] || a.payload::<Reshape>("?s")? != column {
            return None;
        }
        let spec = Proj {
            rope: Some(rope),
            ..spec
        };
        let rows = Operands::from([a.id("?x"), a.id("?w")]);
        let operands = rows
            .with(proj::BIAS, a.opt("?b"))
            .with(proj::GAMMA, a.opt("?g"))
            .with(proj::POSITIONS, a.id("?pos"))
            .with(proj::INV_FREQ, a.id("?f"));
        a.add(spec, operands)
    },
};

const QKV_JOIN: Rule = Rule {
    name: "qkv-join",
    stage: Stage::Fuse,
    equation: "attn_step(proj(x, wq), proj(x, wk), proj(x, wv), c) => attn_qkv(gemm(x, pack(wq, wk, wv)), c)",
    exactness: Exactness::Exact,
    doc: "One GEMM for the three projections; head norms, RoPE and the append move into the attention \
          step. Placed at the join: the tuple of the step. All or none of the projections have a bias; \
          queries and keys share epsilon, RoPE and positions, which are those of the step's rows; values \
          have neither norm nor RoPE.",
    lhs: &["(attn_step ?a \
          (proj ?pq ?x ?wq bias=?bq gamma=?gq positions=?pos inv_freq=?f) \
          (proj ?pk ?x ?wk bias=?bk gamma=?gk positions=?pos inv_freq=?f) \
          (proj ?pv ?x ?wv bias=?bv) ?c)"],
    rhs: |a| {
        let AttnStep(attn) = a.payload("?a")?;
        let (pq, pk) = (a.payload::<Proj>("?pq")?, a.payload::<Proj>("?pk")?);
        if pq.head_norm != pk.head_norm || pq.rope != pk.rope {
            return None;
        }
        // The step rotates by the positions of its rows, and by frequencies from a table.
        if pq.rope.is_some() && !(is_positions(a, a.opt("?pos")?) && is_table(a, a.opt("?f")?)) {
            return None;
        }
        let kind = Pack::Qkv {
            head_dim: pq.head_dim,
            interleave: pq.rope.is_some(),
        };
        let weights = [a.id("?wq"), a.id("?wk"), a.id("?wv")];
        if !weights.iter().all(|&w| a.value(w).is_loaded()) {
            return None;
        }
        let w = a.add(kind, weights)?;
        let bias = match ["?bq", "?bk", "?bv"].map(|b| a.opt(b)) {
            [None, None, None] => None,
            [Some(q), Some(k), Some(v)] => Some(a.add(kind, [q, k, v])?),
            _ => return None,
        };
        let (mut q_norm, mut k_norm) = (a.opt("?gq"), a.opt("?gk"));
        if pq.rope.is_some() {
            // Their factors are in the order of the interleaved heads.
            let head = Pack::Head {
                head_dim: pq.head_dim,
            };
            for norm in [&mut q_norm, &mut k_norm] {
                *norm = match *norm {
                    Some(g) => Some(a.add(head, [g])?),
                    None => None,
                };
            }
        }
        let rows = Operands::from([a.id("?x"), w]);
        let qkv = a.add(Gemm::PLAIN, rows.with(gemm::BIAS, bias))?;
        let spec = AttnQkv {
            attn,
            heads: pq.heads,
            kv_heads: pk.heads,
            head_dim: pq.head_dim,
            head_norm: pq.head_norm,
            rope: pq.rope,
        };
        let operands = Operands::from([qkv, a.id("?c")])
            .with(attn_qkv::Q_NORM, q_norm)
            .with(attn_qkv::K_NORM, k_norm)
            .with(attn_qkv::POSITIONS, a.opt("?pos"))
            .with(attn_qkv::INV_FREQ, a.opt("?f"));
        a.add(spec, operands)
    },
};

/// Whether a value is the positions of a step's rows.
fn is_positions(a: &Apply<'_>, id: Id) -> bool {
    let named = |(op, _): &(Op, Operands<Id>)| match op {
        Op::Input(input) => input.name == StepInput::Positions.name(),
        _ => false,
    };
    a.forms(id, "input").iter().any(named)
}

fn is_table(a: &Apply<'_>, id: Id) -> bool {
    a.form(id, "table").is_some()
}
