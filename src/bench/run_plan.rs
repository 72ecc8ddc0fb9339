//! The sizes of a run: what is loaded and how the engine may use it, as a pure function of the device's
//! memory, the model's sizes, the dataset and the user's wishes.

use lathe_codegen::Plan;
use lathe_codegen::plan::WeightBuffer;
use lathe_passes::egraph::cost::DeviceModel;
use lathe_runtime::device::load::LoadOptions;
use lathe_runtime::device::{Capabilities, Memory};
use lathe_runtime::engine::{EngineConfig, Policy};

use super::dataset::{Dataset, DatasetStats};
use super::kv_size::{KvLimits, KvTooSmall, kv_size};
use super::schedule::{Choice, Free, StepCost, choose};
use super::sizing::{Sizes, SizingInput, sizes};
use super::tuning::{TuningError, TuningInput};

/// How the requests of a dataset come to the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunKind {
    /// Continuous batching.
    Serving,
    /// One request after the other.
    Latency,
    /// One static batch after the other, over a contiguous cache.
    StaticBatches,
}

/// What the user wants; what is none is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wishes {
    /// How requests come.
    pub kind: RunKind,
    /// When requests are admitted; static batches have a policy of their own.
    pub policy: Policy,
    /// Most sequences of a step.
    pub max_batch_size: Option<usize>,
    /// Most token rows of a step.
    pub max_num_tokens: Option<usize>,
    /// Longest sequence, prompt and output.
    pub max_seq_len: usize,
    /// Tokens per page of the cache.
    pub page_size: usize,
    /// Fraction of the memory that is left which the cache may take.
    pub kv_fraction: f64,
    /// Whether a prompt may be computed in several steps.
    pub chunked_prefill: bool,
    /// Most requests in flight; 0 or less is no limit.
    pub concurrency: i64,
    /// Input and output length to choose sizes for; the dataset's averages by default.
    pub targets: (Option<u32>, Option<u32>),
    /// Whether every step is logged.
    pub log_steps: bool,
}

/// What is known of the device.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceFacts {
    /// Its memory before the model is loaded.
    pub memory: Memory,
    /// What it can do.
    pub capabilities: Capabilities,
    /// Its rates.
    pub rates: DeviceModel,
}

/// What is known of the model on this device.
pub struct ModelSizes<'a> {
    /// Layers with a cache.
    pub layers: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Bytes of an element of the cache.
    pub kv_element_bytes: f64,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Elements of all weights.
    pub weight_elements: usize,
    /// Bytes of one token in all caches, as the device stores them.
    pub token_bytes: usize,
    /// Kernels of a step.
    pub launches: usize,
    /// Vocabulary size.
    pub vocab: usize,
    /// Bytes that a load takes beside weights and cache.
    pub work_bytes: Box<dyn Fn(&LoadOptions) -> u64 + 'a>,
}

impl<'a> ModelSizes<'a> {
    /// The sizes of a plan on a device that stores a token of its cache in `token_bytes`.
    pub fn of(plan: &'a Plan, token_bytes: usize, vocab: usize) -> Self {
        let cache = plan.caches.first();
        let elements = |w: &WeightBuffer| w.recipe.rows * w.recipe.cols;
        Self {
            layers: plan.caches.len(),
            kv_heads: cache.map_or(0, |cache| cache.kv_heads as usize),
            head_dim: cache.map_or(0, |cache| cache.head_dim as usize),
            kv_element_bytes: cache.map_or(0.0, |cache| cache.dtype.size() as f64),
            weight_bytes: plan.weight_bytes() as u64,
            weight_elements: plan.weights.iter().map(elements).sum(),
            token_bytes,
            launches: plan
                .programs
                .iter()
                .map(|p| p.steps.len())
                .max()
                .unwrap_or(0),
            vocab,
            work_bytes: Box::new(move |options| {
                let general = plan.activation_bytes(&options.general_env());
                general.max(plan.activation_bytes(&options.decode_env())) as u64
            }),
        }
    }
}

/// What a run does.
#[derive(Debug, Clone, PartialEq)]
pub struct RunPlan {
    /// What is loaded.
    pub load: LoadOptions,
    /// How the engine uses it.
    pub engine: EngineConfig,
    /// Requests of average length that the cache holds.
    pub cached_sequences: usize,
    /// What may keep the run below the device's potential.
    pub warnings: Vec<String>,
    /// The trial whose sizes were taken in place of the heuristic's.
    pub trial: Option<Choice>,
}

/// A run that is not possible.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RunPlanError {
    /// The model, or a request of average length, does not fit into the memory.
    #[error(transparent)]
    Tuning(#[from] TuningError),
    /// The longest request does not fit into the cache.
    #[error(transparent)]
    Cache(#[from] KvTooSmall),
}

impl RunPlan {
    /// Chooses the sizes of a run.
    ///
    /// # Errors
    /// The memory does not suffice. Static batches are taken as they are wished for: whether they fit is
    /// seen when the model is loaded.
    pub fn new(
        device: &DeviceFacts,
        model: &ModelSizes<'_>,
        dataset: &Dataset,
        wishes: &Wishes,
    ) -> Result<RunPlan, RunPlanError> {
        let planner = Planner {
            device,
            model,
            dataset,
            wishes,
        };
        match wishes.kind {
            RunKind::StaticBatches => Ok(planner.static_batches()),
            RunKind::Serving | RunKind::Latency => planner.paged(&dataset.stats()),
        }
    }
}

/// The inputs of a plan.
struct Planner<'a> {
    device: &'a DeviceFacts,
    model: &'a ModelSizes<'a>,
    dataset: &'a Dataset,
    wishes: &'a Wishes,
}

impl Planner<'_> {
    /// All requests in one batch, unless a smaller one is wished for; a page holds a whole sequence.
    fn static_batches(&self) -> RunPlan {
        /// Token rows of a step that keep any device busy.
        const TOKENS: usize = 2048;
        let n = self.dataset.requests.len().max(1);
        let batch = self.wishes.max_batch_size.unwrap_or(n).clamp(1, n);
        let tokens = self.wishes.max_num_tokens.unwrap_or(TOKENS);
        let load = LoadOptions::contiguous(batch, self.wishes.max_seq_len, tokens);
        RunPlan {
            engine: EngineConfig {
                policy: Policy::Static,
                // The tokens of a step are read before the next one is planned.
                overlap: false,
                log_steps: self.wishes.log_steps,
                ..EngineConfig::of(&load.capacity(self.model.vocab))
            },
            load,
            cached_sequences: batch,
            warnings: Vec::new(),
            trial: None,
        }
    }

    /// Sizes from memory and dataset, over a paged cache.
    fn paged(&self, stats: &DatasetStats) -> Result<RunPlan, RunPlanError> {
        let (memory, weights) = (self.device.memory, self.model.weight_bytes);
        let Some(free) = memory.free.checked_sub(weights) else {
            let memory = memory.free;
            return Err(TuningError::WeightsDoNotFit { weights, memory }.into());
        };
        let mut sizes = self.sizes(stats, free)?;
        let mut trial = None;
        let (mut load, mut cached_sequences) = self.load(&sizes, free)?;
        if self.device.capabilities.has_known_rates && self.wishes.kind != RunKind::Latency {
            trial = self.trial(self.engine(&sizes, &load), &load);
            if let Some(choice) = &trial {
                sizes.max_batch_size = choice.max_batch_size;
                sizes.max_num_tokens = choice.max_num_tokens;
                (load, cached_sequences) = self.load(&sizes, free)?;
            }
        }
        Ok(RunPlan {
            engine: self.engine(&sizes, &load),
            load,
            cached_sequences,
            warnings: sizes.warnings,
            trial,
        })
    }

    fn chunked_prefill(&self) -> bool {
        self.wishes.chunked_prefill && self.wishes.kind != RunKind::Latency
    }

    /// The heuristic's sizes within what is wished for and useful.
    fn sizes(&self, stats: &DatasetStats, free: u64) -> Result<Sizes, TuningError> {
        let (model, wishes) = (self.model, self.wishes);
        let (cacheable, reserve) = self.device.memory.for_cache(free);
        let (isl, osl) = wishes.targets;
        sizes(&SizingInput {
            dataset: stats,
            max_batch_size: match wishes.kind {
                RunKind::Latency => Some(1),
                RunKind::Serving | RunKind::StaticBatches => wishes.max_batch_size,
            },
            max_num_tokens: wishes.max_num_tokens,
            concurrency: wishes.concurrency,
            tuning: TuningInput {
                layers: model.layers,
                kv_heads: model.kv_heads,
                head_dim: model.head_dim,
                kv_element_bytes: model.kv_element_bytes,
                weight_bytes: model.weight_bytes,
                device_bytes: model.weight_bytes + cacheable.saturating_sub(reserve),
                tp: 1,
                kv_fraction: wishes.kv_fraction,
                isl: isl.map_or(stats.avg_isl, f64::from),
                osl: osl.map_or(stats.avg_osl, f64::from),
                max_isl: stats.max_isl,
                chunked_prefill: self.chunked_prefill(),
            },
            capabilities: self.device.capabilities,
        })
    }

    /// What is loaded for these sizes, with the cache that `free` bytes allow, and how many requests of
    /// average length that holds.
    fn load(&self, sizes: &Sizes, free: u64) -> Result<(LoadOptions, usize), KvTooSmall> {
        let wishes = self.wishes;
        let mut load = LoadOptions {
            max_tokens: sizes.max_num_tokens,
            max_rows: sizes.max_batch_size,
            max_sequences: sizes.max_batch_size,
            max_seq_len: wishes.max_seq_len,
            page_size: wishes.page_size,
            pages: 0,
        };
        let left = free.saturating_sub((self.model.work_bytes)(&load));
        let (free_bytes, reserve_bytes) = self.device.memory.for_cache(left);
        let size = kv_size(
            self.dataset,
            &KvLimits {
                page_size: load.page_size,
                token_bytes: self.model.token_bytes,
                free_bytes,
                reserve_bytes,
                fraction: wishes.kv_fraction,
                max_batch_size: sizes.max_batch_size,
                concurrency: wishes.concurrency,
            },
        )?;
        load.pages = size.pages;
        Ok((load, size.cached_sequences))
    }

    fn engine(&self, sizes: &Sizes, load: &LoadOptions) -> EngineConfig {
        EngineConfig {
            policy: self.wishes.policy,
            chunked_prefill: self.chunked_prefill(),
            // A device that computes inside `submit` gains nothing from it.
            overlap: self.device.capabilities.is_asynchronous,
            log_steps: self.wishes.log_steps,
            max_batch_size: sizes.max_batch_size,
            ..EngineConfig::of(&load.capacity(self.model.vocab))
        }
    }

    /// Sizes that a trial run prefers to the heuristic's, where none were wished for.
    fn trial(&self, config: EngineConfig, load: &LoadOptions) -> Option<Choice> {
        let (model, wishes) = (self.model, self.wishes);
        let free = Free {
            batch: wishes.max_batch_size.is_none(),
            tokens: wishes.max_num_tokens.is_none(),
        };
        let cost = StepCost::new(
            &self.device.rates,
            model.weight_bytes as usize,
            model.weight_elements,
            model.token_bytes,
            model.launches,
        );
        let capacity = load.capacity(model.vocab);
        choose(
            self.dataset,
            config,
            capacity,
            wishes.concurrency,
            cost,
            free,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::dataset::Request;

    /// Llama-3.1-8B in bfloat16, without activations.
    fn llama_8b() -> ModelSizes<'static> {
        ModelSizes {
            layers: 32,
            kv_heads: 8,
            head_dim: 128,
            kv_element_bytes: 2.0,
            weight_bytes: 16_060_522_496,
            weight_elements: 8_030_261_248,
            token_bytes: 131_072,
            launches: 290,
            vocab: 128_256,
            work_bytes: Box::new(|_| 0),
        }
    }

    fn h100() -> DeviceFacts {
        DeviceFacts {
            memory: Memory {
                free: 79 << 30,
                cache_limit: u64::MAX,
                reserve: 1 << 30,
            },
            capabilities: Capabilities {
                is_asynchronous: true,
                compiles: true,
                has_known_rates: true,
                has_own_memory: true,
                useful_batch: None,
                f32_error: 1e-4,
            },
            rates: DeviceModel::H100,
        }
    }

    /// 32 GiB are free, a cache takes 8 of them at most.
    fn cpu() -> DeviceFacts {
        DeviceFacts {
            memory: Memory {
                free: 32 << 30,
                cache_limit: 8 << 30,
                reserve: 0,
            },
            capabilities: Capabilities {
                is_asynchronous: false,
                compiles: false,
                has_known_rates: false,
                has_own_memory: false,
                useful_batch: Some(64),
                f32_error: 5e-6,
            },
            rates: DeviceModel::CPU,
        }
    }

    fn dataset(n: usize, isl: usize, osl: u32) -> Dataset {
        let line = Request {
            task_id: 0,
            input_ids: vec![0; isl],
            output_tokens: osl,
        };
        Dataset {
            path: "d".into(),
            requests: vec![line; n],
        }
    }

    const WISHES: Wishes = Wishes {
        kind: RunKind::Serving,
        policy: Policy::GuaranteedNoEvict,
        max_batch_size: None,
        max_num_tokens: None,
        max_seq_len: 2000,
        page_size: 64,
        kv_fraction: 0.9,
        chunked_prefill: true,
        concurrency: -1,
        targets: (None, None),
        log_steps: false,
    };

    fn plan(device: &DeviceFacts, n: usize, wishes: &Wishes) -> RunPlan {
        RunPlan::new(device, &llama_8b(), &dataset(n, 1000, 1000), wishes).unwrap()
    }

    /// By hand: 84,825,604,096 - 16,060,522,496 bytes are left, nine tenths of them are 61,888,573,440
    /// bytes, which are 7,377 pages of 64 * 131,072 bytes. Of 100 requests all run at a time: 100 * 32 pages.
    #[test]
    fn the_cache_is_what_memory_allows_and_the_dataset_can_use() {
        let few = plan(&h100(), 100, &WISHES);
        assert_eq!((few.load.pages, few.cached_sequences), (3200, 100));
        assert_eq!((few.load.max_sequences, few.load.max_rows), (100, 100));
        let many = plan(&h100(), 300, &WISHES);
        assert_eq!(many.load.pages, 7377);
        assert_eq!(many.cached_sequences, 230);
        assert!(many.engine.overlap && many.engine.chunked_prefill);
        assert_eq!(many.engine.max_seq_len, 2000);
    }

    /// What the trial prefers is loaded; what the user has given is never changed. The cache holds 242
    /// whole requests: 512 take three rounds with steps of 2,048 tokens, with smaller ones two.
    #[test]
    fn the_trial_chooses_only_what_was_not_given() {
        let mut gpu = h100();
        gpu.memory.free = 88_240_000_000;
        let tried = plan(&gpu, 512, &WISHES);
        let choice = tried.trial.unwrap();
        assert!(choice.max_num_tokens < 2048, "{choice:?}");
        assert_eq!(tried.load.max_tokens, choice.max_num_tokens);
        assert_eq!(tried.engine.max_num_tokens, choice.max_num_tokens);
        assert_eq!(tried.engine.max_batch_size, choice.max_batch_size);
        let given = Wishes {
            max_batch_size: Some(256),
            max_num_tokens: Some(2048),
            ..WISHES
        };
        let fixed = plan(&gpu, 512, &given);
        assert_eq!((fixed.trial, fixed.load.max_tokens), (None, 2048));
        assert_eq!(fixed.load.max_sequences, 256);
        // A CPU's rates are not known, so there is no trial.
        assert_eq!(plan(&cpu(), 512, &WISHES).trial, None);
    }

    /// A quarter of a laptop's memory at most: nine tenths of 8 GiB are 921 pages, 28 whole requests.
    #[test]
    fn a_cpu_takes_little() {
        let plan = plan(&cpu(), 512, &WISHES);
        assert_eq!((plan.load.pages, plan.cached_sequences), (921, 28));
        assert_eq!(plan.load.max_sequences, 64);
        assert!(!plan.engine.overlap && plan.warnings.is_empty());
    }

    #[test]
    fn latency_runs_one_sequence_in_whole_prompts() {
        let wishes = Wishes {
            kind: RunKind::Latency,
            concurrency: 1,
            ..WISHES
        };
        let plan = plan(&h100(), 100, &wishes);
        assert_eq!((plan.load.max_sequences, plan.load.pages), (1, 32));
        assert_eq!(plan.engine.max_batch_size, 1);
        assert!(!plan.engine.chunked_prefill && plan.trial.is_none());
    }

    #[test]
    fn static_batches_have_a_page_for_each_sequence() {
        let wishes = Wishes {
            kind: RunKind::StaticBatches,
            max_batch_size: Some(7),
            max_num_tokens: Some(5),
            ..WISHES
        };
        let fixed = plan(&cpu(), 100, &wishes);
        assert_eq!(fixed.load, LoadOptions::contiguous(7, 2000, 5));
        assert_eq!(fixed.load.max_tokens, 7, "a row for each sequence");
        assert_eq!(
            (fixed.engine.policy, fixed.engine.overlap),
            (Policy::Static, false)
        );
        let all = Wishes {
            max_batch_size: None,
            max_num_tokens: None,
            ..wishes
        };
        assert_eq!(
            plan(&cpu(), 3, &all).load,
            LoadOptions::contiguous(3, 2000, 2048)
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut small = h100();
        small.memory.free = 8 << 30;
        let data = dataset(4, 1000, 1000);
        let error = RunPlan::new(&small, &llama_8b(), &data, &WISHES).unwrap_err();
        assert!(
            error.to_string().starts_with("the weights need 14.96 GiB"),
            "{error}"
        );
        // The activations leave too little for the longest request.
        let mut model = llama_8b();
        model.work_bytes = Box::new(|_| 64 << 30);
        let error = RunPlan::new(&h100(), &model, &data, &WISHES).unwrap_err();
        assert!(matches!(error, RunPlanError::Cache(_)), "{error}");
    }
}
