//! What a reader should know before believing a benchmark's numbers.

use std::path::Path;

use super::dataset::DatasetStats;

/// What the warnings are derived from.
#[derive(Debug, Clone, Copy)]
pub struct RunLimits {
    /// `--concurrency`; 0 or less is no limit.
    pub concurrency: i64,
    /// Most sequences in a step.
    pub max_batch_size: usize,
    /// Sequences of full length that the KV cache holds.
    pub cached_sequences: usize,
}

/// Every warning that applies.
pub fn warnings(dataset: &DatasetStats, limits: RunLimits) -> Vec<String> {
    let mut warnings: Vec<String> = length_warning(dataset).into_iter().collect();
    let RunLimits {
        concurrency,
        max_batch_size,
        cached_sequences,
    } = limits;
    let in_flight = usize::try_from(concurrency).ok().filter(|&limit| limit > 0);
    if let Some(concurrency) = in_flight.filter(|&limit| limit < max_batch_size) {
        warnings.push(format!(
            "--concurrency {concurrency} keeps the batch below its size of {max_batch_size}; throughput will be that of a smaller batch"
        ));
    }
    if dataset.num_requests < max_batch_size
        && in_flight.is_none_or(|limit| limit > dataset.num_requests)
    {
        warnings.push(format!(
            "{} requests cannot fill a batch of {max_batch_size}",
            dataset.num_requests
        ));
    }
    let wanted = max_batch_size
        .min(dataset.num_requests)
        .min(in_flight.unwrap_or(usize::MAX));
    if cached_sequences < wanted {
        warnings.push(format!(
            "the KV cache holds {cached_sequences} sequences of {:.0} tokens, so the batch of {wanted} is not reached",
            dataset.avg_sequence_length
        ));
    }
    warnings
}

/// A file name such as `synthetic_128_128.txt` promises lengths; says so when the dataset has others.
fn length_warning(dataset: &DatasetStats) -> Option<String> {
    /// Relative difference of the mean that a name still covers.
    const TOLERANCE: f64 = 0.1;
    let stem = Path::new(&dataset.dataset_path).file_stem()?.to_str()?;
    let (isl, osl) = lengths_in_name(stem)?;
    let differs =
        |promised: usize, found: f64| (found - promised as f64).abs() > TOLERANCE * promised as f64;
    (differs(isl, dataset.avg_isl) || differs(osl, dataset.avg_osl)).then(|| {
        format!(
            "the dataset's name says {isl} input and {osl} output tokens, its requests have {:.1} and {:.1} on average",
            dataset.avg_isl, dataset.avg_osl
        )
    })
}

/// The last two numbers of a name that are separated by one of `_-x,`.
fn lengths_in_name(stem: &str) -> Option<(usize, usize)> {
    let parts: Vec<Option<usize>> = stem
        .split(['_', '-', 'x', ',', '.'])
        .map(|part| part.parse().ok())
        .collect();
    parts.windows(2).rev().find_map(|pair| match pair {
        [Some(isl), Some(osl)] if *isl > 0 && *osl > 0 => Some((*isl, *osl)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::dataset::{Dataset, Request};

    fn stats(path: &str, n: usize, isl: usize, osl: u32) -> DatasetStats {
        let request = Request {
            task_id: 0,
            input_ids: vec![0; isl],
            output_tokens: osl,
        };
        Dataset {
            path: path.into(),
            requests: vec![request; n],
        }
        .stats()
    }

    const ROOMY: RunLimits = RunLimits {
        concurrency: -1,
        max_batch_size: 64,
        cached_sequences: 1000,
    };

    #[test]
    fn names() {
        assert_eq!(lengths_in_name("synthetic_128_2048"), Some((128, 2048)));
        assert_eq!(lengths_in_name("llama-3.1-8b-1000x500"), Some((1000, 500)));
        assert_eq!(lengths_in_name("dataset_2026"), None);
    }

    #[test]
    fn a_wrong_dataset_is_noticed() {
        assert_eq!(
            warnings(&stats("/d/synthetic_128_128.txt", 100, 128, 128), ROOMY),
            Vec::<String>::new()
        );
        let found = warnings(&stats("/d/synthetic_128_128.txt", 100, 128, 28), ROOMY);
        assert_eq!(
            found,
            [
                "the dataset's name says 128 input and 128 output tokens, its requests have 128.0 and 28.0 on average"
            ]
        );
    }

    #[test]
    fn limits() {
        let data = stats("d", 100, 10, 10);
        let found = warnings(
            &data,
            RunLimits {
                concurrency: 8,
                ..ROOMY
            },
        );
        assert!(
            found.len() == 1 && found[0].starts_with("--concurrency 8 keeps"),
            "{found:?}"
        );
        let found = warnings(
            &data,
            RunLimits {
                max_batch_size: 128,
                ..ROOMY
            },
        );
        assert_eq!(found, ["100 requests cannot fill a batch of 128"]);
        let found = warnings(
            &data,
            RunLimits {
                cached_sequences: 40,
                ..ROOMY
            },
        );
        assert_eq!(
            found,
            ["the KV cache holds 40 sequences of 20 tokens, so the batch of 64 is not reached"]
        );
        assert!(
            warnings(
                &data,
                RunLimits {
                    concurrency: 64,
                    cached_sequences: 64,
                    ..ROOMY
                }
            )
            .is_empty()
        );
    }
}
