//! From full sequences to the rows of one step: `win` moves down through row-wise operations and
//! inserts the KV cache at attention (egraph.md 5.2).
//!
//! `win` of a value `[B,S,..]` is the value's rows of this step, `[T,..]`, the token axis first.
//! What it cannot move through (a reduction over the sequence, an attention that sees later rows)
//! keeps it, and extraction names that value.

use crate::egraph::analysis::is_step_shape;
use crate::rule::{Apply, Exactness, Rule, Stage};
use crate::sample::{Build, Gen, b, n, s};
use egg::Id;
use lathe_ir::{
    AttnSpec, BinaryFn, DType, Dim, Graph, Mask, NodeId, Op, Real, ReduceFn, RopeSpec, SdpaStage,
    Sym, UnaryFn, WinSpec,
};

pub(super) const RULES: &[Rule] = &[
    INPUT, POSITIONS, UNARY, CAST, BINARY, WHERE, REDUCE, LINEAR, ROWWISE, RMSNORM, SWIGLU, ANGLES,
    ROPE, EMBEDDING, ATTENTION,
];

/// Prefix of the names of step inputs that are windows of full-sequence inputs.
pub const STEP: &str = "step.";

/// The payload of the matched `win`. A window that still holds whole sequences is no value of a
/// step: it goes nowhere.
pub(super) fn spec(a: &Apply<'_>) -> Option<WinSpec> {
    match a.op("?w") {
        Op::Win(w) if is_step_shape(&a.tensor(a.root)?.shape) => Some(w),
        _ => None,
    }
}

/// Where an axis of a full value stands in its window: the token axis is 0, the others follow.
pub(super) fn window_axis(w: WinSpec, axis: usize) -> Option<usize> {
    let gone = |i: usize| w.batch == Some(i as u8) || w.seq == Some(i as u8);
    (!gone(axis)).then(|| 1 + (0..axis).filter(|&i| !gone(i)).count())
}

/// The window of an operand that broadcasts to a value of rank `rank`, whose window is `w`: so
/// that it broadcasts to the window of the value. Axes that the operand lacks, or has with extent
/// 1, stay broadcast.
pub(super) fn operand(a: &mut Apply<'_>, w: WinSpec, rank: usize, x: Id) -> Option<Id> {
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
    let y = a.add(Op::Win(WinSpec { batch, seq }), &[x])?;
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
    doc: "The rows of an input that belong to this step are an input of the step.",
    lhs: &["(win ?w (input ?i))"],
    rhs: |a| {
        let Op::Input { name, dtype, .. } = a.op("?i") else {
            return None;
        };
        spec(a)?;
        let shape = a.tensor(a.root)?.shape;
        let name = format!("{STEP}{name}");
        a.add(Op::Input { name, dtype, shape }, &[])
    },
    sample: |g| {
        let mut q = Build::new();
        let x = full(&mut q, g, "x", DType::F32);
        let y = q.win(x, Some(0), Some(1));
        q.done(&[y])
    },
    near_misses: &[("the window holds whole sequences", |g| {
        let mut q = Build::new();
        let x = full(&mut q, g, "x", DType::F32);
        let y = q.win(x, Some(0), None);
        q.done(&[y])
    })],
};

const POSITIONS: Rule = Rule {
    name: "win-positions",
    stage: Stage::KvCache,
    equation: "win(iota(S)) => input step.positions",
    exactness: Exactness::Exact,
    doc: "Row indices of the full sequence are the positions of the step's tokens.",
    lhs: &["(win ?w (iota ?i))"],
    rhs: |a| {
        let Op::Iota { len, dtype } = a.op("?i") else {
            return None;
        };
        let name = format!("{STEP}positions");
        let shape = vec![Dim::sym(Sym::T)];
        (len == s()).then(|| a.add(Op::Input { name, dtype, shape }, &[]))?
    },
    sample: |_| {
        let mut q = Build::new();
        let x = q.op(
            Op::Iota {
                len: s(),
                dtype: DType::I64,
            },
            &[],
        );
        let y = q.win(x, None, Some(0));
        q.done(&[y])
    },
    near_misses: &[("a count of sequences", |_| {
        let mut q = Build::new();
        let x = q.op(
            Op::Iota {
                len: b(),
                dtype: DType::I64,
            },
            &[],
        );
        let y = q.win(x, Some(0), None);
        q.done(&[y])
    })],
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
    sample: |g| {
        let mut q = Build::new();
        let f = g.pick(&UnaryFn::ALL);
        let dt = if f == UnaryFn::Not {
            DType::Bool
        } else {
            DType::F32
        };
        let x = full(&mut q, g, "x", dt);
        let y = q.un(f, x);
        let y = q.win(y, Some(0), Some(1));
        q.done(&[y])
    },
    near_misses: &[],
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
    sample: |g| {
        let mut q = Build::new();
        let x = full(&mut q, g, "x", DType::BF16);
        let y = q.cast(x, DType::F32);
        let y = q.win(y, Some(0), Some(1));
        q.done(&[y])
    },
    near_misses: &[],
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
    sample: |g| {
        let mut q = Build::new();
        let (h, d) = (g.dim(), g.dim());
        let f = g.pick(&BinaryFn::ALL);
        let dt = if matches!(f, BinaryFn::And | BinaryFn::Or) {
            DType::Bool
        } else {
            DType::F32
        };
        let x = q.input("x", dt, &[b(), n(h), s(), n(d)]);
        let shapes: [&[Dim]; 5] = [
            &[b(), n(1), s(), n(d)],
            &[n(1), n(1), s(), n(1)],
            &[s(), n(1)],
            &[n(h), n(1), n(d)],
            &[b(), n(1), n(1), n(d)],
        ];
        let y = q.input("y", dt, shapes[g.pick(&[0, 1, 2, 3, 4])]);
        let y = q.bin(f, x, y);
        let y = q.win(y, Some(0), Some(2));
        q.done(&[y])
    },
    near_misses: &[("one side is the keys of all rows", |g| {
        let mut q = Build::new();
        let x = q.input("x", DType::F32, &[b(), s(), n(1)]);
        let y = q.input("y", DType::F32, &[b(), s(), n(g.wide())]);
        let y = q.bin(BinaryFn::Mul, x, y);
        let y = q.win(y, Some(0), None);
        q.done(&[y])
    })],
};

const WHERE: Rule = Rule {
    name: "win-where",
    stage: Stage::KvCache,
    equation: "win(where(c, x, y)) => where(win(c), win(x), win(y))",
    exactness: Exactness::Exact,
    doc: "Elementwise, as win-binary.",
    lhs: &["(win ?w (where ?c ?x ?y))"],
    rhs: |a| pointwise(a, Op::Where, &["?c", "?x", "?y"]),
    sample: |g| {
        let mut q = Build::new();
        let x = full(&mut q, g, "x", DType::F32);
        let zero = q.konst(0.0, DType::F32);
        let c = q.bin(BinaryFn::Gt, x, zero);
        let y = q.op(Op::Where, &[c, x, zero]);
        let y = q.win(y, Some(0), Some(1));
        q.done(&[y])
    },
    near_misses: &[("whole sequences are chosen from", |g| {
        let mut q = Build::new();
        let x = full(&mut q, g, "x", DType::F32);
        let zero = q.konst(0.0, DType::F32);
        let c = q.bin(BinaryFn::Gt, x, zero);
        let y = q.op(Op::Where, &[c, x, zero]);
        let y = q.win(y, Some(0), None);
        q.done(&[y])
    })],
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
        let Op::Reduce { f, axis, keepdim } = a.op("?r") else {
            return None;
        };
        // Axes of the result from the reduced one on stand one further in x, if it went away.
        let shift = |i: Option<u8>| i.map(|i| if !keepdim && i >= axis { i + 1 } else { i });
        let w = spec(a)?;
        let w = WinSpec {
            batch: shift(w.batch),
            seq: shift(w.seq),
        };
        let x = a.id("?x");
        a.tensor(x)?.shape[usize::from(axis)].known()?;
        let axis = window_axis(w, usize::from(axis))? as u8;
        let x = a.add(Op::Win(w), &[x])?;
        a.add(Op::Reduce { f, axis, keepdim }, &[x])
    },
    sample: |g| {
        let mut q = Build::new();
        let x = full(&mut q, g, "x", DType::F32);
        let f = g.pick(&ReduceFn::ALL);
        let keepdim = g.pick(&[false, true]);
        let y = q.op(
            Op::Reduce {
                f,
                axis: 2,
                keepdim,
            },
            &[x],
        );
        let y = q.win(y, Some(0), Some(1));
        q.done(&[y])
    },
    near_misses: &[("a mean over the sequence", |g| {
        let mut q = Build::new();
        let x = full(&mut q, g, "x", DType::F32);
        let f = ReduceFn::Mean;
        let y = q.op(
            Op::Reduce {
                f,
                axis: 1,
                keepdim: false,
            },
            &[x],
        );
        let y = q.win(y, Some(0), None);
        q.done(&[y])
    })],
};

/// `win(f(x, ..)) => f(win(x), ..)` for functions of the last axis of x.
fn rowwise(a: &mut Apply<'_>, op: Op, others: &[Id]) -> Option<Id> {
    let w = spec(a)?;
    let last = a.tensor(a.id("?x"))?.rank() - 1;
    window_axis(w, last)?;
    let x = a.id("?x");
    let x = a.add(Op::Win(w), &[x])?;
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
            Op::Linear
        } else {
            Op::Matmul
        };
        if a.ty("?m")?.rank() != 2 || a.ty("?m")?.shape.iter().any(|d| d.known().is_none()) {
            return None;
        }
        rowwise(a, op, &[m])
    },
    sample: |g| {
        let mut q = Build::new();
        let (k, o) = (g.dim(), g.dim());
        let x = q.input("x", DType::F32, &[b(), s(), n(k)]);
        let (op, shape) = [(Op::Linear, [o, k]), (Op::Matmul, [k, o])][g.pick(&[0, 1])].clone();
        let w = q.weight("w", DType::F32, &shape);
        let y = q.op(op, &[x, w]);
        let y = q.win(y, Some(0), Some(1));
        q.done(&[y])
    },
    near_misses: &[("the sum is over the sequence", |g| {
        let mut q = Build::new();
        let x = q.input("x", DType::F32, &[b(), s(), s()]);
        let v = q.input("v", DType::F32, &[s(), n(g.dim())]);
        let y = q.op(Op::Matmul, &[x, v]);
        let y = q.win(y, Some(0), Some(1));
        q.done(&[y])
    })],
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
            Op::Softmax
        } else {
            Op::Silu
        };
        rowwise(a, op, &[])
    },
    sample: |g| {
        let mut q = Build::new();
        let x = full(&mut q, g, "x", DType::F32);
        let softmax = g.pick(&[true, false]);
        let y = q.op(if softmax { Op::Softmax } else { Op::Silu }, &[x]);
        let y = q.win(y, Some(0), Some(1));
        q.done(&[y])
    },
    near_misses: &[("a softmax over the sequence", |_| {
        let mut q = Build::new();
        let x = q.input("x", DType::F32, &[b(), n(2), s()]);
        let y = q.op(Op::Softmax, &[x]);
        let y = q.win(y, Some(0), Some(2));
        q.done(&[y])
    })],
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
    sample: |g| {
        let mut q = Build::new();
        let h = g.dim();
        let x = q.input("x", DType::F32, &[b(), s(), n(h)]);
        let w = q.weight("w", DType::F32, &[h]);
        let y = q.op(
            Op::RmsNorm {
                eps: Real::new(1e-5),
            },
            &[x, w],
        );
        let y = q.win(y, Some(0), Some(1));
        q.done(&[y])
    },
    near_misses: &[("a norm over the sequence", |_| {
        let mut q = Build::new();
        let x = q.input("x", DType::F32, &[b(), n(2), s()]);
        let w = q.input("w", DType::F32, &[s()]);
        let y = q.op(
            Op::RmsNorm {
                eps: Real::new(1e-5),
            },
            &[x, w],
        );
        let y = q.win(y, Some(0), Some(2));
        q.done(&[y])
    })],
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
        let u = a.add(Op::Win(w), &[u])?;
        rowwise(a, Op::SwiGlu, &[u])
    },
    sample: |g| {
        let mut q = Build::new();
        let d = g.dim();
        let x = q.input("x", DType::F32, &[b(), s(), n(d)]);
        let u = q.input("u", DType::F32, &[b(), s(), n(d)]);
        let y = q.op(Op::SwiGlu, &[x, u]);
        let y = q.win(y, Some(0), Some(1));
        q.done(&[y])
    },
    near_misses: &[],
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
        let x = a.add(Op::Win(w), &[x])?;
        let y = a.add(Op::Angles, &[x, f])?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
    sample: |g| {
        let mut q = Build::new();
        let p = q.input("p", DType::I64, &[b(), s()]);
        let f = q.freqs(g.dim());
        let y = q.op(Op::Angles, &[p, f]);
        let y = q.win(y, Some(0), Some(1));
        q.done(&[y])
    },
    near_misses: &[],
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
    sample: |g| {
        let mut q = Build::new();
        let (h, f) = (g.dim(), g.dim());
        let x = q.input("x", DType::F32, &[b(), n(h), s(), n(2 * f)]);
        let p = q.input("p", DType::I64, &[b(), n(1), s()]);
        let f = q.freqs(f);
        let y = q.op(
            Op::Rope(RopeSpec {
                scaling: Real::new(1.0),
            }),
            &[x, p, f],
        );
        let y = q.win(y, Some(0), Some(2));
        q.done(&[y])
    },
    near_misses: &[],
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
        let x = a.add(Op::Win(w), &[x])?;
        a.add(Op::Embedding, &[t, x])
    },
    sample: |g| {
        let mut q = Build::new();
        let t = q.weight("t", DType::F32, &[7, g.dim()]);
        let ids = q.input("ids", DType::I64, &[b(), s()]);
        let y = q.op(Op::Embedding, &[t, ids]);
        let y = q.win(y, Some(0), Some(1));
        q.done(&[y])
    },
    near_misses: &[("the table holds whole sequences", |_| {
        let mut q = Build::new();
        let t = q.input("t", DType::F32, &[n(7), s()]);
        let ids = q.input("ids", DType::I64, &[b()]);
        let y = q.op(Op::Embedding, &[t, ids]);
        let y = q.win(y, Some(0), Some(1));
        q.done(&[y])
    })],
};

const ATTENTION: Rule = Rule {
    name: "insert-kv-cache",
    stage: Stage::KvCache,
    equation: "win(attn(q, k, v)) => get0(attn_step(win(q), win(k), win(v), cache))   (causal)",
    exactness: Exactness::Reassociates,
    doc: "Under a causal mask row i reads rows <= i only, so with rows 0..s of k and v cached by earlier \
          steps of this same operation the rows of this step can be computed. The cache is that of the \
          value's layer.",
    lhs: &["(win ?w (attn ?p ?q ?k ?v))"],
    rhs: |a| {
        let Op::Attn(p) = a.op("?p") else { return None };
        let w = spec(a)?;
        if !p.mask.causal || w.batch != Some(0) || w.seq != Some(2) {
            return None;
        }
        let layer = a.value(a.root).origin().and_then(|p| p.layer)?;
        let k = a.ty("?k")?;
        let (kv_heads, head_dim) = (k.shape[1].known()?, k.shape[3].known()?);
        let mut ops = Vec::with_capacity(4);
        for v in ["?q", "?k", "?v"] {
            let x = a.id(v);
            ops.push(a.add(Op::Win(w), &[x])?);
        }
        let cache = Op::Cache {
            layer,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
        };
        ops.push(a.add(cache, &[])?);
        let step = a.add(Op::AttnStep(p), &ops)?;
        a.add(Op::Get(0), &[step])
    },
    sample: |g| {
        let window = g.pick(&[None, Some(2)]);
        attend(
            g,
            Mask {
                causal: true,
                window,
            },
        )
    },
    near_misses: &[
        ("every row sees every other", |g| attend(g, Mask::ALL)),
        ("a window without a causal mask", |g| {
            attend(
                g,
                Mask {
                    causal: false,
                    window: Some(2),
                },
            )
        }),
    ],
};

fn attend(g: &mut Gen, mask: Mask) -> Graph {
    let mut q = Build::new();
    let (kv, groups, d) = (g.dim(), g.pick(&[1, 2]), g.dim());
    let few = [b(), n(kv), s(), n(d)];
    let x = q.input("q", DType::F32, &[b(), n(kv * groups), s(), n(d)]);
    let k = q.input("k", DType::F32, &few);
    let v = q.input("v", DType::F32, &few);
    let spec = AttnSpec {
        mask,
        groups: groups as u32,
        stage: SdpaStage::Closed,
        ..AttnSpec::open()
    };
    let y = q.op(Op::Attn(spec), &[x, k, v]);
    let y = q.win(y, Some(0), Some(2));
    q.done(&[y])
}

/// A full-sequence input `[B,S,d]`.
pub(super) fn full(q: &mut Build, g: &mut Gen, name: &str, dtype: DType) -> NodeId {
    q.input(name, dtype, &[b(), s(), n(g.dim())])
}
