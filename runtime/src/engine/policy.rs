//! When a waiting request is admitted, and what happens when the cache is full.

use std::fmt;
use std::str::FromStr;

use super::pages::PagePool;

/// How requests come together in steps and how cache pages are promised to them. In all policies they
/// are admitted in the order of their arrival, so that none is passed over for ever.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Policy {
    /// A request is admitted when its longest possible life fits beside the others' in every step to
    /// come; it is never pre-empted.
    #[default]
    GuaranteedNoEvict,
    /// A request is admitted when its known tokens fit. When the pages run out, the newest sequence
    /// gives up its own and is computed again later.
    MaxUtilization,
    /// Static batches: requests join until the batch is full, all their prompts are computed, then all
    /// of them decode together until the last one ends. Every request holds the pages of its whole
    /// life. No user asks for it by name: it is what `runtime: demollm` means.
    Static,
}

impl Policy {
    /// Its name in reports; trtllm-bench's, where that has the policy.
    pub fn name(self) -> &'static str {
        match self {
            Self::Static => "static",
            Self::GuaranteedNoEvict => "guaranteed_no_evict",
            Self::MaxUtilization => "max_utilization",
        }
    }
}

/// Whether a request that needs `pages` pages now is admitted beside sequences that may still ask for
/// `growth` pages, where pre-emption is allowed.
pub(crate) fn has_room(pool: &PagePool, pages: usize, growth: usize) -> bool {
    /// Part of the cache that an admission leaves free for the growth of the others: without it the
    /// next step would pre-empt what this one admitted.
    const RESERVE: usize = 100;
    pool.free() >= pages + pool.len().div_ceil(RESERVE).min(growth)
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::GuaranteedNoEvict, Self::MaxUtilization]
            .into_iter()
            .find(|policy| policy.name().eq_ignore_ascii_case(text))
            .ok_or_else(|| {
                format!(
                    "scheduler policy is {text}, expected guaranteed_no_evict or max_utilization"
                )
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!("MAX_UTILIZATION".parse(), Ok(Policy::MaxUtilization));
        assert_eq!(
            Policy::default().to_string().parse(),
            Ok(Policy::GuaranteedNoEvict)
        );
        assert!("static".parse::<Policy>().is_err(), "a runtime, no choice");
        let error = "fifo".parse::<Policy>().unwrap_err();
        assert!(error.contains("fifo"), "{error}");
    }

    #[test]
    fn admission_leaves_room_for_growth() {
        let pool = PagePool::new(200);
        assert!(has_room(&pool, 198, 9) && !has_room(&pool, 199, 9));
        assert!(has_room(&pool, 199, 1) && !has_room(&pool, 200, 1));
        assert!(has_room(&pool, 200, 0));
    }
}
