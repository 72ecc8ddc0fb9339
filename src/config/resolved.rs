//! The configuration of a run, with the source of every value.

use super::options::{
    AttnBackend, CompileBackend, Given, KvCacheDtype, Options, RuntimeKind, Source, Switch,
};
use super::transforms;
use indexmap::IndexMap;
use lathe_ir::DType;
use lathe_passes::egraph::cost::{CostPoint, DeviceModel};
use lathe_passes::pipeline::PassConfig;
use serde_json::Value;
use std::fmt::Display;

/// How GEMM kernels are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmTuning {
    /// By timing them, not by heuristics.
    pub timed: bool,
    /// Whether cuBLASLt's are among those that are timed.
    pub cublaslt: bool,
}

/// A complete configuration. What is `None` is decided later, from the memory and the dataset.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// Fusion, CUDA graphs, tuning.
    pub compile_backend: Given<CompileBackend>,
    /// Batching and form of the cache.
    pub runtime: Given<RuntimeKind>,
    /// Share of the free memory that the KV cache may take.
    pub free_mem_ratio: Given<f64>,
    /// Whether weights are random.
    pub skip_loading_weights: Given<bool>,
    /// Batch sizes of captured decode steps.
    pub cuda_graph_batch_sizes: Given<Option<Vec<u32>>>,
    /// Kernels of attention.
    pub attn_backend: Given<AttnBackend>,
    /// Most requests in flight.
    pub max_batch_size: Given<Option<u32>>,
    /// Longest sequence in tokens.
    pub max_seq_len: Given<Option<u32>>,
    /// Most token rows of one step.
    pub max_num_tokens: Given<Option<u32>>,
    /// Tokens of a page of the cache.
    pub attn_page_size: Given<u32>,
    /// Element type of the cache.
    pub kv_cache_dtype: Given<KvCacheDtype>,
    /// Overrides of config.json.
    pub model_kwargs: IndexMap<String, Given<Value>>,
    /// Whether every sharded projection is gathered.
    pub simple_shard_only: Given<bool>,
    /// Whether long prompts are spread over several steps.
    pub enable_chunked_prefill: Given<bool>,
    /// Switches of stages and rules.
    pub switches: Vec<Given<Switch>>,
    /// Sequences for which the decode program is chosen.
    pub decode_batch: Given<u32>,
    /// Cached tokens for which the decode program is chosen.
    pub decode_context: Given<u32>,
    /// Tokens for which the general program is chosen.
    pub prefill_tokens: Given<u32>,
    /// Whether torch-opt chooses GEMM kernels by timing.
    pub autotune: Given<bool>,
    /// Whether it may choose cuBLASLt's.
    pub cublaslt: Given<bool>,
}

fn first<T>(yaml: Option<Given<T>>, flags: Option<Given<T>>, default: T) -> Given<T> {
    yaml.or(flags).unwrap_or_else(|| Given::default_of(default))
}

impl Default for Resolved {
    /// Every default.
    fn default() -> Self {
        Resolved::new(Options::default(), Options::default())
    }
}

impl Resolved {
    /// Merges the YAML file over the command line over the defaults.
    pub fn new(flags: Options, yaml: Options) -> Resolved {
        let mut model_kwargs = flags.model_kwargs;
        model_kwargs.extend(yaml.model_kwargs);
        let mut switches = flags.switches;
        switches.extend(yaml.switches);
        Resolved {
            compile_backend: first(
                yaml.compile_backend,
                flags.compile_backend,
                CompileBackend::Opt,
            ),
            runtime: first(yaml.runtime, flags.runtime, RuntimeKind::Trtllm),
            free_mem_ratio: first(yaml.free_mem_ratio, flags.free_mem_ratio, 0.95),
            skip_loading_weights: first(
                yaml.skip_loading_weights,
                flags.skip_loading_weights,
                false,
            ),
            cuda_graph_batch_sizes: first(
                yaml.cuda_graph_batch_sizes,
                flags.cuda_graph_batch_sizes,
                None,
            ),
            attn_backend: first(
                yaml.attn_backend,
                flags.attn_backend,
                AttnBackend::Flashinfer,
            ),
            max_batch_size: first(yaml.max_batch_size, flags.max_batch_size, None),
            max_seq_len: first(yaml.max_seq_len, flags.max_seq_len, None),
            max_num_tokens: first(yaml.max_num_tokens, flags.max_num_tokens, None),
            attn_page_size: first(yaml.attn_page_size, flags.attn_page_size, 64),
            kv_cache_dtype: first(
                yaml.kv_cache_dtype,
                flags.kv_cache_dtype,
                KvCacheDtype::Auto,
            ),
            model_kwargs,
            simple_shard_only: first(yaml.simple_shard_only, flags.simple_shard_only, false),
            enable_chunked_prefill: first(
                yaml.enable_chunked_prefill,
                flags.enable_chunked_prefill,
                true,
            ),
            switches,
            decode_batch: first(yaml.decode_batch, flags.decode_batch, 1),
            decode_context: first(yaml.decode_context, flags.decode_context, 512),
            prefill_tokens: first(yaml.prefill_tokens, flags.prefill_tokens, 2048),
            autotune: first(yaml.autotune, flags.autotune, true),
            cublaslt: first(yaml.cublaslt, flags.cublaslt, false),
        }
    }

    /// The stages and rules that do not run, each with the setting that says so. Of several
    /// switches of one name the last holds; the top-level keys hold over `transforms`.
    pub fn disabled(&self) -> IndexMap<&'static str, String> {
        let mut off = IndexMap::new();
        for given in &self.switches {
            let Switch { name, enabled } = &given.value;
            for target in transforms::switches(name) {
                if *enabled {
                    off.shift_remove(target);
                } else {
                    off.insert(target, reason(&format!("transforms.{name}"), &given.source));
                }
            }
        }
        if !self.compile_backend.value.fuses() {
            off.insert("fuse", because("compile_backend", &self.compile_backend));
        }
        if self.attn_backend.value == AttnBackend::Torch {
            off.insert("qkv-join", because("attn_backend", &self.attn_backend));
        }
        off
    }

    /// Checks `kv_cache_dtype` against the element type of the model: kernels read and write the
    /// cache in that type only.
    ///
    /// # Errors
    /// It names another type.
    pub fn check_kv_cache_dtype(&self, model: DType) -> Result<(), String> {
        let Given { value, source } = &self.kv_cache_dtype;
        let wanted = match value {
            KvCacheDtype::Auto => return Ok(()),
            KvCacheDtype::Bfloat16 => DType::BF16,
            KvCacheDtype::Float16 => DType::F16,
            KvCacheDtype::Float32 => DType::F32,
        };
        if wanted == model {
            return Ok(());
        }
        let name = match model {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        };
        Err(format!(
            "kv_cache_dtype: {value} ({source}), but the cache has the type of the activations, {name}; \
             use auto, or --dtype {value}"
        ))
    }

    /// How GEMM kernels are chosen.
    pub fn tuning(&self) -> GemmTuning {
        let timed = self.compile_backend.value.autotunes() && self.autotune.value;
        GemmTuning {
            timed,
            cublaslt: timed && self.cublaslt.value,
        }
    }

    /// What the passes are to do, for a device.
    pub fn pass_config(&self, device: DeviceModel) -> PassConfig {
        let mut config = PassConfig::new(device.clone());
        config.disabled = self.disabled().keys().map(|k| (*k).to_string()).collect();
        config.points.decode = CostPoint::decode(
            self.decode_batch.value.into(),
            self.decode_context.value.into(),
            device.clone(),
        );
        config.points.general = CostPoint::prefill(self.prefill_tokens.value.into(), device);
        config
    }

    /// The overrides of config.json, for the importer.
    pub fn overrides(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.model_kwargs
            .iter()
            .map(|(k, v)| (k.as_str(), &v.value))
    }

    /// Every setting as `(key, value, source)`, in the order of the documentation.
    pub fn rows(&self) -> Vec<(String, String, String)> {
        let mut rows = Vec::new();
        let mut row = |key: &str, value: String, source: &Source| {
            rows.push((key.to_string(), value, source.to_string()));
        };
        fn opt<T: Display>(v: Option<T>) -> String {
            v.map_or_else(|| "automatic".to_string(), |v| v.to_string())
        }
        let sizes = self.cuda_graph_batch_sizes.value.as_ref();
        let sizes = sizes.map(|s| {
            let s: Vec<String> = s.iter().map(u32::to_string).collect();
            format!("[{}]", s.join(", "))
        });
        macro_rules! rows {
            ($($field:ident),* $(,)?) => {
                $(row(stringify!($field), self.$field.value.to_string(), &self.$field.source);)*
            };
        }
        rows!(
            compile_backend,
            runtime,
            free_mem_ratio,
            skip_loading_weights
        );
        row(
            "cuda_graph_batch_sizes",
            opt(sizes),
            &self.cuda_graph_batch_sizes.source,
        );
        rows!(attn_backend);
        for (key, v) in [
            ("max_batch_size", &self.max_batch_size),
            ("max_seq_len", &self.max_seq_len),
            ("max_num_tokens", &self.max_num_tokens),
        ] {
            row(key, opt(v.value), &v.source);
        }
        rows!(
            attn_page_size,
            kv_cache_dtype,
            simple_shard_only,
            enable_chunked_prefill,
        );
        for (key, v) in &self.model_kwargs {
            row(
                &format!("model_kwargs.{key}"),
                v.value.to_string(),
                &v.source,
            );
        }
        for s in &self.switches {
            row(
                &format!("transforms.{}.enabled", s.value.name),
                s.value.enabled.to_string(),
                &s.source,
            );
        }
        for (key, v) in [
            ("decode_batch", &self.decode_batch),
            ("decode_context", &self.decode_context),
            ("prefill_tokens", &self.prefill_tokens),
        ] {
            let key = format!("transforms.extract.{key}");
            row(&key, v.value.to_string(), &v.source);
        }
        for (key, v) in [("enabled", &self.autotune), ("cublaslt", &self.cublaslt)] {
            let key = format!("transforms.autotune.{key}");
            row(&key, v.value.to_string(), &v.source);
        }
        rows
    }
}

fn because<T: Display>(key: &str, given: &Given<T>) -> String {
    reason(&format!("{key}: {}", given.value), &given.source)
}

fn reason(what: &str, source: &Source) -> String {
    format!("{what} ({source})")
}
