//! What every operation says of itself: names, operands, class, type rule, attributes.

use crate::operands::{Operands, Slot};
use crate::shape::Dim;
use crate::{DType, Real, Type};
use std::fmt::Display;
use std::str::FromStr;

/// How far an operation is from the import and how near to a kernel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// An importer may emit it: a core ATen operator, or a leaf.
    Primitive,
    /// Recognised by the passes as one thing.
    Composite,
    /// Laid out as a kernel computes it.
    Lowered,
}

/// Kinds of operations, for tables of where time goes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Class {
    /// Products with weights, with whatever is fused into them.
    Gemm,
    /// Attention, with the append to the cache.
    Attention,
    /// Normalisation, softmax, reductions.
    Norm,
    /// Elementwise functions and activations.
    Elementwise,
    /// Lookups and changes of layout.
    Movement,
    /// Products of two activations (attention that was not recognised).
    Matmul,
    /// Picking tokens.
    Sample,
}

impl Class {
    /// All kinds, in the order of tables.
    pub const ALL: [Class; 7] = [
        Class::Gemm,
        Class::Attention,
        Class::Norm,
        Class::Elementwise,
        Class::Movement,
        Class::Matmul,
        Class::Sample,
    ];

    /// The name in tables.
    pub fn name(self) -> &'static str {
        [
            "gemm",
            "attention",
            "norm",
            "elementwise",
            "movement",
            "matmul",
            "sample",
        ][self as usize]
    }
}

/// The operands of an operation and what kind of operation it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Signature {
    /// How near to a kernel it is.
    pub level: Level,
    /// What its time is counted as.
    pub class: Class,
    /// Its operands in order; none for [`Signature::variadic`].
    pub slots: &'static [Slot],
    /// Whether it takes any number of operands.
    pub variadic: bool,
}

impl Signature {
    /// An operation with these operands.
    pub const fn new(level: Level, class: Class, slots: &'static [Slot]) -> Signature {
        Signature {
            level,
            class,
            slots,
            variadic: false,
        }
    }

    /// An operation that takes any number of operands, all present.
    pub const fn variadic(level: Level, class: Class) -> Signature {
        Signature {
            level,
            class,
            slots: &[],
            variadic: true,
        }
    }

    /// A primitive without operands.
    pub const LEAF: Signature = Signature::new(Level::Primitive, Class::Movement, &[]);

    /// Whether the operation has no operands.
    pub const fn is_leaf(&self) -> bool {
        self.slots.is_empty() && !self.variadic
    }

    /// Whether IR text gives operands by name: where there are several, except for primitives.
    pub fn is_named(&self) -> bool {
        self.level != Level::Primitive && self.slots.len() > 1
    }

    /// The operand of a name.
    pub fn slot(&self, name: &str) -> Option<Slot> {
        self.slots.iter().copied().find(|s| s.name() == name)
    }

    /// Checks which operands are present.
    ///
    /// # Errors
    /// A required operand is absent, or there are more than the operation takes.
    pub fn check<T>(&self, operands: &Operands<T>) -> Result<(), String> {
        if self.variadic {
            return if operands.is_dense() {
                Ok(())
            } else {
                Err("an operand is absent".to_string())
            };
        }
        let required = self.slots.iter().filter(|s| !s.is_optional()).count();
        let found = operands.len();
        if found < required || operands.slots() > self.slots.len() {
            let expected = if required == self.slots.len() {
                required.to_string()
            } else {
                format!("{required} to {}", self.slots.len())
            };
            return Err(format!("expected {expected} operands, found {found}"));
        }
        let missing = |s: &&Slot| !s.is_optional() && operands.get_ref(**s).is_none();
        match self.slots.iter().find(missing) {
            Some(s) => Err(format!("operand '{}' is absent", s.name())),
            None => Ok(()),
        }
    }
}

/// An operation without its operands: the payload of a variant of [`Op`](super::Op), with everything that the
/// rest of lathe asks about it. What it computes is told by the interpreter.
pub trait Operation: Clone + Default {
    /// Its name; for a family of functions all their names.
    const NAMES: &'static [&'static str];
    /// Its operands and kind.
    const SIGNATURE: Signature;
    /// Whether there is more to it than its name. Such an operation has its payload as first child in
    /// the e-graph, so that patterns can bind it.
    const HAS_PAYLOAD: bool = size_of::<Self>() > 0;

    /// The name in IR text, patterns and dumps.
    fn name(&self) -> &'static str {
        Self::NAMES[0]
    }

    /// What its time is counted as.
    fn class(&self) -> Class {
        Self::SIGNATURE.class
    }

    /// The operation of one of [`Operation::NAMES`], before its attributes are read.
    fn named(_name: &str) -> Self {
        Self::default()
    }

    /// Visits what its name and type do not say. The one description serves the printer, which reads
    /// the fields, and the parser, which fills them in.
    ///
    /// # Errors
    /// Those of the visitor: an attribute is missing or has a value of another kind.
    fn fields<V: Fields>(&mut self, _v: &mut V) -> Result<(), V::Fault> {
        Ok(())
    }

    /// The type of the result for operands of these types. Their number has been checked.
    ///
    /// # Errors
    /// What does not fit, in words.
    fn ty(&self, x: &Operands<&Type>) -> Result<Type, String>;
}

/// A visitor of the fields of a payload, in the order of the text. Each method is given the name of an
/// attribute and its value.
pub trait Fields {
    /// Why the visit ends.
    type Fault;

    /// An integer.
    fn int<T: TryFrom<i64> + Into<i64> + Copy>(
        &mut self,
        name: &'static str,
        v: &mut T,
    ) -> Result<(), Self::Fault>;
    /// An integer or nothing.
    fn opt_int<T: TryFrom<i64> + Into<i64> + Copy>(
        &mut self,
        name: &'static str,
        v: &mut Option<T>,
    ) -> Result<(), Self::Fault>;
    /// A real constant.
    fn real(&mut self, name: &'static str, v: &mut Real) -> Result<(), Self::Fault>;
    /// A real constant or nothing.
    fn opt_real(&mut self, name: &'static str, v: &mut Option<Real>) -> Result<(), Self::Fault>;
    /// One of a few words.
    fn word<T: Copy + PartialEq>(
        &mut self,
        name: &'static str,
        v: &mut T,
        choices: &[(&'static str, T)],
    ) -> Result<(), Self::Fault>;
    /// One of a few words; the first one is left out of the text.
    fn opt_word<T: Copy + PartialEq>(
        &mut self,
        name: &'static str,
        v: &mut T,
        choices: &[(&'static str, T)],
    ) -> Result<(), Self::Fault>;
    /// True or false.
    fn flag(&mut self, name: &'static str, v: &mut bool) -> Result<(), Self::Fault> {
        self.word(name, v, &[("true", true), ("false", false)])
    }
    /// A name in quotes.
    fn text(&mut self, name: &'static str, v: &mut String) -> Result<(), Self::Fault>;
    /// A value in quotes that has a grammar of its own; `what` says of what.
    fn parsed<T: Display + FromStr<Err = String>>(
        &mut self,
        name: &'static str,
        v: &mut T,
        what: &str,
    ) -> Result<(), Self::Fault>;
    /// A list of axes.
    fn axes(&mut self, name: &'static str, v: &mut Vec<u8>) -> Result<(), Self::Fault>;
    /// A list of real constants.
    fn reals(&mut self, name: &'static str, v: &mut Vec<Real>) -> Result<(), Self::Fault>;

    /// The element type of the result: the written type says it.
    fn dtype(&mut self, v: &mut DType) -> Result<(), Self::Fault>;
    /// The extents of the result: the written type says them.
    fn shape(&mut self, v: &mut Vec<Dim>) -> Result<(), Self::Fault>;
    /// The extents of the result, which must be known.
    fn known_shape(&mut self, v: &mut Vec<i64>) -> Result<(), Self::Fault>;
    /// The only extent of the result.
    fn extent(&mut self, v: &mut Dim) -> Result<(), Self::Fault>;
}
