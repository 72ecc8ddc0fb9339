//! One run of a program: its values in the arena, its weights and caches, by step and operand.

use super::kernels::Elem;
use super::memory::Layout;
use super::pages::PageBuffer;
use crate::device::load::{LoadOptions, RopeTables};
use crate::device::step::StepBatch;
use lathe_codegen::{Operand, Plan, Program, Step, ValueId};
use lathe_ir::{DType, Slot, SymEnv, TensorType};

/// What a program reads at run time.
pub(super) struct Inputs<'a> {
    pub(super) batch: &'a StepBatch,
}

/// One run of a program.
pub(crate) struct Run<'a, E> {
    pub(crate) plan: &'a Plan,
    pub(super) options: &'a LoadOptions,
    pub(super) weights: &'a [PageBuffer<E>],
    pub(super) rope: &'a RopeTables,
    pub(crate) program: &'a Program,
    pub(super) layout: &'a Layout,
    /// Start of the activations. Slots of values alive at the same time are disjoint.
    pub(super) base: *mut u8,
    pub(super) env: SymEnv,
    pub(super) inputs: &'a Inputs<'a>,
    pub(crate) caches: &'a mut [PageBuffer<E>],
    pub(super) scratch: &'a mut Vec<E>,
}

impl<'a, E: Elem> Run<'a, E> {
    /// Elements of a tensor type at this run's sizes.
    pub(super) fn len(&self, ty: &TensorType) -> usize {
        ty.elements(&self.env)
    }

    pub(super) fn last(&self, step: &Step, operand: Slot) -> usize {
        let shape = step.tensor(operand).map(|t| &t.shape[..]);
        shape
            .and_then(<[_]>::last)
            .map_or(1, |d| d.eval(&self.env) as usize)
    }

    pub(super) fn rows(&self, step: &Step, operand: Slot) -> usize {
        let shape = step.tensor(operand).map(|t| &t.shape[..]);
        shape
            .and_then(<[_]>::first)
            .map_or(1, |d| d.eval(&self.env) as usize)
    }

    /// A float operand in the plan's element type.
    pub(super) fn floats(&self, step: &Step, operand: Slot) -> Result<&'a [E], String> {
        let absent = || format!("operand '{}' is no tensor", operand.name());
        let ty = step.tensor(operand).ok_or_else(absent)?;
        match step.get(operand) {
            Some(Operand::Weight(w)) if is_elem::<E>(ty.dtype) => Ok(self.weight(*w, ty)),
            Some(Operand::Value(v)) if is_elem::<E>(ty.dtype) => Ok(self.read(*v, ty)),
            other => {
                let name = operand.name();
                Err(format!("operand '{name}' is {other:?} of {}", ty.dtype))
            }
        }
    }

    /// As [`Run::floats`], of an operand that may be absent.
    pub(super) fn opt_floats(&self, step: &Step, operand: Slot) -> Result<Option<&'a [E]>, String> {
        let present = step.get(operand);
        present.map(|_| self.floats(step, operand)).transpose()
    }

    /// The memory of a value, for reading.
    pub(super) fn read<T>(&self, v: ValueId, ty: &TensorType) -> &'a [T] {
        let n = self.len(ty);
        debug_assert_eq!(std::mem::size_of::<T>(), ty.dtype.size());
        // SAFETY: the slot holds `n` elements of the value's type at the sizes that the arena was
        // laid out for, offsets are multiples of 64, and every producer has written all of them.
        unsafe { std::slice::from_raw_parts(self.place(v).cast::<T>(), n) }
    }

    /// The memory of a result, for writing.
    #[allow(clippy::mut_from_ref)] // slots of live values are disjoint: see `liveness`
    pub(super) fn write<T>(&self, v: ValueId, ty: &TensorType) -> &'a mut [T] {
        let n = self.len(ty);
        debug_assert_eq!(std::mem::size_of::<T>(), ty.dtype.size());
        // SAFETY: as in `read`; the result's slot is disjoint from the slots of the step's
        // operands and other results (liveness gives results their slots before operands end).
        unsafe { std::slice::from_raw_parts_mut(self.place(v).cast::<T>(), n) }
    }

    /// The bytes of a value.
    pub(crate) fn bytes(&self, v: ValueId) -> &[u8] {
        let n = self.program.values[v.0 as usize].0.bytes(&self.env);
        // SAFETY: as in `read`.
        unsafe { std::slice::from_raw_parts(self.place(v), n) }
    }

    /// The bytes of a result, for writing.
    pub(crate) fn bytes_mut(&mut self, v: ValueId) -> &mut [u8] {
        let n = self.program.values[v.0 as usize].0.bytes(&self.env);
        // SAFETY: as in `write`.
        unsafe { std::slice::from_raw_parts_mut(self.place(v), n) }
    }

    /// A weight as elements of its type, which is `T`.
    pub(super) fn weight<T: Elem>(&self, w: usize, ty: &TensorType) -> &'a [T] {
        let data: &'a [E] = &self.weights[w];
        let n = self.len(ty);
        assert!(n * size_of::<T>() <= size_of_val(data) && ty.dtype.name() == T::NAME);
        // SAFETY: the buffer is aligned to a page, has these bytes, and holds elements of the
        // weight's type, of which any bytes are values.
        unsafe { std::slice::from_raw_parts(data.as_ptr().cast::<T>(), n) }
    }

    fn place(&self, v: ValueId) -> *mut u8 {
        let offset = self.layout.offsets[self.program.slot(v)];
        // SAFETY: offsets lie inside the arena by construction of the layout.
        unsafe { self.base.add(offset) }
    }

    /// The memory of a step's float result.
    #[allow(clippy::mut_from_ref)] // as `write`
    pub(super) fn out(&self, step: &Step, i: usize) -> &'a mut [E] {
        match (step.results[i], step.result_type(i)) {
            (Some(v), Some(ty)) => self.write(v, ty),
            _ => &mut [],
        }
    }
}

/// Whether `E` stores this element type.
pub(super) fn is_elem<E: Elem>(dtype: DType) -> bool {
    dtype.name() == E::NAME
}
