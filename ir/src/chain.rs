//! Chains: small programs of pointwise operations and row reductions that run as one kernel.
//!
//! The payload of [`crate::ops::Chain`] is a program over its operands. All its values are floats over one
//! *domain*, the extents of its widest value: a row is the last axis, and every value is either
//! full or constant along the rows. Arithmetic inside a chain is f32; only results are rounded.
//!
//! In IR text a chain is the attribute `expr`: statements `NAME ARGUMENT…` that define `t0`, `t1`, …
//! in turn, then the results, e.g. `mean:1 a0; sub a0 t0; mul t1 0.5:f32 -> t2 t0`.

use crate::dtype::DType;
use crate::functions::{BinaryFn, ReduceFn, UnaryFn};
use crate::ops::checks::norm_operands;
use crate::ops::{Reduce, Softmax, SwiGlu};
use crate::shape::{Dim, broadcast, format_shape};
use crate::{Real, TensorType, Type};
use std::fmt;
use std::str::FromStr;

/// Most statements of a chain.
pub const MAX_STATEMENTS: usize = 64;

/// What a statement reads.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum ChainArg {
    /// An operand of the chain.
    Operand(u8),
    /// The result of an earlier statement.
    Value(u8),
    /// A constant.
    Const {
        /// Its value.
        value: Real,
        /// Its element type.
        dtype: DType,
    },
}

/// What a statement computes: float arithmetic, and what reduces rows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum ChainOp {
    /// Conversion to another float type: without effect, because nothing inside a chain is rounded.
    Cast(DType),
    /// A function of a float; not [`UnaryFn::Not`].
    Unary(UnaryFn),
    /// Arithmetic of two floats; no comparison and no function of truth values.
    Binary(BinaryFn),
    /// `x·sigmoid(x)`.
    Silu,
    /// `silu(gate)·up`.
    SwiGlu,
    /// Softmax of a row.
    Softmax,
    /// RMSNorm of a row with the factors of its columns.
    RmsNorm {
        /// Added to the mean square.
        eps: Real,
    },
    /// A reduction of a row to one element; not [`ReduceFn::Argmax`].
    Reduce {
        /// What is computed.
        f: ReduceFn,
        /// The last axis.
        axis: u8,
    },
}

impl ChainOp {
    /// The operation's name, as outside of chains.
    pub fn name(&self) -> &'static str {
        match self {
            ChainOp::Cast(_) => "cast",
            ChainOp::Unary(f) => f.name(),
            ChainOp::Binary(f) => f.name(),
            ChainOp::Silu => "silu",
            ChainOp::SwiGlu => "swiglu",
            ChainOp::Softmax => "softmax",
            ChainOp::RmsNorm { .. } => "rmsnorm",
            ChainOp::Reduce { f, .. } => f.name(),
        }
    }

    /// Whether it needs whole rows.
    pub fn reduces_rows(&self) -> bool {
        matches!(
            self,
            ChainOp::Softmax | ChainOp::RmsNorm { .. } | ChainOp::Reduce { .. }
        )
    }

    /// Whether chains have such an operation.
    pub(crate) fn is_legal(&self) -> bool {
        match self {
            ChainOp::Cast(d) => d.is_float(),
            ChainOp::Unary(f) => *f != UnaryFn::Not,
            ChainOp::Binary(f) => !(f.is_comparison() || f.is_logical()),
            ChainOp::Reduce { f, .. } => *f != ReduceFn::Argmax,
            _ => true,
        }
    }

    /// The type of the operation for operands of these types.
    fn ty(&self, x: &[&TensorType]) -> Result<TensorType, String> {
        match (self, x) {
            (ChainOp::Cast(d), &[x]) => Ok(TensorType {
                dtype: *d,
                ..x.clone()
            }),
            (ChainOp::Unary(f), &[x]) => f.of(x),
            (ChainOp::Silu, &[x]) => Ok(x.clone()),
            (ChainOp::Binary(f), &[a, b]) => f.of(a, b),
            (ChainOp::SwiGlu, &[gate, up]) => SwiGlu::of(gate, up),
            (ChainOp::Softmax, &[x]) => Softmax::of(x),
            (ChainOp::RmsNorm { .. }, &[x, gamma]) => norm_operands(x, gamma).map(|()| x.clone()),
            (&ChainOp::Reduce { f, axis }, &[x]) => {
                if usize::from(axis) + 1 != x.rank() {
                    return Err(format!("reduces axis {axis}, which is not the last"));
                }
                let keepdim = true;
                Reduce { f, axis, keepdim }.of(x)
            }
            (_, x) => Err(format!(
                "{} does not take {} operands",
                self.name(),
                x.len()
            )),
        }
    }
}

impl fmt::Display for ChainOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            ChainOp::Cast(d) => write!(f, ":{d}"),
            ChainOp::Reduce { axis, .. } => write!(f, ":{axis}"),
            ChainOp::RmsNorm { eps } => write!(f, ":{eps}"),
            _ => Ok(()),
        }
    }
}

impl FromStr for ChainOp {
    type Err = String;

    fn from_str(head: &str) -> Result<ChainOp, String> {
        let (name, payload) = match head.split_once(':') {
            Some((n, p)) => (n, Some(p)),
            None => (head, None),
        };
        let op = match (name, payload) {
            ("cast", Some(d)) => DType::by_name(d).map(ChainOp::Cast),
            ("rmsnorm", Some(eps)) => real(eps).map(|eps| ChainOp::RmsNorm { eps }),
            (name, Some(axis)) => match (ReduceFn::by_name(name), axis.parse()) {
                (Some(f), Ok(axis)) => Some(ChainOp::Reduce { f, axis }),
                _ => None,
            },
            ("silu", None) => Some(ChainOp::Silu),
            ("swiglu", None) => Some(ChainOp::SwiGlu),
            ("softmax", None) => Some(ChainOp::Softmax),
            (name, None) => match (UnaryFn::by_name(name), BinaryFn::by_name(name)) {
                (Some(f), _) => Some(ChainOp::Unary(f)),
                (_, Some(f)) => Some(ChainOp::Binary(f)),
                _ => None,
            },
        };
        op.filter(ChainOp::is_legal)
            .ok_or_else(|| format!("'{head}' is no operation of chains"))
    }
}

/// One operation of a chain.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Statement {
    /// What is computed.
    pub op: ChainOp,
    /// From what.
    pub args: Vec<ChainArg>,
}

/// The payload of the operation `chain`: `(operands…)`, pointwise operations and row reductions as one kernel.
/// Several results are a tuple.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Chain {
    /// The operations in order.
    pub statements: Vec<Statement>,
    /// Statements whose values are results, in order. One result is a tensor, several a tuple.
    pub results: Vec<u8>,
}

/// How an operand or value lies in the domain of a chain.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Access {
    /// An element for each element of the domain.
    Full,
    /// An element for each row.
    Row,
    /// An element for each column, the same for all rows.
    Column,
    /// One element.
    Scalar,
}

/// How a value of these extents lies in a domain; `None` if it is broadcast in another way.
pub fn access(shape: &[Dim], domain: &[Dim]) -> Option<Access> {
    if shape == domain {
        return Some(Access::Full);
    }
    let ones = |dims: &[Dim]| dims.iter().all(|d| d.is(1));
    if ones(shape) {
        return (shape.len() <= domain.len()).then_some(Access::Scalar);
    }
    let (last, width) = (shape.last()?, domain.last()?);
    if shape.len() == domain.len()
        && last.is(1)
        && shape[..shape.len() - 1] == domain[..domain.len() - 1]
    {
        return Some(Access::Row);
    }
    (shape.len() <= domain.len() && last == width && ones(&shape[..shape.len() - 1]))
        .then_some(Access::Column)
}

impl Chain {
    /// The types of all statements for operands of these types.
    ///
    /// # Errors
    /// A statement reads what does not exist yet or does not accept its operands; or the values do not lie in
    /// one domain.
    pub fn types(&self, operands: &[&Type]) -> Result<Vec<TensorType>, String> {
        if self.statements.is_empty() || self.statements.len() > MAX_STATEMENTS {
            return Err(format!("{} statements", self.statements.len()));
        }
        let operands: Vec<&TensorType> = (operands.iter())
            .map(|t| t.as_tensor().filter(|t| t.dtype.is_float()))
            .collect::<Option<_>>()
            .ok_or("a value is no tensor of floats")?;
        let mut types: Vec<TensorType> = Vec::with_capacity(self.statements.len());
        for (i, s) in self.statements.iter().enumerate() {
            if !s.op.is_legal() {
                return Err(format!("{} has no place in a chain", s.op.name()));
            }
            let mut args = Vec::with_capacity(s.args.len());
            for a in &s.args {
                let ty = match *a {
                    ChainArg::Operand(k) => operands.get(usize::from(k)).map(|&t| t.clone()),
                    ChainArg::Value(k) => types.get(usize::from(k)).cloned(),
                    ChainArg::Const { dtype, .. } if !dtype.is_float() => None,
                    ChainArg::Const { dtype, .. } => Some(TensorType {
                        dtype,
                        shape: Vec::new(),
                    }),
                };
                args.push(ty.ok_or_else(|| format!("t{i} reads what is not there"))?);
            }
            let refs: Vec<&TensorType> = args.iter().collect();
            types.push(s.op.ty(&refs).map_err(|e| format!("t{i}: {e}"))?);
        }
        let missing = |r: &&u8| usize::from(**r) >= types.len();
        if let Some(r) = self.results.iter().find(missing) {
            return Err(format!("result t{r} is not there"));
        }
        if self.results.is_empty() {
            return Err("no result".into());
        }
        let values = || operands.iter().copied().chain(&types);
        let domain = domain(values())?;
        for t in values() {
            if access(&t.shape, &domain).is_none() {
                let (shape, domain) = (format_shape(&t.shape), format_shape(&domain));
                return Err(format!("{shape} does not lie in the domain {domain}"));
            }
        }
        Ok(types)
    }

    /// The type of the operation.
    ///
    /// # Errors
    /// As [`Chain::types`].
    pub fn ty(&self, operands: &[&Type]) -> Result<Type, String> {
        let types = self.types(operands)?;
        let result = |&r: &u8| Type::Tensor(types[usize::from(r)].clone());
        Ok(match &self.results[..] {
            [r] => result(r),
            many => Type::Tuple(many.iter().map(result).collect()),
        })
    }

    /// Names of the operations, each once, in order of their first occurrence, without casts.
    pub fn names(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for s in &self.statements {
            let name = s.op.name();
            if !names.contains(&name) && !matches!(s.op, ChainOp::Cast(_)) {
                names.push(name);
            }
        }
        names
    }

    /// Whether a statement needs whole rows.
    pub fn reduces(&self) -> bool {
        self.statements.iter().any(|s| s.op.reduces_rows())
    }
}

/// The domain of values: what all of them are broadcast to.
///
/// # Errors
/// There is none.
pub fn domain<'a>(types: impl Iterator<Item = &'a TensorType>) -> Result<Vec<Dim>, String> {
    let mut domain: Vec<Dim> = Vec::new();
    for t in types {
        domain = broadcast(&domain, &t.shape).ok_or("the values have no common domain")?;
    }
    Ok(domain)
}

impl fmt::Display for ChainArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ChainArg::Operand(i) => write!(f, "a{i}"),
            ChainArg::Value(i) => write!(f, "t{i}"),
            ChainArg::Const { value, dtype } => write!(f, "{value}:{dtype}"),
        }
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, s) in self.statements.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{}", s.op)?;
            for a in &s.args {
                write!(f, " {a}")?;
            }
        }
        f.write_str(" ->")?;
        for r in &self.results {
            write!(f, " t{r}")?;
        }
        Ok(())
    }
}

impl FromStr for Chain {
    type Err = String;

    fn from_str(text: &str) -> Result<Chain, String> {
        let (body, results) = text
            .split_once("->")
            .ok_or("no results: expected '-> t0'")?;
        let statements = body.split(';').map(statement).collect::<Result<_, _>>()?;
        let results = results
            .split_whitespace()
            .map(|r| index(r, 't').ok_or_else(|| format!("'{r}' is no result")))
            .collect::<Result<_, _>>()?;
        Ok(Chain {
            statements,
            results,
        })
    }
}

fn statement(text: &str) -> Result<Statement, String> {
    let mut words = text.split_whitespace();
    let op = words.next().ok_or("an empty statement")?.parse()?;
    let args = words
        .map(|w| {
            argument(w).ok_or_else(|| format!("'{w}' is no operand: expected a0, t0 or 0.5:f32"))
        })
        .collect::<Result<_, _>>()?;
    Ok(Statement { op, args })
}

fn argument(word: &str) -> Option<ChainArg> {
    if let Some(i) = index(word, 'a') {
        return Some(ChainArg::Operand(i));
    }
    if let Some(i) = index(word, 't') {
        return Some(ChainArg::Value(i));
    }
    let (value, d) = word.split_once(':')?;
    Some(ChainArg::Const {
        value: real(value)?,
        dtype: DType::by_name(d)?,
    })
}

fn index(word: &str, letter: char) -> Option<u8> {
    word.strip_prefix(letter)?.parse().ok()
}

fn real(word: &str) -> Option<Real> {
    word.parse().ok().map(Real::new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Sym;

    #[test]
    fn text_reads_back() {
        let text = "cast:f32 a0; mean:1 t0; sub t0 t1; rmsnorm:1e-5 t2 a1; mul t3 0.5:f32 -> t4 t1";
        let chain: Chain = text.parse().unwrap();
        assert_eq!(chain.to_string(), text);
        for bad in [
            "add a0 a1",
            "gemm a0 -> t0",
            "add a0 x -> t0",
            "argmax:1 a0 -> t0",
            "eq a0 a0 -> t0",
        ] {
            assert!(bad.parse::<Chain>().is_err(), "{bad}");
        }
    }

    #[test]
    fn values_lie_in_one_domain() {
        let (t, h) = (Dim::sym(Sym::T), Dim::new(8));
        let x = Type::tensor(DType::BF16, [t, h]);
        let gamma = Type::tensor(DType::F32, [h]);
        let chain: Chain =
            "cast:f32 a0; mean:1 t0; sub t0 t1; rmsnorm:1e-5 t2 a1; cast:bf16 t3 -> t4 t1"
                .parse()
                .unwrap();
        let row = Type::tensor(DType::F32, [t, Dim::new(1)]);
        assert_eq!(
            chain.ty(&[&x, &gamma]).unwrap(),
            Type::Tuple(vec![x.clone(), row.clone()])
        );
        // A broadcast in the middle, a reduction of another axis, integers, a result too many.
        let q = Type::tensor(DType::F32, [t, Dim::new(4), h]);
        let cos = Type::tensor(DType::F32, [t, Dim::new(1), h]);
        let ids = Type::tensor(DType::I64, [t, h]);
        for (text, operands) in [
            ("mul a0 a1 -> t0", vec![&q, &cos]),
            ("sum:0 a0 -> t0", vec![&x]),
            ("add a0 a0 -> t0", vec![&ids]),
            ("neg a0 -> t1", vec![&x]),
            ("add a0 a2 -> t0", vec![&x, &x]),
            ("add a0 t0 -> t0", vec![&x]),
        ] {
            assert!(
                text.parse::<Chain>().unwrap().ty(&operands).is_err(),
                "{text}"
            );
        }
        assert_eq!(access(&[h], &[t, h]), Some(Access::Column));
        assert_eq!(access(&[t, Dim::new(1)], &[t, h]), Some(Access::Row));
        assert_eq!(access(&[], &[t, h]), Some(Access::Scalar));
        assert_eq!(access(&[t], &[t, h]), None);
    }
}
