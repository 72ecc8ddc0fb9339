//! Operands by name: what an operation reads, each in its slot.

use smallvec::SmallVec;
use std::fmt;

/// A named operand of an operation: where it stands and what may stand there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    index: u8,
    name: &'static str,
    optional: bool,
    weight: bool,
}

impl Slot {
    /// The operand at a position, which computes with whatever it is given.
    pub const fn value(index: u8, name: &'static str) -> Slot {
        Slot {
            index,
            name,
            optional: false,
            weight: false,
        }
    }

    /// The operand at a position, which is a weight in every program that has kernels for it.
    pub const fn weight(index: u8, name: &'static str) -> Slot {
        Slot {
            weight: true,
            ..Slot::value(index, name)
        }
    }

    /// An operand of an operation that takes any number of them.
    pub const fn nth(index: usize) -> Slot {
        Slot::value(index as u8, "operand")
    }

    /// The same operand, which may be absent.
    #[must_use]
    pub const fn optional(self) -> Slot {
        Slot {
            optional: true,
            ..self
        }
    }

    /// Its position among the operands.
    pub const fn index(self) -> usize {
        self.index as usize
    }

    /// Its name in IR text, patterns and errors.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Whether it may be absent.
    pub const fn is_optional(self) -> bool {
        self.optional
    }

    /// Whether it is a weight.
    pub const fn is_weight(self) -> bool {
        self.weight
    }
}

/// The operand of operations that have one.
pub const X: Slot = Slot::value(0, "x");

/// The operands of an operation: one a slot, some of them absent. Operations without named slots
/// ([`Signature::variadic`](crate::ops::Signature::variadic)) have a list of present ones.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Operands<T>(SmallVec<[Option<T>; 4]>);

impl<T> Default for Operands<T> {
    fn default() -> Operands<T> {
        Operands(SmallVec::new())
    }
}

impl<T: fmt::Debug> fmt::Debug for Operands<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.0).finish()
    }
}

impl<T> Operands<T> {
    /// One operand a slot, in order; trailing slots may be left out.
    pub fn of_slots(slots: impl IntoIterator<Item = Option<T>>) -> Operands<T> {
        let mut out = Operands(slots.into_iter().collect());
        out.trim();
        out
    }

    /// These operands and one more.
    #[must_use]
    pub fn with(mut self, slot: Slot, operand: impl Into<Option<T>>) -> Operands<T> {
        self.set(slot, operand);
        self
    }

    /// Puts an operand into its slot, or takes it out.
    pub fn set(&mut self, slot: Slot, operand: impl Into<Option<T>>) {
        while self.0.len() <= slot.index() {
            self.0.push(None);
        }
        self.0[slot.index()] = operand.into();
        self.trim();
    }

    /// Absent operands at the end are not stored, so that equal operands are equal lists.
    fn trim(&mut self) {
        while matches!(self.0.last(), Some(None)) {
            self.0.pop();
        }
    }

    /// The operand in a slot, if it is present.
    pub fn get_ref(&self, slot: Slot) -> Option<&T> {
        self.0.get(slot.index())?.as_ref()
    }

    /// The operands with their positions, absent ones left out.
    pub fn enumerate(&self) -> impl DoubleEndedIterator<Item = (usize, &T)> {
        let slots = self.0.iter().enumerate();
        slots.filter_map(|(i, x)| Some((i, x.as_ref()?)))
    }

    /// The operands, absent ones left out.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &T> {
        self.0.iter().flatten()
    }

    /// Number of slots up to the last present operand.
    pub fn slots(&self) -> usize {
        self.0.len()
    }

    /// Number of present operands.
    pub fn len(&self) -> usize {
        self.iter().count()
    }

    /// Whether there is no operand.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether no slot before the last present operand is empty.
    pub fn is_dense(&self) -> bool {
        self.0.iter().all(Option::is_some)
    }

    /// Each operand replaced, in its slot.
    pub fn map<'a, U>(&'a self, mut f: impl FnMut(&'a T) -> U) -> Operands<U> {
        Operands(self.0.iter().map(|x| x.as_ref().map(&mut f)).collect())
    }

    /// As [`Operands::map`], up to the first error.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn try_map<'a, U, E>(
        &'a self,
        mut f: impl FnMut(&'a T) -> Result<U, E>,
    ) -> Result<Operands<U>, E> {
        let all: Result<_, E> = (self.0.iter())
            .map(|x| x.as_ref().map(&mut f).transpose())
            .collect();
        all.map(Operands)
    }
}

impl<T: Copy> Operands<T> {
    /// The operand in a slot, if it is present.
    pub fn get(&self, slot: Slot) -> Option<T> {
        self.get_ref(slot).copied()
    }

    /// The only operand, if there is just one.
    pub fn only(&self) -> Option<T> {
        match self.0.as_slice() {
            &[Some(x)] => Some(x),
            _ => None,
        }
    }

    /// Whether a value is among the operands.
    pub fn contains(&self, x: &T) -> bool
    where
        T: PartialEq,
    {
        self.iter().any(|y| y == x)
    }
}

impl<T> std::ops::Index<Slot> for Operands<T> {
    type Output = T;

    /// A required operand of a well-typed operation.
    ///
    /// # Panics
    /// The operand is absent.
    fn index(&self, slot: Slot) -> &T {
        self.get_ref(slot)
            .unwrap_or_else(|| panic!("invariant: operand '{}' is present", slot.name()))
    }
}

impl<T, const N: usize> From<[T; N]> for Operands<T> {
    fn from(x: [T; N]) -> Operands<T> {
        Operands(x.into_iter().map(Some).collect())
    }
}

impl<T: Clone, const N: usize> From<&[T; N]> for Operands<T> {
    fn from(x: &[T; N]) -> Operands<T> {
        Operands::from(&x[..])
    }
}

impl<T: Clone> From<&[T]> for Operands<T> {
    fn from(x: &[T]) -> Operands<T> {
        Operands(x.iter().cloned().map(Some).collect())
    }
}

impl<T: Clone> From<&Vec<T>> for Operands<T> {
    fn from(x: &Vec<T>) -> Operands<T> {
        Operands::from(&x[..])
    }
}

impl<T> From<Vec<T>> for Operands<T> {
    fn from(x: Vec<T>) -> Operands<T> {
        Operands(x.into_iter().map(Some).collect())
    }
}

impl<T: Clone> From<&Operands<T>> for Operands<T> {
    fn from(x: &Operands<T>) -> Operands<T> {
        x.clone()
    }
}

impl<T> FromIterator<T> for Operands<T> {
    fn from_iter<I: IntoIterator<Item = T>>(x: I) -> Operands<T> {
        Operands(x.into_iter().map(Some).collect())
    }
}

impl<'a, T> IntoIterator for &'a Operands<T> {
    type Item = &'a T;
    type IntoIter = std::iter::Flatten<std::slice::Iter<'a, Option<T>>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const X: Slot = Slot::value(0, "x");
    const BIAS: Slot = Slot::weight(2, "bias").optional();

    #[test]
    fn absent_operands_leave_no_trace() {
        let some = Operands::from([1, 2]).with(BIAS, 3);
        assert_eq!((some[X], some.get(BIAS), some.len()), (1, Some(3), 3));
        let none = some.with(BIAS, None);
        assert_eq!(none, Operands::from([1, 2]));
        assert_eq!(none.get(BIAS), None);
        let gap = Operands::of_slots([Some(1), None, Some(3), None]);
        assert_eq!(gap.iter().collect::<Vec<_>>(), [&1, &3]);
        assert_eq!(gap.enumerate().map(|(i, _)| i).collect::<Vec<_>>(), [0, 2]);
        assert_eq!((gap.slots(), gap.is_dense()), (3, false));
        assert_eq!(
            gap.map(|x| x * 2),
            Operands::of_slots([Some(2), None, Some(6)])
        );
    }
}
