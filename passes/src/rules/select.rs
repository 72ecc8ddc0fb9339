//! Row selection moves down through the head, so that logits are made only for rows that are
//! sampled.

use crate::rule::{Exactness, Rule, Stage};
use lathe_ir::BinaryFn;
use lathe_ir::ops::{Linear, Select};

pub(super) const RULES: &[Rule] = &[SELECT_LINEAR, SELECT_RMSNORM, SELECT_ADD];

const SELECT_LINEAR: Rule = Rule {
    name: "select-linear",
    stage: Stage::KvCache,
    equation: "select(linear(x, w), rows) => linear(select(x, rows), w)",
    exactness: Exactness::Exact,
    doc: "A prefill of 2,048 tokens needs one row of logits a sequence, not 2,048.",
    lhs: &["(select (linear ?x ?w) ?r)"],
    rhs: |a| {
        if a.ty("?x")?.rank() < 2 {
            return None;
        }
        let (x, w, r) = (a.id("?x"), a.id("?w"), a.id("?r"));
        let x = a.add(Select, [x, r])?;
        a.add(Linear, [x, w])
    },
};

const SELECT_RMSNORM: Rule = Rule {
    name: "select-rmsnorm",
    stage: Stage::KvCache,
    equation: "select(rmsnorm(x, w), rows) => rmsnorm(select(x, rows), w)",
    exactness: Exactness::Exact,
    doc: "A norm is row-wise over the last axis, so any earlier axis may be selected first.",
    lhs: &["(select (rmsnorm ?e ?x ?w) ?r)"],
    rhs: |a| {
        if a.ty("?x")?.rank() < 2 {
            return None;
        }
        let (x, w, r, e) = (a.id("?x"), a.id("?w"), a.id("?r"), a.op("?e"));
        let x = a.add(Select, [x, r])?;
        a.add(e, [x, w])
    },
};

const SELECT_ADD: Rule = Rule {
    name: "select-add",
    stage: Stage::KvCache,
    equation: "select(a + b, rows) => select(a, rows) + select(b, rows)",
    exactness: Exactness::Exact,
    doc: "The residual add before the final norm; both sides have all the rows.",
    lhs: &["(select (add ?a ?b) ?r)"],
    rhs: |a| {
        if a.ty("?a")?.shape != a.ty("?b")?.shape {
            return None;
        }
        let (x, y, r) = (a.id("?a"), a.id("?b"), a.id("?r"));
        let x = a.add(Select, [x, r])?;
        let y = a.add(Select, [y, r])?;
        a.add(BinaryFn::Add, [x, y])
    },
};
