//! How many pages the running sequences will hold in the steps to come.
//!
//! A decoding sequence grows by one token a step until it has its tokens, so what it will hold is
//! known for every step; a stop token or a cancellation only gives its pages back sooner. A request is
//! therefore safe to admit when no step to come needs more pages than there are, although all the
//! sequences at full length may need more: the older ones have gone by then.

use super::sequence::Sequence;

/// What one sequence holds from the next step on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Life {
    /// Tokens in the cache before the next step; each step adds one.
    pub(crate) tokens: usize,
    /// Steps that it still takes part in. After the last one its pages are free.
    pub(crate) steps: usize,
}

impl Life {
    /// The life of a sequence that decodes.
    pub(crate) fn of(sequence: &Sequence) -> Self {
        Self {
            tokens: sequence.computed,
            steps: sequence.max_new - sequence.n_sampled,
        }
    }

    /// The life of a request that is admitted now, when `rows` of its tokens are computed in this step
    /// and at least `later` a step afterwards. Where its prompt may end in one of several steps, it is
    /// taken to grow from the first of them on and to last as if it had ended in the last.
    pub(crate) fn of_admitted(sequence: &Sequence, rows: usize, later: usize) -> Self {
        let after = sequence.max_new - sequence.n_sampled - 1;
        match sequence.remaining() - rows {
            0 => Self {
                tokens: sequence.len(),
                steps: after,
            },
            left => Self {
                tokens: sequence.len() - 1,
                steps: after + left.div_ceil(later.max(1)),
            },
        }
    }
}

/// The lives of all running sequences.
#[derive(Debug)]
pub(crate) struct Forecast {
    /// By steps, longest first.
    lives: Vec<Life>,
    counts: Remainders,
}

impl Forecast {
    pub(crate) fn new(page_size: usize) -> Self {
        Self {
            lives: Vec::new(),
            counts: Remainders::new(page_size),
        }
    }

    /// Starts anew with these sequences.
    pub(crate) fn reset(&mut self, lives: impl Iterator<Item = Life>) {
        self.lives.clear();
        self.lives.extend(lives);
        self.lives
            .sort_unstable_by_key(|life| std::cmp::Reverse(life.steps));
    }

    /// Adds a sequence.
    pub(crate) fn insert(&mut self, life: Life) {
        let at = self.lives.partition_point(|l| l.steps >= life.steps);
        self.lives.insert(at, life);
    }

    /// Whether `pages` pages suffice in every step to come for all sequences and one more.
    pub(crate) fn fits(&mut self, more: Life, pages: usize) -> bool {
        self.counts.clear();
        // What is held only falls when a sequence ends: the last step of each is where to look. From
        // the last of all backwards, those that are there are a growing set.
        let mut i = 0;
        let mut pending = Some(more);
        loop {
            let next = self.lives.get(i).map_or(0, |life| life.steps);
            let step = next.max(pending.map_or(0, |life| life.steps));
            if step == 0 {
                return true;
            }
            if let Some(life) = pending.take_if(|life| life.steps == step) {
                self.counts.add(life.tokens);
            }
            while let Some(life) = self.lives.get(i).filter(|life| life.steps == step) {
                self.counts.add(life.tokens);
                i += 1;
            }
            if self.counts.pages_after(step) > pages {
                return false;
            }
        }
    }

    /// Pages held in step `step`, counted from 1 for the next one.
    #[cfg(test)]
    fn pages_at(&self, step: usize) -> usize {
        let alive = self.lives.iter().filter(|life| life.steps >= step);
        alive
            .map(|life| (life.tokens + step).div_ceil(self.counts.page_size))
            .sum()
    }
}

/// Token counts by what they exceed whole pages by.
#[derive(Debug)]
struct Remainders {
    page_size: usize,
    whole: usize,
    n: usize,
    /// Fenwick tree over the remainders.
    tree: Vec<usize>,
}

impl Remainders {
    fn new(page_size: usize) -> Self {
        Self {
            page_size,
            whole: 0,
            n: 0,
            tree: vec![0; page_size + 1],
        }
    }

    fn clear(&mut self) {
        self.whole = 0;
        self.n = 0;
        self.tree.fill(0);
    }

    fn add(&mut self, tokens: usize) {
        self.whole += tokens / self.page_size;
        self.n += 1;
        let mut at = tokens % self.page_size + 1;
        while at < self.tree.len() {
            self.tree[at] += 1;
            at += at & at.wrapping_neg();
        }
    }

    /// Counts with a remainder below `limit`.
    fn below(&self, limit: usize) -> usize {
        let mut at = limit;
        let mut n = 0;
        while at > 0 {
            n += self.tree[at];
            at &= at - 1;
        }
        n
    }

    /// Pages of all counts once each has grown by `steps`:
    /// `ceil((p·q + r + p·u + v) / p) = q + u + ceil((r + v) / p)` with `r, v < p`, where the last term
    /// is 0 for `r = v = 0`, 2 for `r > p - v`, else 1.
    fn pages_after(&self, steps: usize) -> usize {
        let (u, v) = (steps / self.page_size, steps % self.page_size);
        let common = self.whole + self.n * (u + 1);
        if v == 0 {
            common - self.below(1)
        } else {
            common + self.n - self.below(self.page_size - v + 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_fits_that_grows_after_another_has_ended() {
        let mut forecast = Forecast::new(4);
        // 8 tokens and 4 steps left: 3 pages until then.
        let old = Life {
            tokens: 8,
            steps: 4,
        };
        forecast.reset([old].into_iter());
        // 2 tokens and 10 steps: 1 or 2 pages beside the other (6 tokens after 4 steps), 3 at its end.
        let new = Life {
            tokens: 2,
            steps: 10,
        };
        assert!(forecast.fits(new, 5) && !forecast.fits(new, 4));
        forecast.insert(new);
        assert_eq!([1, 4, 5, 10].map(|s| forecast.pages_at(s)), [4, 5, 2, 3]);
        assert!(Forecast::new(4).fits(new, 3));
    }

    proptest! {
        /// The counted pages against each step and sequence by itself.
        #[test]
        fn no_step_is_missed(
            page_size in 1usize..20,
            lives in prop::collection::vec((0usize..90, 0usize..50), 0..30),
            more in (0usize..90, 0usize..50),
            pages in 1usize..120,
        ) {
            let life = |&(tokens, steps): &(usize, usize)| Life { tokens, steps };
            let mut forecast = Forecast::new(page_size);
            forecast.reset(lives.iter().map(life));
            let fits = forecast.fits(life(&more), pages);
            forecast.insert(life(&more));
            prop_assert!(forecast.lives.is_sorted_by(|a, b| a.steps >= b.steps));
            let most = (1..=50).map(|step| forecast.pages_at(step)).max();
            prop_assert_eq!(fits, most <= Some(pages));
        }
    }
}
