//! Where a key of a YAML text stands.
//!
//! The YAML reader tells positions only with its errors. So the text is read once more by a visitor that fails on
//! every key and goes on behind it; the errors carry the positions. Values that are wrong are looked for one by one, by
//! a visitor that fails on arriving.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::collections::HashMap;
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

/// Where the keys of a text stand that can be asked for: of the text itself, and of the mappings in [`NESTED`].
#[derive(Debug, Default)]
pub(super) struct Keys {
    at: HashMap<Vec<String>, Position>,
    /// The first key that stands twice in its mapping, where it stands the second time.
    twice: Option<Position>,
    /// Where reading ended early, if it did.
    end: Option<Position>,
}

/// Keys whose values are read for keys in turn, and how many levels of them.
const NESTED: [(&str, usize); 2] = [("transforms", 2), ("model_kwargs", 1)];

impl Keys {
    /// Reads the text once.
    pub(super) fn read(text: &str) -> Keys {
        let mut keys = Keys::default();
        let level = Level {
            keys: &mut keys,
            path: &[],
            below: None,
        };
        let outcome = level.deserialize(serde_yaml::Deserializer::from_str(text));
        keys.end = outcome.err().and_then(|error| position(&error));
        keys
    }

    /// The first of these keys that stands twice, where it does so the second time.
    pub(super) fn twice(&self) -> Option<Position> {
        self.twice
    }

    /// The position of the last key of `path` (keys of nested mappings, outermost first).
    pub(super) fn key(&self, path: &[&str]) -> Option<Position> {
        let path: Vec<String> = path.iter().map(|&key| key.to_owned()).collect();
        self.at.get(&path).copied().or(self.end)
    }
}

/// What is no mapping, for a visitor with a method `end` that says whether reading goes on behind a value.
macro_rules! no_mappings {
    () => {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a value")
        }

        no_mappings!(visit_bool: bool, visit_i64: i64, visit_u64: u64, visit_f64: f64, visit_str: &str);

        fn visit_unit<E: Error>(self) -> Result<(), E> {
            self.end()
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
            self.end::<A::Error>()?;
            while items.next_element::<IgnoredAny>()?.is_some() {}
            Ok(())
        }
    };
    ($($visit:ident: $ty:ty),*) => {
        $(fn $visit<E: Error>(self, _: $ty) -> Result<(), E> {
            self.end()
        })*
    };
}

/// Reads a mapping and notes its keys.
struct Level<'a> {
    keys: &'a mut Keys,
    path: &'a [String],
    /// Levels of mappings below this one; `None` for the text itself.
    below: Option<usize>,
}

impl<'de> DeserializeSeed<'de> for Level<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl Level<'_> {
    /// What has no keys is passed over.
    fn end<E: Error>(&self) -> Result<(), E> {
        Ok(())
    }
}

impl<'de> Visitor<'de> for Level<'_> {
    no_mappings!();

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        loop {
            let mut key = None;
            // Reading a key fails on purpose: the error tells the position, and the key is read nevertheless.
            let Err(error) = entries.next_key_seed(KeyText(&mut key)) else {
                return Ok(());
            };
            let Some(key) = key else {
                return Err(error);
            };
            let below = match self.below {
                None => NESTED.iter().find(|n| n.0 == key).map_or(0, |n| n.1),
                Some(below) => below - 1,
            };
            let path = [self.path, &[key]].concat();
            let at = said_position(&error.to_string());
            if self.keys.at.contains_key(&path) {
                self.keys.twice.get_or_insert(at);
            } else {
                self.keys.at.insert(path.clone(), at);
            }
            if below > 0 {
                entries.next_value_seed(Level {
                    keys: self.keys,
                    path: &path,
                    below: Some(below),
                })?;
            } else {
                entries.next_value::<IgnoredAny>()?;
            }
        }
    }
}

/// The position that the text of an error ends with; it is left out where it is the first.
fn said_position(error: &str) -> Position {
    let said = error.rsplit_once(" at line ").and_then(|(_, at)| {
        let (line, column) = at.split_once(" column ")?;
        Some(Position {
            line: line.parse().ok()?,
            column: column.parse().ok()?,
        })
    });
    said.unwrap_or(Position { line: 1, column: 1 })
}

/// Keeps the text of a scalar key and fails.
struct KeyText<'a>(&'a mut Option<String>);

impl KeyText<'_> {
    fn keep<E: Error>(self, key: &str) -> Result<(), E> {
        *self.0 = Some(key.to_owned());
        Err(E::custom(FOUND))
    }
}

/// The position of the value under `path`.
///
/// This reads the text again.
pub(super) fn value(text: &str, path: &[&str]) -> Option<Position> {
    let error = Seek(path)
        .deserialize(serde_yaml::Deserializer::from_str(text))
        .err()?;
    position(&error)
}

/// Where an error stands, if it says so.
pub(super) fn position(error: &serde_yaml::Error) -> Option<Position> {
    let at = error.location()?;
    Some(Position {
        line: at.line(),
        column: at.column(),
    })
}

/// Reads a value whose keys lead on to the one that is sought, on which it fails.
#[derive(Clone, Copy)]
struct Seek<'a>(&'a [&'a str]);

/// Says whether a key leads to what is sought.
struct KeySeek<'a>(Seek<'a>);

const FOUND: &str = "found";

impl<'de> DeserializeSeed<'de> for Seek<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl Seek<'_> {
    /// Fails where nothing is left to follow: this is the value.
    fn end<E: Error>(&self) -> Result<(), E> {
        if self.0.is_empty() {
            Err(E::custom(FOUND))
        } else {
            Ok(())
        }
    }
}

impl<'de> Visitor<'de> for Seek<'_> {
    no_mappings!();

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        self.end::<A::Error>()?;
        while let Some(leads) = entries.next_key_seed(KeySeek(self))? {
            if leads {
                let (_, below) = self.0.split_at(1);
                entries.next_value_seed(Seek(below))?;
            } else {
                entries.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

impl KeySeek<'_> {
    fn keep<E: Error>(self, found: &str) -> Result<bool, E> {
        Ok(self.0.0.first() == Some(&found))
    }
}

/// A visitor of scalar keys that hands their text to its method `keep`.
macro_rules! key_visitor {
    ($visitor:ident -> $value:ty) => {
        impl<'de> DeserializeSeed<'de> for $visitor<'_> {
            type Value = $value;

            fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<$value, D::Error> {
                d.deserialize_any(self)
            }
        }

        impl<'de> Visitor<'de> for $visitor<'_> {
            type Value = $value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E: Error>(self, v: &str) -> Result<$value, E> {
                self.keep(v)
            }

            fn visit_bool<E: Error>(self, v: bool) -> Result<$value, E> {
                self.keep(&v.to_string())
            }

            fn visit_i64<E: Error>(self, v: i64) -> Result<$value, E> {
                self.keep(&v.to_string())
            }

            fn visit_u64<E: Error>(self, v: u64) -> Result<$value, E> {
                self.keep(&v.to_string())
            }

            fn visit_f64<E: Error>(self, v: f64) -> Result<$value, E> {
                self.keep(&v.to_string())
            }

            fn visit_unit<E: Error>(self) -> Result<$value, E> {
                self.keep("null")
            }
        }
    };
}

key_visitor!(KeySeek -> bool);
key_visitor!(KeyText -> ());

#[cfg(test)]
mod tests {
    use super::*;

    fn at(line: usize, column: usize) -> Option<Position> {
        Some(Position { line, column })
    }

    #[test]
    fn keys_and_values_in_block_and_flow_style() {
        let text = "a: 1\n# note\ntransforms:\n  c: [1, 2]\n  d: {e: 5, f: {g: x}}\n'g': {h: 7}\n1.5: {}\nnull: 2\n";
        let keys = Keys::read(text);
        assert_eq!(keys.key(&["a"]), at(1, 1));
        assert_eq!(keys.key(&["transforms", "d"]), at(5, 3));
        assert_eq!(keys.key(&["transforms", "d", "f"]), at(5, 13));
        assert_eq!(value(text, &["transforms", "d", "e"]), at(5, 10));
        assert_eq!(value(text, &["transforms", "c"]), at(4, 6));
        assert_eq!(keys.key(&["g"]), at(6, 1));
        assert_eq!(keys.key(&["1.5"]), at(7, 1));
        assert_eq!(keys.key(&["null"]), at(8, 1));
        // Nobody asks for these.
        assert_eq!(keys.key(&["g", "h"]), None);
        assert_eq!(keys.key(&["transforms", "d", "f", "g"]), None);
        assert_eq!(keys.key(&["z"]), None);
    }

    /// Keys that are no scalars have no text to look for; what follows is said to stand there.
    #[test]
    fn reading_ends_at_a_key_that_is_no_scalar() {
        let keys = Keys::read("a: 1\n? [1]\n: 2\nb: 3\n");
        assert_eq!(keys.key(&["a"]), at(1, 1));
        assert_eq!(keys.key(&["b"]), at(2, 3));
    }

    #[test]
    fn anchors_are_followed() {
        let text = "model_kwargs: &m {a: 1}\ntransforms: *m\nb: *m\nc: 1\n";
        let keys = Keys::read(text);
        assert_eq!(keys.key(&["model_kwargs", "a"]), at(1, 19));
        assert_eq!(keys.key(&["transforms", "a"]), at(1, 19));
        assert_eq!(keys.key(&["c"]), at(4, 1));
    }
}
