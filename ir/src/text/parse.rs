//! Reads SSA text. A syntax error ends the reading; types are checked for all nodes.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use super::attrs::{Args, Attr};
use super::lexer::{Fault, Lexer, Pos, Token, fault};
use super::print::{is_plain_path, layer};
use crate::graph::{Graph, Node, NodeId, Prov};
use crate::infer::infer;
use crate::operands::Operands;
use crate::ops::{Op, Signature};
use crate::shape::{Dim, Sym};
use crate::types::format_type;
use crate::{DType, Real, TensorType, Type};
use std::collections::BTreeMap;
use std::sync::Arc;
use thiserror::Error;

/// Largest accepted text, in bytes.
const MAX_TEXT: usize = 256 << 20;
/// Largest accepted number of axes.
const MAX_RANK: usize = 16;
/// Largest accepted number of operands or tuple elements.
const MAX_OPERANDS: usize = 64;
/// Largest accepted number of elements of a list attribute.
const MAX_LIST: usize = 1 << 20;
/// Largest accepted constant of an extent; sums and products of a few of them stay in range.
const MAX_EXTENT: i64 = 1 << 40;
/// Largest accepted coefficient of a symbol.
const MAX_COEF: i64 = 1 << 20;

/// A text is not a program.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ParseError {
    /// The text does not follow the grammar.
    #[error("{at}: expected {expected}, found {found}")]
    Syntax {
        /// Where.
        at: Pos,
        /// What could stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// Operations do not accept their operands, or written types are not the derived ones. All of
    /// them are listed.
    #[error("{}", lines(.0))]
    Types(Vec<TypeMismatch>),
}

/// The written type of a value is not what its operation makes.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("{at}: %{value} ({op}): {reason}")]
pub struct TypeMismatch {
    /// Where the operation's name stands.
    pub at: Pos,
    /// The value's name, without `%`.
    pub value: String,
    /// The operation's name.
    pub op: &'static str,
    /// What was written and what was expected.
    pub reason: String,
}

fn lines(errors: &[TypeMismatch]) -> String {
    let lines: Vec<String> = errors.iter().map(TypeMismatch::to_string).collect();
    lines.join("\n")
}

impl From<Fault> for ParseError {
    fn from(f: Fault) -> ParseError {
        ParseError::Syntax {
            at: f.at,
            expected: f.expected,
            found: f.found,
        }
    }
}

/// Reads a program from its text.
///
/// # Errors
/// The text does not follow the grammar (the first place is reported), or types do not fit (all
/// places are reported).
pub fn parse(text: &str) -> Result<Graph, ParseError> {
    if text.len() > MAX_TEXT {
        return Err(fault(
            Pos { line: 1, col: 1 },
            format!("a text of at most {MAX_TEXT} bytes"),
            format!("{} bytes", text.len()),
        )
        .into());
    }
    let mut p = Parser::new(text)?;
    p.graph()?;
    if p.mismatches.is_empty() {
        Ok(p.graph)
    } else {
        Err(ParseError::Types(p.mismatches))
    }
}

struct Parser<'a> {
    lexer: Lexer<'a>,
    token: Token<'a>,
    at: Pos,
    graph: Graph,
    names: BTreeMap<&'a str, NodeId>,
    mismatches: Vec<TypeMismatch>,
    /// The paths so far, shared between nodes.
    paths: BTreeMap<String, Arc<str>>,
}

type R<T> = Result<T, Fault>;

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> R<Parser<'a>> {
        let mut lexer = Lexer::new(text);
        let (token, at) = lexer.token()?;
        Ok(Parser {
            lexer,
            token,
            at,
            graph: Graph::default(),
            names: BTreeMap::new(),
            mismatches: Vec::new(),
            paths: BTreeMap::new(),
        })
    }

    /// Moves on and returns the token that was current.
    fn next(&mut self) -> R<Token<'a>> {
        let (token, at) = self.lexer.token()?;
        self.at = at;
        Ok(std::mem::replace(&mut self.token, token))
    }

    fn unexpected<T>(&self, expected: &str) -> R<T> {
        Err(fault(self.at, expected.to_string(), self.token.to_string()))
    }

    fn accept(&mut self, c: char) -> R<bool> {
        let here = self.token == Token::Punct(c);
        if here {
            self.next()?;
        }
        Ok(here)
    }

    fn expect(&mut self, c: char) -> R<()> {
        if self.accept(c)? {
            Ok(())
        } else {
            self.unexpected(&format!("'{c}'"))
        }
    }

    fn keyword(&mut self, word: &str) -> R<()> {
        if self.token == Token::Word(word) {
            self.next()?;
            Ok(())
        } else {
            self.unexpected(&format!("'{word}'"))
        }
    }

    /// Skips blank lines and comment lines.
    fn blank_lines(&mut self) -> R<()> {
        while matches!(self.token, Token::Newline | Token::Comment(_)) {
            self.next()?;
        }
        Ok(())
    }

    fn end_of_line(&mut self) -> R<()> {
        if self.token == Token::Newline {
            self.next()?;
            Ok(())
        } else {
            self.unexpected("the end of the line")
        }
    }

    fn graph(&mut self) -> R<()> {
        self.blank_lines()?;
        self.keyword("graph")?;
        self.graph.name = match self.next_if_text()? {
            Some(name) => name,
            None => return self.unexpected("the graph's name in quotes"),
        };
        self.expect('{')?;
        if !matches!(self.token, Token::Comment(_)) {
            self.end_of_line()?;
        }
        loop {
            self.blank_lines()?;
            match self.token {
                Token::Value(_) => self.node()?,
                Token::Word("return") => break,
                _ => return self.unexpected("a node or 'return'"),
            }
        }
        self.next()?;
        self.outputs()?;
        self.blank_lines()?;
        self.expect('}')?;
        self.blank_lines()?;
        if self.token == Token::End {
            Ok(())
        } else {
            self.unexpected("the end of the text")
        }
    }

    fn next_if_text(&mut self) -> R<Option<String>> {
        if !matches!(self.token, Token::Text(_)) {
            return Ok(None);
        }
        match self.next()? {
            Token::Text(s) => Ok(Some(s)),
            _ => Ok(None),
        }
    }

    fn outputs(&mut self) -> R<()> {
        if self.token == Token::Newline {
            return self.end_of_line();
        }
        loop {
            let name = match self.token {
                Token::Word(w) => {
                    self.next()?;
                    w.to_string()
                }
                _ => match self.next_if_text()? {
                    Some(s) => s,
                    None => return self.unexpected("an output's name"),
                },
            };
            self.expect('=')?;
            let id = self.operand()?;
            self.graph.set_output(&name, id);
            if !self.accept(',')? {
                return self.end_of_line();
            }
        }
    }

    /// A value that is defined already.
    fn operand(&mut self) -> R<NodeId> {
        let Token::Value(name) = self.token else {
            return self.unexpected("a value");
        };
        let Some(&id) = self.names.get(name) else {
            return self.unexpected("a value that is defined above");
        };
        self.next()?;
        Ok(id)
    }

    fn node(&mut self) -> R<()> {
        let Token::Value(name) = self.token else {
            return self.unexpected("a value");
        };
        if self.names.contains_key(name) {
            return self.unexpected("a value that is not defined yet");
        }
        self.next()?;
        self.expect('=')?;
        let at = self.at;
        let op = match self.token {
            Token::Word(name) => Op::named(name),
            _ => None,
        };
        let Some(op) = op else {
            return self.unexpected("an operation");
        };
        self.next()?;
        let inputs = self.operands(op.name(), op.signature())?;
        let list = self.attrs()?;
        self.expect(':')?;
        let ty = self.ty()?;
        let args = Args {
            name: op.name(),
            at,
            list,
            ty: &ty,
        };
        let op = args.build(op)?;
        let prov = self.prov()?;
        self.end_of_line()?;
        let derived = infer(&op, inputs.map(|&i| &self.graph.node(i).ty));
        let reason = match derived {
            Ok(derived) if derived == ty => None,
            Ok(derived) => Some(format!(
                "type is written as {}, but is {}",
                format_type(&ty),
                format_type(&derived)
            )),
            Err(e) => Some(e.reason),
        };
        if let Some(reason) = reason {
            self.mismatches.push(TypeMismatch {
                at,
                value: name.to_string(),
                op: op.name(),
                reason,
            });
        }
        // Later nodes are checked against the written type, so that one slip is one error.
        let id = self.graph.push_unchecked(Node {
            op,
            inputs,
            ty,
            prov,
        });
        self.names.insert(name, id);
        Ok(())
    }

    /// Values in the order of the operation's slots, then values by the names of their slots.
    fn operands(&mut self, op: &str, signature: &Signature) -> R<Operands<NodeId>> {
        let mut list = Vec::new();
        let mut named = Vec::new();
        loop {
            if let Token::Word(name) = self.token {
                let Some(slot) = signature.slot(name) else {
                    return self.unexpected(&format!("an operand of '{op}'"));
                };
                let given = slot.index() < list.len() || named.iter().any(|&(s, _)| s == slot);
                if given {
                    return self.unexpected("an operand that is not given yet");
                }
                self.next()?;
                self.expect('=')?;
                named.push((slot, self.operand()?));
            } else if list.is_empty() && named.is_empty() && !matches!(self.token, Token::Value(_))
            {
                return Ok(Operands::default());
            } else if named.is_empty() {
                list.push(self.operand()?);
                if list.len() > MAX_OPERANDS {
                    return self.unexpected(&format!("at most {MAX_OPERANDS} operands"));
                }
            } else {
                return self.unexpected("an operand's name");
            }
            if !self.accept(',')? {
                break;
            }
        }
        let operands = Operands::from(list);
        Ok(named
            .into_iter()
            .fold(operands, |all, (slot, id)| all.with(slot, id)))
    }

    fn attrs(&mut self) -> R<Vec<(String, Attr, Pos)>> {
        let mut out: Vec<(String, Attr, Pos)> = Vec::new();
        if !self.accept('{')? {
            return Ok(out);
        }
        loop {
            let at = self.at;
            let Token::Word(name) = self.token else {
                return self.unexpected("an attribute's name");
            };
            if out.iter().any(|(n, ..)| n == name) {
                return self.unexpected("an attribute that is not given yet");
            }
            self.next()?;
            self.expect('=')?;
            let value = self.attr()?;
            out.push((name.to_string(), value, at));
            if !self.accept(',')? {
                self.expect('}')?;
                return Ok(out);
            }
        }
    }

    fn attr(&mut self) -> R<Attr> {
        if let Some(text) = self.next_if_text()? {
            return Ok(Attr::Text(text));
        }
        if self.accept('[')? {
            return self.list();
        }
        if let Token::Word(w) = self.token
            && !["inf", "NaN"].contains(&w)
        {
            self.next()?;
            return Ok(Attr::Word(w.to_string()));
        }
        self.number()
    }

    fn list(&mut self) -> R<Attr> {
        let mut items = Vec::new();
        if self.accept(']')? {
            return Ok(Attr::Reals(Vec::new()));
        }
        loop {
            items.push(self.number()?);
            if items.len() > MAX_LIST {
                return self.unexpected(&format!("at most {MAX_LIST} elements"));
            }
            if !self.accept(',')? {
                break;
            }
        }
        self.expect(']')?;
        let ints: Option<Vec<i64>> = items
            .iter()
            .map(|v| match v {
                Attr::Int(i) => Some(*i),
                _ => None,
            })
            .collect();
        Ok(match ints {
            Some(ints) => Attr::Ints(ints),
            None => Attr::Reals(
                items
                    .iter()
                    .map(|v| match v {
                        Attr::Int(i) => Real::new(*i as f64),
                        Attr::Real(r) => *r,
                        _ => Real::new(0.0),
                    })
                    .collect(),
            ),
        })
    }

    /// An integer or a real constant with its sign.
    fn number(&mut self) -> R<Attr> {
        let negative = self.accept('-')?;
        let sign = if negative { -1.0 } else { 1.0 };
        let value = match self.token {
            Token::Word("inf") => Some(Attr::Real(Real::new(sign * f64::INFINITY))),
            Token::Word("NaN") => Some(Attr::Real(Real::new(f64::NAN))),
            Token::Number(raw) if raw.bytes().all(|b| b.is_ascii_digit()) => raw
                .parse::<i128>()
                .ok()
                .and_then(|v| i64::try_from(if negative { -v } else { v }).ok())
                .map(Attr::Int),
            Token::Number(raw) => raw
                .parse::<f64>()
                .ok()
                .filter(|v| v.is_finite())
                .map(|v| Attr::Real(Real::new(sign * v))),
            _ => return self.unexpected("a number, a word, a quoted name or a list"),
        };
        match value {
            Some(v) => {
                self.next()?;
                Ok(v)
            }
            None => self.unexpected("a number in range"),
        }
    }

    fn ty(&mut self) -> R<Type> {
        if !self.accept('(')? {
            return self.plain_type();
        }
        let mut out = Vec::new();
        loop {
            out.push(self.plain_type()?);
            if out.len() > MAX_OPERANDS {
                return self.unexpected(&format!("at most {MAX_OPERANDS} elements"));
            }
            if !self.accept(',')? {
                self.expect(')')?;
                return Ok(Type::Tuple(out));
            }
        }
    }

    /// A type other than a tuple: no operation makes tuples of tuples.
    fn plain_type(&mut self) -> R<Type> {
        let expected = "a type: bool, i32, i64, f16, bf16 or f32 with extents, or 'cache'";
        let Token::Word(word) = self.token else {
            return self.unexpected(expected);
        };
        let ty = match (word, DType::by_name(word)) {
            ("cache", _) => Type::Cache,
            (_, Some(dtype)) => {
                self.next()?;
                self.expect('[')?;
                let shape = self.shape()?;
                return Ok(Type::Tensor(TensorType { dtype, shape }));
            }
            _ => return self.unexpected(expected),
        };
        self.next()?;
        Ok(ty)
    }

    /// Extents and the closing bracket.
    fn shape(&mut self) -> R<Vec<Dim>> {
        let mut out = Vec::new();
        if self.accept(']')? {
            return Ok(out);
        }
        loop {
            out.push(self.dim()?);
            if out.len() > MAX_RANK {
                return self.unexpected(&format!("at most {MAX_RANK} axes"));
            }
            if !self.accept(',')? {
                self.expect(']')?;
                return Ok(out);
            }
        }
    }

    /// `4096`, `S`, `S+1`, `2*S-3`: each symbol and the constant at most once.
    fn dim(&mut self) -> R<Dim> {
        let mut dim = Dim::new(0);
        let mut constant = false;
        let mut sign = if self.accept('-')? { -1 } else { 1 };
        loop {
            let at = self.at;
            let (k, has_number) = match self.token {
                Token::Number(raw) => match raw.parse::<i64>() {
                    Ok(v) if v <= MAX_EXTENT => {
                        self.next()?;
                        (v, true)
                    }
                    _ => return self.unexpected("an integer of at most 2^40"),
                },
                Token::Word(_) => (1, false),
                _ => return self.unexpected("an extent"),
            };
            if has_number && !self.accept('*')? {
                if std::mem::replace(&mut constant, true) {
                    return Err(fault(at, "one constant an extent".into(), "another".into()));
                }
                dim = dim + Dim::new(sign * k);
            } else {
                let sym = match self.token {
                    Token::Word(w) => Sym::ALL.into_iter().find(|s| s.name() == w),
                    _ => None,
                };
                let Some(sym) = sym else {
                    return self.unexpected("one of the symbols B, S, T, R");
                };
                if dim.coef(sym) != 0 || k > MAX_COEF {
                    return self.unexpected("each symbol once, with a coefficient of at most 2^20");
                }
                self.next()?;
                dim = dim + Dim::sym(sym) * (sign * k);
            }
            if self.accept('+')? {
                sign = 1;
            } else if self.accept('-')? {
                sign = -1;
            } else {
                return Ok(dim);
            }
        }
    }

    /// The provenance in the comment at the end of a node's line.
    fn prov(&mut self) -> R<Prov> {
        let (at, text) = match self.token {
            Token::Comment(text) => (self.at, text),
            _ => return Ok(Prov::global("")),
        };
        self.next()?;
        let (first, rest) = text.split_once(' ').unwrap_or((text, ""));
        let (number, path) = match layer(first) {
            Some(Some(n)) => (Some(n), rest.trim()),
            Some(None) => {
                let expected = "a layer of at most 32 bits".to_string();
                return Err(fault(at, expected, format!("'{first}'")));
            }
            None => (None, text),
        };
        let path = if path.starts_with('"') {
            match Parser::new(path).and_then(|mut p| {
                let text = p.next_if_text()?;
                Ok(text.filter(|_| p.token == Token::End))
            }) {
                Ok(Some(path)) => path,
                _ => return Err(fault(at, "one quoted path".into(), "something else".into())),
            }
        } else if path.is_empty() || is_plain_path(path) {
            path.to_string()
        } else {
            let expected = "a layer such as L0 and a module path as the comment of a node";
            return Err(fault(at, expected.to_string(), "another text".to_string()));
        };
        let path = self
            .paths
            .entry(path)
            .or_insert_with_key(|p| p.as_str().into());
        Ok(Prov {
            layer: number,
            path: Arc::clone(path),
        })
    }
}
