//! SiLU and the gated MLP.

use crate::rule::{Apply, Exactness, Rule, Stage};
use egg::Id;
use lathe_ir::Operands;
use lathe_ir::ops::gemm;
use lathe_ir::ops::{Gemm, Pack, Silu, SwiGlu};
use lathe_ir::{Epilogue, Prologue};

pub(super) const RECOGNIZE: &[Rule] = &[SILU, SWIGLU];
pub(super) const FUSE: &[Rule] = &[GATE_UP_JOIN, GATE_UP_JOIN_BIAS];

const SILU: Rule = Rule {
    name: "silu",
    stage: Stage::Recognize,
    equation: "x * sigmoid(x) => silu(x)",
    exactness: Exactness::Exact,
    doc: "Both orders of the product.",
    lhs: &["(mul ?x (sigmoid ?x))", "(mul (sigmoid ?x) ?x)"],
    rhs: |a| {
        let x = a.id("?x");
        a.add(Silu, [x])
    },
};

const SWIGLU: Rule = Rule {
    name: "swiglu",
    stage: Stage::Recognize,
    equation: "silu(g) * u => swiglu(g, u)",
    exactness: Exactness::Exact,
    doc: "The gate of a gated MLP; both orders of the product.",
    lhs: &["(mul (silu ?g) ?u)", "(mul ?u (silu ?g))"],
    rhs: |a| {
        let (g, u) = (a.id("?g"), a.id("?u"));
        let y = a.add(SwiGlu, [g, u])?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
};

const GATE_UP_JOIN: Rule = Rule {
    name: "gate-up-join",
    stage: Stage::Fuse,
    equation: "swiglu(linear(x, wg), linear(x, wu)) => gemm{swiglu}(x, pack(wg, wu))",
    exactness: Exactness::Exact,
    doc: "One GEMM over gate and up rows interleaved by 8, so that both partners of a product are in \
          one thread. Placed at the join, where even a greedy extraction finds it.",
    lhs: &["(swiglu (linear ?x ?wg) (linear ?x ?wu))"],
    rhs: |a| join(a, None),
};

const GATE_UP_JOIN_BIAS: Rule = Rule {
    name: "gate-up-join-bias",
    stage: Stage::Fuse,
    equation: "swiglu(linear(x, wg) + bg, linear(x, wu) + bu) => gemm{swiglu}(x, pack(wg, wu), pack(bg, bu))",
    exactness: Exactness::Exact,
    doc: "As gate-up-join, for mlp_bias.",
    lhs: &["(swiglu (add (linear ?x ?wg) ?bg) (add (linear ?x ?wu) ?bu))"],
    rhs: |a| {
        let (bg, bu) = (a.id("?bg"), a.id("?bu"));
        if a.ty("?bg")?.rank() != 1 || !a.value(bg).is_loaded() || !a.value(bu).is_loaded() {
            return None;
        }
        join(a, Some([bg, bu]))
    },
};

fn join(a: &mut Apply<'_>, biases: Option<[Id; 2]>) -> Option<Id> {
    let (x, wg, wu) = (a.id("?x"), a.id("?wg"), a.id("?wu"));
    if !a.value(wg).is_loaded() || !a.value(wu).is_loaded() || a.same(wg, wu) {
        return None;
    }
    let w = a.add(Pack::GateUp, [wg, wu])?;
    let bias = match biases {
        Some(biases) => Some(a.add(Pack::GateUp, biases)?),
        None => None,
    };
    let spec = Gemm {
        prologue: Prologue::None,
        epilogue: Epilogue::SwiGlu,
    };
    a.add(spec, Operands::from([x, w]).with(gemm::BIAS, bias))
}
