//! What every operation computes, one implementation an operation: the oracle. The implementations stand with the
//! arithmetic that they use.

use super::{Float, Interp, Tensor, Value};
use crate::dtype::DType;
use crate::operands::{Operands, Slot};
use crate::ops::Operation;
use crate::{TensorType, Type};

/// One evaluation.
pub(crate) struct Call<'c, 'a, F> {
    /// Symbols, inputs, weights, step and caches.
    pub(super) state: &'c mut Interp<'a, F>,
    /// The type of the result.
    pub(super) ty: &'c Type,
    /// The element type that values are rounded to where they are produced, if they are.
    pub(super) round: Option<DType>,
}

impl<F: Float> Call<'_, '_, F> {
    /// The extents of the result, which is a tensor.
    pub(super) fn extents(&self) -> Result<Vec<usize>, String> {
        match self.ty {
            Type::Tensor(TensorType { shape, .. }) => self.state.extents(shape),
            _ => Err("the result is no tensor".to_string()),
        }
    }
}

/// The meaning of an operation.
pub(crate) trait Eval: Operation {
    /// Its value for these operands, not yet rounded and checked against its type.
    ///
    /// # Errors
    /// The operands do not fit, or something is missing from the interpreter's state.
    fn eval<F: Float>(
        &self,
        x: &Operands<&Value<F>>,
        call: &mut Call<'_, '_, F>,
    ) -> Result<Value<F>, String>;
}

impl<'v, F: Float> Operands<&'v Value<F>> {
    /// A required operand.
    pub(super) fn value(&self, slot: Slot) -> Result<&'v Value<F>, String> {
        self.get(slot).ok_or_else(|| {
            format!(
                "operand '{}' is absent, but the operation needs it",
                slot.name()
            )
        })
    }

    /// A required float tensor.
    pub(super) fn float(&self, slot: Slot) -> Result<&'v Tensor<F>, String> {
        self.value(slot)?.float()
    }

    /// A float tensor that may be absent.
    pub(super) fn opt_float(&self, slot: Slot) -> Result<Option<&'v Tensor<F>>, String> {
        self.get(slot).map(Value::float).transpose()
    }
}
