//! From timestamps of requests to the statistics of a benchmark, with trtllm-bench's definitions.
//!
//! All times are nanoseconds of one monotonic clock. A request starts when it is handed to the engine (a
//! wait for one of `--concurrency` slots does not count) and ends when its last token is known.

use std::collections::BTreeMap;

use serde::Serialize;

/// What was measured of one request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RequestRecord {
    /// Index of the request in the run.
    pub id: u64,
    /// Prompt tokens.
    pub isl: usize,
    /// When the request was handed to the engine.
    pub start_ns: u64,
    /// When its first token was known; `None` without streaming.
    pub first_token_ns: Option<u64>,
    /// When its last token was known.
    pub end_ns: u64,
    /// Index of the engine iteration that gave the last token, counted from the request's first one.
    pub decode_iteration: u64,
    /// The generated tokens.
    pub output_tokens: Vec<u32>,
    /// Why the request failed; such a request counts in no statistic.
    pub error: Option<String>,
}

impl RequestRecord {
    /// Generated tokens, the first one included.
    pub fn n_output(&self) -> usize {
        self.output_tokens.len()
    }

    /// `end - start`.
    pub fn latency_ns(&self) -> f64 {
        self.end_ns.saturating_sub(self.start_ns) as f64
    }

    /// `first token - start`; 0 without streaming.
    pub fn ttft_ns(&self) -> f64 {
        self.first_token_ns
            .map_or(0.0, |first| first.saturating_sub(self.start_ns) as f64)
    }

    /// `latency - TTFT`.
    pub fn generation_ns(&self) -> f64 {
        self.latency_ns() - self.ttft_ns()
    }

    /// Time per output token after the first, `(end - first token) / (n - 1)`; 0 for a single token.
    pub fn tpot_ns(&self) -> f64 {
        ratio(
            self.generation_ns(),
            self.n_output().saturating_sub(1) as f64,
        )
    }

    /// Tokens after the first per nanosecond of generation time.
    pub fn generation_rate(&self) -> f64 {
        ratio(
            self.n_output().saturating_sub(1) as f64,
            self.generation_ns(),
        )
    }

    /// Output tokens per nanosecond of the whole request.
    pub fn output_rate(&self) -> f64 {
        ratio(self.n_output() as f64, self.latency_ns())
    }
}

/// `a / b`, 0 where `b` is 0.
fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// Order statistics of one quantity. A percentile is the element at index `int(n * p)` of the sorted
/// values, without interpolation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct PercentileStats {
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Least value.
    pub minimum: f64,
    /// Greatest value.
    pub maximum: f64,
    /// Mean.
    pub average: f64,
}

impl PercentileStats {
    /// Statistics of the values; all zero when there are none.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (Some(&minimum), Some(&maximum)) = (sorted.first(), sorted.last()) else {
            return Self::default();
        };
        let n = sorted.len();
        let at = |p: f64| sorted[((n as f64 * p) as usize).min(n - 1)];
        let average = values.iter().sum::<f64>() / n as f64;
        Self {
            p50: at(0.50),
            p90: at(0.90),
            p95: at(0.95),
            p99: at(0.99),
            minimum,
            maximum,
            average,
        }
    }

    /// Every statistic multiplied by a positive factor (a change of unit).
    pub fn scaled(&self, factor: f64) -> Self {
        Self {
            p50: self.p50 * factor,
            p90: self.p90 * factor,
            p95: self.p95 * factor,
            p99: self.p99 * factor,
            minimum: self.minimum * factor,
            maximum: self.maximum * factor,
            average: self.average * factor,
        }
    }
}

/// Statistics of a run, over the requests that did not fail. Times in nanoseconds, rates per second.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BenchStatistics {
    /// Finished requests.
    pub num_requests: usize,
    /// Wall time, `max(end) - min(start)`.
    pub total_latency_ns: f64,
    /// Prompt tokens of all requests.
    pub total_input_tokens: usize,
    /// Generated tokens of all requests, first ones included.
    pub total_output_tokens: usize,
    /// Requests / (last start - first start); 0 when all started at once.
    pub issue_rate: f64,
    /// Mean number of requests in flight: sum of latencies / wall time.
    pub avg_concurrent_requests: f64,
    /// Requests / wall time.
    pub request_throughput: f64,
    /// Generated tokens / wall time.
    pub output_throughput: f64,
    /// Prompt and generated tokens / wall time.
    pub total_throughput: f64,
    /// Mean over requests of generated tokens / latency.
    pub output_throughput_per_user: f64,
    /// Request latency.
    pub latency_ns: PercentileStats,
    /// Time to first token.
    pub ttft_ns: PercentileStats,
    /// Time per output token.
    pub tpot_ns: PercentileStats,
    /// Tokens per second of a request after its first token.
    pub generation_rate: PercentileStats,
}

const PER_SECOND: f64 = 1e9;

impl BenchStatistics {
    /// Statistics of the records.
    pub fn of(records: &[RequestRecord]) -> Self {
        let done: Vec<&RequestRecord> = records
            .iter()
            .filter(|record| record.error.is_none())
            .collect();
        let percentiles = |value: fn(&RequestRecord) -> f64| {
            PercentileStats::of(
                &done
                    .iter()
                    .map(|record| value(record))
                    .collect::<Vec<f64>>(),
            )
        };
        let first_start = done.iter().map(|record| record.start_ns).min().unwrap_or(0);
        let last_start = done.iter().map(|record| record.start_ns).max().unwrap_or(0);
        let last_end = done.iter().map(|record| record.end_ns).max().unwrap_or(0);
        let total_latency_ns = last_end.saturating_sub(first_start) as f64;
        let num_requests = done.len();
        let total_input_tokens: usize = done.iter().map(|record| record.isl).sum();
        let total_output_tokens: usize = done.iter().map(|record| record.n_output()).sum();
        let sum_of_latencies: f64 = done.iter().map(|record| record.latency_ns()).sum();
        let per_second = |count: usize| ratio(count as f64 * PER_SECOND, total_latency_ns);
        Self {
            num_requests,
            total_latency_ns,
            total_input_tokens,
            total_output_tokens,
            issue_rate: ratio(num_requests as f64, (last_start - first_start) as f64) * PER_SECOND,
            avg_concurrent_requests: ratio(sum_of_latencies, total_latency_ns),
            request_throughput: per_second(num_requests),
            output_throughput: per_second(total_output_tokens),
            total_throughput: per_second(total_input_tokens + total_output_tokens),
            output_throughput_per_user: percentiles(RequestRecord::output_rate).average
                * PER_SECOND,
            latency_ns: percentiles(RequestRecord::latency_ns),
            ttft_ns: percentiles(RequestRecord::ttft_ns),
            tpot_ns: percentiles(RequestRecord::tpot_ns),
            generation_rate: percentiles(RequestRecord::generation_rate).scaled(PER_SECOND),
        }
    }

    /// Mean prompt length.
    pub fn avg_input_length(&self) -> f64 {
        ratio(self.total_input_tokens as f64, self.num_requests as f64)
    }

    /// Mean output length.
    pub fn avg_output_length(&self) -> f64 {
        ratio(self.total_output_tokens as f64, self.num_requests as f64)
    }
}

/// The distinct errors of failed requests with their counts, in text order.
pub fn failures(records: &[RequestRecord]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for error in records.iter().filter_map(|record| record.error.as_deref()) {
        *counts.entry(error).or_insert(0) += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(
        id: u64,
        isl: usize,
        start: u64,
        first: Option<u64>,
        end: u64,
        n_output: usize,
    ) -> RequestRecord {
        RequestRecord {
            id,
            isl,
            start_ns: start,
            first_token_ns: first,
            end_ns: end,
            output_tokens: vec![0; n_output],
            ..RequestRecord::default()
        }
    }

    #[test]
    fn percentiles_are_not_interpolated() {
        let values: Vec<f64> = (1..=10).rev().map(f64::from).collect();
        let stats = PercentileStats::of(&values);
        // Indices int(10 * p): 5, 9, 9, 9 of 1..=10.
        assert_eq!(
            (stats.p50, stats.p90, stats.p95, stats.p99),
            (6.0, 10.0, 10.0, 10.0)
        );
        assert_eq!(
            (stats.minimum, stats.maximum, stats.average),
            (1.0, 10.0, 5.5)
        );
        let values: Vec<f64> = (0..200).map(f64::from).collect();
        let stats = PercentileStats::of(&values);
        assert_eq!(
            (stats.p50, stats.p90, stats.p95, stats.p99),
            (100.0, 180.0, 190.0, 198.0)
        );
        assert_eq!(PercentileStats::of(&[]), PercentileStats::default());
        assert_eq!(PercentileStats::of(&[3.0]).p99, 3.0);
    }

    /// Two requests worked out by hand: in seconds 1..3 with first token at 1.5 and 4 tokens, and 2..6 with
    /// first token at 3 and 7 tokens.
    #[test]
    fn streaming_by_hand() {
        const S: u64 = 1_000_000_000;
        let records = [
            record(0, 10, S, Some(S + S / 2), 3 * S, 4),
            record(1, 20, 2 * S, Some(3 * S), 6 * S, 7),
        ];
        let stats = BenchStatistics::of(&records);
        assert_eq!(stats.total_latency_ns, 5e9);
        assert_eq!(stats.request_throughput, 0.4);
        assert_eq!(stats.output_throughput, 2.2);
        assert_eq!(stats.total_throughput, 8.2);
        assert_eq!(stats.avg_concurrent_requests, 6.0 / 5.0);
        assert_eq!(stats.issue_rate, 2.0);
        // 4/2 and 7/4 tokens a second.
        assert!((stats.output_throughput_per_user - 1.875).abs() < 1e-12);
        assert_eq!(
            (
                stats.ttft_ns.minimum,
                stats.ttft_ns.maximum,
                stats.ttft_ns.average
            ),
            (0.5e9, 1e9, 0.75e9)
        );
        // 1.5 s / 3 and 3 s / 6.
        assert_eq!(
            (stats.tpot_ns.minimum, stats.tpot_ns.maximum),
            (0.5e9, 0.5e9)
        );
        assert_eq!(stats.generation_rate.average, 2.0);
        assert_eq!((stats.latency_ns.p50, stats.latency_ns.minimum), (4e9, 2e9));
        assert_eq!(
            (stats.avg_input_length(), stats.avg_output_length()),
            (15.0, 5.5)
        );
    }

    #[test]
    fn without_streaming_the_first_token_is_not_known() {
        let stats = BenchStatistics::of(&[record(0, 5, 0, None, 2_000, 5)]);
        assert_eq!(stats.ttft_ns, PercentileStats::default());
        // Generation time is the whole latency: 2000 ns over 4 tokens.
        assert_eq!(stats.tpot_ns.average, 500.0);
        assert_eq!(stats.issue_rate, 0.0);
    }

    #[test]
    fn one_token_has_no_time_per_token() {
        let stats = BenchStatistics::of(&[record(0, 5, 0, Some(900), 1_000, 1)]);
        assert_eq!(
            (stats.tpot_ns.average, stats.generation_rate.average),
            (0.0, 0.0)
        );
        assert!((stats.output_throughput_per_user - 1e6).abs() < 1e-6);
    }

    #[test]
    fn failed_requests_count_only_as_failures() {
        let failed = |error: &str| RequestRecord {
            error: Some(error.into()),
            ..record(9, 1, 0, None, 99_000, 3)
        };
        let records = [
            record(0, 5, 1_000, None, 2_000, 5),
            failed("too long"),
            failed("too long"),
            failed("lost"),
        ];
        assert_eq!(
            BenchStatistics::of(&records),
            BenchStatistics::of(&records[..1])
        );
        assert_eq!(
            failures(&records).into_iter().collect::<Vec<_>>(),
            [("lost", 1), ("too long", 2)]
        );
        assert_eq!(
            BenchStatistics::of(&records[1..]),
            BenchStatistics::default()
        );
    }

    proptest! {
        #[test]
        fn order_statistics_are_ordered(values in prop::collection::vec(0f64..1e9, 1..200)) {
            let s = PercentileStats::of(&values);
            prop_assert!(s.minimum <= s.p50 && s.p50 <= s.p90 && s.p90 <= s.p95 && s.p95 <= s.p99 && s.p99 <= s.maximum);
            prop_assert!(s.minimum <= s.average * (1.0 + 1e-12) && s.average <= s.maximum * (1.0 + 1e-12));
        }
    }
}
