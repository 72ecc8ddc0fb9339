//! Spellings of the same thing get one form, so that later rules need one pattern each.

use crate::rule::{Exactness, Rule, Stage};
use crate::sample::{Build, b, n, s};
use lathe_ir::{BinaryFn, DType, Op};

pub(super) const RULES: &[Rule] = &[
    MUL_ONE,
    MUL_CONST_RIGHT,
    LINEAR,
    LINEAR_STORED,
    SCALE_OUT_OF_SCORES,
    RESHAPE_RESHAPE,
];

const MUL_ONE: Rule = Rule {
    name: "mul-one",
    stage: Stage::Canonicalize,
    equation: "x * 1 => x",
    exactness: Exactness::Exact,
    doc: "Hugging Face multiplies cos and sin by an attention scaling that is 1 for most rope types. \
          The product must not be wider than x: a constant that broadcasts is no identity.",
    lhs: &["(mul ?x ?c)", "(mul ?c ?x)"],
    rhs: |a| {
        let x = a.id("?x");
        (a.konst("?c") == Some(1.0) && a.value(x).ty == a.value(a.root).ty).then_some(x)
    },
    sample: |g| {
        let mut q = Build::new();
        let d = g.float();
        let x = q.input("x", d, &[n(g.dim()), n(g.dim())]);
        let c = q.konst(1.0, d);
        let (a, b) = g.pick(&[(x, c), (c, x)]);
        let y = q.bin(BinaryFn::Mul, a, b);
        q.done(&[y])
    },
    near_misses: &[
        ("the constant is not 1", |g| {
            let mut q = Build::new();
            let x = q.input("x", DType::F32, &[n(g.dim())]);
            let c = q.konst(1.5, DType::F32);
            let y = q.bin(BinaryFn::Mul, x, c);
            q.done(&[y])
        }),
        ("the constant widens x", |_| {
            let mut q = Build::new();
            let x = q.input("x", DType::F32, &[n(1)]);
            let c = q.konst(1.0, DType::F32);
            let c = q.reshape(c, &[n(1)]);
            let c = q.op(Op::Expand(vec![n(3)]), &[c]);
            let y = q.bin(BinaryFn::Mul, x, c);
            q.done(&[y])
        }),
    ],
};

const MUL_CONST_RIGHT: Rule = Rule {
    name: "mul-weight-right",
    stage: Stage::Canonicalize,
    equation: "w * x => x * w   (w a weight or constant, x not)",
    exactness: Exactness::Exact,
    doc: "Norms multiply by their weight on the left in Llama and on the right elsewhere. Directed, \
          so that it cannot grow the e-graph as general commutativity would.",
    lhs: &["(mul ?w ?x)"],
    rhs: |a| {
        let fixed = |id| {
            let v = a.value(id);
            v.weight_only || v.konst.is_some()
        };
        let (w, x) = (a.id("?w"), a.id("?x"));
        if !fixed(w) || fixed(x) {
            return None;
        }
        a.add(Op::Binary(BinaryFn::Mul), &[x, w])
    },
    sample: |g| {
        let mut q = Build::new();
        let (d, h) = (g.float(), g.dim());
        let x = q.input("x", d, &[n(g.dim()), n(h)]);
        let w = q.weight("w", d, &[h]);
        let y = q.bin(BinaryFn::Mul, w, x);
        q.done(&[y])
    },
    near_misses: &[("both sides vary", |g| {
        let mut q = Build::new();
        let h = g.dim();
        let x = q.input("x", DType::F32, &[n(h)]);
        let z = q.input("z", DType::F32, &[n(h)]);
        let y = q.bin(BinaryFn::Mul, x, z);
        q.done(&[y])
    })],
};

const LINEAR: Rule = Rule {
    name: "linear",
    stage: Stage::Canonicalize,
    equation: "matmul(x, transpose(w)) => linear(x, w)   (w of rank 2)",
    exactness: Exactness::Exact,
    doc: "Projections of Hugging Face are x·wᵀ with w [out, in]. Batched transposes (the keys of an \
          attention) are left alone.",
    lhs: &["(matmul ?x (permute ?p ?w))"],
    rhs: |a| {
        let (x, w) = (a.id("?x"), a.id("?w"));
        if a.ty("?w")?.rank() != 2 || a.op("?p") != Op::Permute(vec![1, 0]) {
            return None;
        }
        let y = a.add(Op::Linear, &[x, w])?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
    sample: |g| {
        let mut q = Build::new();
        let (d, k, o) = (g.float(), g.dim(), g.dim());
        let x = q.input("x", d, &[b(), s(), n(k)]);
        let w = q.weight("w", d, &[o, k]);
        let wt = q.permute(w, &[1, 0]);
        let y = q.op(Op::Matmul, &[x, wt]);
        q.done(&[y])
    },
    near_misses: &[
        ("a batch of transposes", |g| {
            let mut q = Build::new();
            let (h, k) = (g.wide(), g.dim());
            let x = q.input("x", DType::F32, &[n(h), n(3), n(k)]);
            let z = q.input("z", DType::F32, &[n(h), n(5), n(k)]);
            let zt = q.permute(z, &[0, 2, 1]);
            let y = q.op(Op::Matmul, &[x, zt]);
            q.done(&[y])
        }),
        ("no transpose", |g| {
            let mut q = Build::new();
            let k = g.dim();
            let x = q.input("x", DType::F32, &[n(3), n(k)]);
            let w = q.weight("w", DType::F32, &[k, k]);
            let w = q.permute(w, &[0, 1]);
            let y = q.op(Op::Matmul, &[x, w]);
            q.done(&[y])
        }),
    ],
};

const LINEAR_STORED: Rule = Rule {
    name: "linear-stored",
    stage: Stage::Canonicalize,
    equation: "matmul(x, w) => linear(x, transpose(w))   (w a weight or a slice of one, of rank 2)",
    exactness: Exactness::Exact,
    doc: "GPT-2 stores projections [in, out] and cuts q, k and v out of one of them. The loader \
          transposes and cuts; computed weights are left alone, so that the rule cannot feed itself.",
    lhs: &["(matmul ?x (weight ?p))", "(matmul ?x (slice ?p ?w))"],
    rhs: |a| {
        let w = match a.op("?p") {
            op @ Op::Weight { .. } => a.add(op, &[])?,
            op @ Op::Slice { .. } if a.value(a.id("?w")).weight_only => {
                let whole = a.id("?w");
                a.add(op, &[whole])?
            }
            _ => return None,
        };
        if a.value(w).ty.as_tensor()?.rank() != 2 {
            return None;
        }
        let wt = a.add(Op::Permute(vec![1, 0]), &[w])?;
        let x = a.id("?x");
        let y = a.add(Op::Linear, &[x, wt])?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
    sample: |g| {
        let mut q = Build::new();
        let (d, k, o) = (g.float(), g.dim(), g.dim());
        let x = q.input("x", d, &[b(), s(), n(k)]);
        let w = q.weight("w", d, &[k, o + 2]);
        let cut = q.op(
            Op::Slice {
                axis: 1,
                start: 1,
                end: o + 1,
            },
            &[w],
        );
        let w = g.pick(&[w, cut]);
        let y = q.op(Op::Matmul, &[x, w]);
        q.done(&[y])
    },
    near_misses: &[("the second factor varies", |g| {
        let mut q = Build::new();
        let k = g.dim();
        let x = q.input("x", DType::F32, &[n(3), n(k)]);
        let z = q.input("z", DType::F32, &[n(k), n(k + 2)]);
        let z = q.op(
            Op::Slice {
                axis: 1,
                start: 0,
                end: k,
            },
            &[z],
        );
        let y = q.op(Op::Matmul, &[x, z]);
        q.done(&[y])
    })],
};

const SCALE_OUT_OF_SCORES: Rule = Rule {
    name: "scale-out-of-scores",
    stage: Stage::Canonicalize,
    equation: "matmul(q * c, k) => matmul(q, k) * c   (c a constant)",
    exactness: Exactness::Reassociates,
    doc: "Some models scale the queries before the product instead of the scores after it.",
    lhs: &["(matmul (mul ?q ?c) ?k)"],
    rhs: |a| {
        a.konst("?c")?;
        let (q, c, k) = (a.id("?q"), a.id("?c"), a.id("?k"));
        let scores = a.add(Op::Matmul, &[q, k])?;
        let y = a.add(Op::Binary(BinaryFn::Mul), &[scores, c])?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
    sample: |g| {
        let mut q = Build::new();
        let (d, h, e) = (g.float(), g.dim(), g.dim());
        let x = q.input("q", d, &[b(), n(h), s(), n(e)]);
        let k = q.input("k", d, &[b(), n(h), n(e), s()]);
        let c = q.konst(0.25, d);
        let x = q.bin(BinaryFn::Mul, x, c);
        let y = q.op(Op::Matmul, &[x, k]);
        q.done(&[y])
    },
    near_misses: &[("the factor varies over the features", |g| {
        let mut q = Build::new();
        let e = g.wide();
        let x = q.input("q", DType::F32, &[s(), n(e)]);
        let k = q.input("k", DType::F32, &[n(e), s()]);
        let c = q.weight("c", DType::F32, &[e]);
        let x = q.bin(BinaryFn::Mul, x, c);
        let y = q.op(Op::Matmul, &[x, k]);
        q.done(&[y])
    })],
};

const RESHAPE_RESHAPE: Rule = Rule {
    name: "reshape-reshape",
    stage: Stage::KvCache,
    equation: "reshape(reshape(x, a), b) => reshape(x, b), or x if that has these extents already",
    exactness: Exactness::Exact,
    doc: "Windows leave chains of views behind (positions expanded to batches and flattened again).",
    lhs: &["(reshape ?b (reshape ?a ?x))"],
    rhs: |a| {
        let Op::Reshape(to) = a.op("?b") else {
            return None;
        };
        let x = a.id("?x");
        a.reshape(x, to)
    },
    sample: |g| {
        let mut q = Build::new();
        let (h, d) = (g.dim(), g.wide());
        let x = q.input("x", g.float(), &[n(h * d)]);
        let y = q.reshape(x, &[n(h), n(d)]);
        let back: [&[lathe_ir::Dim]; 2] = [&[n(h * d)], &[n(d), n(h)]];
        let y = q.reshape(y, back[g.pick(&[0, 1])]);
        q.done(&[y])
    },
    near_misses: &[("a transpose between the views", |g| {
        let mut q = Build::new();
        let (h, d) = (g.wide(), g.wide());
        let x = q.input("x", DType::F32, &[n(h * d)]);
        let y = q.reshape(x, &[n(h), n(d)]);
        let y = q.permute(y, &[1, 0]);
        let y = q.reshape(y, &[n(h * d)]);
        q.done(&[y])
    })],
};
