//! The elementwise functions and reductions, each with its name.

/// An enumeration whose variants have names in IR text.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
        #[allow(missing_docs)]
        pub enum $name {
            #[default]
            $($variant),*
        }

        impl $name {
            /// All of them, in declaration order.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];
            /// Their names, in the same order.
            pub const NAMES: &'static [&'static str] = &[$($text),*];

            /// The name in IR text, patterns and dumps.
            pub const fn name(self) -> &'static str {
                Self::NAMES[self as usize]
            }

            /// The one of a name.
            pub fn by_name(name: &str) -> Option<$name> {
                Self::ALL.iter().copied().find(|f| f.name() == name)
            }
        }
    };
}

named! {
    /// Elementwise functions of one operand.
    UnaryFn {
        Neg = "neg", Abs = "abs", Exp = "exp", Log = "log", Sqrt = "sqrt", Rsqrt = "rsqrt",
        Sin = "sin", Cos = "cos", Tanh = "tanh", Sigmoid = "sigmoid", Erf = "erf", Relu = "relu",
        Not = "not",
    }
}

named! {
    /// Elementwise functions of two operands, with NumPy broadcasting.
    BinaryFn {
        Add = "add", Sub = "sub", Mul = "mul", Div = "div", Pow = "pow", Maximum = "maximum",
        Minimum = "minimum", Eq = "eq", Ne = "ne", Lt = "lt", Le = "le", Gt = "gt", Ge = "ge",
        And = "and", Or = "or",
    }
}

impl BinaryFn {
    /// Whether the result is `bool` whatever the operands are.
    pub const fn is_comparison(self) -> bool {
        matches!(
            self,
            BinaryFn::Eq | BinaryFn::Ne | BinaryFn::Lt | BinaryFn::Le | BinaryFn::Gt | BinaryFn::Ge
        )
    }

    /// Whether it joins truth values.
    pub const fn is_logical(self) -> bool {
        matches!(self, BinaryFn::And | BinaryFn::Or)
    }
}

named! {
    /// Reductions over one axis.
    ReduceFn { Sum = "sum", Mean = "mean", Amax = "amax", Argmax = "argmax" }
}
