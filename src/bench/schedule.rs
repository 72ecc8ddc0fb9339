//! Batch and step sizes by trial: the dataset is scheduled on a device that computes nothing and takes
//! as long as the roofline says.
//!
//! How many rounds a dataset needs depends on lengths, cache and batch in jumps: 512 requests through a
//! cache that holds 240 of them take three rounds, through one that holds 256 two. The scheduler itself
//! is fast enough to be asked.

use lathe_passes::egraph::cost::DeviceModel;
use lathe_runtime::device::step::Capacity;
use lathe_runtime::engine::{Clock, Engine, EngineConfig, NullDevice, Progress, Request};
use lathe_runtime::sampling::SamplingParams;

use super::dataset::Dataset;

/// How long a step takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepCost {
    /// Seconds that reading the weights takes.
    pub weights: f64,
    /// Seconds of matrix arithmetic a token row.
    pub row: f64,
    /// Seconds that reading the keys and values of one cached token takes.
    pub cached_token: f64,
    /// Seconds that do not depend on the batch.
    pub fixed: f64,
}

impl StepCost {
    /// The cost on a device of which kernels reach nine tenths.
    ///
    /// `weight_bytes` and `weight_elements` are those of all linears, `token_bytes` the cache's for a
    /// token, `launches` kernels of a step.
    pub fn new(
        device: &DeviceModel,
        weight_bytes: usize,
        weight_elements: usize,
        token_bytes: usize,
        launches: usize,
    ) -> Self {
        const REACHED: f64 = 0.9;
        let (bandwidth, flops) = (REACHED * device.bandwidth, REACHED * device.matrix_flops);
        Self {
            weights: weight_bytes as f64 / bandwidth,
            row: 2.0 * weight_elements as f64 / flops,
            cached_token: token_bytes as f64 / bandwidth,
            fixed: launches as f64 * device.launch,
        }
    }

    /// Seconds of a step. The linears go from bound by memory to bound by arithmetic around a knee that
    /// the fourth power rounds as measured GEMMs do.
    fn of(&self, rows: usize, cached: u64) -> f64 {
        let linears = (self.weights.powi(4) + (self.row * rows as f64).powi(4)).powf(0.25);
        linears + self.cached_token * cached as f64 + self.fixed
    }
}

/// Seconds that the dataset takes when every request runs to its length; nothing if the configuration
/// does not fit the capacity. Requests that cannot run are left out.
pub fn predicted_seconds(
    dataset: &Dataset,
    config: EngineConfig,
    capacity: Capacity,
    concurrency: i64,
    cost: StepCost,
) -> Option<f64> {
    let slots = usize::try_from(concurrency)
        .ok()
        .filter(|&limit| limit > 0)
        .unwrap_or(usize::MAX);
    let mut seconds = 0.0;
    let mut device = NullDevice::new(capacity, |batch| {
        let cached = batch.kv_lens.iter().map(|&n| n as u64).sum();
        seconds += cost.of(batch.tokens_len(), cached);
    });
    let config = EngineConfig {
        stream: false,
        log_steps: false,
        ..config
    };
    let mut engine = Engine::new(&mut device, config, Clock::start()).ok()?;
    let mut requests = (0u64..).zip(&dataset.requests);
    loop {
        while engine.live() < slots {
            let Some((id, request)) = requests.next() else {
                break;
            };
            let request = Request {
                id,
                prompt: vec![0; request.input_ids.len()],
                max_new: request.output_tokens as usize,
                stop: Vec::new(),
                params: SamplingParams::default(),
                arrival_ns: 0,
            };
            // A refusal is reported by the run itself.
            let _ = engine.add(request);
        }
        if engine.iterate().ok()? == Progress::Idle && engine.is_idle() {
            break;
        }
        engine.take_finished();
    }
    drop(engine);
    Some(seconds)
}

/// Sizes that a trial prefers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Most sequences in a step.
    pub max_batch_size: usize,
    /// Most token rows in a step.
    pub max_num_tokens: usize,
    /// Predicted seconds with them.
    pub seconds: f64,
    /// Predicted seconds with the sizes that came in.
    pub before: f64,
    /// The sizes that came in: sequences and token rows.
    pub instead_of: (usize, usize),
}

/// Which sizes may be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Free {
    /// `max_batch_size`.
    pub batch: bool,
    /// `max_num_tokens`.
    pub tokens: bool,
}

/// Tries smaller sizes than those of `config`; says so when some of them are clearly better.
///
/// Smaller steps let the sequences start one after the other, so that they do not all need their
/// longest cache at the same time; a batch that divides the requests evenly leaves no small remainder
/// to run by itself. Larger sizes than the configuration's are not tried: they may not fit.
pub fn choose(
    dataset: &Dataset,
    config: EngineConfig,
    capacity: Capacity,
    concurrency: i64,
    cost: StepCost,
    free: Free,
) -> Option<Choice> {
    /// Least step that keeps the matrix units busy.
    const STEPS: [usize; 4] = [1024, 1280, 1536, 2048];
    /// Least part of the time that is worth a departure from the heuristic: the prediction is not better.
    const WORTH: f64 = 0.02;
    /// A trial of so many tokens takes about 0.1 s.
    const MOST_TOKENS: u64 = 4_000_000;
    /// A smaller batch would leave the matrix units idle.
    const LEAST_BATCH: usize = 256;
    let tokens = |r: &super::dataset::Request| u64::from(r.output_tokens);
    if dataset.requests.iter().map(tokens).sum::<u64>() > MOST_TOKENS {
        return None;
    }
    let before = predicted_seconds(dataset, config, capacity, concurrency, cost)?;
    let instead_of = (config.max_batch_size, config.max_num_tokens);
    let n = dataset.requests.len();
    let rounds = n.div_ceil(config.max_batch_size);
    let even = n.div_ceil(rounds).next_multiple_of(64);
    let mut batches = vec![config.max_batch_size];
    if free.batch && (LEAST_BATCH..config.max_batch_size).contains(&even) {
        batches.push(even);
    }
    let mut steps = vec![config.max_num_tokens];
    if free.tokens && config.chunked_prefill {
        steps.extend(STEPS.iter().filter(|&&t| t < config.max_num_tokens));
    }
    let mut best: Option<Choice> = None;
    for &max_batch_size in &batches {
        for &max_num_tokens in steps.iter().filter(|&&t| t >= max_batch_size) {
            let config = EngineConfig {
                max_batch_size,
                max_num_tokens,
                ..config
            };
            let seconds = predicted_seconds(dataset, config, capacity, concurrency, cost)?;
            let least = best.map_or(before * (1.0 - WORTH), |b| b.seconds);
            if seconds < least {
                best = Some(Choice {
                    max_batch_size,
                    max_num_tokens,
                    seconds,
                    before,
                    instead_of,
                });
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::dataset::Request as Line;
    use lathe_runtime::device::load::LoadOptions;

    fn dataset(n: usize, isl: usize, osl: u32) -> Dataset {
        let line = Line {
            task_id: 0,
            input_ids: vec![0; isl],
            output_tokens: osl,
        };
        Dataset {
            path: "d".into(),
            requests: vec![line; n],
        }
    }

    /// Llama-3.1-8B in bfloat16 on an H100: 131,072 bytes of cache a token, about 290 kernels a step.
    fn cost() -> StepCost {
        let elements = 7_500_000_000;
        StepCost::new(&DeviceModel::H100, 2 * elements, elements, 131_072, 290)
    }

    fn limits(
        batch: usize,
        tokens: usize,
        max_seq_len: usize,
        pages: usize,
    ) -> (EngineConfig, Capacity) {
        let capacity = LoadOptions {
            max_tokens: tokens,
            max_rows: batch,
            max_sequences: batch,
            max_seq_len,
            page_size: 64,
            pages,
        }
        .capacity(100);
        (EngineConfig::of(&capacity), capacity)
    }

    const BOTH: Free = Free {
        batch: true,
        tokens: true,
    };

    #[test]
    fn a_step_by_hand() {
        let cost = StepCost {
            weights: 3.0,
            row: 1.0,
            cached_token: 0.5,
            fixed: 0.25,
        };
        assert!((cost.of(0, 4) - 5.25).abs() < 1e-12);
        // (3^4 + 3^4)^(1/4) = 3 * 2^(1/4).
        assert!((cost.of(3, 0) - (3.0 * 2f64.powf(0.25) + 0.25)).abs() < 1e-12);
    }

    /// Two requests, one at a time: 4 prompt rows, then 2 decode steps on 5 and 6 cached tokens.
    #[test]
    fn a_run_by_hand() {
        let cost = StepCost {
            weights: 10.0,
            row: 0.0,
            cached_token: 1.0,
            fixed: 0.0,
        };
        let (config, capacity) = limits(8, 64, 16, 8);
        let one = 3.0 * 10.0 + 4.0 + 5.0 + 6.0;
        let data = dataset(2, 4, 3);
        let seconds = |n| predicted_seconds(&data, config, capacity, n, cost).unwrap();
        assert!((seconds(1) - 2.0 * one).abs() < 1e-9);
        assert!((seconds(-1) - (one + 15.0)).abs() < 1e-9);
        let beyond = EngineConfig {
            max_num_tokens: 65,
            ..config
        };
        assert_eq!(predicted_seconds(&data, beyond, capacity, -1, cost), None);
    }

    /// 60.5 GiB of cache: with steps of 2,048 tokens 512 requests of 1000/1000 take three rounds, with
    /// smaller ones two.
    #[test]
    fn smaller_steps_save_a_round() {
        let (config, capacity) = limits(256, 2048, 2000, 7744);
        let data = dataset(512, 1000, 1000);
        let choice = choose(&data, config, capacity, -1, cost(), BOTH).unwrap();
        assert!((1024..2048).contains(&choice.max_num_tokens), "{choice:?}");
        assert_eq!(choice.max_batch_size, 256);
        assert!(choice.seconds < 0.98 * choice.before, "{choice:?}");
        let fixed = Free {
            batch: true,
            tokens: false,
        };
        assert_eq!(choose(&data, config, capacity, -1, cost(), fixed), None);
        // Twice the cache leaves nothing to gain.
        let (config, capacity) = limits(256, 2048, 2000, 15_000);
        let roomy = choose(&data, config, capacity, -1, cost(), BOTH);
        assert!(
            roomy.is_none_or(|c| c.seconds > 0.97 * c.before),
            "{roomy:?}"
        );
    }

    /// For the record: what the scheduler makes of the standard workloads, in output tokens a second.
    #[test]
    fn predictions_are_within_what_is_known_of_the_machine() {
        let cases = [
            (2048, 128, 128, 2048, 3840, 16_000.0, 21_000.0),
            (512, 2048, 128, 224, 3840, 1_900.0, 2_500.0),
        ];
        for (n, isl, osl, batch, tokens, low, high) in cases {
            let (config, capacity) = limits(batch, tokens, isl + osl as usize, 7744);
            let data = dataset(n, isl, osl);
            let seconds = predicted_seconds(&data, config, capacity, -1, cost()).unwrap();
            let rate = n as f64 * f64::from(osl) / seconds;
            assert!((low..high).contains(&rate), "{n} {isl}/{osl}: {rate}");
        }
    }
}
