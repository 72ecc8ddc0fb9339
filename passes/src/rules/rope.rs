//! Rotary position embedding from its parts.

use crate::rule::{Apply, Exactness, Rule, Stage};
use egg::Id;
use lathe_ir::ops::{Angles, Cast, Concat, Permute, Reshape, Rope, Slice};
use lathe_ir::ops::{X, angles, binary, concat};
use lathe_ir::{DType, Dim, Op, Real};

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
        let (Op::Reshape(Reshape(rf)), Op::Reshape(Reshape(rp))) = (a.op("?rf"), a.op("?rp"))
        else {
            return None;
        };
        if f.rank() != 1
            || p.rank() != 2
            || rf != [Dim::new(1), f.shape[0], Dim::new(1)]
            || rp != [p.shape[0], Dim::new(1), p.shape[1]]
            || a.op("?t") != Op::Permute(Permute(vec![0, 2, 1]))
            || a.op("?c") != Op::Cast(Cast(DType::F32))
        {
            return None;
        }
        let (p, f) = (a.id("?p"), a.id("?f"));
        let y = a.add(Angles, [p, f])?;
        (a.value(y).ty == a.value(a.root).ty).then_some(y)
    },
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
        let (hi, lo) = (a.payload::<Slice>("?hi")?, a.payload::<Slice>("?lo")?);
        let slice = |start, end| Slice { axis, start, end };
        if d % 2 != 0
            || a.payload::<Concat>("?c")? != (Concat { axis })
            || hi != slice(d / 2, d)
            || lo != slice(0, d / 2)
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
        let positions = a.reshape(ops[angles::POSITIONS], lead)?;
        let spec = Rope { scaling: c.scaling };
        let x = a.id("?x");
        a.add(spec, [x, positions, ops[angles::INV_FREQ]])
    },
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
            let (Op::Concat(Concat { axis }), parts) = a.form(ops[X], "concat")? else {
                return None;
            };
            let rank = a.tensor(ops[X])?.rank();
            let (first, second) = (parts[concat::A], parts[concat::B]);
            a.form(first, "angles")?;
            let whole = a.same(first, second) && usize::from(axis) + 1 == rank;
            return whole.then_some(Wave {
                angles: first,
                scaling: Real::new(scaling),
            });
        }
        if let Some((_, ops)) = a.form(id, "cast") {
            id = ops[X];
        } else if let Some((_, ops)) = a.form(id, "reshape") {
            // Only extents of 1 may be inserted: the features stay the last axis.
            if a.tensor(ops[X])?.shape.last() != a.tensor(id)?.shape.last() {
                return None;
            }
            id = ops[X];
        } else {
            let (_, ops) = a.form(id, "mul")?;
            scaling *= a.value(ops[binary::B]).konst?;
            id = ops[binary::A];
        }
    }
}
