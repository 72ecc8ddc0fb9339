//! Type derivation: which operand types an operation accepts and what it returns. The graph builder, the
//! verifier and the e-graph analysis all use this one function. The rules of the operations stand with
//! them ([`crate::ops`]).

use crate::Type;
use crate::operands::Operands;
use crate::ops::Op;
use thiserror::Error;

/// An operation does not accept its operands.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{op}: {reason}")]
pub struct TypeError {
    /// The operation's name.
    pub op: &'static str,
    /// What was found and what was expected.
    pub reason: String,
}

/// The result type of an operation on operands of these types.
///
/// # Errors
/// The number of operands, an element type or an extent does not fit.
pub fn infer<'a>(op: &Op, operands: impl Into<Operands<&'a Type>>) -> Result<Type, TypeError> {
    let operands = operands.into();
    let checked = op.signature().check(&operands);
    checked
        .and_then(|()| op.ty(&operands))
        .map_err(|reason| TypeError {
            op: op.name(),
            reason,
        })
}
