//! Real constants of programs.

use std::fmt;

/// A real constant with total order and hash, so that payloads can be e-graph keys.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Real(u64);

impl Real {
    /// Wraps a value; `-0.0` becomes `0.0`, and all that is no number one NaN, so that equal reals are
    /// equal keys.
    pub fn new(v: f64) -> Real {
        Real(match v {
            0.0 => 0,
            v if v.is_nan() => f64::NAN.to_bits(),
            v => v.to_bits(),
        })
    }

    /// The value.
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }
}

impl PartialOrd for Real {
    fn partial_cmp(&self, o: &Real) -> Option<std::cmp::Ordering> {
        Some(self.cmp(o))
    }
}

impl Ord for Real {
    fn cmp(&self, o: &Real) -> std::cmp::Ordering {
        self.get().total_cmp(&o.get())
    }
}

impl fmt::Debug for Real {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Real {
    /// The shortest text that reads back as the same f64.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v = self.get();
        if v != 0.0 && (v.abs() < 1e-4 || v.abs() >= 1e16) {
            write!(f, "{v:e}")
        } else {
            write!(f, "{v:?}")
        }
    }
}
