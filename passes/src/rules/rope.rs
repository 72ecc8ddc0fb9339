//! Rotary position embedding from its parts.

use crate::rule::{Apply, Exactness, Rule, Stage};
use crate::sample::{Build, Gen, b, n, s};
use egg::Id;
use lathe_ir::{BinaryFn, DType, Graph, NodeId, Op, Real, RopeSpec, UnaryFn};

pub(super) const RULES: &[Rule] = &[ANGLES, ROPE];

const ANGLES: Rule = Rule {
    name: "rope-angles",
    stage: Stage::Recognize,
    equation: "transpose(matmul(expand(inv_freq [1,F,1]), positions [B,1,S])) => angles(positions, inv_freq)",
    exactness: Exactness::Exact,
    doc: "The product over an axis of extent 1 is an outer product of positions and frequencies.",
    lhs: &["(permute ?t (matmul (expand ?e (reshape ?rf ?f)) (reshape ?rp (cast ?c ?p))))"],
    rhs: |a| {
        let (f, p) = (a.ty("?f")?, a.ty("?p")?);
        let (Op::Reshape(rf), Op::Reshape(rp)) = (a.op("?rf"), a.op("?rp")) else {
            return None;
        };
        if f.rank() != 1
            || p.rank() != 2
            || rf != [n(1), f.shape[0], n(1)]
            || rp != [p.shape[0], n(1), p.shape[1]]
            || a.op("?t") != Op::Permute(vec![0, 2, 1])
            || a.op("?c") != Op::Cast(DType::F32)
        {
            return None;
        }
        let (p, f) = (a.id("?p"), a.id("?f"));
        let y = a.add(Op::Angles, &[p, f])?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
    sample: |g| {
        let mut q = Build::new();
        let y = angles(&mut q, g.dim(), &[0, 2, 1]);
        q.done(&[y])
    },
    near_misses: &[("not transposed", |g| {
        let mut q = Build::new();
        let y = angles(&mut q, g.dim(), &[0, 1, 2]);
        q.done(&[y])
    })],
};

const ROPE: Rule = Rule {
    name: "rope",
    stage: Stage::Recognize,
    equation: "x * cos + rotate_half(x) * sin => rope(x, positions, inv_freq)",
    exactness: Exactness::Exact,
    doc: "cos and sin are looked through for their angles (concatenated with themselves, scaled, cast \
          and reshaped alike); rotate_half is concat(-x[D/2..], x[..D/2]).",
    lhs: &["(add (mul ?x ?cos) (mul (concat ?c (neg (slice ?hi ?x)) (slice ?lo ?x)) ?sin))"],
    rhs: |a| {
        let x = a.ty("?x")?;
        let rank = x.rank();
        let axis = rank as u8 - 1;
        let d = x.shape[rank - 1].known()?;
        let slice = |start, end| Op::Slice { axis, start, end };
        if d % 2 != 0
            || a.op("?c") != (Op::Concat { axis })
            || a.op("?hi") != slice(d / 2, d)
            || a.op("?lo") != slice(0, d / 2)
        {
            return None;
        }
        let (cos, sin) = (a.id("?cos"), a.id("?sin"));
        let c = wave(a, cos, "cos")?;
        let s = wave(a, sin, "sin")?;
        if !a.same(c.angles, s.angles) || c.scaling != s.scaling {
            return None;
        }
        let (_, ops) = a.form(c.angles, "angles")?;
        // cos stretches over x as [.., D]; the positions stretch as [..] without the features.
        let mut lead = a.tensor(cos)?.shape;
        lead.pop();
        let positions = a.reshape(ops[0], lead)?;
        let spec = RopeSpec { scaling: c.scaling };
        let x = a.id("?x");
        a.add(Op::Rope(spec), &[x, positions, ops[1]])
    },
    sample: |g| {
        let scaling = g.pick(&[1.0, 1.25]);
        rope(g, scaling, scaling, false)
    },
    near_misses: &[
        ("cos and sin are scaled differently", |g| {
            rope(g, 1.0, 1.5, false)
        }),
        ("the halves are not exchanged", |g| rope(g, 1.0, 1.0, true)),
    ],
};

/// What a cos or sin operand was made of.
struct Wave {
    angles: Id,
    scaling: Real,
}

/// Looks through `reshape`, `cast` and a constant factor for `f(concat(a, a))` with known angles.
fn wave(a: &Apply<'_>, id: Id, f: &str) -> Option<Wave> {
    let mut id = id;
    let mut scaling = 1.0;
    loop {
        if let Some((_, ops)) = a.form(id, f) {
            let (Op::Concat { axis }, parts) = a.form(ops[0], "concat")? else {
                return None;
            };
            let rank = a.tensor(ops[0])?.rank();
            a.form(parts[0], "angles")?;
            let whole = a.same(parts[0], parts[1]) && usize::from(axis) + 1 == rank;
            return whole.then_some(Wave {
                angles: parts[0],
                scaling: Real::new(scaling),
            });
        }
        if let Some((_, ops)) = a.form(id, "cast") {
            id = ops[0];
        } else if let Some((_, ops)) = a.form(id, "reshape") {
            // Only extents of 1 may be inserted: the features stay the last axis.
            if a.tensor(ops[0])?.shape.last() != a.tensor(id)?.shape.last() {
                return None;
            }
            id = ops[0];
        } else {
            let (_, ops) = a.form(id, "mul")?;
            scaling *= a.value(ops[1]).konst?;
            id = ops[0];
        }
    }
}

/// Angles in parts, as Hugging Face computes them; `perm` is the final transpose.
fn angles(q: &mut Build, f: i64, perm: &[u8]) -> NodeId {
    let freq = q.freqs(f);
    let freq = q.reshape(freq, &[n(1), n(f), n(1)]);
    let freq = q.op(Op::Expand(vec![b(), n(f), n(1)]), &[freq]);
    let p = q.input("positions", DType::I64, &[b(), s()]);
    let p = q.cast(p, DType::F32);
    let p = q.reshape(p, &[b(), n(1), s()]);
    let y = q.op(Op::Matmul, &[freq, p]);
    q.permute(y, perm)
}

fn rope(g: &mut Gen, cos_scaling: f64, sin_scaling: f64, straight: bool) -> Graph {
    let mut q = Build::new();
    let (dt, h, f) = (g.float(), g.dim(), g.dim());
    let freq = q.freqs(f);
    let p = q.input("positions", DType::I64, &[b(), s()]);
    let angles = q.op(Op::Angles, &[p, freq]);
    let x = q.input("x", dt, &[b(), n(h), s(), n(2 * f)]);
    let both = q.op(Op::Concat { axis: 2 }, &[angles, angles]);
    let mut wave = |fun, scaling: f64| {
        let y = q.un(fun, both);
        let y = if scaling == 1.0 {
            y
        } else {
            let c = q.konst(scaling, DType::F32);
            q.bin(BinaryFn::Mul, y, c)
        };
        let y = q.cast(y, dt);
        q.reshape(y, &[b(), n(1), s(), n(2 * f)])
    };
    let cos = wave(UnaryFn::Cos, cos_scaling);
    let sin = wave(UnaryFn::Sin, sin_scaling);
    let hi = q.slice(x, 3, f, 2 * f);
    let lo = q.slice(x, 3, 0, f);
    let rotated = if straight {
        let lo = q.un(UnaryFn::Neg, lo);
        q.op(Op::Concat { axis: 3 }, &[lo, hi])
    } else {
        let hi = q.un(UnaryFn::Neg, hi);
        q.op(Op::Concat { axis: 3 }, &[hi, lo])
    };
    let y = q.bin(BinaryFn::Mul, x, cos);
    let z = q.bin(BinaryFn::Mul, rotated, sin);
    let y = q.bin(BinaryFn::Add, y, z);
    q.done(&[y])
}
