//! Sizes for which programs are generated: a batch runs in the smallest bucket that holds it, padded
//! with rows that no kernel reads.

use lathe_codegen::cuda::Sizes;

/// Smallest number of decode rows that a bucket has and that is at least `n`.
pub(super) fn decode(n: usize) -> usize {
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
pub(super) fn general(t: usize, b: usize, r: usize) -> Sizes {
    Sizes {
        t: tokens(t),
        b: b.next_power_of_two(),
        r: r.max(1).next_power_of_two(),
    }
}

/// All buckets of decode steps of up to `most` rows.
pub(super) fn all_decode(most: usize) -> Vec<Sizes> {
    let mut sizes: Vec<usize> = (1..=most).map(decode).collect();
    sizes.dedup();
    sizes
        .into_iter()
        .map(|n| Sizes { t: n, b: n, r: n })
        .collect()
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
}
