//! From full sequences to the rows of one step: `win` moves down through row-wise operations and
//! inserts the KV cache at attention.
//!
//! `win` of a value `[B,S,..]` is the value's rows of this step, `[T,..]`, the token axis first.
//! What it cannot move through (a reduction over the sequence, an attention that sees later rows)
//! keeps it, and extraction names that value.

use crate::egraph::analysis::is_step_shape;
use crate::rule::{Apply, Exactness, Rule, Stage};
use egg::Id;
use lathe_ir::ops::{
    Angles, Attn, AttnStep, Cache, Cast, Embedding, Get, Input, Iota, Linear, Matmul, Reduce, Silu,
    Softmax, SwiGlu, Where, Win,
};
use lathe_ir::{BinaryFn, DType, Dim, Op, StepInput, Sym, UnaryFn};

pub(super) const RULES: &[Rule] = &[
    INPUT, POSITIONS, UNARY, CAST, BINARY, WHERE, REDUCE, LINEAR, ROWWISE, RMSNORM, SWIGLU, ANGLES,
    ROPE, EMBEDDING, ATTENTION,
];

/// Prefix of the names of step inputs that are windows of full-sequence inputs.
pub const STEP: &str = "step.";

/// The payload of the matched `win`. A window that still holds whole sequences is no value of a
/// step: it goes nowhere.
pub(super) fn spec(a: &Apply<'_>) -> Option<Win> {
    match a.op("?w") {
        Op::Win(w) if is_step_shape(&a.tensor(a.root)?.shape) => Some(w),
        _ => None,
    }
}

/// Where an axis of a full value stands in its window: the token axis is 0, the others follow.
pub(super) fn window_axis(w: Win, axis: usize) -> Option<usize> {
    let gone = |i: usize| w.batch == Some(i as u8) || w.seq == Some(i as u8);
    (!gone(axis)).then(|| 1 + (0..axis).filter(|&i| !gone(i)).count())
}

/// The window of an operand that broadcasts to a value of rank `rank`, whose window is `w`: so
/// that it broadcasts to the window of the value. Axes that the operand lacks, or has with extent
/// 1, stay broadcast.
pub(super) fn operand(a: &mut Apply<'_>, w: Win, rank: usize, x: Id) -> Option<Id> {
    let shape = a.tensor(x)?.shape;
    let missing = rank - shape.len();
    let find = |axis: Option<u8>, sym: Sym| -> Option<usize> {
        let i = usize::from(axis?).checked_sub(missing)?;
        shape[i].is_sym(sym).then_some(i)
    };
    let (batch, seq) = (find(w.batch, Sym::B), find(w.seq, Sym::S));
    // Axes of the full value's batch and sequence along which the operand is constant go away.
    let window_axes: Vec<usize> = [w.batch, w.seq]
        .iter()
        .filter_map(|&axis| usize::from(axis?).checked_sub(missing))
        .collect();
    let constant = |i: usize| window_axes.contains(&i) && Some(i) != batch && Some(i) != seq;
    if (0..shape.len()).any(|i| constant(i) && !shape[i].is(1)) {
        return None;
    }
    let kept: Vec<usize> = (0..shape.len()).filter(|&i| !constant(i)).collect();
    let x = a.reshape(x, kept.iter().map(|&i| shape[i]).collect())?;
    let place = |axis: Option<usize>| {
        axis.map(|i| kept.iter().position(|&k| k == i).expect("kept axes") as u8)
    };
    let (batch, seq) = (place(batch), place(seq));
    if batch.is_none() && seq.is_none() {
        return Some(x);
    }
    let y = a.add(Win { batch, seq }, [x])?;
    // Ones between the token axis and the operand's own axes keep it aligned from the right.
    let full_rest = rank - usize::from(w.batch.is_some()) - usize::from(w.seq.is_some());
    let mut out = a.tensor(y)?.shape;
    while out.len() < full_rest + 1 {
        out.insert(1, Dim::new(1));
    }
    a.reshape(y, out)
}

/// `win(f(x, y, ..)) => f(win(x), win(y), ..)` for operands that broadcast to the result.
fn pointwise(a: &mut Apply<'_>, op: Op, operands: &[&str]) -> Option<Id> {
    let w = spec(a)?;
    let ids: Vec<Id> = operands.iter().map(|v| a.id(v)).collect();
    let mut rank = 0;
    for &id in &ids {
        rank = rank.max(a.tensor(id)?.rank());
    }
    let mut windows = Vec::with_capacity(ids.len());
    for id in ids {
        windows.push(operand(a, w, rank, id)?);
    }
    let y = a.add(op, &windows)?;
    (a.value(y).ty == a.value(a.root).ty).then_some(y)
}

const INPUT: Rule = Rule {
    name: "win-input",
    stage: Stage::KvCache,
    equation: "win(input x) => input step.x",
    exactness: Exactness::Exact,
    doc: "The rows of an input that belong to this step are an input of the step. Not those of an input \
          that is called as what a step is given anyway: positions and wanted rows.",
    lhs: &["(win ?w (input ?i))"],
    rhs: |a| {
        let Op::Input(Input { name, dtype, .. }) = a.op("?i") else {
            return None;
        };
        spec(a)?;
        let shape = a.tensor(a.root)?.shape;
        let name = format!("{STEP}{name}");
        match StepInput::by_name(&name) {
            Some(StepInput::Tokens) if shape.len() == 1 && !dtype.is_float() => {}
            Some(_) => return None,
            None => {}
        }
        a.add(Input { name, dtype, shape }, [])
    },
};

const POSITIONS: Rule = Rule {
    name: "win-positions",
    stage: Stage::KvCache,
    equation: "win(iota(S)) => cast(input step.positions)",
    exactness: Exactness::Exact,
    doc: "Row indices of the full sequence are the positions of the step's tokens, which are integers; \
          other element types are conversions of them.",
    lhs: &["(win ?w (iota ?i))"],
    rhs: |a| {
        let Op::Iota(Iota { len, dtype }) = a.op("?i") else {
            return None;
        };
        if len != Dim::sym(Sym::S) {
            return None;
        }
        let positions = Input {
            name: StepInput::Positions.name().to_string(),
            dtype: DType::I64,
            shape: vec![Dim::sym(Sym::T)],
        };
        let positions = a.add(positions, [])?;
        match dtype {
            DType::I64 => Some(positions),
            _ => a.add(Cast(dtype), [positions]),
        }
    },
};

const UNARY: Rule = Rule {
    name: "win-unary",
    stage: Stage::KvCache,
    equation: "win(f(x)) => f(win(x))",
    exactness: Exactness::Exact,
    doc: "Elementwise functions of one operand.",
    lhs: &[
        "(win ?w (neg ?x))",
        "(win ?w (abs ?x))",
        "(win ?w (exp ?x))",
        "(win ?w (log ?x))",
        "(win ?w (sqrt ?x))",
        "(win ?w (rsqrt ?x))",
        "(win ?w (sin ?x))",
        "(win ?w (cos ?x))",
        "(win ?w (tanh ?x))",
        "(win ?w (sigmoid ?x))",
        "(win ?w (erf ?x))",
        "(win ?w (relu ?x))",
        "(win ?w (not ?x))",
    ],
    rhs: |a| pointwise(a, Op::Unary(UnaryFn::ALL[a.spelling]), &["?x"]),
};

const CAST: Rule = Rule {
    name: "win-cast",
    stage: Stage::KvCache,
    equation: "win(cast(x)) => cast(win(x))",
    exactness: Exactness::Exact,
    doc: "Casts are elementwise.",
    lhs: &["(win ?w (cast ?c ?x))"],
    rhs: |a| {
        let c = a.op("?c");
        pointwise(a, c, &["?x"])
    },
};

const BINARY: Rule = Rule {
    name: "win-binary",
    stage: Stage::KvCache,
    equation: "win(f(x, y)) => f(win(x), win(y))",
    exactness: Exactness::Exact,
    doc: "Elementwise functions of two operands; what does not vary with the row stays as it is.",
    lhs: &[
        "(win ?w (add ?x ?y))",
        "(win ?w (sub ?x ?y))",
        "(win ?w (mul ?x ?y))",
        "(win ?w (div ?x ?y))",
        "(win ?w (pow ?x ?y))",
        "(win ?w (maximum ?x ?y))",
        "(win ?w (minimum ?x ?y))",
        "(win ?w (eq ?x ?y))",
        "(win ?w (ne ?x ?y))",
        "(win ?w (lt ?x ?y))",
        "(win ?w (le ?x ?y))",
        "(win ?w (gt ?x ?y))",
        "(win ?w (ge ?x ?y))",
        "(win ?w (and ?x ?y))",
        "(win ?w (or ?x ?y))",
    ],
    rhs: |a| pointwise(a, Op::Binary(BinaryFn::ALL[a.spelling]), &["?x", "?y"]),
};

const WHERE: Rule = Rule {
    name: "win-where",
    stage: Stage::KvCache,
    equation: "win(where(c, x, y)) => where(win(c), win(x), win(y))",
    exactness: Exactness::Exact,
    doc: "Elementwise, as win-binary.",
    lhs: &["(win ?w (where ?c ?x ?y))"],
    rhs: |a| pointwise(a, Op::Where(Where), &["?c", "?x", "?y"]),
};

const REDUCE: Rule = Rule {
    name: "win-reduce",
    stage: Stage::KvCache,
    equation: "win(reduce(x, axis)) => reduce(win(x), axis)   (axis neither batch nor sequence)",
    exactness: Exactness::Exact,
    doc: "Reductions within a row. A reduction over the sequence mixes rows and stays.",
    lhs: &[
        "(win ?w (sum ?r ?x))",
        "(win ?w (mean ?r ?x))",
        "(win ?w (amax ?r ?x))",
        "(win ?w (argmax ?r ?x))",
    ],
    rhs: |a| {
        let Op::Reduce(Reduce { f, axis, keepdim }) = a.op("?r") else {
            return None;
        };
        // Axes of the result from the reduced one on stand one further in x, if it went away.
        let shift = |i: Option<u8>| i.map(|i| if !keepdim && i >= axis { i + 1 } else { i });
        let w = spec(a)?;
        let w = Win {
            batch: shift(w.batch),
            seq: shift(w.seq),
        };
        let x = a.id("?x");
        a.tensor(x)?.shape[usize::from(axis)].known()?;
        let axis = window_axis(w, usize::from(axis))? as u8;
        let x = a.add(w, [x])?;
        a.add(Reduce { f, axis, keepdim }, [x])
    },
};

/// `win(f(x, ..)) => f(win(x), ..)` for functions of the last axis of x.
fn rowwise(a: &mut Apply<'_>, op: Op, others: &[Id]) -> Option<Id> {
    let w = spec(a)?;
    let last = a.tensor(a.id("?x"))?.rank() - 1;
    window_axis(w, last)?;
    let x = a.id("?x");
    let x = a.add(w, [x])?;
    let mut operands = vec![x];
    operands.extend_from_slice(others);
    a.add(op, &operands)
}

const LINEAR: Rule = Rule {
    name: "win-linear",
    stage: Stage::KvCache,
    equation: "win(linear(x, w)) => linear(win(x), w);  win(matmul(x, w)) likewise for a matrix w",
    exactness: Exactness::Exact,
    doc: "Projections are row-wise.",
    lhs: &["(win ?w (linear ?x ?m))", "(win ?w (matmul ?x ?m))"],
    rhs: |a| {
        let m = a.id("?m");
        let op = if a.spelling == 0 {
            Op::Linear(Linear)
        } else {
            Op::Matmul(Matmul)
        };
        if a.ty("?m")?.rank() != 2 || a.ty("?m")?.shape.iter().any(|d| d.known().is_none()) {
            return None;
        }
        rowwise(a, op, &[m])
    },
};

const ROWWISE: Rule = Rule {
    name: "win-rowwise",
    stage: Stage::KvCache,
    equation: "win(f(x)) => f(win(x))   (f = softmax, silu)",
    exactness: Exactness::Exact,
    doc: "Functions of the last axis; a softmax over the sequence stays.",
    lhs: &["(win ?w (softmax ?x))", "(win ?w (silu ?x))"],
    rhs: |a| {
        let op = if a.spelling == 0 {
            Op::Softmax(Softmax)
        } else {
            Op::Silu(Silu)
        };
        rowwise(a, op, &[])
    },
};

const RMSNORM: Rule = Rule {
    name: "win-rmsnorm",
    stage: Stage::KvCache,
    equation: "win(rmsnorm(x, g)) => rmsnorm(win(x), g)",
    exactness: Exactness::Exact,
    doc: "Norms are row-wise.",
    lhs: &["(win ?w (rmsnorm ?e ?x ?g))"],
    rhs: |a| {
        let (e, g) = (a.op("?e"), a.id("?g"));
        rowwise(a, e, &[g])
    },
};

const SWIGLU: Rule = Rule {
    name: "win-swiglu",
    stage: Stage::KvCache,
    equation: "win(swiglu(g, u)) => swiglu(win(g), win(u))",
    exactness: Exactness::Exact,
    doc: "The gate is elementwise.",
    lhs: &["(win ?w (swiglu ?x ?u))"],
    rhs: |a| {
        let (w, u) = (spec(a)?, a.id("?u"));
        let u = a.add(w, [u])?;
        rowwise(a, Op::SwiGlu(SwiGlu), &[u])
    },
};

const ANGLES: Rule = Rule {
    name: "win-angles",
    stage: Stage::KvCache,
    equation: "win(angles(p, f)) => angles(win(p), f)",
    exactness: Exactness::Exact,
    doc: "Each position has its own angles.",
    lhs: &["(win ?w (angles ?x ?f))"],
    rhs: |a| {
        let (w, x, f) = (spec(a)?, a.id("?x"), a.id("?f"));
        let x = a.add(w, [x])?;
        let y = a.add(Angles, [x, f])?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
};

const ROPE: Rule = Rule {
    name: "win-rope",
    stage: Stage::KvCache,
    equation: "win(rope(x, p, f)) => rope(win(x), win(p), f)",
    exactness: Exactness::Exact,
    doc: "Each row is rotated by its own position.",
    lhs: &["(win ?w (rope ?r ?x ?p ?f))"],
    rhs: |a| {
        let (w, r, p, f) = (spec(a)?, a.op("?r"), a.id("?p"), a.id("?f"));
        let lead = a.ty("?x")?.rank() - 1;
        let p = operand(a, w, lead, p)?;
        rowwise(a, r, &[p, f])
    },
};

const EMBEDDING: Rule = Rule {
    name: "win-embedding",
    stage: Stage::KvCache,
    equation: "win(embedding(table, ids)) => embedding(table, win(ids))",
    exactness: Exactness::Exact,
    doc: "Each token is looked up by itself.",
    lhs: &["(win ?w (embedding ?t ?x))"],
    rhs: |a| {
        let (w, t, x) = (spec(a)?, a.id("?t"), a.id("?x"));
        a.ty("?t")?.shape[0].known()?;
        window_axis(w, a.ty("?x")?.rank())?;
        let x = a.add(w, [x])?;
        a.add(Embedding, [t, x])
    },
};

const ATTENTION: Rule = Rule {
    name: "insert-kv-cache",
    stage: Stage::KvCache,
    equation: "win(attn(q, k, v)) => get0(attn_step(win(q), win(k), win(v), cache))   (causal)",
    exactness: Exactness::Reassociates,
    doc: "Under a causal mask row i reads rows <= i only, so with rows 0..s of k and v cached by earlier \
          steps of this same operation the rows of this step can be computed. The cache is that of the \
          value's layer, which only one attention of the layer can have.",
    lhs: &["(win ?w (attn ?p ?q ?k ?v))"],
    rhs: |a| {
        let Op::Attn(Attn(p)) = a.op("?p") else {
            return None;
        };
        let w = spec(a)?;
        if !p.mask.causal || w.batch != Some(0) || w.seq != Some(2) {
            return None;
        }
        let layer = a.value(a.root).origin().and_then(|p| p.layer)?;
        if !a.claim_cache(layer) {
            return None;
        }
        let k = a.ty("?k")?;
        let (kv_heads, head_dim) = (k.shape[1].known()?, k.shape[3].known()?);
        let mut ops = Vec::with_capacity(4);
        for v in ["?q", "?k", "?v"] {
            let x = a.id(v);
            ops.push(a.add(w, [x])?);
        }
        let cache = Op::Cache(Cache {
            layer,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
        });
        ops.push(a.add(cache, [])?);
        let step = a.add(AttnStep(p), &ops)?;
        a.add(Get(0), [step])
    },
};
