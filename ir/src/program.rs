//! Which programs a model is compiled to.

/// Which program of a model.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum ProgramKind {
    /// A step of one row a sequence; symbols T = B = R.
    Decode,
    /// A step of ragged rows; symbols T, B and R.
    General,
    /// Whole sequences without a cache; symbols B and S.
    Full,
    /// What depends on weights alone, run once while loading; no symbols.
    Once,
}

impl ProgramKind {
    /// The name in dumps.
    pub fn name(self) -> &'static str {
        match self {
            ProgramKind::Decode => "decode",
            ProgramKind::General => "general",
            ProgramKind::Full => "full",
            ProgramKind::Once => "once",
        }
    }
}

/// One thing for each of the two step programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Both<T> {
    /// That of the decode program.
    pub decode: T,
    /// That of the general program.
    pub general: T,
}

impl<T> Both<T> {
    /// What `make` gives for each program, decode first.
    pub fn from_fn(mut make: impl FnMut(ProgramKind) -> T) -> Both<T> {
        Both {
            decode: make(ProgramKind::Decode),
            general: make(ProgramKind::General),
        }
    }

    /// What `f` makes of each, decode first.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Both<U> {
        Both {
            decode: f(self.decode),
            general: f(self.general),
        }
    }

    /// References to both.
    pub fn as_ref(&self) -> Both<&T> {
        Both {
            decode: &self.decode,
            general: &self.general,
        }
    }

    /// Both with those of `other`.
    pub fn zip<U>(self, other: Both<U>) -> Both<(T, U)> {
        Both {
            decode: (self.decode, other.decode),
            general: (self.general, other.general),
        }
    }

    /// The one of a program; none for a program that is no step.
    pub fn get(&self, kind: ProgramKind) -> Option<&T> {
        match kind {
            ProgramKind::Decode => Some(&self.decode),
            ProgramKind::General => Some(&self.general),
            ProgramKind::Full | ProgramKind::Once => None,
        }
    }

    /// Both with their programs, decode first.
    pub fn iter(&self) -> impl Iterator<Item = (ProgramKind, &T)> {
        [
            (ProgramKind::Decode, &self.decode),
            (ProgramKind::General, &self.general),
        ]
        .into_iter()
    }
}
