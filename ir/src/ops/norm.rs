//! Operations on rows: reductions, softmax, RMSNorm.

use super::checks::{axis_of, norm_operands, same_type, want_float, want_min_rank};
use super::{Class, Fields, Level, Operation, Signature, X};
use crate::functions::ReduceFn;
use crate::operands::{Operands, Slot};
use crate::shape::Dim;
use crate::{DType, Real, TensorType, Type};

type Rule = Result<Type, String>;

/// `(x)`: reduces `axis`, which keeps extent 1 with `keepdim`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Reduce {
    /// What is computed.
    pub f: ReduceFn,
    /// Which axis.
    pub axis: u8,
    /// Whether the axis stays, with extent 1.
    pub keepdim: bool,
}

impl Operation for Reduce {
    const NAMES: &'static [&'static str] = ReduceFn::NAMES;
    const SIGNATURE: Signature = Signature::new(Level::Primitive, Class::Norm, &[X]);

    fn name(&self) -> &'static str {
        self.f.name()
    }

    fn named(name: &str) -> Reduce {
        Reduce {
            f: ReduceFn::by_name(name).unwrap_or_default(),
            ..Reduce::default()
        }
    }

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.int("axis", &mut self.axis)?;
        v.flag("keepdim", &mut self.keepdim)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        self.of(x.tensor(X)?).map(Type::Tensor)
    }
}

impl Reduce {
    /// The type of the reduction of a tensor.
    ///
    /// # Errors
    /// There is no such axis, or the elements are no floats.
    pub fn of(self, x: &TensorType) -> Result<TensorType, String> {
        let axis = axis_of(self.axis, x)?;
        want_float(x, "x")?;
        let mut shape = x.shape.clone();
        if self.keepdim {
            shape[axis] = Dim::new(1);
        } else {
            shape.remove(axis);
        }
        let dtype = match self.f {
            ReduceFn::Argmax => DType::I64,
            _ => x.dtype,
        };
        Ok(TensorType { dtype, shape })
    }
}

/// `(x)`: over the last axis, in f32, rounded to x's element type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Softmax;

impl Operation for Softmax {
    const NAMES: &'static [&'static str] = &["softmax"];
    const SIGNATURE: Signature = Signature::new(Level::Composite, Class::Norm, &[X]);

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        Softmax::of(x.tensor(X)?).map(Type::Tensor)
    }
}

impl Softmax {
    /// The type of the softmax of a tensor.
    ///
    /// # Errors
    /// It has no axis, or its elements are no floats.
    pub fn of(x: &TensorType) -> Result<TensorType, String> {
        want_float(x, "x")?;
        want_min_rank(x, 1)?;
        Ok(x.clone())
    }
}

/// `(x, gamma [H])`: `x / sqrt(mean(x²) + eps) · gamma` over the last axis, in f32.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: Real,
}

/// Operands of [`RmsNorm`].
pub mod rmsnorm {
    use super::Slot;
    /// The rows.
    pub const X: Slot = Slot::value(0, "x");
    /// Factors of the columns.
    pub const GAMMA: Slot = Slot::weight(1, "gamma");
}

impl Operation for RmsNorm {
    const NAMES: &'static [&'static str] = &["rmsnorm"];
    const SIGNATURE: Signature =
        Signature::new(Level::Composite, Class::Norm, &[rmsnorm::X, rmsnorm::GAMMA]);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.real("eps", &mut self.eps)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let (x, gamma) = (x.tensor(rmsnorm::X)?, x.tensor(rmsnorm::GAMMA)?);
        norm_operands(x, gamma)?;
        Ok(Type::Tensor(x.clone()))
    }
}

/// `(r, d, gamma) -> (r + d, rmsnorm(r + d)·gamma)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct AddRms {
    /// Added to the mean square.
    pub eps: Real,
}

/// Operands of [`AddRms`].
pub mod addrms {
    use super::Slot;
    /// The residual.
    pub const X: Slot = Slot::value(0, "x");
    /// What is added to it.
    pub const DELTA: Slot = Slot::value(1, "delta");
    /// Factors of the columns.
    pub const GAMMA: Slot = Slot::weight(2, "gamma");
}

impl Operation for AddRms {
    const NAMES: &'static [&'static str] = &["addrms"];
    const SIGNATURE: Signature = Signature::new(
        Level::Lowered,
        Class::Norm,
        &[addrms::X, addrms::DELTA, addrms::GAMMA],
    );

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.real("eps", &mut self.eps)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let (r, d) = (x.tensor(addrms::X)?, x.tensor(addrms::DELTA)?);
        same_type(r, d)?;
        norm_operands(r, x.tensor(addrms::GAMMA)?)?;
        let sum = Type::Tensor(r.clone());
        Ok(Type::Tuple(vec![sum.clone(), sum]))
    }
}
