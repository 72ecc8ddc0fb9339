//! How large values can be: bounds that functions have by themselves, and what arithmetic makes of them.

use lathe_ir::ops::{X, binary, concat, select_where};
use lathe_ir::{BinaryFn, Op, Operands, UnaryFn};

/// A number that no element of an operation's value exceeds in magnitude, if one is known; `x` are
/// those of its operands, `konst` the number that all its elements are.
pub(super) fn bound(op: &Op, x: &Operands<Option<f64>>, konst: Option<f64>) -> Option<f64> {
    if let Some(v) = konst {
        return v.is_finite().then(|| v.abs());
    }
    let of = |slot| x.get(slot).flatten();
    let found = match op {
        Op::Unary(f) => match f {
            UnaryFn::Tanh | UnaryFn::Sigmoid | UnaryFn::Erf | UnaryFn::Sin | UnaryFn::Cos => 1.0,
            UnaryFn::Neg | UnaryFn::Abs | UnaryFn::Relu => of(X)?,
            _ => return None,
        },
        Op::Binary(f) => {
            let (a, b) = (of(binary::A)?, of(binary::B)?);
            match f {
                BinaryFn::Add | BinaryFn::Sub => a + b,
                BinaryFn::Mul => a * b,
                BinaryFn::Maximum | BinaryFn::Minimum => a.max(b),
                _ => return None,
            }
        }
        Op::Where(_) => of(select_where::A)?.max(of(select_where::B)?),
        Op::Concat(_) => of(concat::A)?.max(of(concat::B)?),
        Op::Reshape(_) | Op::Expand(_) | Op::Permute(_) | Op::Slice(_) | Op::RepeatKv(_) => of(X)?,
        // Narrow types round, and integers truncate or wrap around.
        Op::Cast(c) if c.0.is_float() => of(X)? * 1.01,
        Op::Softmax(_) => 1.0,
        _ => return None,
    };
    found.is_finite().then_some(found)
}
