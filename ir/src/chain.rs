//! Chains: small programs of pointwise operations and row reductions that run as one kernel.
//!
//! The payload of [`Op::Chain`] is a program over its operands. All its values are floats over one
//! *domain*, the extents of its widest value: a row is the last axis, and every value is either
//! full or constant along the rows. Arithmetic inside a chain is f32; only results are rounded.
//!
//! In IR text a chain is the attribute `expr`: statements `NAME ARGUMENT…` that define `t0`, `t1`, …
//! in turn, then the results, e.g. `mean:1 a0; sub a0 t0; mul t1 0.5:f32 -> t2 t0`.

use crate::Type;
use crate::dtype::DType;
use crate::infer::{TypeError, infer};
use crate::op::{BinaryFn, Op, ReduceFn, UnaryFn};
use crate::shape::{Dim, broadcast};
use crate::spec::Real;
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

/// One operation of a chain.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Statement {
    /// What is computed: one of [`is_chainable`].
    pub op: Op,
    /// From what.
    pub args: Vec<ChainArg>,
}

/// The payload of [`Op::Chain`].
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
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

/// Whether an operation may be a statement: float arithmetic, and what reduces rows. Whether its
/// operands allow it is for [`Chain::types`] to say.
pub fn is_chainable(op: &Op) -> bool {
    match op {
        Op::Cast(d) => d.is_float(),
        Op::Unary(f) => *f != UnaryFn::Not,
        Op::Binary(f) => !(f.is_comparison() || matches!(f, BinaryFn::And | BinaryFn::Or)),
        Op::Silu | Op::SwiGlu => true,
        _ => reduces_rows(op),
    }
}

/// Whether an operation needs whole rows.
pub fn reduces_rows(op: &Op) -> bool {
    match op {
        Op::Softmax | Op::RmsNorm { .. } => true,
        Op::Reduce { f, keepdim, .. } => *keepdim && *f != ReduceFn::Argmax,
        _ => false,
    }
}

impl Chain {
    /// The types of all statements for operands of these types.
    ///
    /// # Errors
    /// A statement is no operation of chains, reads what does not exist yet or does not accept its
    /// operands; or the values do not lie in one domain.
    pub fn types(&self, operands: &[&Type]) -> Result<Vec<Type>, TypeError> {
        let fail = |reason: String| TypeError {
            op: "chain",
            reason,
        };
        if self.statements.is_empty() || self.statements.len() > MAX_STATEMENTS {
            return Err(fail(format!("{} statements", self.statements.len())));
        }
        let mut types: Vec<Type> = Vec::with_capacity(self.statements.len());
        for (i, s) in self.statements.iter().enumerate() {
            if !is_chainable(&s.op) {
                return Err(fail(format!("{} has no place in a chain", s.op.name())));
            }
            let mut args = Vec::with_capacity(s.args.len());
            for a in &s.args {
                let ty = match *a {
                    ChainArg::Operand(k) => operands.get(usize::from(k)).map(|&t| t.clone()),
                    ChainArg::Value(k) => types.get(usize::from(k)).cloned(),
                    ChainArg::Const { dtype, .. } => Some(Type::tensor(dtype, [])),
                };
                args.push(ty.ok_or_else(|| fail(format!("t{i} reads what is not there")))?);
            }
            let refs: Vec<&Type> = args.iter().collect();
            let ty = infer(&s.op, &refs)?;
            if let (Op::Reduce { axis, .. }, Some(x)) = (&s.op, refs[0].as_tensor())
                && usize::from(*axis) + 1 != x.rank()
            {
                return Err(fail(format!(
                    "t{i} reduces axis {axis}, which is not the last"
                )));
            }
            types.push(ty);
        }
        if let Some(r) = self
            .results
            .iter()
            .find(|&&r| usize::from(r) >= types.len())
        {
            return Err(fail(format!("result t{r} is not there")));
        }
        if self.results.is_empty() {
            return Err(fail("no result".into()));
        }
        let domain = domain(operands.iter().copied().chain(&types)).map_err(fail)?;
        for t in operands.iter().copied().chain(&types) {
            let Some(t) = t.as_tensor().filter(|t| t.dtype.is_float()) else {
                return Err(fail("a value is no tensor of floats".into()));
            };
            if access(&t.shape, &domain).is_none() {
                let shape = crate::shape::format_shape(&t.shape);
                let domain = crate::shape::format_shape(&domain);
                return Err(fail(format!("{shape} does not lie in the domain {domain}")));
            }
        }
        Ok(types)
    }

    /// The type of the operation.
    ///
    /// # Errors
    /// As [`Chain::types`].
    pub fn ty(&self, operands: &[&Type]) -> Result<Type, TypeError> {
        let types = self.types(operands)?;
        let mut results: Vec<Type> = self
            .results
            .iter()
            .map(|&r| types[usize::from(r)].clone())
            .collect();
        Ok(match results.len() {
            1 => results.remove(0),
            _ => Type::Tuple(results),
        })
    }

    /// Names of the operations, each once, in order of their first occurrence, without casts.
    pub fn names(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for s in &self.statements {
            let name = s.op.name();
            if !names.contains(&name) && !matches!(s.op, Op::Cast(_)) {
                names.push(name);
            }
        }
        names
    }

    /// Whether a statement needs whole rows.
    pub fn reduces(&self) -> bool {
        self.statements.iter().any(|s| reduces_rows(&s.op))
    }
}

/// The domain of values: what all of them are broadcast to.
///
/// # Errors
/// There is none.
pub fn domain<'a>(types: impl Iterator<Item = &'a Type>) -> Result<Vec<Dim>, String> {
    let mut domain: Vec<Dim> = Vec::new();
    for t in types.filter_map(Type::as_tensor) {
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
            f.write_str(s.op.name())?;
            match &s.op {
                Op::Cast(d) => write!(f, ":{d}")?,
                Op::Reduce { axis, .. } => write!(f, ":{axis}")?,
                Op::RmsNorm { eps } => write!(f, ":{eps}")?,
                _ => {}
            }
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
    let head = words.next().ok_or("an empty statement")?;
    let (name, payload) = match head.split_once(':') {
        Some((n, p)) => (n, Some(p)),
        None => (head, None),
    };
    let bad = || format!("'{head}' is no operation of chains");
    let op = match (name, payload) {
        ("cast", Some(d)) => Op::Cast(dtype(d).ok_or_else(bad)?),
        ("rmsnorm", Some(eps)) => Op::RmsNorm {
            eps: real(eps).ok_or_else(bad)?,
        },
        (name, Some(axis)) => Op::Reduce {
            f: *ReduceFn::ALL
                .iter()
                .find(|f| f.name() == name)
                .ok_or_else(bad)?,
            axis: axis.parse().map_err(|_| bad())?,
            keepdim: true,
        },
        (name, None) => Op::plain(name).ok_or_else(bad)?,
    };
    if !is_chainable(&op) {
        return Err(bad());
    }
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
        dtype: dtype(d)?,
    })
}

fn index(word: &str, letter: char) -> Option<u8> {
    word.strip_prefix(letter)?.parse().ok()
}

fn real(word: &str) -> Option<Real> {
    word.parse().ok().map(Real::new)
}

fn dtype(word: &str) -> Option<DType> {
    DType::ALL.into_iter().find(|d| d.name() == word)
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
