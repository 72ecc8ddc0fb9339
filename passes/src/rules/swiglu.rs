//! SiLU and the gated MLP.

use crate::rule::{Apply, Exactness, Rule, Stage};
use crate::sample::{Build, Gen, n, t};
use egg::Id;
use lathe_ir::{BinaryFn, DType, Epilogue, GemmSpec, Graph, Op, PackKind, Prologue, UnaryFn};

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
        a.add(Op::Silu, &[x])
    },
    sample: |g| {
        let mut q = Build::new();
        let x = q.input("x", g.float(), &[n(g.dim()), n(g.dim())]);
        let y = q.un(UnaryFn::Sigmoid, x);
        let (a, b) = g.pick(&[(x, y), (y, x)]);
        let y = q.bin(BinaryFn::Mul, a, b);
        q.done(&[y])
    },
    near_misses: &[("the sigmoid is of another value", |g| {
        let mut q = Build::new();
        let shape = [n(g.dim()), n(g.dim())];
        let x = q.input("x", DType::F32, &shape);
        let z = q.input("z", DType::F32, &shape);
        let y = q.un(UnaryFn::Sigmoid, z);
        let y = q.bin(BinaryFn::Mul, x, y);
        q.done(&[y])
    })],
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
        let y = a.add(Op::SwiGlu, &[g, u])?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
    sample: |g| {
        let mut q = Build::new();
        let (d, shape) = (g.float(), [n(g.dim()), n(g.dim())]);
        let x = q.input("g", d, &shape);
        let u = q.input("u", d, &shape);
        let y = q.op(Op::Silu, &[x]);
        let (a, b) = g.pick(&[(y, u), (u, y)]);
        let y = q.bin(BinaryFn::Mul, a, b);
        q.done(&[y])
    },
    near_misses: &[("up broadcasts over the gate", |g| {
        let mut q = Build::new();
        let h = g.wide();
        let x = q.input("g", DType::F32, &[n(2), n(h)]);
        let u = q.input("u", DType::F32, &[n(h)]);
        let y = q.op(Op::Silu, &[x]);
        let y = q.bin(BinaryFn::Mul, y, u);
        q.done(&[y])
    })],
};

const GATE_UP_JOIN: Rule = Rule {
    name: "gate-up-join",
    stage: Stage::Fuse,
    equation: "swiglu(linear(x, wg), linear(x, wu)) => gemm{swiglu}(x, pack(wg, wu))",
    exactness: Exactness::Exact,
    doc: "One GEMM over gate and up rows interleaved by 8, so that both partners of a product are in \
          one thread. Placed at the join, where even a greedy extraction finds it.",
    lhs: &["(swiglu (linear ?x ?wg) (linear ?x ?wu))"],
    rhs: |a| {
        let none = a.none();
        join(a, none, none)
    },
    sample: |g| mlp(g, false, 16, 16),
    near_misses: &[
        ("the rows do not come in blocks of 8", |g| {
            mlp(g, false, 12, 12)
        }),
        ("gate and up read different rows", |g| {
            let mut q = Build::new();
            let k = g.dim();
            let x = q.input("x", DType::F32, &[t(), n(k)]);
            let z = q.input("z", DType::F32, &[t(), n(k)]);
            let wg = q.weight("wg", DType::F32, &[16, k]);
            let wu = q.weight("wu", DType::F32, &[16, k]);
            let gate = q.op(Op::Linear, &[x, wg]);
            let up = q.op(Op::Linear, &[z, wu]);
            let y = q.op(Op::SwiGlu, &[gate, up]);
            q.done(&[y])
        }),
    ],
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
        if a.ty("?bg")?.rank() != 1 || !a.value(bg).weight_only || !a.value(bu).weight_only {
            return None;
        }
        join(a, bg, bu)
    },
    sample: |g| mlp(g, true, 16, 16),
    near_misses: &[("the bias is no weight", |g| {
        let mut q = Build::new();
        let k = g.dim();
        let x = q.input("x", DType::F32, &[t(), n(k)]);
        let bias = q.input("b", DType::F32, &[n(16)]);
        let wg = q.weight("wg", DType::F32, &[16, k]);
        let wu = q.weight("wu", DType::F32, &[16, k]);
        let gate = q.op(Op::Linear, &[x, wg]);
        let gate = q.bin(BinaryFn::Add, gate, bias);
        let up = q.op(Op::Linear, &[x, wu]);
        let up = q.bin(BinaryFn::Add, up, bias);
        let y = q.op(Op::SwiGlu, &[gate, up]);
        q.done(&[y])
    })],
};

fn join(a: &mut Apply<'_>, bg: Id, bu: Id) -> Option<Id> {
    let (x, wg, wu) = (a.id("?x"), a.id("?wg"), a.id("?wu"));
    if !a.value(wg).weight_only || !a.value(wu).weight_only || a.same(wg, wu) {
        return None;
    }
    let w = a.add(Op::Pack(PackKind::GateUp), &[wg, wu])?;
    let bias = if a.tensor(bg).is_some() {
        a.add(Op::Pack(PackKind::GateUp), &[bg, bu])?
    } else {
        bg
    };
    let none = a.none();
    let spec = GemmSpec {
        prologue: Prologue::None,
        epilogue: Epilogue::SwiGlu,
    };
    a.add(Op::Gemm(spec), &[x, w, bias, none, none, none])
}

fn mlp(g: &mut Gen, bias: bool, gate_rows: i64, up_rows: i64) -> Graph {
    let mut q = Build::new();
    let (d, k) = (g.float(), g.dim());
    let x = q.input("x", d, &[t(), n(k)]);
    let mut part = |name: &str, rows: i64| {
        let w = q.weight(&format!("w{name}"), d, &[rows, k]);
        let y = q.op(Op::Linear, &[x, w]);
        if bias {
            let bias = q.weight(&format!("b{name}"), d, &[rows]);
            q.bin(BinaryFn::Add, y, bias)
        } else {
            y
        }
    };
    let gate = part("g", gate_rows);
    let up = part("u", up_rows);
    let y = q.op(Op::SwiGlu, &[gate, up]);
    q.done(&[y])
}
