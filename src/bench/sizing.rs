//! Batch and step sizes of a serving run: what the user gave, else trtllm-bench's heuristic within
//! what the dataset can use.

use super::dataset::DatasetStats;
use super::tuning::{TuningError, TuningInput};
use lathe_runtime::device::Capabilities;

/// What the sizes are derived from.
#[derive(Debug, Clone, Copy)]
pub struct SizingInput<'a> {
    /// The dataset's lengths.
    pub dataset: &'a DatasetStats,
    /// `max_batch_size`, if it was given.
    pub max_batch_size: Option<usize>,
    /// `max_num_tokens`, if it was given.
    pub max_num_tokens: Option<usize>,
    /// `--concurrency`; 0 or less is no limit.
    pub concurrency: i64,
    /// What the heuristic needs to know.
    pub tuning: TuningInput,
    /// What is known of the device.
    pub capabilities: Capabilities,
}

/// Sizes of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    /// Most sequences in a step.
    pub max_batch_size: usize,
    /// Most token rows in a step.
    pub max_num_tokens: usize,
    /// What may keep the benchmark below the device's potential.
    pub warnings: Vec<String>,
}

/// Chooses the sizes that were not given.
///
/// # Errors
/// The model, or one request of average length, does not fit into the memory.
pub fn sizes(input: &SizingInput<'_>) -> Result<Sizes, TuningError> {
    let tuned = input.tuning.tune()?;
    let in_flight = usize::try_from(input.concurrency)
        .ok()
        .filter(|&limit| limit > 0)
        .unwrap_or(usize::MAX);
    let useful = input.dataset.num_requests.min(in_flight).max(1);
    let cap = input.capabilities.useful_batch.unwrap_or(usize::MAX);
    let automatic = tuned.max_batch_size.min(useful).min(cap);
    let max_batch_size = match (input.max_batch_size, input.max_num_tokens) {
        (Some(given), _) => given,
        // Every running sequence has a row in every step.
        (None, Some(tokens)) => automatic.min(tokens.max(1)),
        (None, None) => automatic,
    };
    // All prompts of a full batch in one step are the most that can come together.
    let most = max_batch_size.saturating_mul(input.dataset.max_isl.max(1));
    let max_num_tokens = input
        .max_num_tokens
        .unwrap_or_else(|| tuned.max_num_tokens.min(most).max(max_batch_size));
    Ok(Sizes {
        max_batch_size,
        max_num_tokens,
        // The heuristic's warnings are about memory that nothing else uses.
        warnings: match input.capabilities.has_own_memory {
            true => tuned.warnings,
            false => Vec::new(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::dataset::{Dataset, Request};

    const GPU: Capabilities = Capabilities {
        is_asynchronous: true,
        compiles: true,
        has_known_rates: true,
        has_own_memory: true,
        useful_batch: None,
        f32_error: 1e-4,
    };

    const TUNING: TuningInput = TuningInput {
        layers: 32,
        kv_heads: 8,
        head_dim: 128,
        kv_element_bytes: 2.0,
        weight_bytes: 16_060_522_496,
        device_bytes: 80 << 30,
        tp: 1,
        kv_fraction: 0.9,
        isl: 1000.0,
        osl: 1000.0,
        max_isl: 1000,
        chunked_prefill: true,
    };

    fn sized(n: usize, change: impl Fn(&mut SizingInput<'_>)) -> (usize, usize) {
        let request = Request {
            task_id: 0,
            input_ids: vec![0; 10],
            output_tokens: 10,
        };
        let stats = Dataset {
            path: "d".into(),
            requests: vec![request; n],
        }
        .stats();
        let mut input = SizingInput {
            dataset: &stats,
            max_batch_size: None,
            max_num_tokens: None,
            concurrency: -1,
            tuning: TUNING,
            capabilities: GPU,
        };
        change(&mut input);
        let sizes = sizes(&input).unwrap();
        (sizes.max_batch_size, sizes.max_num_tokens)
    }

    #[test]
    fn the_heuristic_within_what_is_useful() {
        // Alone it gives 256 and 2048.
        assert_eq!(sized(1000, |_| {}), (256, 2048));
        assert_eq!(sized(100, |_| {}), (100, 1000));
        assert_eq!(sized(1000, |input| input.concurrency = 8), (8, 80));
        assert_eq!(
            sized(1000, |input| input.capabilities.useful_batch = Some(64)),
            (64, 640)
        );
    }

    #[test]
    fn given_sizes_hold() {
        assert_eq!(
            sized(100, |input| input.max_batch_size = Some(500)),
            (500, 2048)
        );
        assert_eq!(
            sized(1000, |input| input.max_num_tokens = Some(77)),
            (77, 77)
        );
        let both = sized(1000, |input| {
            input.max_batch_size = Some(4);
            input.max_num_tokens = Some(3);
        });
        assert_eq!(both, (4, 3), "the engine refuses it");
    }
}
