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
    /// Most sequences that a step had, where that is known.
    pub peak_sequences: Option<usize>,
}

/// Every warning that applies.
pub fn warnings(dataset: &DatasetStats, limits: RunLimits) -> Vec<String> {
    let mut warnings: Vec<String> = length_warning(dataset).into_iter().collect();
    let RunLimits {
        concurrency,
        max_batch_size,
        cached_sequences,
        peak_sequences,
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
    // Sequences of different ages take less than as many of full length.
    let reached = peak_sequences.unwrap_or(cached_sequences);
    if cached_sequences < wanted && reached < wanted {
        warnings.push(format!(
            "the KV cache holds {cached_sequences} sequences of {:.0} tokens; the batch of {wanted} was not reached, only {reached}",
            dataset.avg_sequence_length
        ));
    }
    warnings
}

/// A file name such as `synthetic_128_128.txt` promises lengths; says so when the dataset has others.
fn length_warning(dataset: &DatasetStats) -> Option<String> {
    /// Relative difference of the mean that a name still covers.
    const TOLERANCE: f64 = 0.1;
    let name = Path::new(&dataset.dataset_path).file_name()?.to_str()?;
    let stem = [".jsonl", ".json", ".txt"]
        .iter()
        .find_map(|extension| name.strip_suffix(extension))
        .unwrap_or(name);
    let promised = lengths_in_name(stem, dataset.num_requests);
    let near = |promised: usize, found: f64| {
        (found - promised as f64).abs() <= TOLERANCE * promised as f64
    };
    let holds =
        |&(isl, osl): &(usize, usize)| near(isl, dataset.avg_isl) && near(osl, dataset.avg_osl);
    let &(isl, osl) = promised.first()?;
    if promised.iter().any(holds) {
        return None;
    }
    Some(format!(
        "the dataset's name says {isl} input and {osl} output tokens, its requests have {:.1} and {:.1} on average",
        dataset.avg_isl, dataset.avg_osl
    ))
}

/// Pairs of input and output length that a file name may mean, the likeliest first.
///
/// `isl128_osl2048` and `in-128-out-2048` say what they are, and so does `128x2048`. Else two neighbours
/// of a row of numbers (`synthetic_128_2048`); of three numbers one may be the count of requests, first
/// or last (`synthetic_128_128_2048`).
fn lengths_in_name(stem: &str, num_requests: usize) -> Vec<(usize, usize)> {
    let stem = stem.to_ascii_lowercase();
    let labelled = |labels: &[&str]| labels.iter().find_map(|label| number_after(&stem, label));
    if let (Some(isl), Some(osl)) = (
        labelled(&["isl", "input", "prompt", "in"]),
        labelled(&["osl", "output", "out"]),
    ) {
        return vec![(isl, osl)];
    }
    let parts: Vec<&str> = stem.split(['_', '-', ',', ' ']).collect();
    let crossed = parts.iter().rev().find_map(|part| {
        let (isl, osl) = part.split_once('x')?;
        Some((isl.parse().ok()?, osl.parse().ok()?))
    });
    if let Some(pair) = crossed {
        return vec![pair];
    }
    let numbers: Vec<Option<usize>> = parts.iter().map(|part| part.parse().ok()).collect();
    let mut rows = numbers.split(Option::is_none).filter(|row| row.len() > 1);
    let Some(row) = rows.next_back() else {
        return Vec::new();
    };
    let row: Vec<usize> = row.iter().copied().flatten().collect();
    let lengths = match &row[..] {
        [count, lengths @ ..] if lengths.len() > 1 && *count == num_requests => lengths,
        [lengths @ .., count] if lengths.len() > 1 && *count == num_requests => lengths,
        lengths => lengths,
    };
    let mut pairs: Vec<(usize, usize)> = lengths.windows(2).map(|p| (p[0], p[1])).collect();
    // Of a date and two lengths the lengths come last; of lengths and a count the count does.
    if lengths.len() > 3 {
        pairs.reverse();
    }
    // Versions such as `llama-3-1` are no lengths.
    pairs.retain(|&(isl, osl)| isl > 0 && osl > 0 && isl.max(osl) >= 16);
    pairs
}

/// The number behind a label, directly or after one of `_-=`. The label starts a word.
fn number_after(text: &str, label: &str) -> Option<usize> {
    text.match_indices(label).find_map(|(at, _)| {
        if text[..at].ends_with(|c: char| c.is_ascii_alphabetic()) {
            return None;
        }
        let rest = &text[at + label.len()..];
        let rest = rest.strip_prefix(['_', '-', '=']).unwrap_or(rest);
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        rest[..digits].parse().ok().filter(|&n| n > 0)
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
        peak_sequences: None,
    };

    #[test]
    fn names() {
        let one = |name: &str| lengths_in_name(name, 3000).first().copied();
        let cases = [
            ("synthetic_128_2048", Some((128, 2048))),
            ("synthetic_128_128_2048", Some((128, 128))),
            ("synthetic_128_128_3000", Some((128, 128))),
            ("3000_1000_500", Some((1000, 500))),
            ("synthetic_2048_128_n3000", Some((2048, 128))),
            ("llama-3.1-8b-1000x500", Some((1000, 500))),
            ("llama-3-1-8b_1024_1024", Some((1024, 1024))),
            ("2026-11-24_128_256", Some((128, 256))),
            ("isl128_osl2048_n300", Some((128, 2048))),
            ("OSL-64-ISL-512", Some((512, 64))),
            ("in=1000,out=2000", Some((1000, 2000))),
            ("train_512_1", Some((512, 1))),
            ("dataset_2026", None),
            ("llama-3-1-8b", None),
            ("d", None),
            ("min_max_0_0", None),
            ("cnn_dailymail", None),
        ];
        for (name, expected) in cases {
            assert_eq!(one(name), expected, "{name}");
        }
    }

    #[test]
    fn a_wrong_dataset_is_noticed() {
        for right in [
            "/d/synthetic_128_128.txt",
            "/d/synthetic_128_128_2048.json",
            "/d/2048_128_128.jsonl",
            "d",
        ] {
            let found = warnings(&stats(right, 100, 128, 128), ROOMY);
            assert_eq!(found, Vec::<String>::new(), "{right}");
        }
        for wrong in [
            "/d/synthetic_128_128.txt",
            "/d/synthetic_128_128_2048.json",
            "/d/isl128_osl128.txt",
        ] {
            let found = warnings(&stats(wrong, 100, 128, 28), ROOMY);
            assert_eq!(
                found,
                [
                    "the dataset's name says 128 input and 128 output tokens, its requests have 128.0 and 28.0 on average"
                ],
                "{wrong}"
            );
        }
        let found = warnings(&stats("synthetic_128_2048.txt", 100, 2048, 128), ROOMY);
        assert_eq!(found.len(), 1, "swapped");
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
            [
                "the KV cache holds 40 sequences of 20 tokens; the batch of 64 was not reached, only 40"
            ]
        );
        let reached = RunLimits {
            cached_sequences: 40,
            peak_sequences: Some(64),
            ..ROOMY
        };
        assert_eq!(warnings(&data, reached), Vec::<String>::new());
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
