//! Tokens of IR text.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::fmt;
use std::iter::Peekable;
use std::str::CharIndices;

/// A place in a text; both numbers count from 1, columns in characters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pos {
    /// Line.
    pub line: usize,
    /// Column.
    pub col: usize,
}

impl fmt::Display for Pos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.col)
    }
}

/// Something else stands where `expected` should.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Fault {
    pub(super) at: Pos,
    pub(super) expected: String,
    pub(super) found: String,
}

pub(super) fn fault(at: Pos, expected: String, found: String) -> Fault {
    Fault {
        at,
        expected,
        found,
    }
}

/// Longest accepted name, in bytes.
pub(super) const MAX_NAME: usize = 4096;

#[derive(Clone, PartialEq, Debug)]
pub(super) enum Token<'a> {
    /// Letters, digits and underscores, not starting with a digit.
    Word(&'a str),
    /// `%` and a name; without the `%`.
    Value(&'a str),
    /// Digits, possibly with a fraction and an exponent; never with a sign.
    Number(&'a str),
    /// A quoted name, unescaped.
    Text(String),
    /// One other character.
    Punct(char),
    /// The rest of a line after `//`, without surrounding blanks.
    Comment(&'a str),
    /// The end of a line.
    Newline,
    /// The end of the text.
    End,
}

impl fmt::Display for Token<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Long tokens are cut, so that an error stays one line of bearable length.
        let short = |s: &str| s.chars().take(40).collect::<String>();
        match self {
            Token::Word(s) | Token::Number(s) => write!(f, "'{}'", short(s)),
            Token::Value(s) => write!(f, "'%{}'", short(s)),
            Token::Text(s) => write!(f, "{}", super::quote::quote(&short(s))),
            Token::Punct(c) => write!(f, "'{}'", c.escape_debug()),
            Token::Comment(_) => f.write_str("a comment"),
            Token::Newline => f.write_str("the end of the line"),
            Token::End => f.write_str("the end of the text"),
        }
    }
}

pub(super) struct Lexer<'a> {
    src: &'a str,
    chars: Peekable<CharIndices<'a>>,
    pos: Pos,
}

impl<'a> Lexer<'a> {
    pub(super) fn new(src: &'a str) -> Lexer<'a> {
        Lexer {
            src,
            chars: src.char_indices().peekable(),
            pos: Pos { line: 1, col: 1 },
        }
    }

    fn peek(&mut self) -> Option<char> {
        self.chars.peek().map(|&(_, c)| c)
    }

    fn bump(&mut self) -> Option<char> {
        let (_, c) = self.chars.next()?;
        if c == '\n' {
            self.pos.line += 1;
            self.pos.col = 1;
        } else {
            self.pos.col += 1;
        }
        Some(c)
    }

    fn offset(&mut self) -> usize {
        self.chars.peek().map_or(self.src.len(), |&(i, _)| i)
    }

    fn take_while(&mut self, accept: impl Fn(char) -> bool) {
        while self.peek().is_some_and(&accept) {
            self.bump();
        }
    }

    /// The next token and where it starts.
    pub(super) fn token(&mut self) -> Result<(Token<'a>, Pos), Fault> {
        self.take_while(|c| matches!(c, ' ' | '\t' | '\r'));
        let (start, at) = (self.offset(), self.pos);
        let src = self.src;
        let Some(c) = self.peek() else {
            return Ok((Token::End, at));
        };
        let in_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let token = match c {
            '\n' => {
                self.bump();
                Token::Newline
            }
            '"' => Token::Text(self.text()?),
            '%' => {
                self.bump();
                let from = self.offset();
                self.take_while(in_word);
                let name = &src[from..self.offset()];
                if name.is_empty() || name.len() > MAX_NAME {
                    let found = format!("{} characters", name.len());
                    return Err(fault(at, "a value's name after '%'".to_string(), found));
                }
                Token::Value(name)
            }
            c if c.is_ascii_digit() => {
                self.number();
                Token::Number(&src[start..self.offset()])
            }
            c if in_word(c) => {
                self.take_while(in_word);
                Token::Word(&src[start..self.offset()])
            }
            '/' if src[start..].starts_with("//") => {
                self.take_while(|c| c != '\n');
                let end = self.offset();
                Token::Comment(src[start + 2..end].trim())
            }
            c => {
                self.bump();
                Token::Punct(c)
            }
        };
        Ok((token, at))
    }

    fn number(&mut self) {
        let digit = |c: char| c.is_ascii_digit();
        self.take_while(digit);
        if self.peek() == Some('.') {
            self.bump();
            self.take_while(digit);
        }
        if matches!(self.peek(), Some('e' | 'E')) {
            self.bump();
            if matches!(self.peek(), Some('+' | '-')) {
                self.bump();
            }
            self.take_while(digit);
        }
    }

    fn text(&mut self) -> Result<String, Fault> {
        let at = self.pos;
        self.bump();
        let mut out = String::new();
        loop {
            let here = self.pos;
            if out.len() > MAX_NAME {
                let expected = format!("a name of at most {MAX_NAME} bytes");
                return Err(fault(at, expected, "a longer one".to_string()));
            }
            match self.bump() {
                Some('"') => return Ok(out),
                None | Some('\n') => {
                    let found = "the end of the line".to_string();
                    return Err(fault(here, "'\"'".to_string(), found));
                }
                Some('\\') => out.push(self.escape(here)?),
                Some(c) => out.push(c),
            }
        }
    }

    fn escape(&mut self, at: Pos) -> Result<char, Fault> {
        let bad = |found: String| {
            let expected = "one of \\\\, \\\", \\n, \\r, \\t, \\u{hex}".to_string();
            fault(at, expected, found)
        };
        match self.bump() {
            Some('n') => Ok('\n'),
            Some('r') => Ok('\r'),
            Some('t') => Ok('\t'),
            Some(c @ ('"' | '\\')) => Ok(c),
            Some('u') if self.peek() == Some('{') => {
                self.bump();
                let start = self.offset();
                self.take_while(|c| c.is_ascii_hexdigit());
                let hex = &self.src[start..self.offset()];
                let c = u32::from_str_radix(hex, 16).ok().and_then(char::from_u32);
                match (c, self.bump()) {
                    (Some(c), Some('}')) => Ok(c),
                    _ => Err(bad("a bad \\u escape".to_string())),
                }
            }
            Some(c) => Err(bad(format!("'\\{}'", c.escape_debug()))),
            None => Err(bad("the end of the text".to_string())),
        }
    }
}
