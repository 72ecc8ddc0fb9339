//! Values of which all elements are one known number.

use lathe_ir::ops::{Cast, Const, X};
use lathe_ir::{DType, Op, Operands, Type, UnaryFn};

/// Beyond this, f64 does not tell neighbouring integers apart.
const EXACT: f64 = 9e15;

/// The number that all elements of an operation's value of this type are, if its operands say so: `x` are
/// the numbers that theirs are.
pub(super) fn constant(op: &Op, x: &Operands<Option<f64>>, ty: &Type) -> Option<f64> {
    match op {
        Op::Const(Const { value, dtype }) => held(value.get(), *dtype),
        Op::Cast(Cast(to)) => held(x[X]?, *to),
        Op::Reshape(_) | Op::Expand(_) => x[X],
        Op::Unary(UnaryFn::Neg) if is_float(ty) => Some(-x[X]?),
        _ => None,
    }
}

fn is_float(ty: &Type) -> bool {
    ty.as_tensor().is_some_and(|t| t.dtype.is_float())
}

/// A number as an element type holds it: the interpreter's conversion, over the reals for floats.
fn held(v: f64, dtype: DType) -> Option<f64> {
    match dtype {
        DType::Bool => Some(f64::from(u8::from(v != 0.0))),
        DType::I32 | DType::I64 if v.is_nan() => Some(0.0),
        DType::I32 => (v.abs() <= f64::from(i32::MAX)).then(|| v.trunc()),
        DType::I64 => (v.abs() <= EXACT).then(|| v.trunc()),
        _ => Some(v),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_type_says_what_it_holds() {
        assert_eq!(held(0.5, DType::I64), Some(0.0));
        assert_eq!(held(-1.5, DType::I32), Some(-1.0));
        assert_eq!(held(1e10, DType::I32), None);
        assert_eq!(held(2.0, DType::Bool), Some(1.0));
        assert_eq!(held(f64::NAN, DType::I32), Some(0.0));
        assert_eq!(held(f64::NEG_INFINITY, DType::I64), None);
        assert_eq!(held(0.1, DType::BF16), Some(0.1));
    }
}
