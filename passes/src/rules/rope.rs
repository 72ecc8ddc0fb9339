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
        // Of one shape, so that each row meets the sine of its cosine's position.
        if a.tensor(cos)?.shape != a.tensor(sin)?.shape {
            return None;
        }
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

/// Looks through `reshape`, `cast` between floats and a constant factor for `f(concat(a, a))` with known
/// angles. A value may be a form of itself (times one), so each is looked at once.
fn wave(a: &Apply<'_>, id: Id, f: &str) -> Option<Wave> {
    let mut seen: Vec<Id> = Vec::new();
    let mut open = vec![(id, 1.0)];
    while let Some((id, scaling)) = open.pop() {
        if seen.iter().any(|&s| a.same(s, id)) {
            continue;
        }
        seen.push(id);
        for (_, ops) in a.forms(id, f) {
            if let Some(angles) = doubled_angles(a, ops[X]) {
                let scaling = Real::new(scaling);
                return Some(Wave { angles, scaling });
            }
        }
        // Through integers, numbers would lose their fractions.
        let floats = |x: &Id| a.tensor(*x).is_some_and(|t| t.dtype.is_float());
        let casts = a.forms(id, "cast").into_iter().map(|(_, ops)| ops[X]);
        open.extend(casts.filter(floats).map(|x| (x, scaling)));
        // Only extents of 1 may be inserted: the features stay the last axis.
        let last = |x: Id| a.tensor(x).and_then(|t| t.shape.last().copied());
        let views = a.forms(id, "reshape").into_iter().map(|(_, ops)| ops[X]);
        open.extend(views.filter(|&x| last(x) == last(id)).map(|x| (x, scaling)));
        for (_, ops) in a.forms(id, "mul") {
            let factor = a.value(ops[binary::B]).konst.unwrap_or(f64::NAN);
            if (scaling * factor).is_finite() {
                open.push((ops[binary::A], scaling * factor));
            }
        }
    }
    None
}

/// The angles of which a value is the concatenation with themselves.
fn doubled_angles(a: &Apply<'_>, id: Id) -> Option<Id> {
    let rank = a.tensor(id)?.rank();
    a.forms(id, "concat").into_iter().find_map(|(op, parts)| {
        let (first, second) = (parts[concat::A], parts[concat::B]);
        let axis = op.as_::<Concat>()?.axis;
        let whole = a.same(first, second) && usize::from(axis) + 1 == rank;
        (whole && a.form(first, "angles").is_some()).then_some(first)
    })
}
