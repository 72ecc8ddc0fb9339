//! Symbolic extents: affine expressions over a few named symbols, in normal form.

use std::fmt;
use std::ops::{Add, Mul, Sub};

/// A size known only at run time.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Sym {
    /// Sequences in the batch.
    B = 0,
    /// Positions of each sequence (full-sequence graphs only).
    S = 1,
    /// Token rows of a step: the ragged chunks of all sequences, concatenated.
    T = 2,
    /// Rows of a step whose logits are wanted.
    R = 3,
}

impl Sym {
    /// All symbols, in declaration order.
    pub const ALL: [Sym; 4] = [Sym::B, Sym::S, Sym::T, Sym::R];

    /// The letter used in IR text.
    pub fn name(self) -> &'static str {
        ["B", "S", "T", "R"][self as usize]
    }
}

/// Values of the symbols.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SymEnv {
    values: [i64; 4],
}

impl SymEnv {
    /// An assignment of the given symbols; the others are 0.
    pub fn new(values: &[(Sym, i64)]) -> SymEnv {
        let mut env = SymEnv::default();
        for &(sym, v) in values {
            env.values[sym as usize] = v;
        }
        env
    }

    /// The value of a symbol.
    pub fn get(&self, sym: Sym) -> i64 {
        self.values[sym as usize]
    }

    /// The same assignment with one symbol changed.
    pub fn with(mut self, sym: Sym, v: i64) -> SymEnv {
        self.values[sym as usize] = v;
        self
    }
}

/// An extent `c + Σ kᵢ·symᵢ`. Equal extents have equal representations. Arithmetic saturates, so
/// that absurd extents in untrusted text cannot overflow.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Dim {
    coef: [i32; 4],
    konst: i64,
}

impl Dim {
    /// A constant extent.
    pub const fn new(n: i64) -> Dim {
        Dim {
            coef: [0; 4],
            konst: n,
        }
    }

    /// A symbol as an extent.
    pub const fn sym(s: Sym) -> Dim {
        let mut coef = [0; 4];
        coef[s as usize] = 1;
        Dim { coef, konst: 0 }
    }

    /// The constant value, if no symbol occurs.
    pub fn known(self) -> Option<i64> {
        (self.coef == [0; 4]).then_some(self.konst)
    }

    /// Whether the extent is exactly `n`.
    pub fn is(self, n: i64) -> bool {
        self.known() == Some(n)
    }

    /// Whether the extent is exactly the symbol `s`.
    pub fn is_sym(self, s: Sym) -> bool {
        self == Dim::sym(s)
    }

    /// The constant part.
    pub fn konst(self) -> i64 {
        self.konst
    }

    /// The coefficient of a symbol.
    pub fn coef(self, s: Sym) -> i32 {
        self.coef[s as usize]
    }

    /// The value under an assignment of the symbols.
    pub fn eval(self, env: &SymEnv) -> i64 {
        let mut v = self.konst;
        for s in Sym::ALL {
            v = v.saturating_add(i64::from(self.coef[s as usize]).saturating_mul(env.get(s)));
        }
        v
    }

    /// Replaces a symbol by another one (e.g. `R` by `T` in a decode program).
    pub fn rename(mut self, from: Sym, to: Sym) -> Dim {
        let c = std::mem::take(&mut self.coef[from as usize]);
        self.coef[to as usize] = self.coef[to as usize].saturating_add(c);
        self
    }
}

impl From<i64> for Dim {
    fn from(n: i64) -> Dim {
        Dim::new(n)
    }
}

impl From<usize> for Dim {
    fn from(n: usize) -> Dim {
        Dim::new(n as i64)
    }
}

impl From<Sym> for Dim {
    fn from(s: Sym) -> Dim {
        Dim::sym(s)
    }
}

impl Add for Dim {
    type Output = Dim;
    fn add(mut self, o: Dim) -> Dim {
        self.konst = self.konst.saturating_add(o.konst);
        for i in 0..4 {
            self.coef[i] = self.coef[i].saturating_add(o.coef[i]);
        }
        self
    }
}

impl Sub for Dim {
    type Output = Dim;
    fn sub(self, o: Dim) -> Dim {
        self + o * -1
    }
}

impl Mul<i64> for Dim {
    type Output = Dim;
    fn mul(mut self, k: i64) -> Dim {
        self.konst = self.konst.saturating_mul(k);
        for c in &mut self.coef {
            let v = i64::from(*c).saturating_mul(k);
            *c = v.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32;
        }
        self
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for s in Sym::ALL {
            let c = self.coef[s as usize];
            if c == 0 {
                continue;
            }
            if c < 0 {
                f.write_str("-")?;
            } else if !first {
                f.write_str("+")?;
            }
            if c.unsigned_abs() != 1 {
                write!(f, "{}*", c.unsigned_abs())?;
            }
            f.write_str(s.name())?;
            first = false;
        }
        if first {
            write!(f, "{}", self.konst)
        } else if self.konst != 0 {
            write!(f, "{:+}", self.konst)
        } else {
            Ok(())
        }
    }
}

/// The number of elements of a shape in normal form: the constant factor and the symbolic
/// extents, sorted. Two shapes hold the same number of elements for every assignment of the
/// symbols if these are equal. A factor of `i64::MAX` stands for any larger one.
pub fn element_count(shape: &[Dim]) -> (i64, Vec<Dim>) {
    let mut factor: i64 = 1;
    let mut syms = Vec::new();
    for &d in shape {
        match d.known() {
            Some(n) => factor = factor.saturating_mul(n),
            None => syms.push(d),
        }
    }
    syms.sort();
    (factor, syms)
}

/// Formats a shape as `[B,S,4096]`.
pub fn format_shape(shape: &[Dim]) -> String {
    let dims: Vec<String> = shape.iter().map(Dim::to_string).collect();
    format!("[{}]", dims.join(","))
}

/// The shape of a broadcast, by NumPy's rule: aligned from the right, extent 1 stretches.
pub fn broadcast(a: &[Dim], b: &[Dim]) -> Option<Vec<Dim>> {
    let rank = a.len().max(b.len());
    let at = |s: &[Dim], i: usize| {
        let skip = rank - s.len();
        if i < skip { Dim::new(1) } else { s[i - skip] }
    };
    (0..rank)
        .map(|i| {
            let (x, y) = (at(a, i), at(b, i));
            if x == y || y.is(1) {
                Some(x)
            } else if x.is(1) {
                Some(y)
            } else {
                None
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dims_print_in_normal_form() {
        let s = Dim::sym(Sym::S);
        assert_eq!((s + Dim::new(1)).to_string(), "S+1");
        assert_eq!((s * 2 - Dim::new(3)).to_string(), "2*S-3");
        assert_eq!((s - s).to_string(), "0");
        assert_eq!((Dim::sym(Sym::B) + s).to_string(), "B+S");
    }

    #[test]
    fn broadcast_aligns_from_the_right() {
        let (b, s) = (Dim::sym(Sym::B), Dim::sym(Sym::S));
        let one = Dim::new(1);
        assert_eq!(
            broadcast(&[b, one, s], &[Dim::new(4), s]),
            Some(vec![b, Dim::new(4), s])
        );
        assert_eq!(broadcast(&[b, s], &[Dim::new(2), s]), None);
    }
}
