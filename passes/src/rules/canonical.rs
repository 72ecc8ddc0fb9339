//! Spellings of the same thing get one form, so that later rules need one pattern each.

use crate::rule::{Exactness, Rule, Stage};
use lathe_ir::ops::{Linear, Matmul, Permute, Reshape};
use lathe_ir::{BinaryFn, Op};

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
            v.is_loaded() || v.konst.is_some()
        };
        let (w, x) = (a.id("?w"), a.id("?x"));
        if !fixed(w) || fixed(x) {
            return None;
        }
        a.add(BinaryFn::Mul, [x, w])
    },
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
        if a.ty("?w")?.rank() != 2 || a.op("?p") != Op::Permute(Permute(vec![1, 0])) {
            return None;
        }
        let y = a.add(Linear, [x, w])?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
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
            op @ Op::Weight(_) => a.add(op, [])?,
            op @ Op::Slice(_) if a.value(a.id("?w")).is_loaded() => {
                let whole = a.id("?w");
                a.add(op, [whole])?
            }
            _ => return None,
        };
        if a.value(w).ty.as_tensor()?.rank() != 2 {
            return None;
        }
        let wt = a.add(Permute(vec![1, 0]), [w])?;
        let x = a.id("?x");
        let y = a.add(Linear, [x, wt])?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
};

const SCALE_OUT_OF_SCORES: Rule = Rule {
    name: "scale-out-of-scores",
    stage: Stage::Canonicalize,
    equation: "matmul(q * c, k) => matmul(q, k) * c   (c a finite constant)",
    exactness: Exactness::Reassociates,
    doc: "Some models scale the queries before the product instead of the scores after it.",
    lhs: &["(matmul (mul ?q ?c) ?k)"],
    rhs: |a| {
        // An infinite factor of terms of either sign makes their sum no number.
        if !a.konst("?c")?.is_finite() {
            return None;
        }
        let (q, c, k) = (a.id("?q"), a.id("?c"), a.id("?k"));
        let scores = a.add(Matmul, [q, k])?;
        let y = a.add(BinaryFn::Mul, [scores, c])?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
};

const RESHAPE_RESHAPE: Rule = Rule {
    name: "reshape-reshape",
    stage: Stage::KvCache,
    equation: "reshape(reshape(x, a), b) => reshape(x, b), or x if that has these extents already",
    exactness: Exactness::Exact,
    doc: "Windows leave chains of views behind (positions expanded to batches and flattened again).",
    lhs: &["(reshape ?b (reshape ?a ?x))"],
    rhs: |a| {
        let Op::Reshape(Reshape(to)) = a.op("?b") else {
            return None;
        };
        let x = a.id("?x");
        a.reshape(x, to)
    },
};
