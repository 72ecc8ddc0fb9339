//! The allocator of cache pages.

/// Pages that `tokens` tokens take.
pub fn pages_for(tokens: usize, page_size: usize) -> usize {
    tokens.div_ceil(page_size)
}

/// Free and used pages of one cache. Allocation takes the page that was freed last, so that equal
/// histories give equal block tables.
#[derive(Clone, Debug)]
pub struct PagePool {
    free: Vec<i32>,
    /// One bit a page, set while the page is in use.
    used: Vec<u64>,
    pages: usize,
}

impl PagePool {
    /// A pool of `pages` free pages, numbered from 0.
    pub fn new(pages: usize) -> Self {
        Self {
            free: (0..pages as i32).rev().collect(),
            used: vec![0; pages.div_ceil(64)],
            pages,
        }
    }

    /// Pages in all.
    pub fn len(&self) -> usize {
        self.pages
    }

    /// Whether the pool has no pages at all.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Pages that can be allocated.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages in use.
    pub fn used(&self) -> usize {
        self.pages - self.free.len()
    }

    /// Whether `page` is in use; false for a number that is no page.
    pub fn is_used(&self, page: i32) -> bool {
        let word = usize::try_from(page)
            .ok()
            .and_then(|p| self.used.get(p / 64));
        word.is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// Appends `n` pages to `pages`, or none of them when fewer are free; says whether it did.
    #[must_use]
    pub fn allocate(&mut self, n: usize, pages: &mut Vec<i32>) -> bool {
        let Some(left) = self.free.len().checked_sub(n) else {
            return false;
        };
        pages.reserve(n);
        while self.free.len() > left {
            let page = self.free.pop().expect("invariant: counted above");
            self.used[page as usize / 64] |= 1 << (page % 64);
            pages.push(page);
        }
        true
    }

    /// Takes all of `pages` back and empties the list.
    ///
    /// # Panics
    /// A page is not in use (invariant: a page has one owner).
    pub fn release(&mut self, pages: &mut Vec<i32>) {
        while let Some(page) = pages.pop() {
            assert!(self.is_used(page), "invariant: page {page} has one owner");
            self.used[page as usize / 64] &= !(1 << (page % 64));
            self.free.push(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn all_or_nothing() {
        let mut pool = PagePool::new(3);
        let mut a = Vec::new();
        assert!(pool.allocate(2, &mut a));
        let mut b = Vec::new();
        assert!(!pool.allocate(2, &mut b));
        assert!(b.is_empty());
        assert_eq!((pool.free(), pool.used()), (1, 2));
        assert_eq!(a, [0, 1]);
        pool.release(&mut a);
        assert!(pool.allocate(3, &mut b));
        assert_eq!(b, [0, 1, 2]);
    }

    #[test]
    #[should_panic(expected = "one owner")]
    fn a_second_release_is_noticed() {
        let mut pool = PagePool::new(70);
        let mut pages = Vec::new();
        assert!(pool.allocate(70, &mut pages));
        pool.release(&mut vec![69]);
        pool.release(&mut vec![69]);
    }

    #[test]
    fn page_counts() {
        let counts: Vec<_> = [0, 1, 63, 64, 65]
            .iter()
            .map(|&t| pages_for(t, 64))
            .collect();
        assert_eq!(counts, [0, 1, 1, 1, 2]);
    }

    proptest! {
        /// Owners never share a page, and nothing is lost.
        #[test]
        fn pages_have_one_owner(
            n in 1usize..200,
            calls in prop::collection::vec((0usize..8, 0usize..40), 1..200),
        ) {
            let mut pool = PagePool::new(n);
            let mut owners: Vec<Vec<i32>> = vec![Vec::new(); 8];
            for (owner, count) in calls {
                if count < 8 {
                    pool.release(&mut owners[owner]);
                } else {
                    let before = pool.free();
                    let done = pool.allocate(count, &mut owners[owner]);
                    prop_assert_eq!(done, before >= count);
                }
                let mut all: Vec<i32> = owners.concat();
                all.sort_unstable();
                all.dedup();
                prop_assert_eq!(all.len(), pool.used());
                prop_assert_eq!(all.len(), owners.iter().map(Vec::len).sum::<usize>());
                prop_assert!(all.iter().all(|&p| pool.is_used(p)));
                prop_assert_eq!(pool.free() + pool.used(), n);
            }
        }
    }
}
