//! `win` through operations that only move elements.

use super::win::{operand, spec, window_axis};
use crate::rule::{Apply, Exactness, Rule, Stage};
use egg::Id;
use lathe_ir::ops::{Concat, Expand, Matmul, Permute, RepeatKv, Reshape, Slice, Win};
use lathe_ir::shape::element_count;
use lathe_ir::{Dim, Op, Sym};

pub(super) const RULES: &[Rule] = &[RESHAPE, PERMUTE, EXPAND, SLICE, CONCAT, REPEAT_KV, OUTER];

const RESHAPE: Rule = Rule {
    name: "win-reshape",
    stage: Stage::KvCache,
    equation: "win(reshape(x)) => reshape(win(x))   (batch and sequence axes kept)",
    exactness: Exactness::Exact,
    doc: "The batch and sequence axes of the result must be axes of x, at the same place in row-major \
          order: a reshape that merges rows with features stays.",
    lhs: &["(win ?w (reshape ?r ?x))"],
    rhs: |a| {
        let (w, x, root) = (spec(a)?, a.id("?x"), a.root);
        let Op::Reshape(Reshape(to)) = a.op("?r") else {
            return None;
        };
        let from = a.tensor(x)?.shape;
        let source = |axis: Option<u8>| -> Option<Option<u8>> {
            let Some(axis) = axis else { return Some(None) };
            let axis = usize::from(axis);
            let before = element_count(&to[..axis]);
            (0..from.len())
                .find(|&i| from[i] == to[axis] && element_count(&from[..i]) == before)
                .map(|i| Some(i as u8))
        };
        let w = Win {
            batch: source(w.batch)?,
            seq: source(w.seq)?,
        };
        let x = a.add(w, [x])?;
        let shape = a.tensor(root)?.shape;
        a.reshape(x, shape)
    },
};

const PERMUTE: Rule = Rule {
    name: "win-permute",
    stage: Stage::KvCache,
    equation: "win(permute(x)) => permute(win(x))",
    exactness: Exactness::Exact,
    doc: "The token axis comes first anyway, so transposing heads and sequence becomes nothing.",
    lhs: &["(win ?w (permute ?p ?x))"],
    rhs: |a| {
        let (w, x) = (spec(a)?, a.id("?x"));
        let Op::Permute(Permute(p)) = a.op("?p") else {
            return None;
        };
        let inner = Win {
            batch: w.batch.map(|i| p[usize::from(i)]),
            seq: w.seq.map(|i| p[usize::from(i)]),
        };
        let mut perm = vec![0];
        for (i, &from) in p.iter().enumerate() {
            if window_axis(w, i).is_some() {
                perm.push(window_axis(inner, usize::from(from))? as u8);
            }
        }
        let x = a.add(inner, [x])?;
        if perm.iter().enumerate().all(|(i, &p)| usize::from(p) == i) {
            return Some(x);
        }
        a.add(Permute(perm), [x])
    },
};

const EXPAND: Rule = Rule {
    name: "win-expand",
    stage: Stage::KvCache,
    equation: "win(expand(x)) => expand(win(x))",
    exactness: Exactness::Exact,
    doc: "What is constant along batch or sequence is stretched over the tokens instead.",
    lhs: &["(win ?w (expand ?e ?x))"],
    rhs: |a| {
        let (w, x, root) = (spec(a)?, a.id("?x"), a.root);
        let to = a.tensor(root)?.shape;
        let rank = a.tensor(x)?.rank();
        let x = operand(a, w, rank, x)?;
        let mut shape = a.tensor(x)?.shape;
        while shape.len() < to.len() {
            shape.insert(0, Dim::new(1));
        }
        let x = a.reshape(x, shape.clone())?;
        if shape == to {
            return Some(x);
        }
        a.add(Expand(to), [x])
    },
};

const SLICE: Rule = Rule {
    name: "win-slice",
    stage: Stage::KvCache,
    equation: "win(slice(x)) => slice(win(x))",
    exactness: Exactness::Exact,
    doc: "Slices of features (rotate_half, fused projections).",
    lhs: &["(win ?w (slice ?p ?x))"],
    rhs: |a| {
        let (w, x) = (spec(a)?, a.id("?x"));
        let Op::Slice(Slice { axis, start, end }) = a.op("?p") else {
            return None;
        };
        let axis = window_axis(w, usize::from(axis))? as u8;
        let x = a.add(w, [x])?;
        a.add(Slice { axis, start, end }, [x])
    },
};

const CONCAT: Rule = Rule {
    name: "win-concat",
    stage: Stage::KvCache,
    equation: "win(concat(x, y)) => concat(win(x), win(y))   (along features)",
    exactness: Exactness::Exact,
    doc: "Rows are put together feature by feature; a concatenation of sequences stays.",
    lhs: &["(win ?w (concat ?p ?x ?y))"],
    rhs: |a| {
        let (w, x, y) = (spec(a)?, a.id("?x"), a.id("?y"));
        let Op::Concat(Concat { axis }) = a.op("?p") else {
            return None;
        };
        let axis = window_axis(w, usize::from(axis))? as u8;
        let x = a.add(w, [x])?;
        let y = a.add(w, [y])?;
        a.add(Concat { axis }, [x, y])
    },
};

const REPEAT_KV: Rule = Rule {
    name: "win-repeat-kv",
    stage: Stage::KvCache,
    equation: "win(repeat_kv{g}(x)) => reshape(expand(reshape(win(x), [T,H,1,D]), [T,H,g,D]), [T,H*g,D])",
    exactness: Exactness::Exact,
    doc: "Only needed when attention-gqa is switched off.",
    lhs: &["(win ?w (repeat_kv ?g ?x))"],
    rhs: |a| {
        let (w, x) = (spec(a)?, a.id("?x"));
        let Op::RepeatKv(RepeatKv { groups }) = a.op("?g") else {
            return None;
        };
        if w.batch != Some(0) || w.seq != Some(2) {
            return None;
        }
        let x = a.add(w, [x])?;
        let [t, h, d] = a.tensor(x)?.shape[..] else {
            return None;
        };
        let g = Dim::new(i64::from(groups));
        let x = a.reshape(x, vec![t, h, Dim::new(1), d])?;
        let x = a.add(Expand(vec![t, h, g, d]), [x])?;
        a.reshape(x, vec![t, h * i64::from(groups), d])
    },
};

const OUTER: Rule = Rule {
    name: "win-outer",
    stage: Stage::KvCache,
    equation: "win(matmul(x [B,M,K], y [B,K,S])) => matmul(win(x), win(y) [T,K,1]) without its last axis",
    exactness: Exactness::Exact,
    doc: "A product whose columns are the rows of the sequence (rotary angles before they are \
          recognised). Neither factor may sum over the sequence.",
    lhs: &["(win ?w (matmul ?x ?y))"],
    rhs: |a| {
        let w = spec(a)?;
        let (x, y) = (a.ty("?x")?, a.ty("?y")?);
        if x.rank() != 3 || y.rank() != 3 || w.batch != Some(0) || w.seq != Some(2) {
            return None;
        }
        if !y.shape[2].is_sym(Sym::S) || x.shape.iter().any(|d| d.is_sym(Sym::S)) {
            return None;
        }
        let columns = window_columns(a, y.shape[0])?;
        let rows = window_rows(a, x.shape[0])?;
        let product = a.add(Matmul, [rows, columns])?;
        let shape = a.tensor(a.root)?.shape;
        a.reshape(product, shape)
    },
};

/// `y [B or 1,K,S]` as `[T,K,1]`: the column of each token.
fn window_columns(a: &mut Apply<'_>, batch: Dim) -> Option<Id> {
    let w = Win {
        batch: Some(0),
        seq: Some(2),
    };
    let y = a.id("?y");
    if !batch.is_sym(Sym::B) {
        return None;
    }
    let y = a.add(w, [y])?;
    let mut shape = a.tensor(y)?.shape;
    shape.push(Dim::new(1));
    a.reshape(y, shape)
}

/// `x [B or 1,M,K]` as `[T or 1,M,K]`.
fn window_rows(a: &mut Apply<'_>, batch: Dim) -> Option<Id> {
    let x = a.id("?x");
    if !batch.is_sym(Sym::B) {
        return batch.is(1).then_some(x);
    }
    let w = Win {
        batch: Some(0),
        seq: None,
    };
    a.add(w, [x])
}
