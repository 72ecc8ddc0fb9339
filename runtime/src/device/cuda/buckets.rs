//! Sizes for which programs are generated: a batch runs in the smallest bucket that holds it, padded
//! with rows that no kernel reads.

use lathe_codegen::cuda::Sizes;

/// Smallest number of decode rows that a bucket has and that is at least `n`.
pub(crate) fn decode(n: usize) -> usize {
    match n {
        0..=1 => 1,
        2 => 2,
        3..=4 => 4,
        5..=64 => n.next_multiple_of(8),
        65..=256 => n.next_multiple_of(32),
        _ => n.next_multiple_of(64),
    }
}

/// Rows of a general step: padding wastes at most an eighth of large steps.
fn tokens(n: usize) -> usize {
    match n {
        0..=128 => n.next_power_of_two().max(8),
        129..=1024 => n.next_multiple_of(64),
        _ => n.next_multiple_of(128),
    }
}

/// The bucket of a general step.
pub(crate) fn general(t: usize, b: usize, r: usize) -> Sizes {
    Sizes {
        t: tokens(t),
        b: b.next_power_of_two(),
        r: r.max(1).next_power_of_two(),
    }
}

/// Rows that decode steps are padded to: those that were asked for, or else those that waste least.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeBuckets {
    most: usize,
    /// Ascending; none asked for: empty.
    asked: Vec<usize>,
}

impl DecodeBuckets {
    /// Buckets of steps of up to `most` sequences. A size that was asked for and is above `most`
    /// counts as `most`; each is rounded up to one that kernels are generated for.
    pub fn new(most: usize, asked: Option<&[usize]>) -> DecodeBuckets {
        let mut asked: Vec<usize> = asked.unwrap_or_default().to_vec();
        asked.retain(|&n| n > 0);
        asked.iter_mut().for_each(|n| *n = decode((*n).min(most)));
        asked.sort_unstable();
        asked.dedup();
        DecodeBuckets { most, asked }
    }

    /// Rows of the bucket for `n` sequences: at least `n`, and never less for more of them.
    pub fn of(&self, n: usize) -> usize {
        let fits = self.asked.iter().find(|&&size| size >= n);
        fits.copied().unwrap_or_else(|| decode(n))
    }

    /// Whether steps of so many rows are captured as a graph: all, unless sizes were asked for.
    pub fn is_captured(&self, rows: usize) -> bool {
        self.asked.is_empty() || self.asked.contains(&rows)
    }

    /// All buckets, ascending.
    pub fn all(&self) -> Vec<usize> {
        if self.asked.is_empty() {
            return all_decode(self.most).into_iter().map(|s| s.b).collect();
        }
        let mut sizes: Vec<usize> = (1..=self.most).map(|n| self.of(n)).collect();
        sizes.dedup();
        sizes
    }
}

/// All buckets of decode steps of up to `most` rows.
pub(super) fn all_decode(most: usize) -> Vec<Sizes> {
    let mut sizes: Vec<usize> = (1..=most).map(decode).collect();
    sizes.dedup();
    sizes.into_iter().map(Sizes::decode).collect()
}

/// Buckets of general steps with the most sequences and sampled rows.
pub(super) fn all_general(t: usize, b: usize, r: usize) -> Vec<Sizes> {
    let mut sizes: Vec<usize> = (1..=t).map(tokens).collect();
    sizes.dedup();
    sizes
        .into_iter()
        .map(|t| Sizes {
            t,
            ..general(t, b, r)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_their_batches_and_are_stable() {
        for n in 1..3000 {
            assert!(decode(n) >= n && decode(decode(n)) == decode(n));
            assert!(tokens(n) >= n && tokens(tokens(n)) == tokens(n));
        }
        assert_eq!(decode(3), 4);
        assert_eq!(tokens(2048), 2048);
    }

    #[test]
    fn sizes_that_were_asked_for() {
        let b = DecodeBuckets::new(100, Some(&[256, 3, 1, 24, 3]));
        assert_eq!(b.all(), [1, 4, 24, 128]);
        assert_eq!((b.of(2), b.of(5), b.of(25), b.of(100)), (4, 24, 128, 128));
        assert!(b.is_captured(128) && !b.is_captured(8));
        // Steps above the largest of them have the usual sizes and no graph.
        let b = DecodeBuckets::new(40, Some(&[4]));
        assert_eq!(b.all(), [4, 8, 16, 24, 32, 40]);
        assert!(b.is_captured(4) && !b.is_captured(8));
        for (most, asked) in [(300, None), (70, Some(&[7, 50][..])), (5, Some(&[9]))] {
            let b = DecodeBuckets::new(most, asked);
            let mut last = 0;
            for n in 1..=most {
                assert!(b.of(n) >= n.max(last), "{b:?} {n}");
                last = b.of(n);
            }
        }
        let usual = DecodeBuckets::new(300, None);
        let sizes: Vec<usize> = all_decode(300).iter().map(|s| s.b).collect();
        assert_eq!(usual.all(), sizes);
        assert!(sizes.iter().all(|&n| usual.is_captured(n)));
    }
}
