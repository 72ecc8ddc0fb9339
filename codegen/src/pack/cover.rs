//! Whether segments write each destination row exactly once, by arithmetic on ranges: a vocabulary may have billions
//! of rows, and a plan is made before any memory is asked for.
//!
//! A segment writes a range of rows, or the eight rows of one partner in each block of 16. Between two bounds of such
//! ranges the same segments write, and rows that are equal modulo 16 are written alike: 16 rows stand for all.

use super::{INTERLEAVE, RowPerm, Segment};
use std::ops::Range;

const BLOCK: usize = 2 * INTERLEAVE;

/// What is wrong with the destination rows of segments.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The first row that two segments write, and these.
    Overlap {
        row: usize,
        first: usize,
        second: usize,
    },
    /// The first row that none writes, and how many such rows there are.
    Uncovered { row: usize, count: usize },
}

/// From the first to the last row that a segment writes; `None` if it writes none.
fn span(s: &Segment) -> Option<Range<usize>> {
    let last = s.src_rows.len().checked_sub(1)?;
    let bounds = match s.perm {
        // A permutation of whole heads.
        RowPerm::Identity | RowPerm::RopeHalves { .. } => (0, last),
        RowPerm::Interleave8 { .. } => (s.perm.apply(0), s.perm.apply(last)),
    };
    Some(s.dst_row + bounds.0..s.dst_row + bounds.1 + 1)
}

/// Whether a segment writes a row of its span.
fn writes(s: &Segment, row: usize) -> bool {
    match s.perm {
        RowPerm::Identity | RowPerm::RopeHalves { .. } => true,
        RowPerm::Interleave8 { part } => (row - s.dst_row) / INTERLEAVE % 2 == part,
    }
}

/// The first fault of segments that lie inside of `rows` rows and fit their permutations.
pub(super) fn fault(rows: usize, segments: &[Segment]) -> Option<Fault> {
    let mut spans: Vec<(Range<usize>, usize)> = segments
        .iter()
        .enumerate()
        .filter_map(|(i, s)| Some((span(s)?, i)))
        .collect();
    spans.sort_by_key(|(span, i)| (span.start, *i));
    let mut bounds: Vec<usize> = spans.iter().flat_map(|(s, _)| [s.start, s.end]).collect();
    bounds.extend([0, rows]);
    bounds.sort_unstable();
    bounds.dedup();

    let mut waiting = spans.into_iter().peekable();
    let mut active: Vec<(usize, usize)> = Vec::new();
    let mut uncovered: Option<(usize, usize)> = None;
    for pair in bounds.windows(2) {
        let (start, end) = (pair[0], pair[1]);
        active.retain(|&(until, _)| until > start);
        while let Some((span, i)) = waiting.next_if(|(span, _)| span.start == start) {
            active.push((span.end, i));
        }
        active.sort_unstable_by_key(|&(_, i)| i);
        for row in start..end.min(start + BLOCK) {
            let mut writers = active
                .iter()
                .map(|&(_, i)| i)
                .filter(|&i| writes(&segments[i], row));
            match (writers.next(), writers.next()) {
                (Some(first), Some(second)) => {
                    return Some(Fault::Overlap { row, first, second });
                }
                (None, _) => {
                    let alike = (end - row).div_ceil(BLOCK);
                    let (first, count) = uncovered.unwrap_or((row, 0));
                    uncovered = Some((first, count + alike));
                }
                _ => {}
            }
        }
    }
    uncovered.map(|(row, count)| Fault::Uncovered { row, count })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Row by row.
    fn counted(rows: usize, segments: &[Segment]) -> Option<Fault> {
        let mut writers = vec![Vec::new(); rows];
        for (i, s) in segments.iter().enumerate() {
            for row in s.src_rows.clone() {
                writers[s.dst_row_of(row)].push(i);
            }
        }
        let overlap = |(row, w): (usize, &Vec<usize>)| match w[..] {
            [first, second, ..] => Some(Fault::Overlap { row, first, second }),
            _ => None,
        };
        let none = |w: &&Vec<usize>| w.is_empty();
        let count = writers.iter().filter(none).count();
        let missing = || Some((writers.iter().position(|w| w.is_empty())?, count));
        writers
            .iter()
            .enumerate()
            .find_map(overlap)
            .or_else(|| missing().map(|(row, count)| Fault::Uncovered { row, count }))
    }

    prop_compose! {
        fn segment()(kind in 0usize..4, blocks in 0usize..5, odd in 0usize..9, dst in 0usize..40) -> Segment {
            let (perm, rows) = match kind {
                0 => (RowPerm::Identity, 8 * blocks + odd),
                1 => (RowPerm::RopeHalves { head_dim: 32 }, 32 * blocks),
                kind => (RowPerm::Interleave8 { part: kind - 2 }, 8 * blocks),
            };
            Segment::whole("w", rows, 1, dst).with_perm(perm)
        }
    }

    proptest! {
        #[test]
        fn ranges_say_what_rows_say(segments in prop::collection::vec(segment(), 0..4), more in 0usize..40) {
            let end = segments.iter().filter_map(span).map(|s| s.end).max().unwrap_or(0);
            prop_assert_eq!(fault(end + more, &segments), counted(end + more, &segments));
        }

        /// Segments one after the other, a few of them moved: mostly right, so the faults are rare ones.
        #[test]
        fn neighbours_cover(blocks in prop::collection::vec((0usize..6, 1usize..4), 1..6), nudge in 0usize..3) {
            let (mut segments, mut at) = (Vec::new(), 0);
            for (kind, n) in blocks {
                match kind {
                    0 => {
                        let gate = |part| Segment::whole("g", 8 * n, 1, at).with_perm(RowPerm::Interleave8 { part });
                        segments.extend([gate(0), gate(1)]);
                        at += 16 * n;
                    }
                    1 => {
                        let rope = RowPerm::RopeHalves { head_dim: 16 };
                        segments.push(Segment::whole("q", 16 * n, 1, at).with_perm(rope));
                        at += 16 * n;
                    }
                    _ => {
                        segments.push(Segment::whole("v", n, 1, at));
                        at += n;
                    }
                }
            }
            prop_assert_eq!(fault(at, &segments), None);
            segments[0].dst_row += nudge;
            prop_assert_eq!(fault(at + nudge, &segments), counted(at + nudge, &segments));
        }
    }
}
