//! How many pages the KV cache gets: the smaller of a fraction of the free memory and what the
//! dataset can use.

use lathe_runtime::engine::pages_for;

use super::dataset::Dataset;

/// What the size is derived from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KvLimits {
    /// Tokens a page.
    pub page_size: usize,
    /// Bytes of one token's keys and values in all layers, on one device.
    pub token_bytes: usize,
    /// Free bytes of the device that has the least, after weights and work space.
    pub free_bytes: u64,
    /// Free bytes that stay free whatever the fraction.
    pub reserve_bytes: u64,
    /// Fraction of the free bytes that the cache may take.
    pub fraction: f64,
    /// Most sequences that run at a time.
    pub max_batch_size: usize,
    /// `--concurrency`; 0 or less is no limit.
    pub concurrency: i64,
}

/// A size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvSize {
    /// Pages to allocate.
    pub pages: usize,
    /// Pages that the dataset can use at a time.
    pub wanted: usize,
    /// Average requests of the dataset that the pages hold.
    pub cached_sequences: usize,
}

impl KvSize {
    /// Whether the memory holds less than the dataset can use.
    pub fn is_limited(&self) -> bool {
        self.pages < self.wanted
    }
}

/// A cache that cannot hold the longest request.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "the longest request has {tokens} tokens and needs {} of KV cache; {} are free and {fraction} of it may be used: {} are missing",
    size(*.needed), size(*.free), size(.needed.saturating_sub(*.allowed))
)]
pub struct KvTooSmall {
    /// Tokens of the longest request.
    pub tokens: usize,
    /// Bytes of its pages.
    pub needed: u64,
    /// Free bytes.
    pub free: u64,
    /// Fraction of them that may be used.
    pub fraction: f64,
    /// Bytes that may be used.
    pub allowed: u64,
}

fn size(bytes: u64) -> String {
    crate::phases::bytes(bytes as f64)
}

/// The pages of a cache for a dataset.
///
/// # Errors
/// The longest request does not fit.
pub fn kv_size(dataset: &Dataset, limits: &KvLimits) -> Result<KvSize, KvTooSmall> {
    let page_size = limits.page_size.max(1);
    let lifetime = |tokens: usize| pages_for(tokens.saturating_sub(1).max(1), page_size);
    let mut requests: Vec<(usize, usize)> = dataset
        .requests
        .iter()
        .map(|request| (lifetime(request.total_tokens()), request.total_tokens()))
        .collect();
    requests.sort_unstable_by(|a, b| b.cmp(a));
    let at_a_time = usize::try_from(limits.concurrency)
        .ok()
        .filter(|&limit| limit > 0)
        .map_or(limits.max_batch_size, |limit| {
            limit.min(limits.max_batch_size)
        });
    let wanted: usize = requests
        .iter()
        .take(at_a_time)
        .map(|(pages, _)| pages)
        .sum();
    let page_bytes = (limits.token_bytes * page_size) as u64;
    let fraction = (limits.free_bytes as f64 * limits.fraction) as u64;
    let allowed = fraction.min(limits.free_bytes.saturating_sub(limits.reserve_bytes));
    // A model without a cache (no attention layer) needs pages only by name.
    let affordable = allowed
        .checked_div(page_bytes)
        .map_or(wanted, |pages| usize::try_from(pages).unwrap_or(usize::MAX));
    let &(longest, tokens) = requests.first().unwrap_or(&(0, 0));
    if affordable < longest {
        return Err(KvTooSmall {
            tokens,
            needed: longest as u64 * page_bytes,
            free: limits.free_bytes,
            fraction: limits.fraction,
            allowed,
        });
    }
    let pages = wanted.min(affordable);
    let all: usize = requests.iter().map(|(pages, _)| pages).sum();
    let cached_sequences = (pages * requests.len()).checked_div(all).unwrap_or(0);
    Ok(KvSize {
        pages,
        wanted,
        cached_sequences,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::dataset::Request;

    fn dataset(lengths: &[(usize, u32)]) -> Dataset {
        let request = |&(isl, output_tokens): &(usize, u32)| Request {
            task_id: 0,
            input_ids: vec![0; isl],
            output_tokens,
        };
        Dataset {
            path: "d".into(),
            requests: lengths.iter().map(request).collect(),
        }
    }

    const LIMITS: KvLimits = KvLimits {
        page_size: 16,
        token_bytes: 1024,
        free_bytes: 1 << 30,
        reserve_bytes: 0,
        fraction: 0.5,
        max_batch_size: 2,
        concurrency: -1,
    };

    #[test]
    fn a_small_dataset_needs_no_more_than_it_can_use() {
        // Lifetimes of 16, 31 and 47 cached tokens: 1, 2 and 3 pages; two run at a time.
        let data = dataset(&[(10, 7), (30, 2), (40, 8)]);
        let size = kv_size(&data, &LIMITS).unwrap();
        assert_eq!((size.pages, size.wanted, size.cached_sequences), (5, 5, 2));
        assert!(!size.is_limited());
        let one = KvLimits {
            concurrency: 1,
            ..LIMITS
        };
        assert_eq!(kv_size(&data, &one).unwrap().pages, 3);
        let many = KvLimits {
            max_batch_size: 64,
            ..LIMITS
        };
        assert_eq!(kv_size(&data, &many).unwrap().pages, 6);
    }

    #[test]
    fn memory_limits() {
        let data = dataset(&[(33, 16); 100]);
        // 3 pages of 16 KiB each; 0.5 of 160 KiB are 5 pages.
        let tight = KvLimits {
            free_bytes: 160 << 10,
            ..LIMITS
        };
        let size = kv_size(&data, &tight).unwrap();
        assert_eq!((size.pages, size.wanted, size.cached_sequences), (5, 6, 1));
        assert!(size.is_limited());
        // What is left beside a reserve of 100 KiB are 3 pages.
        let reserved = KvLimits {
            reserve_bytes: 100 << 10,
            ..tight
        };
        assert_eq!(kv_size(&data, &reserved).unwrap().pages, 3);
        let none = KvLimits {
            free_bytes: 64 << 10,
            token_bytes: 1 << 20,
            ..LIMITS
        };
        let error = kv_size(&data, &none).unwrap_err();
        assert_eq!((error.needed, error.allowed), (48 << 20, 32 << 10));
        assert_eq!(
            error.to_string(),
            "the longest request has 49 tokens and needs 48.00 MiB of KV cache; 64.00 KiB are free and 0.5 of it \
             may be used: 47.97 MiB are missing"
        );
    }
}
