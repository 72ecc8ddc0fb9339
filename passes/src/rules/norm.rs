//! RMSNorm from its parts, and its fusion with residual adds and GEMMs.

use super::softmax::reduces_last;
use crate::rule::{Apply, Exactness, Rule, Stage};
use crate::sample::{Build, Gen, n, t};
use egg::Id;
use lathe_ir::{
    BinaryFn, DType, Epilogue, GemmSpec, Graph, NodeId, Op, Prologue, Real, ReduceFn, UnaryFn,
};

pub(super) const RECOGNIZE: &[Rule] = &[RMSNORM, RMSNORM_UPCAST];
pub(super) const FUSE: &[Rule] = &[
    ADD_RMSNORM,
    PROLOGUE_RMS,
    GAMMA_INTO_WEIGHT,
    PROLOGUE_ADD_RMS,
];

const RMSNORM: Rule = Rule {
    name: "rmsnorm",
    stage: Stage::Recognize,
    equation: "x * rsqrt(mean(x^2) + eps) * w => rmsnorm(x, w)",
    exactness: Exactness::Exact,
    doc: "In f32, over the last axis, with a gamma vector of its extent.",
    lhs: &["(mul (mul ?x (rsqrt (add (mean ?m (pow ?x ?two)) ?eps))) ?w)"],
    rhs: |a| {
        let x = a.id("?x");
        recognize(a, x)
    },
    sample: |g| {
        let mut q = Build::new();
        let h = g.dim();
        let x = q.input("x", DType::F32, &[n(g.dim()), n(h)]);
        let y = parts(&mut q, x, h, DType::F32, 2.0);
        q.done(&[y])
    },
    near_misses: &[
        ("a cube, not a square", |g| {
            let mut q = Build::new();
            let h = g.dim();
            let x = q.input("x", DType::F32, &[n(g.dim()), n(h)]);
            let y = parts(&mut q, x, h, DType::F32, 3.0);
            q.done(&[y])
        }),
        ("the mean is over rows", |g| {
            let mut q = Build::new();
            let h = g.wide();
            let x = q.input("x", DType::F32, &[n(3), n(h)]);
            let two = q.konst(2.0, DType::F32);
            let p = q.bin(BinaryFn::Pow, x, two);
            let f = ReduceFn::Mean;
            let m = q.op(
                Op::Reduce {
                    f,
                    axis: 0,
                    keepdim: true,
                },
                &[p],
            );
            let y = finish(&mut q, x, m, h, DType::F32);
            q.done(&[y])
        }),
    ],
};

const RMSNORM_UPCAST: Rule = Rule {
    name: "rmsnorm-upcast",
    stage: Stage::Recognize,
    equation: "cast(x32 * rsqrt(mean(x32^2) + eps), d) * w => rmsnorm(x, w)   (x32 = cast(x, f32))",
    exactness: Exactness::Exact,
    doc: "Hugging Face norms in f32 and returns to the model's type before gamma.",
    lhs: &[
        "(mul (cast ?d (mul (cast ?f ?x) (rsqrt (add (mean ?m (pow (cast ?f ?x) ?two)) ?eps)))) ?w)",
    ],
    rhs: |a| {
        let d = a.ty("?x")?.dtype;
        if a.op("?d") != Op::Cast(d) || a.op("?f") != Op::Cast(DType::F32) {
            return None;
        }
        let x = a.id("?x");
        recognize(a, x)
    },
    sample: |g| {
        let mut q = Build::new();
        let h = g.dim();
        let x = q.input("x", DType::BF16, &[n(g.dim()), n(h)]);
        let y = parts(&mut q, x, h, DType::BF16, 2.0);
        q.done(&[y])
    },
    near_misses: &[("the result has another type than x", |g| {
        let mut q = Build::new();
        let h = g.dim();
        let x = q.input("x", DType::BF16, &[n(g.dim()), n(h)]);
        let y = parts(&mut q, x, h, DType::F16, 2.0);
        q.done(&[y])
    })],
};

fn recognize(a: &mut Apply<'_>, x: Id) -> Option<Id> {
    let rank = a.tensor(x)?.rank();
    if !reduces_last(&a.op("?m"), ReduceFn::Mean, rank) || a.konst("?two") != Some(2.0) {
        return None;
    }
    let eps = Real::new(a.konst("?eps")?);
    let w = a.id("?w");
    let y = a.add(Op::RmsNorm { eps }, &[x, w])?;
    (a.value(y).ty == a.value(a.root).ty).then_some(y)
}

const ADD_RMSNORM: Rule = Rule {
    name: "add-rmsnorm",
    stage: Stage::Fuse,
    equation: "rmsnorm(r + d, w) => get1(addrms(r, d, w));  r + d = get0(addrms(r, d, w))",
    exactness: Exactness::Exact,
    doc: "The residual add and the norm read the same row. The sum stays available as element 0.",
    lhs: &["(rmsnorm ?e (add ?r ?d) ?w)"],
    rhs: |a| {
        let Op::RmsNorm { eps } = a.op("?e") else {
            return None;
        };
        let (r, d, w) = (a.id("?r"), a.id("?d"), a.id("?w"));
        let both = a.add(Op::AddRms { eps }, &[r, d, w])?;
        let sum = a.add(Op::Binary(BinaryFn::Add), &[r, d])?;
        let first = a.add(Op::Get(0), &[both])?;
        a.unite(sum, first);
        a.add(Op::Get(1), &[both])
    },
    sample: |g| {
        let mut q = Build::new();
        let (dt, h) = (g.float(), g.dim());
        let shape = [t(), n(h)];
        let r = q.input("r", dt, &shape);
        let d = q.input("d", dt, &shape);
        let x = q.bin(BinaryFn::Add, r, d);
        let y = norm(&mut q, x, h, dt);
        q.done(&[x, y])
    },
    near_misses: &[("the delta broadcasts", |g| {
        let mut q = Build::new();
        let h = g.wide();
        let r = q.input("r", DType::F32, &[t(), n(h)]);
        let d = q.input("d", DType::F32, &[n(h)]);
        let x = q.bin(BinaryFn::Add, r, d);
        let y = norm(&mut q, x, h, DType::F32);
        q.done(&[y])
    })],
};

const PROLOGUE_RMS: Rule = Rule {
    name: "norm-into-gemm",
    stage: Stage::Fuse,
    equation: "gemm(rmsnorm(x, g), w) => gemm{rms}(x, w, g)",
    exactness: Exactness::Exact,
    doc: "Worth it while the rows are few: every unit repeats the norm. The cost decides.",
    lhs: &["(gemm ?p (rmsnorm ?e ?x ?g) ?w ?b ?res ?none ?none)"],
    rhs: |a| {
        let (Op::Gemm(spec), Op::RmsNorm { eps }) = (a.op("?p"), a.op("?e")) else {
            return None;
        };
        if spec.prologue != Prologue::None || a.ty("?x")?.rank() != 2 {
            return None;
        }
        let spec = GemmSpec {
            prologue: Prologue::Rms { eps },
            ..spec
        };
        let ops = [a.id("?x"), a.id("?w"), a.id("?b"), a.id("?res"), a.id("?g")];
        let none = a.none();
        a.add(
            Op::Gemm(spec),
            &[ops[0], ops[1], ops[2], ops[3], ops[4], none],
        )
    },
    sample: |g| {
        let mut q = Build::new();
        let (dt, h, o) = (g.float(), g.dim(), g.dim());
        let x = q.input("x", dt, &[t(), n(h)]);
        let y = norm(&mut q, x, h, dt);
        let y = gemm(&mut q, y, h, o, dt);
        q.done(&[y])
    },
    near_misses: &[("the GEMM has a prologue already", |g| {
        let mut q = Build::new();
        let h = g.wide();
        let x = q.input("x", DType::F32, &[t(), n(h)]);
        let y = norm(&mut q, x, h, DType::F32);
        let w = q.weight("w", DType::F32, &[h, h]);
        let g2 = q.weight("g2", DType::F32, &[h]);
        let none = q.none();
        let spec = GemmSpec {
            prologue: Prologue::Rms {
                eps: Real::new(1e-5),
            },
            epilogue: Epilogue::None,
        };
        let y = q.op(Op::Gemm(spec), &[y, w, none, none, g2, none]);
        q.done(&[y])
    })],
};

const GAMMA_INTO_WEIGHT: Rule = Rule {
    name: "gamma-into-weight",
    stage: Stage::Fuse,
    equation: "gemm{rms}(x, w, g) => gemm{rms}(x, w * g)",
    exactness: Exactness::Reassociates,
    doc: "What is left of the norm is one factor a row, which the GEMM applies to its accumulators. The \
          columns are multiplied while the weight is loaded, in its place: not if others read it as it is.",
    lhs: &["(gemm ?p ?x ?w ?b ?res ?g ?none)"],
    rhs: |a| {
        let Op::Gemm(spec) = a.op("?p") else {
            return None;
        };
        let (w, g) = (a.id("?w"), a.id("?g"));
        let fixed = |v: &crate::egraph::analysis::Value| v.weight_only && !v.shared;
        if !matches!(spec.prologue, Prologue::Rms { .. }) || a.is_none("?g") {
            return None;
        }
        if !fixed(a.value(w)) || !a.value(g).weight_only {
            return None;
        }
        let scaled = a.add(Op::Binary(BinaryFn::Mul), &[w, g])?;
        if a.value(scaled).ty != a.value(w).ty {
            return None;
        }
        let (x, b, res, none) = (a.id("?x"), a.id("?b"), a.id("?res"), a.none());
        a.add(Op::Gemm(spec), &[x, scaled, b, res, none, none])
    },
    sample: |g| {
        let mut q = Build::new();
        let (dt, h, o) = (g.float(), g.dim(), g.dim());
        let x = q.input("x", dt, &[t(), n(h)]);
        let w = q.weight("w", dt, &[o, h]);
        let y = rms_gemm(&mut q, x, w, h, dt);
        q.done(&[y])
    },
    near_misses: &[
        ("the weight is an embedding too", |g| {
            let mut q = Build::new();
            let (dt, h) = (g.float(), g.dim());
            let x = q.input("x", dt, &[t(), n(h)]);
            let w = q.weight("w", dt, &[8, h]);
            let ids = q.input("ids", DType::I32, &[t()]);
            let e = q.op(Op::Embedding, &[w, ids]);
            let y = rms_gemm(&mut q, x, w, h, dt);
            q.done(&[e, y])
        }),
        ("the weight varies", |g| {
            let mut q = Build::new();
            let (dt, h) = (g.float(), g.dim());
            let x = q.input("x", dt, &[t(), n(h)]);
            let w = q.input("w", dt, &[n(3), n(h)]);
            let y = rms_gemm(&mut q, x, w, h, dt);
            q.done(&[y])
        }),
    ],
};

fn rms_gemm(q: &mut Build, x: NodeId, w: NodeId, h: i64, dt: DType) -> NodeId {
    let gamma = q.weight("gamma", dt, &[h]);
    let none = q.none();
    let spec = GemmSpec {
        prologue: Prologue::Rms {
            eps: Real::new(1e-5),
        },
        epilogue: Epilogue::None,
    };
    q.op(Op::Gemm(spec), &[x, w, none, none, gamma, none])
}

const PROLOGUE_ADD_RMS: Rule = Rule {
    name: "add-norm-into-gemm",
    stage: Stage::Fuse,
    equation: "gemm(get1(addrms(r, d, g)), w) => get1(gemm{addrms}(r, w, g, d));  get0 = get0",
    exactness: Exactness::Exact,
    doc: "As norm-into-gemm, with the residual add in the same prologue; one unit writes the sum.",
    lhs: &["(gemm ?p (get ?i (addrms ?e ?r ?d ?g)) ?w ?b ?res ?none ?none)"],
    rhs: |a| {
        let (Op::Gemm(spec), Op::AddRms { eps }) = (a.op("?p"), a.op("?e")) else {
            return None;
        };
        if spec.prologue != Prologue::None || a.op("?i") != Op::Get(1) || a.ty("?r")?.rank() != 2 {
            return None;
        }
        let spec = GemmSpec {
            prologue: Prologue::AddRms { eps },
            ..spec
        };
        let (r, d, g) = (a.id("?r"), a.id("?d"), a.id("?g"));
        let ops = [r, a.id("?w"), a.id("?b"), a.id("?res"), g, d];
        let both = a.add(Op::Gemm(spec), &ops)?;
        let addrms = a.add(Op::AddRms { eps }, &[r, d, g])?;
        let old_sum = a.add(Op::Get(0), &[addrms])?;
        let new_sum = a.add(Op::Get(0), &[both])?;
        a.unite(old_sum, new_sum);
        a.add(Op::Get(1), &[both])
    },
    sample: |g| add_norm_gemm(g, 1),
    near_misses: &[("the GEMM reads the sum, not the norm", |g| {
        add_norm_gemm(g, 0)
    })],
};

fn add_norm_gemm(g: &mut Gen, element: u8) -> Graph {
    let mut q = Build::new();
    let (dt, h, o) = (g.float(), g.dim(), g.dim());
    let shape = [t(), n(h)];
    let r = q.input("r", dt, &shape);
    let d = q.input("d", dt, &shape);
    let w = q.weight("gamma", dt, &[h]);
    let eps = Real::new(1e-5);
    let both = q.op(Op::AddRms { eps }, &[r, d, w]);
    let sum = q.op(Op::Get(0), &[both]);
    let y = q.op(Op::Get(element), &[both]);
    let y = gemm(&mut q, y, h, o, dt);
    q.done(&[sum, y])
}

fn norm(q: &mut Build, x: NodeId, h: i64, dt: DType) -> NodeId {
    let w = q.weight("gamma", dt, &[h]);
    let eps = Real::new(1e-5);
    q.op(Op::RmsNorm { eps }, &[x, w])
}

/// A plain GEMM of `[T, k]` rows with an `[o, k]` weight.
pub(super) fn gemm(q: &mut Build, x: NodeId, k: i64, o: i64, dt: DType) -> NodeId {
    let w = q.weight("w", dt, &[o, k]);
    let none = q.none();
    q.op(Op::Gemm(GemmSpec::PLAIN), &[x, w, none, none, none, none])
}

/// RMSNorm in parts as Hugging Face writes it, with the result in type `out`.
fn parts(q: &mut Build, x: NodeId, h: i64, out: DType, power: f64) -> NodeId {
    let x32 = q.cast(x, DType::F32);
    let two = q.konst(power, DType::F32);
    let p = q.bin(BinaryFn::Pow, x32, two);
    let m = q.reduce_last(ReduceFn::Mean, p);
    finish(q, x32, m, h, out)
}

fn finish(q: &mut Build, x32: NodeId, mean: NodeId, h: i64, out: DType) -> NodeId {
    let eps = q.konst(1e-5, DType::F32);
    let v = q.bin(BinaryFn::Add, mean, eps);
    let r = q.un(UnaryFn::Rsqrt, v);
    let y = q.bin(BinaryFn::Mul, x32, r);
    let y = q.cast(y, out);
    let w = q.weight("w", out, &[h]);
    q.bin(BinaryFn::Mul, y, w)
}
