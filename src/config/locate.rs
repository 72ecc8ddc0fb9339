//! Where a key of a YAML text stands.
//!
//! The YAML reader tells positions only with its errors. So the text is read once more by a
//! visitor that fails on arriving at the wanted key or item; the error carries the position.

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;

/// A line and a column, both from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Column.
    pub column: usize,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// The position of the last key of `path` (keys of nested mappings, outermost first).
pub(super) fn key(text: &str, path: &[&str]) -> Option<Position> {
    let seek = Seek { path, value: false };
    seek_in(text, seek)
}

/// The position of the value under `path`.
pub(super) fn value(text: &str, path: &[&str]) -> Option<Position> {
    let seek = Seek { path, value: true };
    seek_in(text, seek)
}

fn seek_in(text: &str, seek: Seek<'_>) -> Option<Position> {
    let error = seek
        .deserialize(serde_yaml::Deserializer::from_str(text))
        .err()?;
    let at = error.location()?;
    Some(Position {
        line: at.line(),
        column: at.column(),
    })
}

/// Reads a value whose keys lead on to what is sought.
#[derive(Clone, Copy)]
struct Seek<'a> {
    path: &'a [&'a str],
    value: bool,
}

/// Reads one key and fails if it is the one that is sought; says whether it leads there.
struct KeySeek<'a>(Seek<'a>);

const FOUND: &str = "found";

impl<'de> DeserializeSeed<'de> for Seek<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

macro_rules! scalar {
    ($($visit:ident: $ty:ty),*) => {
        $(fn $visit<E: Error>(self, _: $ty) -> Result<(), E> {
            self.end()
        })*
    };
}

impl Seek<'_> {
    fn end<E: Error>(self) -> Result<(), E> {
        if self.path.is_empty() && self.value {
            Err(E::custom(FOUND))
        } else {
            Ok(())
        }
    }
}

impl<'de> Visitor<'de> for Seek<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    scalar!(visit_bool: bool, visit_i64: i64, visit_u64: u64, visit_f64: f64, visit_str: &str);

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.end()
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        self.end::<A::Error>()?;
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        self.end::<A::Error>()?;
        while let Some(leads) = entries.next_key_seed(KeySeek(self))? {
            if leads {
                entries.next_value_seed(Seek {
                    path: &self.path[1..],
                    value: self.value,
                })?;
            } else {
                entries.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for KeySeek<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<bool, D::Error> {
        d.deserialize_any(self)
    }
}

impl KeySeek<'_> {
    fn compare<E: Error>(self, found: &str) -> Result<bool, E> {
        match self.0.path {
            [last] if *last == found && !self.0.value => Err(E::custom(FOUND)),
            [next, ..] => Ok(*next == found),
            [] => Ok(false),
        }
    }
}

impl<'de> Visitor<'de> for KeySeek<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, v: &str) -> Result<bool, E> {
        self.compare(v)
    }

    fn visit_bool<E: Error>(self, v: bool) -> Result<bool, E> {
        self.compare(&v.to_string())
    }

    fn visit_i64<E: Error>(self, v: i64) -> Result<bool, E> {
        self.compare(&v.to_string())
    }

    fn visit_u64<E: Error>(self, v: u64) -> Result<bool, E> {
        self.compare(&v.to_string())
    }

    fn visit_f64<E: Error>(self, v: f64) -> Result<bool, E> {
        self.compare(&v.to_string())
    }

    fn visit_unit<E: Error>(self) -> Result<bool, E> {
        self.compare("null")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(line: usize, column: usize) -> Option<Position> {
        Some(Position { line, column })
    }

    #[test]
    fn keys_and_values_in_block_and_flow_style() {
        let text = "a: 1\n# note\nb:\n  c: [1, 2]\n  d: {e: 5, f: x}\n'g': 7\n";
        assert_eq!(key(text, &["a"]), at(1, 1));
        assert_eq!(key(text, &["b", "d"]), at(5, 3));
        assert_eq!(key(text, &["b", "d", "f"]), at(5, 13));
        assert_eq!(value(text, &["b", "d", "f"]), at(5, 16));
        assert_eq!(value(text, &["b", "c"]), at(4, 6));
        assert_eq!(key(text, &["g"]), at(6, 1));
        assert_eq!(key(text, &["z"]), None);
    }
}
