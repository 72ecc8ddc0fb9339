//! Masks in many spellings, right and wrong.

use super::build::{Build, Built, n, s};
use lathe_ir::{BinaryFn, DType, Dim, NodeId, UnaryFn};

/// What hidden scores are filled with.
fn fill(g: &mut Build) -> f64 {
    let usual = g.rng.pick(&[
        f64::from(f32::MIN),
        f64::from(half::bf16::MIN),
        -1e9,
        f64::NEG_INFINITY,
    ]);
    g.usual(usual, &[-1e4, -1e5, -10.0, -1.0, 0.0, 1e9, f64::NAN])
}

/// Which keys a query sees, or does not see: `bool [S,S]`, and whether true means seen.
fn visible(g: &mut Build) -> Option<(NodeId, bool)> {
    let dtype = g.usual(DType::I64, &DType::ALL);
    let len = g.usual(s(), &[n(1), s() + n(1), n(3)]);
    let index = |g: &mut Build, shape: [Dim; 2]| {
        let i = g.iota(len, dtype)?;
        let i = g.reshape(i, &shape)?;
        g.maybe_casts(i)
    };
    let keys = index(g, [n(1), len])?;
    let mut queries = index(g, [len, n(1)])?;
    if g.odd() {
        let by = g.rng.pick(&[1.0, -1.0, 0.5, 2.0]);
        queries = g.with(BinaryFn::Add, queries, by)?;
    }
    use BinaryFn::{Ge, Gt, Le, Lt};
    let spelling = g.rng.below(4);
    let (f, swapped, seen) = [
        (Le, false, true),
        (Ge, true, true),
        (Gt, false, false),
        (Lt, true, false),
    ][spelling];
    let f = g.usual(f, &[Le, Lt, Ge, Gt, BinaryFn::Eq]);
    let mut c = match swapped {
        true => g.bin(f, queries, keys)?,
        false => g.bin(f, keys, queries)?,
    };
    if g.rng.one_in(3) {
        let window = g.rng.pick(&[1.0, 2.0, 3.0]);
        let window = g.usual(window, &[0.0, -1.0, 1e12, 2.5]);
        let oldest = g.with(BinaryFn::Sub, queries, window)?;
        let (recent, join) = match seen {
            true => (g.bin(Gt, keys, oldest)?, BinaryFn::And),
            false => (g.bin(Le, keys, oldest)?, BinaryFn::Or),
        };
        let join = g.usual(join, &[BinaryFn::And, BinaryFn::Or]);
        c = g.bin(join, c, recent)?;
    }
    let mut seen = seen;
    if g.rng.one_in(4) {
        c = g.un(UnaryFn::Not, c)?;
        seen = !seen;
    }
    if g.odd() {
        seen = !seen;
    }
    Some((c, seen))
}

/// Scores `[B,H,S,S]` under a mask.
pub(crate) fn masked(g: &mut Build, scores: NodeId) -> Built {
    let (c, seen) = visible(g)?;
    let dtype = g.dtype_of(scores);
    let hidden = fill(g);
    match g.rng.below(5) {
        // masked_fill.
        0 => {
            let fill = g.konst(hidden, dtype)?;
            match seen {
                true => g.choose(c, scores, fill),
                false => g.choose(c, fill, scores),
            }
        }
        // (1 - seen) * fill, or hidden * fill.
        1 => {
            let mut i = g.cast(c, dtype)?;
            if seen {
                let one = g.konst(1.0, dtype)?;
                i = g.bin(BinaryFn::Sub, one, i)?;
            }
            let mask = g.with(BinaryFn::Mul, i, hidden)?;
            g.either(BinaryFn::Add, scores, mask)
        }
        // where(seen, 0, fill), perhaps times the indicator of what is hidden, as Phi's first masks.
        k => {
            let zero = g.usual(0.0, &[1.0, -0.5]);
            let (zero, fill) = (g.konst(zero, dtype)?, g.konst(hidden, dtype)?);
            let mut mask = match seen {
                true => g.choose(c, zero, fill)?,
                false => g.choose(c, fill, zero)?,
            };
            if k == 2 {
                let i = g.cast(c, dtype)?;
                mask = g.bin(BinaryFn::Mul, mask, i)?;
            }
            if g.rng.coin() {
                let extents = g.shape(mask);
                let lead: Vec<Dim> = [vec![n(1), n(1)], extents].concat();
                mask = g.reshape(mask, &lead)?;
            }
            if g.odd() {
                mask = g.permute(mask, &[0, 1, 3, 2])?;
            }
            if g.rng.one_in(5) {
                // The sum of two masks hides what either hides.
                mask = g.bin(BinaryFn::Add, mask, mask)?;
            }
            g.either(BinaryFn::Add, scores, mask)
        }
    }
}
