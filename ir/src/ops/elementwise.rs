//! Elementwise operations.

use super::checks::{
    broadcast_of, same_dtype, same_type, want_dtype, want_float, want_int, want_rank,
};
use super::{Class, Fields, Level, Operation, Signature, X};
use crate::functions::{BinaryFn, UnaryFn};
use crate::operands::{Operands, Slot};
use crate::{DType, TensorType, Type};

type Rule = Result<Type, String>;

const fn primitive(slots: &'static [Slot]) -> Signature {
    Signature::new(Level::Primitive, Class::Elementwise, slots)
}

const fn composite(slots: &'static [Slot]) -> Signature {
    Signature::new(Level::Composite, Class::Elementwise, slots)
}

/// `(x)`: conversion to another element type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Cast(pub DType);

impl Operation for Cast {
    const NAMES: &'static [&'static str] = &["cast"];
    const SIGNATURE: Signature = primitive(&[X]);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.dtype(&mut self.0)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        Ok(Type::tensor(self.0, &x.tensor(X)?.shape[..]))
    }
}

impl Operation for UnaryFn {
    const NAMES: &'static [&'static str] = UnaryFn::NAMES;
    const SIGNATURE: Signature = primitive(&[X]);
    const HAS_PAYLOAD: bool = false;

    fn name(&self) -> &'static str {
        UnaryFn::name(*self)
    }

    fn named(name: &str) -> UnaryFn {
        UnaryFn::by_name(name).unwrap_or_default()
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        self.of(x.tensor(X)?).map(Type::Tensor)
    }
}

impl UnaryFn {
    /// The type of the function of a tensor.
    ///
    /// # Errors
    /// It does not apply to the element type.
    pub fn of(self, x: &TensorType) -> Result<TensorType, String> {
        match self {
            UnaryFn::Not => want_dtype(x, DType::Bool, "x")?,
            UnaryFn::Neg | UnaryFn::Abs | UnaryFn::Relu if x.dtype != DType::Bool => {}
            _ => want_float(x, "x")?,
        }
        Ok(x.clone())
    }
}

/// Operands of [`BinaryFn`].
pub mod binary {
    use super::Slot;
    /// The left operand.
    pub const A: Slot = Slot::value(0, "a");
    /// The right operand, which broadcasts against the left one.
    pub const B: Slot = Slot::value(1, "b");
}

impl Operation for BinaryFn {
    const NAMES: &'static [&'static str] = BinaryFn::NAMES;
    const SIGNATURE: Signature = primitive(&[binary::A, binary::B]);
    const HAS_PAYLOAD: bool = false;

    fn name(&self) -> &'static str {
        BinaryFn::name(*self)
    }

    fn named(name: &str) -> BinaryFn {
        BinaryFn::by_name(name).unwrap_or_default()
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let (a, b) = (x.tensor(binary::A)?, x.tensor(binary::B)?);
        self.of(a, b).map(Type::Tensor)
    }
}

impl BinaryFn {
    /// The type of the function of two tensors.
    ///
    /// # Errors
    /// It does not apply to the element types, or the extents do not broadcast.
    pub fn of(self, a: &TensorType, b: &TensorType) -> Result<TensorType, String> {
        same_dtype(a, b)?;
        let truth = a.dtype == DType::Bool;
        if self.is_logical() != truth && !(self.is_comparison() && truth) {
            return Err(format!("does not apply to {}", a.dtype));
        }
        let dtype = if self.is_comparison() {
            DType::Bool
        } else {
            a.dtype
        };
        let shape = broadcast_of(&a.shape, &b.shape)?;
        Ok(TensorType { dtype, shape })
    }
}

/// `(cond, a, b)` with broadcasting: a where the condition holds, else b.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Where;

/// Operands of [`Where`].
pub mod select_where {
    use super::Slot;
    /// The condition, `bool`.
    pub const COND: Slot = Slot::value(0, "cond");
    /// The value where it holds.
    pub const A: Slot = Slot::value(1, "a");
    /// The value elsewhere.
    pub const B: Slot = Slot::value(2, "b");
}

impl Operation for Where {
    const NAMES: &'static [&'static str] = &["where"];
    const SIGNATURE: Signature = primitive(&[select_where::COND, select_where::A, select_where::B]);

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let c = x.tensor(select_where::COND)?;
        let (a, b) = (x.tensor(select_where::A)?, x.tensor(select_where::B)?);
        want_dtype(c, DType::Bool, "condition")?;
        same_dtype(a, b)?;
        let ab = broadcast_of(&a.shape, &b.shape)?;
        Ok(Type::tensor(a.dtype, broadcast_of(&c.shape, &ab)?))
    }
}

/// `(x)`: `x·sigmoid(x)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Silu;

impl Operation for Silu {
    const NAMES: &'static [&'static str] = &["silu"];
    const SIGNATURE: Signature = composite(&[X]);

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let x = x.tensor(X)?;
        want_float(x, "x")?;
        Ok(Type::Tensor(x.clone()))
    }
}

/// `(gate, up)`: `silu(gate)·up`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct SwiGlu;

/// Operands of [`SwiGlu`].
pub mod swiglu {
    use super::Slot;
    /// What goes through SiLU.
    pub const GATE: Slot = Slot::value(0, "gate");
    /// What is multiplied, of the same type.
    pub const UP: Slot = Slot::value(1, "up");
}

impl Operation for SwiGlu {
    const NAMES: &'static [&'static str] = &["swiglu"];
    const SIGNATURE: Signature = composite(&[swiglu::GATE, swiglu::UP]);

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        SwiGlu::of(x.tensor(swiglu::GATE)?, x.tensor(swiglu::UP)?).map(Type::Tensor)
    }
}

impl SwiGlu {
    /// The type for a gate and an up.
    ///
    /// # Errors
    /// They are not of one float type.
    pub fn of(gate: &TensorType, up: &TensorType) -> Result<TensorType, String> {
        same_type(gate, up)?;
        want_float(gate, "gate")?;
        Ok(gate.clone())
    }
}

/// `(positions [..], inv_freq [F]) -> f32 [..,F]`: their outer product.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Angles;

/// Operands of [`Angles`].
pub mod angles {
    use super::Slot;
    /// Positions of the rows.
    pub const POSITIONS: Slot = Slot::value(0, "positions");
    /// Frequencies, a vector.
    pub const INV_FREQ: Slot = Slot::value(1, "inv_freq");
}

impl Operation for Angles {
    const NAMES: &'static [&'static str] = &["angles"];
    const SIGNATURE: Signature = composite(&[angles::POSITIONS, angles::INV_FREQ]);

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let (p, f) = (x.tensor(angles::POSITIONS)?, x.tensor(angles::INV_FREQ)?);
        want_int(p, "positions")?;
        want_float(f, "inv_freq")?;
        want_rank(f, 1, "inv_freq")?;
        let mut shape = p.shape.clone();
        shape.push(f.shape[0]);
        Ok(Type::tensor(DType::F32, shape))
    }
}
