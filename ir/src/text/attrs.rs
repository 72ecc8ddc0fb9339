//! Payloads of operations as named attributes, in a fixed order, and back.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use super::lexer::{Fault, Pos, fault};
use crate::ops::{Fields, Op};
use crate::shape::Dim;
use crate::{DType, Real, TensorType, Type};
use std::convert::Infallible;
use std::fmt::{self, Display};
use std::str::FromStr;

/// The value of an attribute.
#[derive(Clone, PartialEq, Debug)]
pub enum Attr {
    /// An integer.
    Int(i64),
    /// A real constant.
    Real(Real),
    /// One of a few words.
    Word(String),
    /// A name.
    Text(String),
    /// Integers.
    Ints(Vec<i64>),
    /// Real constants.
    Reals(Vec<Real>),
}

impl fmt::Display for Attr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Attr::Int(v) => write!(f, "{v}"),
            Attr::Real(v) => write!(f, "{v}"),
            Attr::Word(v) => f.write_str(v),
            Attr::Text(v) => f.write_str(&super::quote::quote(v)),
            Attr::Ints(v) => list(f, v),
            Attr::Reals(v) => list(f, v),
        }
    }
}

fn list<T: fmt::Display>(f: &mut fmt::Formatter<'_>, items: &[T]) -> fmt::Result {
    f.write_str("[")?;
    for (i, v) in items.iter().enumerate() {
        if i > 0 {
            f.write_str(", ")?;
        }
        write!(f, "{v}")?;
    }
    f.write_str("]")
}

/// The attributes of an operation, as the text shows them: whatever of its payload its name and type do not
/// say.
pub fn attrs(op: &Op) -> Vec<(&'static str, Attr)> {
    let mut writer = Writer(Vec::new());
    match op.clone().fields(&mut writer) {
        Ok(()) => writer.0,
        Err(never) => match never {},
    }
}

/// Collects attributes.
struct Writer(Vec<(&'static str, Attr)>);

type Written = Result<(), Infallible>;

impl Writer {
    fn push(&mut self, name: &'static str, v: Attr) -> Written {
        self.0.push((name, v));
        Ok(())
    }
}

impl Fields for Writer {
    type Fault = Infallible;

    fn int<T: TryFrom<i64> + Into<i64> + Copy>(
        &mut self,
        name: &'static str,
        v: &mut T,
    ) -> Written {
        self.push(name, Attr::Int((*v).into()))
    }

    fn opt_int<T: TryFrom<i64> + Into<i64> + Copy>(
        &mut self,
        name: &'static str,
        v: &mut Option<T>,
    ) -> Written {
        v.map_or(Ok(()), |v| self.push(name, Attr::Int(v.into())))
    }

    fn real(&mut self, name: &'static str, v: &mut Real) -> Written {
        self.push(name, Attr::Real(*v))
    }

    fn opt_real(&mut self, name: &'static str, v: &mut Option<Real>) -> Written {
        v.map_or(Ok(()), |v| self.push(name, Attr::Real(v)))
    }

    fn word<T: Copy + PartialEq>(
        &mut self,
        name: &'static str,
        v: &mut T,
        choices: &[(&'static str, T)],
    ) -> Written {
        let word = choices.iter().find(|(_, c)| c == v).map_or("", |c| c.0);
        self.push(name, Attr::Word(word.to_string()))
    }

    fn opt_word<T: Copy + PartialEq>(
        &mut self,
        name: &'static str,
        v: &mut T,
        choices: &[(&'static str, T)],
    ) -> Written {
        match choices.first() {
            Some((_, default)) if default == v => Ok(()),
            _ => self.word(name, v, choices),
        }
    }

    fn text(&mut self, name: &'static str, v: &mut String) -> Written {
        self.push(name, Attr::Text(v.clone()))
    }

    fn parsed<T: Display + FromStr<Err = String>>(
        &mut self,
        name: &'static str,
        v: &mut T,
        _what: &str,
    ) -> Written {
        self.push(name, Attr::Text(v.to_string()))
    }

    fn axes(&mut self, name: &'static str, v: &mut Vec<u8>) -> Written {
        self.push(name, Attr::Ints(v.iter().map(|&p| i64::from(p)).collect()))
    }

    fn reals(&mut self, name: &'static str, v: &mut Vec<Real>) -> Written {
        self.push(name, Attr::Reals(v.clone()))
    }

    fn dtype(&mut self, _v: &mut DType) -> Written {
        Ok(())
    }

    fn shape(&mut self, _v: &mut Vec<Dim>) -> Written {
        Ok(())
    }

    fn known_shape(&mut self, _v: &mut Vec<i64>) -> Written {
        Ok(())
    }

    fn extent(&mut self, _v: &mut Dim) -> Written {
        Ok(())
    }
}

/// Attributes as they were written, taken one by one.
pub(super) struct Args<'a> {
    /// The operation's name.
    pub(super) name: &'a str,
    /// Where it stands.
    pub(super) at: Pos,
    /// Name, value and place of each attribute.
    pub(super) list: Vec<(String, Attr, Pos)>,
    /// The type that is written behind them.
    pub(super) ty: &'a Type,
}

type Read = Result<(), Fault>;

impl Args<'_> {
    /// The operation with these attributes.
    pub(super) fn build(mut self, mut op: Op) -> Result<Op, Fault> {
        op.fields(&mut self)?;
        match self.list.first() {
            Some((other, _, at)) => Err(fault(
                *at,
                format!("an attribute of '{}' that is not given yet", self.name),
                format!("'{other}'"),
            )),
            None => Ok(op),
        }
    }

    fn opt(&mut self, name: &str) -> Option<(Attr, Pos)> {
        let i = self.list.iter().position(|(n, ..)| n == name)?;
        let (_, v, at) = self.list.remove(i);
        Some((v, at))
    }

    fn need(&mut self, name: &str) -> Result<(Attr, Pos), Fault> {
        self.opt(name)
            .ok_or_else(|| fault(self.at, format!("attribute '{name}'"), "none".to_string()))
    }

    fn tensor(&self) -> Result<&TensorType, Fault> {
        let expected = || format!("'{}' of a tensor type", self.name);
        (self.ty.as_tensor()).ok_or_else(|| fault(self.at, expected(), "another".into()))
    }
}

impl Fields for Args<'_> {
    type Fault = Fault;

    fn int<T: TryFrom<i64> + Into<i64> + Copy>(&mut self, name: &'static str, v: &mut T) -> Read {
        let (attr, at) = self.need(name)?;
        *v = to_int(&attr, at)?;
        Ok(())
    }

    fn opt_int<T: TryFrom<i64> + Into<i64> + Copy>(
        &mut self,
        name: &'static str,
        v: &mut Option<T>,
    ) -> Read {
        *v = (self.opt(name)).map(|(v, at)| to_int(&v, at)).transpose()?;
        Ok(())
    }

    fn real(&mut self, name: &'static str, v: &mut Real) -> Read {
        let (attr, at) = self.need(name)?;
        *v = to_real(&attr, at)?;
        Ok(())
    }

    fn opt_real(&mut self, name: &'static str, v: &mut Option<Real>) -> Read {
        *v = (self.opt(name))
            .map(|(v, at)| to_real(&v, at))
            .transpose()?;
        Ok(())
    }

    fn word<T: Copy + PartialEq>(
        &mut self,
        name: &'static str,
        v: &mut T,
        choices: &[(&'static str, T)],
    ) -> Read {
        let (attr, at) = self.need(name)?;
        let found = match &attr {
            Attr::Word(w) => choices.iter().find(|(n, _)| n == w),
            _ => None,
        };
        *v = found.map(|&(_, t)| t).ok_or_else(|| {
            let names: Vec<&str> = choices.iter().map(|c| c.0).collect();
            fault(at, format!("one of {}", names.join(", ")), attr.to_string())
        })?;
        Ok(())
    }

    fn opt_word<T: Copy + PartialEq>(
        &mut self,
        name: &'static str,
        v: &mut T,
        choices: &[(&'static str, T)],
    ) -> Read {
        if self.list.iter().any(|(n, ..)| n == name) {
            return self.word(name, v, choices);
        }
        if let Some(&(_, default)) = choices.first() {
            *v = default;
        }
        Ok(())
    }

    fn text(&mut self, name: &'static str, v: &mut String) -> Read {
        match self.need(name)? {
            (Attr::Text(text), _) => *v = text,
            (v, at) => return Err(fault(at, "a quoted name".to_string(), v.to_string())),
        }
        Ok(())
    }

    fn parsed<T: Display + FromStr<Err = String>>(
        &mut self,
        name: &'static str,
        v: &mut T,
        what: &str,
    ) -> Read {
        let mut text = String::new();
        self.text(name, &mut text)?;
        *v = (text.parse()).map_err(|reason| fault(self.at, what.to_string(), reason))?;
        Ok(())
    }

    fn axes(&mut self, name: &'static str, v: &mut Vec<u8>) -> Read {
        *v = match self.need(name)? {
            (Attr::Ints(axes), at) => {
                let axis = |&p: &i64| to_int(&Attr::Int(p), at);
                axes.iter().map(axis).collect::<Result<_, _>>()?
            }
            // An empty list has no element type.
            (Attr::Reals(v), _) if v.is_empty() => Vec::new(),
            (v, at) => return Err(fault(at, "a list of axes".into(), v.to_string())),
        };
        Ok(())
    }

    fn reals(&mut self, name: &'static str, v: &mut Vec<Real>) -> Read {
        *v = match self.need(name)? {
            (Attr::Reals(v), _) => v,
            (Attr::Ints(v), _) => v.iter().map(|&i| Real::new(i as f64)).collect(),
            (v, at) => return Err(fault(at, "a list of numbers".into(), v.to_string())),
        };
        Ok(())
    }

    fn dtype(&mut self, v: &mut DType) -> Read {
        *v = self.tensor()?.dtype;
        Ok(())
    }

    fn shape(&mut self, v: &mut Vec<Dim>) -> Read {
        *v = self.tensor()?.shape.clone();
        Ok(())
    }

    fn known_shape(&mut self, v: &mut Vec<i64>) -> Read {
        let known: Option<Vec<i64>> = self.tensor()?.shape.iter().map(|d| d.known()).collect();
        let expected = || format!("a {} of known extents", self.name);
        *v = known.ok_or_else(|| fault(self.at, expected(), "symbols".into()))?;
        Ok(())
    }

    fn extent(&mut self, v: &mut Dim) -> Read {
        match self.tensor()?.shape.as_slice() {
            &[len] => *v = len,
            _ => {
                let expected = format!("{} of one axis", self.name);
                return Err(fault(self.at, expected, "others".into()));
            }
        }
        Ok(())
    }
}

fn to_int<T: TryFrom<i64>>(v: &Attr, at: Pos) -> Result<T, Fault> {
    let int = match v {
        Attr::Int(i) => T::try_from(*i).ok(),
        _ => None,
    };
    int.ok_or_else(|| {
        let bits = 8 * size_of::<T>();
        fault(
            at,
            format!("an integer of {bits} bits in range"),
            v.to_string(),
        )
    })
}

fn to_real(v: &Attr, at: Pos) -> Result<Real, Fault> {
    match v {
        Attr::Real(r) => Ok(*r),
        Attr::Int(i) => Ok(Real::new(*i as f64)),
        _ => Err(fault(at, "a number".to_string(), v.to_string())),
    }
}
