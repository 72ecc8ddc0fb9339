//! A decision with its reason.

use std::borrow::Cow;
use std::fmt;

/// Why something is fused or not, in words.
pub type Reason = Cow<'static, str>;

/// What is decided of one fusion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict<T = ()> {
    /// It is made, in this way.
    Made(T, Reason),
    /// It is not.
    Not(Reason),
}

impl<T> Verdict<T> {
    pub(super) fn made(how: T, reason: impl Into<Reason>) -> Verdict<T> {
        Verdict::Made(how, reason.into())
    }

    pub(super) fn not(reason: impl Into<Reason>) -> Verdict<T> {
        Verdict::Not(reason.into())
    }

    /// How it is made; `None` if it is not.
    pub fn how(&self) -> Option<&T> {
        match self {
            Verdict::Made(how, _) => Some(how),
            Verdict::Not(_) => None,
        }
    }

    /// Whether it is made.
    pub fn is_made(&self) -> bool {
        self.how().is_some()
    }

    /// Why.
    pub fn reason(&self) -> &str {
        match self {
            Verdict::Made(_, reason) | Verdict::Not(reason) => reason,
        }
    }
}

impl<T> fmt::Display for Verdict<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.is_made() { "yes" } else { "no" };
        write!(f, "{word}: {}", self.reason())
    }
}
