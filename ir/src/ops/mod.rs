//! The operations: primitives (each one core ATen operator), composites that the passes recognise,
//! and lowered operations that have a kernel.
//!
//! A file holds a group of them. Each is a payload with its named operands, its type rule and its
//! attributes ([`Operation`]); the list below makes them one type.

mod attention;
mod chain;
pub(crate) mod checks;
mod elementwise;
mod leaves;
mod matrix;
mod movement;
mod norm;
mod signature;
mod step;

pub use attention::{
    Attn, AttnQkv, AttnSpec, AttnStep, Mask, Proj, RepeatKv, Rope, Sdpa, SdpaStage, attn, attn_qkv,
    attn_step, proj, rope, sdpa,
};
pub use elementwise::{Angles, Cast, Silu, SwiGlu, Where, angles, binary, select_where, swiglu};
pub use leaves::{Cache, Const, Input, Iota, Table, Weight, WeightRef};
pub use matrix::{
    Epilogue, Gemm, Linear, Matmul, Pack, Prologue, gemm, interleaved_source, linear, matmul,
};
pub use movement::{Concat, Embedding, Expand, Permute, Reshape, Slice, concat, embedding};
pub use norm::{AddRms, Reduce, RmsNorm, Softmax, addrms, rmsnorm};
pub use signature::{Class, Fields, Level, Operation, Signature};
pub use step::{Get, Sample, Select, Win, select};

pub use crate::chain::Chain;
pub use crate::functions::{BinaryFn, ReduceFn, UnaryFn};
pub use crate::operands::X;

use crate::Type;
use crate::operands::Operands;

/// The payload of a variant.
pub trait Variant: Operation + Into<Op> {
    /// The payload of an operation, if it is of this kind.
    fn of(op: &Op) -> Option<&Self>;
}

/// Makes the list of payloads one type, and asks the right payload.
macro_rules! operations {
    ($dollar:tt $($(#[$doc:meta])* $variant:ident($payload:ty),)*) => {
        /// An expression of the payload of an operation, whichever it is.
        macro_rules! with_payload {
            ($dollar op:expr, $dollar payload:ident => $dollar value:expr) => {
                match $dollar op {
                    $($crate::ops::Op::$variant($dollar payload) => $dollar value,)*
                }
            };
        }

        /// An operation without its operands.
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        pub enum Op {
            $($(#[$doc])* $variant($payload),)*
        }

        $(
            impl From<$payload> for Op {
                fn from(payload: $payload) -> Op {
                    Op::$variant(payload)
                }
            }

            impl Variant for $payload {
                fn of(op: &Op) -> Option<&$payload> {
                    match op {
                        Op::$variant(payload) => Some(payload),
                        _ => None,
                    }
                }
            }
        )*

        impl Op {
            /// The names of all operations.
            pub fn names() -> impl Iterator<Item = &'static str> {
                [$(<$payload as Operation>::NAMES),*].into_iter().flatten().copied()
            }

            /// The name in IR text, patterns and dumps.
            pub fn name(&self) -> &'static str {
                match self { $(Op::$variant(payload) => Operation::name(payload),)* }
            }

            /// Its operands and kind.
            pub fn signature(&self) -> &'static Signature {
                match self { $(Op::$variant(_) => &<$payload as Operation>::SIGNATURE,)* }
            }

            /// What its time is counted as.
            pub fn class(&self) -> Class {
                match self { $(Op::$variant(payload) => payload.class(),)* }
            }

            /// Whether there is more to the operation than its name.
            pub fn has_payload(&self) -> bool {
                match self { $(Op::$variant(_) => <$payload as Operation>::HAS_PAYLOAD,)* }
            }

            /// The operation of a name, before its attributes are read.
            pub fn named(name: &str) -> Option<Op> {
                $(
                    if <$payload as Operation>::NAMES.contains(&name) {
                        return Some(Op::$variant(<$payload as Operation>::named(name)));
                    }
                )*
                None
            }

            /// Visits what its name and type do not say.
            ///
            /// # Errors
            /// Those of the visitor.
            pub fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
                match self { $(Op::$variant(payload) => payload.fields(v),)* }
            }

            /// The type rule of the operation; see [`crate::infer()`].
            pub(crate) fn ty(&self, x: &Operands<&Type>) -> Result<Type, String> {
                match self { $(Op::$variant(payload) => Operation::ty(payload, x),)* }
            }
        }
    };
}

operations! {
    $

    // ---- leaves ----
    /// A value given at run time.
    Input(Input),
    /// A tensor of the checkpoint.
    Weight(Weight),
    /// A scalar constant.
    Const(Const),
    /// A small vector known at compile time.
    Table(Table),
    /// `[0, 1, …, n-1]`.
    Iota(Iota),
    /// The KV cache of a layer.
    Cache(Cache),

    // ---- primitives ----
    /// Conversion to another element type.
    Cast(Cast),
    /// An elementwise function.
    Unary(UnaryFn),
    /// An elementwise function of two operands.
    Binary(BinaryFn),
    /// A choice between two values.
    Where(Where),
    /// A reduction of one axis.
    Reduce(Reduce),
    /// A matrix product.
    Matmul(Matmul),
    /// Rows of a table.
    Embedding(Embedding),
    /// The same elements under other extents.
    Reshape(Reshape),
    /// Axes in another order.
    Permute(Permute),
    /// Extents of 1 stretched.
    Expand(Expand),
    /// Part of an axis.
    Slice(Slice),
    /// Two values along an axis.
    Concat(Concat),

    // ---- composites ----
    /// A product with a weight.
    Linear(Linear),
    /// Softmax over the last axis.
    Softmax(Softmax),
    /// RMSNorm over the last axis.
    RmsNorm(RmsNorm),
    /// `x·sigmoid(x)`.
    Silu(Silu),
    /// `silu(gate)·up`.
    SwiGlu(SwiGlu),
    /// The angles of rotary embedding.
    Angles(Angles),
    /// Rotary position embedding.
    Rope(Rope),
    /// KV heads repeated for their query heads.
    RepeatKv(RepeatKv),
    /// Attention whose scores are still a term.
    Sdpa(Sdpa),
    /// Attention over whole sequences.
    Attn(Attn),
    /// The rows of a full-sequence value that a step computes.
    Win(Win),
    /// Some rows.
    Select(Select),
    /// An element of a tuple.
    Get(Get),
    /// Attention of a step with its cache.
    AttnStep(AttnStep),
    /// One projection into heads.
    Proj(Proj),

    // ---- lowered ----
    /// Weights laid out as one.
    Pack(Pack),
    /// A residual add and an RMSNorm.
    AddRms(AddRms),
    /// A product with all that is fused into it.
    Gemm(Gemm),
    /// Attention of a step on a packed projection.
    AttnQkv(AttnQkv),
    /// Pointwise operations and row reductions as one kernel.
    Chain(Chain),
    /// The next token of each row.
    Sample(Sample),
}

pub(crate) use with_payload;

impl Op {
    /// The payload, if the operation is of a kind.
    pub fn as_<P: Variant>(&self) -> Option<&P> {
        P::of(self)
    }

    /// Whether the operation is of a kind.
    pub fn is<P: Variant>(&self) -> bool {
        P::of(self).is_some()
    }

    /// The operation of a name that has no payload.
    pub fn plain(name: &str) -> Option<Op> {
        Op::named(name).filter(|op| !op.has_payload())
    }

    /// Whether an importer may emit the operation.
    pub fn is_primitive(&self) -> bool {
        self.signature().level == Level::Primitive && !self.is::<Cache>()
    }

    /// Whether the operation has no operands.
    pub fn is_leaf(&self) -> bool {
        self.signature().is_leaf()
    }
}

/// A name for one kernel in lists: the operation, with what is fused into it.
pub fn kernel_name(op: &Op) -> String {
    if let Some(gemm) = op.as_::<Gemm>() {
        return gemm.kernel_name();
    }
    match op.as_::<Chain>() {
        Some(chain) => chain.kernel_name(),
        None => op.name().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn signatures_are_in_order_and_names_unique() {
        let mut seen = BTreeSet::new();
        for name in Op::names() {
            assert!(seen.insert(name), "two operations are named {name}");
            let op = Op::named(name).unwrap();
            assert_eq!(op.name(), name);
            let signature = op.signature();
            let mut names = BTreeSet::new();
            let mut optional = false;
            for (i, slot) in signature.slots.iter().enumerate() {
                assert_eq!(slot.index(), i, "{name}: {}", slot.name());
                assert_eq!(signature.slot(slot.name()), Some(*slot), "{name}");
                assert!(names.insert(slot.name()), "{name}: {}", slot.name());
                assert!(
                    !optional || slot.is_optional(),
                    "{name}: required operands come first"
                );
                optional |= slot.is_optional();
            }
        }
    }
}
