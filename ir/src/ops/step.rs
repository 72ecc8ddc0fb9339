//! What steps add to whole sequences: windows, selected rows, sampling; and elements of tuples.

use super::checks::{axis_of, want_int, want_min_rank, want_rank};
use super::{Class, Fields, Level, Operation, Signature, X};
use crate::operands::{Operands, Slot};
use crate::shape::{Dim, Sym};
use crate::text::format_type;
use crate::{DType, Type};

type Rule = Result<Type, String>;

/// `(x)`: the rows of a full-sequence value that this step computes. Which axes of the value are batch and
/// sequence; the windowed value has the token axis `T` first and the other axes in order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Win {
    /// Axis of extent `B`, if the value has one.
    pub batch: Option<u8>,
    /// Axis of extent `S`, if the value has one.
    pub seq: Option<u8>,
}

impl Operation for Win {
    const NAMES: &'static [&'static str] = &["win"];
    const SIGNATURE: Signature = Signature::new(Level::Composite, Class::Movement, &[X]);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.opt_int("batch", &mut self.batch)?;
        v.opt_int("seq", &mut self.seq)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let x = x.tensor(X)?;
        for (axis, sym) in [(self.batch, Sym::B), (self.seq, Sym::S)] {
            if let Some(a) = axis {
                let a = axis_of(a, x)?;
                if !x.shape[a].is_sym(sym) {
                    return Err(format!(
                        "axis {a} has extent {}, expected {}",
                        x.shape[a],
                        sym.name()
                    ));
                }
            }
        }
        if self.batch.is_none() && self.seq.is_none() {
            return Err("neither batch nor sequence axis".to_string());
        }
        let mut shape = vec![Dim::sym(Sym::T)];
        for (i, &d) in x.shape.iter().enumerate() {
            let i = Some(i as u8);
            if i != self.batch && i != self.seq {
                shape.push(d);
            }
        }
        Ok(Type::tensor(x.dtype, shape))
    }
}

/// `(x [T,..], rows i32[R]) -> [R,..]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Select;

/// Operands of [`Select`].
pub mod select {
    use super::Slot;
    /// The values.
    pub const X: Slot = Slot::value(0, "x");
    /// Which of their rows.
    pub const ROWS: Slot = Slot::value(1, "rows");
}

impl Operation for Select {
    const NAMES: &'static [&'static str] = &["select"];
    const SIGNATURE: Signature = Signature::new(
        Level::Composite,
        Class::Movement,
        &[select::X, select::ROWS],
    );

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let (x, rows) = (x.tensor(select::X)?, x.tensor(select::ROWS)?);
        want_rank(rows, 1, "rows")?;
        want_int(rows, "rows")?;
        want_min_rank(x, 1)?;
        let mut shape = x.shape.clone();
        shape[0] = rows.shape[0];
        Ok(Type::tensor(x.dtype, shape))
    }
}

/// `(tuple)`: one element.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Get(pub u8);

impl Operation for Get {
    const NAMES: &'static [&'static str] = &["get"];
    const SIGNATURE: Signature = Signature::new(Level::Composite, Class::Movement, &[X]);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.int("index", &mut self.0)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let i = usize::from(self.0);
        match x[X] {
            Type::Tuple(ts) if i < ts.len() => Ok(ts[i].clone()),
            other => Err(format!(
                "no element {i} in a value of type {}",
                format_type(other)
            )),
        }
    }
}

/// `(logits [R,V]) -> i32[R]`: the next token of each row, by the request's sampling parameters.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Sample;

impl Operation for Sample {
    const NAMES: &'static [&'static str] = &["sample"];
    const SIGNATURE: Signature = Signature::new(Level::Lowered, Class::Sample, &[X]);

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let x = x.tensor(X)?;
        want_rank(x, 2, "logits")?;
        Ok(Type::tensor(DType::I32, [x.shape[0]]))
    }
}
