//! Facts about position values and masks.
//!
//! Hugging Face spells the causal mask in many ways. Instead of a rule for each, the analysis
//! follows index values (`iota` along an axis), comparisons of them, and the arithmetic that
//! turns booleans into additive masks; attention rules ask only for the resulting [`Mask`].

use lathe_ir::ops::{Cast, Iota, Where};
use lathe_ir::{BinaryFn, DType, Dim, Mask, Op, Real, UnaryFn};

/// The set of (query `i`, key `j`) with `lo < j - i <= hi`; a missing bound is infinite.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Band {
    /// Exclusive lower bound of `j - i`.
    pub lo: Option<i64>,
    /// Inclusive upper bound of `j - i`.
    pub hi: Option<i64>,
}

impl Band {
    fn intersect(self, o: Band) -> Band {
        let pick = |a: Option<i64>, b: Option<i64>, f: fn(i64, i64) -> i64| match (a, b) {
            (Some(a), Some(b)) => Some(f(a, b)),
            (a, b) => a.or(b),
        };
        Band {
            lo: pick(self.lo, o.lo, i64::max),
            hi: pick(self.hi, o.hi, i64::min),
        }
    }

    /// The complement, if it is a band too.
    pub fn complement(self) -> Option<Band> {
        match (self.lo, self.hi) {
            (None, Some(hi)) => Some(Band {
                lo: Some(hi),
                hi: None,
            }),
            (Some(lo), None) => Some(Band {
                lo: None,
                hi: Some(lo),
            }),
            _ => None,
        }
    }

    /// The band as an attention mask, if attention can express it.
    pub fn as_mask(self) -> Option<Mask> {
        let causal = match self.hi {
            None => false,
            Some(0) => true,
            Some(_) => return None,
        };
        let window = match self.lo {
            None => None,
            Some(lo) if lo < 0 && lo >= -i64::from(u32::MAX) => Some((-lo) as u32),
            Some(_) => return None,
        };
        Some(Mask { causal, window })
    }
}

/// What is known of a value that depends on positions only. Axes are counted from the right:
/// axis 0 is the key axis of a mask, axis 1 the query axis.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fact {
    /// Element = index along `axis` + `offset`, constant along all other axes.
    Index {
        /// Axis from the right.
        axis: usize,
        /// Added to the index.
        offset: i64,
    },
    /// Boolean: true inside the band, or outside of it when `inverted`.
    Bool {
        /// The band.
        band: Band,
        /// Whether it is the outside that is true.
        inverted: bool,
    },
    /// Number: 1 where the boolean fact holds, else 0.
    Indicator {
        /// The band.
        band: Band,
        /// Whether it is the outside that is 1.
        inverted: bool,
    },
    /// Number: 0 inside the band, at most `fill` outside, which is at most [`HIDDEN`].
    Additive {
        /// Visible pairs.
        band: Band,
        /// The largest number outside.
        fill: Real,
    },
}

/// What is no lower hides nothing, whatever the scores are: masks are filled with −1e4, −1e9, the
/// dtype's minimum or −∞. [`Fill`] says how large scores may be beside a fill.
pub const HIDDEN: f64 = -1e4;

/// Below its largest score by this much, a score's weight in a softmax is 0 in f32: e^-104 is less than
/// half of the least number.
const VANISHES: f64 = 104.0;

/// A fill at most this low is no assumption: scores of such a size leave f32 no room for differences.
const ENDLESS: f64 = -1e30;

/// What hides scores, which rules take for −∞.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fill {
    /// It is added to them.
    Added(f64),
    /// It stands in their place.
    Instead(f64),
}

impl Fill {
    /// The largest magnitude of scores beside which hidden ones vanish.
    pub fn limit(self) -> f64 {
        match self {
            Fill::Added(fill) => (-fill - VANISHES) / 2.0,
            Fill::Instead(fill) => -fill - VANISHES,
        }
    }

    /// Whether scores that are known to stay within `bound` allow to take it for −∞. `Some(true)`: only
    /// if they stay below [`Fill::limit`], which nobody knows.
    pub fn hides(self, bound: Option<f64>) -> Option<bool> {
        let (Fill::Added(fill) | Fill::Instead(fill)) = self;
        match bound {
            Some(bound) => (bound <= self.limit()).then_some(false),
            None => (fill <= HIDDEN).then_some(fill > ENDLESS),
        }
    }
}

/// Indices are exact in f32 and i32 as long as offsets are no larger.
const FAR: i64 = 1 << 22;

/// Whether an element type tells all positions of a sequence apart.
fn counts(dtype: DType) -> bool {
    matches!(dtype, DType::I32 | DType::I64 | DType::F32)
}

/// Operand of an operation as far as facts are concerned.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    /// Known fact.
    pub fact: Option<Fact>,
    /// Known constant value of all elements.
    pub konst: Option<f64>,
    /// Extents.
    pub shape: &'a [Dim],
}

/// The fact about the result of an operation, if its operands' facts give one.
pub fn derive(op: &Op, x: &[Operand<'_>], shape: &[Dim]) -> Option<Fact> {
    match (op, x) {
        // The only index of an axis of extent 1 would be repeated by broadcasting.
        (Op::Iota(Iota { len, .. }), _) if len.is(1) => None,
        (Op::Iota(Iota { dtype, .. }), _) => {
            counts(*dtype).then_some(Fact::Index { axis: 0, offset: 0 })
        }
        (Op::Cast(Cast(to)), [a]) => match a.fact? {
            Fact::Bool { band, inverted } if to.is_float() => {
                Some(Fact::Indicator { band, inverted })
            }
            // Narrow floats do not tell long positions apart.
            f @ Fact::Index { .. } => counts(*to).then_some(f),
            f @ (Fact::Indicator { .. } | Fact::Additive { .. }) => to.is_float().then_some(f),
            Fact::Bool { .. } => None,
        },
        (Op::Reshape(_), [a]) => reshape(a.fact?, a.shape, shape),
        (Op::Expand(_), [a]) => Some(a.fact?),
        (Op::Unary(UnaryFn::Not), [a]) => match a.fact? {
            Fact::Bool { band, inverted } => Some(Fact::Bool {
                band,
                inverted: !inverted,
            }),
            _ => None,
        },
        (Op::Binary(f), [a, b]) => binary(*f, a, b),
        (Op::Where(Where), [c, a, b]) => {
            let Fact::Bool { band, inverted } = c.fact? else {
                return None;
            };
            let (a, b) = (a.konst?, b.konst?);
            let fill = Real::new(a.min(b));
            match (a == 0.0 && b <= HIDDEN, b == 0.0 && a <= HIDDEN, inverted) {
                (true, _, false) | (_, true, true) => Some(Fact::Additive { band, fill }),
                (true, _, true) | (_, true, false) => Some(Fact::Additive {
                    band: band.complement()?,
                    fill,
                }),
                _ => None,
            }
        }
        _ => None,
    }
}

/// An index stays one if the only axes that change are of extent 1; a mask needs its last two
/// axes unchanged.
fn reshape(fact: Fact, from: &[Dim], to: &[Dim]) -> Option<Fact> {
    let tail = |s: &[Dim]| -> Vec<Dim> { s.iter().rev().take(2).copied().collect() };
    match fact {
        Fact::Index { axis, offset } => {
            let long = |s: &[Dim]| -> Vec<usize> {
                (0..s.len())
                    .rev()
                    .filter(|&i| !s[i].is(1))
                    .map(|i| s.len() - 1 - i)
                    .collect()
            };
            let (f, t) = (long(from), long(to));
            let pos = f.iter().position(|&a| a == axis)?;
            let same_extents = f.len() == t.len()
                && f.iter()
                    .zip(&t)
                    .all(|(&a, &b)| from[from.len() - 1 - a] == to[to.len() - 1 - b]);
            same_extents.then(|| Fact::Index {
                axis: t[pos],
                offset,
            })
        }
        f => (from.len() >= 2 && to.len() >= 2 && tail(from) == tail(to)).then_some(f),
    }
}

fn binary(f: BinaryFn, a: &Operand<'_>, b: &Operand<'_>) -> Option<Fact> {
    use BinaryFn::{Add, And, Ge, Gt, Le, Lt, Maximum, Minimum, Mul, Or, Sub};
    match (f, a.fact, b.fact) {
        (Add | Sub, Some(Fact::Index { axis, offset }), None) => {
            let k = integer(b.konst?)?;
            shifted(axis, if f == Add { offset + k } else { offset - k })
        }
        (Add, None, Some(Fact::Index { axis, offset })) => {
            shifted(axis, offset + integer(a.konst?)?)
        }
        (Le | Lt | Ge | Gt, Some(x), Some(y)) => compare(f, x, y),
        (And | Minimum, Some(x), Some(y)) => combine(x, y, false),
        (Or | Maximum, Some(x), Some(y)) => combine(x, y, true),
        // Two additive masks hide what either hides.
        (
            Add,
            Some(Fact::Additive { band: p, fill: a }),
            Some(Fact::Additive { band: q, fill: b }),
        ) => Some(Fact::Additive {
            band: p.intersect(q),
            fill: Real::new(a.get().max(b.get())),
        }),
        // 1 − indicator.
        (Sub, None, Some(Fact::Indicator { band, inverted })) if a.konst == Some(1.0) => {
            Some(Fact::Indicator {
                band,
                inverted: !inverted,
            })
        }
        // indicator · (very negative).
        (Mul, Some(Fact::Indicator { band, inverted }), None) => {
            scaled_indicator(band, inverted, b.konst?)
        }
        (Mul, None, Some(Fact::Indicator { band, inverted })) => {
            scaled_indicator(band, inverted, a.konst?)
        }
        // A mask of fills times an indicator of the pairs that stay hidden.
        (
            Mul,
            Some(Fact::Indicator { band, inverted }),
            Some(Fact::Indicator {
                band: q,
                inverted: i,
            }),
        ) => {
            match combine(
                Fact::Bool { band, inverted },
                Fact::Bool {
                    band: q,
                    inverted: i,
                },
                false,
            )? {
                Fact::Bool { band, inverted } => Some(Fact::Indicator { band, inverted }),
                _ => None,
            }
        }
        _ => None,
    }
}

fn scaled_indicator(band: Band, inverted: bool, k: f64) -> Option<Fact> {
    // Where the indicator is 0, an infinite fill is no number.
    if !k.is_finite() || k > HIDDEN {
        return None;
    }
    let band = if inverted { band } else { band.complement()? };
    let fill = Real::new(k);
    Some(Fact::Additive { band, fill })
}

/// An index that stays exact.
fn shifted(axis: usize, offset: i64) -> Option<Fact> {
    (offset.abs() <= FAR).then_some(Fact::Index { axis, offset })
}

fn integer(v: f64) -> Option<i64> {
    (v.fract() == 0.0 && v.abs() <= FAR as f64).then_some(v as i64)
}

/// A comparison of a key index with a query index is a band of `j - i`.
fn compare(f: BinaryFn, x: Fact, y: Fact) -> Option<Fact> {
    let (
        Fact::Index {
            axis: ax,
            offset: ox,
        },
        Fact::Index {
            axis: ay,
            offset: oy,
        },
    ) = (x, y)
    else {
        return None;
    };
    // With the key on the left: j + oj OP i + oi; with the query on the left the comparison flips.
    let (f, oj, oi) = match (ax, ay) {
        (0, 1) => (f, ox, oy),
        (1, 0) => {
            let flipped = match f {
                BinaryFn::Le => BinaryFn::Ge,
                BinaryFn::Lt => BinaryFn::Gt,
                BinaryFn::Ge => BinaryFn::Le,
                _ => BinaryFn::Lt,
            };
            (flipped, oy, ox)
        }
        _ => return None,
    };
    let d = oi - oj;
    let band = match f {
        BinaryFn::Le => Band {
            lo: None,
            hi: Some(d),
        },
        BinaryFn::Lt => Band {
            lo: None,
            hi: Some(d - 1),
        },
        BinaryFn::Ge => Band {
            lo: Some(d - 1),
            hi: None,
        },
        _ => Band {
            lo: Some(d),
            hi: None,
        },
    };
    Some(Fact::Bool {
        band,
        inverted: false,
    })
}

/// Conjunction (or disjunction) of two booleans, where the result is a band or its outside.
fn combine(x: Fact, y: Fact, or: bool) -> Option<Fact> {
    let (
        Fact::Bool {
            band: p,
            inverted: ip,
        },
        Fact::Bool {
            band: q,
            inverted: iq,
        },
    ) = (x, y)
    else {
        return None;
    };
    // De Morgan: p or q = not (not p and not q).
    let (ip, iq) = (ip != or, iq != or);
    let p = if ip { p.complement()? } else { p };
    let q = if iq { q.complement()? } else { q };
    Some(Fact::Bool {
        band: p.intersect(q),
        inverted: or,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Fact = Fact::Index { axis: 0, offset: 0 };

    fn query(offset: i64) -> Fact {
        Fact::Index { axis: 1, offset }
    }

    fn mask_of(f: Option<Fact>) -> Option<Mask> {
        match f? {
            Fact::Bool {
                band,
                inverted: false,
            }
            | Fact::Additive { band, .. } => band.as_mask(),
            Fact::Bool {
                band,
                inverted: true,
            } => band.complement()?.as_mask(),
            _ => None,
        }
    }

    #[test]
    fn four_spellings_of_causal_agree() {
        let causal = Some(Mask::CAUSAL);
        assert_eq!(mask_of(compare(BinaryFn::Le, KEY, query(0))), causal);
        assert_eq!(mask_of(compare(BinaryFn::Ge, query(0), KEY)), causal);
        assert_eq!(mask_of(compare(BinaryFn::Lt, KEY, query(1))), causal);
        assert_eq!(mask_of(compare(BinaryFn::Gt, query(1), KEY)), causal);
    }

    #[test]
    fn an_anticausal_comparison_is_no_causal_mask() {
        // The keys j >= i are a window of one to the left, and not causal.
        let later = Mask {
            causal: false,
            window: Some(1),
        };
        assert_eq!(mask_of(compare(BinaryFn::Ge, KEY, query(0))), Some(later));
        assert_eq!(mask_of(compare(BinaryFn::Gt, KEY, query(0))), None);
        assert_eq!(mask_of(compare(BinaryFn::Le, KEY, query(1))), None);
    }

    #[test]
    fn conversions_that_lose_positions_lose_the_fact() {
        let (i, shape) = (Dim::sym(lathe_ir::Sym::S), [Dim::sym(lathe_ir::Sym::S)]);
        let fact = derive(
            &Op::Iota(Iota {
                len: i,
                dtype: DType::I64,
            }),
            &[],
            &shape,
        );
        assert_eq!(fact, Some(KEY));
        let x = Operand {
            fact,
            konst: None,
            shape: &shape,
        };
        assert_eq!(derive(&Op::Cast(Cast(DType::F32)), &[x], &shape), Some(KEY));
        assert_eq!(derive(&Op::Cast(Cast(DType::BF16)), &[x], &shape), None);
        assert_eq!(derive(&Op::Cast(Cast(DType::Bool)), &[x], &shape), None);
        let one = Op::Iota(Iota {
            len: Dim::new(1),
            dtype: DType::I64,
        });
        assert_eq!(derive(&one, &[], &[Dim::new(1)]), None);
        for narrow in [DType::Bool, DType::BF16, DType::F16] {
            let iota = Op::Iota(Iota {
                len: i,
                dtype: narrow,
            });
            assert_eq!(derive(&iota, &[], &shape), None, "{narrow}");
        }
    }

    #[test]
    fn a_fill_hides_scores_up_to_a_size() {
        use Fill::{Added, Instead};
        // As low as floats go: nothing is assumed. A fill of -1e4 assumes something, unless a bound is
        // known; beside larger scores it hides nothing.
        assert_eq!(Added(f64::from(f32::MIN)).hides(None), Some(false));
        assert_eq!(Instead(f64::NEG_INFINITY).hides(None), Some(false));
        assert_eq!(Added(-1e4).hides(None), Some(true));
        assert_eq!(Added(-1e4).hides(Some(30.0)), Some(false));
        assert_eq!(Added(-1e4).hides(Some(6e3)), None);
        assert_eq!(Instead(-1e4).hides(Some(6e3)), Some(false));
        assert_eq!(Added(-1e3).hides(None), None);
        assert_eq!(Added(-1e3).hides(Some(10.0)), Some(false));
    }

    #[test]
    fn an_infinite_fill_times_an_indicator_is_no_mask() {
        let causal = Band {
            lo: None,
            hi: Some(0),
        };
        let seen = |k| scaled_indicator(causal, true, k);
        assert!(seen(-1e9).is_some());
        assert_eq!(seen(f64::NEG_INFINITY), None);
        assert_eq!(seen(f64::NAN), None);
    }

    #[test]
    fn a_window_is_an_intersection() {
        let causal = compare(BinaryFn::Le, KEY, query(0)).unwrap();
        let recent = compare(BinaryFn::Gt, KEY, query(-12)).unwrap();
        let both = combine(causal, recent, false);
        assert_eq!(
            mask_of(both),
            Some(Mask {
                causal: true,
                window: Some(12)
            })
        );
    }
}
