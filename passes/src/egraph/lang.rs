//! The e-graph language: an operation is its name and its children; the payload of an operation
//! that has one is an interned leaf, its first child.
//!
//! Patterns therefore bind whole payloads: `(attn ?spec ?q ?k ?v)`. A payload inside the enum
//! variant would not do, because patterns would have to spell it out.

use egg::{FromOp, Id, Language};
use lathe_ir::{Op, Slot};
use smallvec::SmallVec;
use std::fmt;

/// How an absent operand is spelled in full patterns.
pub(super) const ABSENT: &str = "absent";

/// An e-node.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Lang {
    /// The payload of an operation: the whole operation, without operands.
    Payload(Op),
    /// An operation by name. With a payload, the first child is its leaf; then a child for each place of its
    /// operands.
    App(&'static str, SmallVec<[Id; 4]>),
    /// What stands in the place of an absent operand.
    Absent,
}

impl Lang {
    /// The operation's name, if this is an operation.
    pub fn name(&self) -> Option<&'static str> {
        match self {
            Lang::App(name, _) => Some(name),
            Lang::Payload(_) | Lang::Absent => None,
        }
    }

    /// What stands in the place of an operand.
    ///
    /// # Panics
    /// The operation has no such operand.
    pub fn place(&self, slot: Slot) -> Id {
        self.places()[slot.index()]
    }

    /// What stands in the places of the operands, some of it absent.
    pub fn places(&self) -> &[Id] {
        match self {
            Lang::Payload(_) | Lang::Absent => &[],
            Lang::App(name, ch) if Op::plain(name).is_some() => ch,
            Lang::App(_, ch) => &ch[1..],
        }
    }
}

impl Language for Lang {
    type Discriminant = (Option<&'static str>, usize);

    fn discriminant(&self) -> Self::Discriminant {
        (self.name(), self.children().len())
    }

    fn matches(&self, other: &Self) -> bool {
        match (self, other) {
            (Lang::Payload(a), Lang::Payload(b)) => a == b,
            (Lang::App(a, x), Lang::App(b, y)) => a == b && x.len() == y.len(),
            (Lang::Absent, Lang::Absent) => true,
            _ => false,
        }
    }

    fn children(&self) -> &[Id] {
        match self {
            Lang::Payload(_) | Lang::Absent => &[],
            Lang::App(_, ch) => ch,
        }
    }

    fn children_mut(&mut self) -> &mut [Id] {
        match self {
            Lang::Payload(_) | Lang::Absent => &mut [],
            Lang::App(_, ch) => ch,
        }
    }
}

impl fmt::Display for Lang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lang::Payload(op) => write!(f, "{op:?}"),
            Lang::App(name, _) => f.write_str(name),
            Lang::Absent => f.write_str(ABSENT),
        }
    }
}

impl FromOp for Lang {
    type Error = String;

    fn from_op(op: &str, children: Vec<Id>) -> Result<Self, String> {
        if op == ABSENT && children.is_empty() {
            return Ok(Lang::Absent);
        }
        let op = Op::named(op).ok_or_else(|| format!("no operation named '{op}'"))?;
        Ok(Lang::App(op.name(), children.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_know_every_operation() {
        for name in Op::names() {
            assert!(Lang::from_op(name, vec![]).is_ok(), "{name}");
        }
        assert!(Lang::from_op("softmax", vec![]).is_ok());
        assert!(Lang::from_op("sofmax", vec![]).is_err());
    }
}
