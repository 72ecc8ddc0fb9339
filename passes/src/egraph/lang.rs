//! The e-graph language: an operation is its name and its children; the payload of an operation
//! that has one is an interned leaf, its first child.
//!
//! Patterns therefore bind whole payloads: `(attn ?spec ?q ?k ?v)`. A payload inside the enum
//! variant would not do, because patterns would have to spell it out.

use egg::{FromOp, Id, Language};
use lathe_ir::Op;
use smallvec::SmallVec;
use std::fmt;

/// An e-node.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Lang {
    /// The payload of an operation: the whole operation, without operands.
    Payload(Op),
    /// An operation by name. With a payload, the first child is its leaf.
    App(&'static str, SmallVec<[Id; 4]>),
}

/// Names of operations that carry a payload, for patterns.
const PAYLOAD_NAMES: &[&str] = &[
    "input",
    "weight",
    "const",
    "table",
    "iota",
    "cache",
    "cast",
    "sum",
    "mean",
    "amax",
    "argmax",
    "reshape",
    "permute",
    "expand",
    "slice",
    "concat",
    "rmsnorm",
    "rope",
    "repeat_kv",
    "sdpa",
    "attn",
    "win",
    "get",
    "attn_step",
    "proj",
    "pack",
    "addrms",
    "gemm",
    "attn_qkv",
    "chain",
];

/// The interned spelling of an operation's name.
fn intern(name: &str) -> Option<&'static str> {
    if let Some(op) = Op::plain(name) {
        return Some(op.name());
    }
    PAYLOAD_NAMES.iter().copied().find(|n| *n == name)
}

impl Lang {
    /// The operation's name, if this is not a payload.
    pub fn name(&self) -> Option<&'static str> {
        match self {
            Lang::App(name, _) => Some(name),
            Lang::Payload(_) => None,
        }
    }

    /// The operands, without the payload.
    pub fn operands(&self) -> &[Id] {
        match self {
            Lang::Payload(_) => &[],
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
            _ => false,
        }
    }

    fn children(&self) -> &[Id] {
        match self {
            Lang::Payload(_) => &[],
            Lang::App(_, ch) => ch,
        }
    }

    fn children_mut(&mut self) -> &mut [Id] {
        match self {
            Lang::Payload(_) => &mut [],
            Lang::App(_, ch) => ch,
        }
    }
}

impl fmt::Display for Lang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lang::Payload(op) => write!(f, "{op:?}"),
            Lang::App(name, _) => f.write_str(name),
        }
    }
}

impl FromOp for Lang {
    type Error = String;

    fn from_op(op: &str, children: Vec<Id>) -> Result<Self, String> {
        let name = intern(op).ok_or_else(|| format!("no operation named '{op}'"))?;
        Ok(Lang::App(name, children.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_know_every_operation() {
        for name in PAYLOAD_NAMES {
            assert!(Op::plain(name).is_none(), "{name} has no payload");
        }
        assert!(Lang::from_op("softmax", vec![]).is_ok());
        assert!(Lang::from_op("sofmax", vec![]).is_err());
    }
}
