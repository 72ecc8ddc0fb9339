//! Lookups and changes of layout.

use super::checks::{axis_of, same_dtype, want_int, want_rank};
use super::{Class, Fields, Level, Operation, Signature, X};
use crate::operands::{Operands, Slot};
use crate::shape::{Dim, element_count, format_shape};
use crate::{TensorType, Type};

type Rule = Result<Type, String>;

const fn primitive(slots: &'static [Slot]) -> Signature {
    Signature::new(Level::Primitive, Class::Movement, slots)
}

/// `(table [V,H], ids [..]) -> [..,H]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Embedding;

/// Operands of [`Embedding`].
pub mod embedding {
    use super::Slot;
    /// The rows, a weight.
    pub const TABLE: Slot = Slot::weight(0, "table");
    /// Which rows.
    pub const IDS: Slot = Slot::value(1, "ids");
}

impl Operation for Embedding {
    const NAMES: &'static [&'static str] = &["embedding"];
    const SIGNATURE: Signature = primitive(&[embedding::TABLE, embedding::IDS]);

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let (table, ids) = (x.tensor(embedding::TABLE)?, x.tensor(embedding::IDS)?);
        want_rank(table, 2, "table")?;
        want_int(ids, "ids")?;
        let mut shape = ids.shape.clone();
        shape.push(table.shape[1]);
        Ok(Type::tensor(table.dtype, shape))
    }
}

/// `(x)`: same elements in row-major order under other extents.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Reshape(pub Vec<Dim>);

impl Operation for Reshape {
    const NAMES: &'static [&'static str] = &["reshape"];
    const SIGNATURE: Signature = primitive(&[X]);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.shape(&mut self.0)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let x = x.tensor(X)?;
        let count = element_count(&self.0);
        if element_count(&x.shape) != count || count.0 == i64::MAX {
            return Err(format!(
                "{} does not hold as many elements as {}",
                format_shape(&x.shape),
                format_shape(&self.0)
            ));
        }
        Ok(Type::tensor(x.dtype, &self.0[..]))
    }
}

/// `(x)`: output axis `i` is input axis `perm[i]`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Permute(pub Vec<u8>);

impl Operation for Permute {
    const NAMES: &'static [&'static str] = &["permute"];
    const SIGNATURE: Signature = primitive(&[X]);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.axes("perm", &mut self.0)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let (x, perm) = (x.tensor(X)?, &self.0);
        let mut seen = vec![false; x.rank()];
        let mut fits = perm.len() == x.rank();
        for &p in perm {
            match seen.get_mut(usize::from(p)) {
                Some(s) if !*s => *s = true,
                _ => fits = false,
            }
        }
        if !fits {
            return Err(format!("{perm:?} is no permutation of {} axes", x.rank()));
        }
        let shape: Vec<Dim> = perm.iter().map(|&p| x.shape[usize::from(p)]).collect();
        Ok(Type::tensor(x.dtype, shape))
    }
}

/// `(x)`: extents of 1 are stretched to the given ones.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Expand(pub Vec<Dim>);

impl Operation for Expand {
    const NAMES: &'static [&'static str] = &["expand"];
    const SIGNATURE: Signature = primitive(&[X]);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.shape(&mut self.0)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let x = x.tensor(X)?;
        let pairs = || x.shape.iter().zip(&self.0);
        let fits = x.rank() == self.0.len() && pairs().all(|(a, b)| a == b || a.is(1));
        if !fits {
            return Err(format!(
                "{} does not stretch to {}",
                format_shape(&x.shape),
                format_shape(&self.0)
            ));
        }
        Ok(Type::tensor(x.dtype, &self.0[..]))
    }
}

/// `(x)`: elements `start..end` of an axis.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Slice {
    /// Which axis.
    pub axis: u8,
    /// First element.
    pub start: i64,
    /// One past the last element.
    pub end: i64,
}

impl Operation for Slice {
    const NAMES: &'static [&'static str] = &["slice"];
    const SIGNATURE: Signature = primitive(&[X]);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.int("axis", &mut self.axis)?;
        v.int("start", &mut self.start)?;
        v.int("end", &mut self.end)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let (x, Slice { start, end, .. }) = (x.tensor(X)?, *self);
        let axis = axis_of(self.axis, x)?;
        let extent = x.shape[axis]
            .known()
            .ok_or_else(|| format!("axis {axis} has the symbolic extent {}", x.shape[axis]))?;
        if !(0 <= start && start < end && end <= extent) {
            return Err(format!(
                "{start}..{end} does not lie in an axis of extent {extent}"
            ));
        }
        let mut shape = x.shape.clone();
        shape[axis] = Dim::new(end - start);
        Ok(Type::tensor(x.dtype, shape))
    }
}

/// `(a, b)`: one after the other along an axis.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Concat {
    /// Which axis.
    pub axis: u8,
}

/// Operands of [`Concat`].
pub mod concat {
    use super::Slot;
    /// What comes first.
    pub const A: Slot = Slot::value(0, "a");
    /// What follows.
    pub const B: Slot = Slot::value(1, "b");
}

impl Operation for Concat {
    const NAMES: &'static [&'static str] = &["concat"];
    const SIGNATURE: Signature = primitive(&[concat::A, concat::B]);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.int("axis", &mut self.axis)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let (a, b) = (x.tensor(concat::A)?, x.tensor(concat::B)?);
        same_dtype(a, b)?;
        let axis = axis_of(self.axis, a)?;
        if !agree_beside(axis, a, b) {
            return Err(format!(
                "{} and {} differ beside axis {axis}",
                format_shape(&a.shape),
                format_shape(&b.shape)
            ));
        }
        let mut shape = a.shape.clone();
        shape[axis] = shape[axis] + b.shape[axis];
        Ok(Type::tensor(a.dtype, shape))
    }
}

fn agree_beside(axis: usize, a: &TensorType, b: &TensorType) -> bool {
    a.rank() == b.rank() && (0..a.rank()).all(|i| i == axis || a.shape[i] == b.shape[i])
}
