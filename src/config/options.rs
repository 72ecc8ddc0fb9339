//! Options as they were given, on the command line or in the YAML file.

use indexmap::IndexMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Source {
    /// Nobody gave it.
    #[default]
    Default,
    /// A flag of the command line.
    Flag(&'static str),
    /// A line of the YAML file.
    Yaml {
        /// The file as it was named.
        file: Arc<str>,
        /// The line, from 1.
        line: usize,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::Flag(flag) => write!(f, "command line, {flag}"),
            Source::Yaml { file, line } => write!(f, "{file}:{line}"),
        }
    }
}

/// A value with its source.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Given<T> {
    /// The value.
    pub value: T,
    /// Where it comes from.
    pub source: Source,
}

impl<T> Given<T> {
    /// A default.
    pub fn default_of(value: T) -> Given<T> {
        Given {
            value,
            source: Source::Default,
        }
    }

    /// The value of a flag, if the flag was given.
    pub fn flag(flag: &'static str, value: Option<T>) -> Option<Given<T>> {
        value.map(|value| Given {
            value,
            source: Source::Flag(flag),
        })
    }
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal $(| $alias:literal)*),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$vdoc])* $variant),* }

        impl $name {
            /// The accepted words, without their aliases.
            pub const WORDS: &'static [&'static str] = &[$($word),*];
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(word: &str) -> Result<Self, String> {
                match word {
                    $($word $(| $alias)* => Ok($name::$variant),)*
                    _ => Err(format!("expected {}", $name::WORDS.join(", "))),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $($name::$variant => $word),* })
            }
        }
    };
}

words! {
    /// `compile_backend`.
    CompileBackend {
        /// Unfused kernels, launched one by one.
        Simple = "torch-simple" | "simple",
        /// Fused kernels, launched one by one.
        Compile = "torch-compile" | "compile",
        /// Unfused kernels in CUDA graphs.
        CudaGraph = "torch-cudagraph" | "cudagraph",
        /// Fused and autotuned kernels in CUDA graphs.
        Opt = "torch-opt" | "opt",
    }
}

impl CompileBackend {
    /// Whether the stage `fuse` runs.
    pub fn fuses(self) -> bool {
        matches!(self, CompileBackend::Compile | CompileBackend::Opt)
    }

    /// Whether decode steps are captured as CUDA graphs.
    pub fn cuda_graphs(self) -> bool {
        matches!(self, CompileBackend::CudaGraph | CompileBackend::Opt)
    }

    /// Whether kernel variants are timed.
    pub fn autotunes(self) -> bool {
        self == CompileBackend::Opt
    }
}

words! {
    /// `runtime`.
    RuntimeKind {
        /// Continuous batching over the paged cache.
        Trtllm = "trtllm",
        /// One static batch over a contiguous cache.
        Demollm = "demollm",
    }
}

words! {
    /// `attn_backend`.
    AttnBackend {
        /// Generated paged kernels.
        Flashinfer = "flashinfer" | "FlashInfer",
        /// Unfused cached attention.
        Torch = "torch",
    }
}

words! {
    /// `kv_cache_dtype`.
    KvCacheDtype {
        /// That of the model.
        Auto = "auto",
        /// bf16.
        Bfloat16 = "bfloat16" | "bf16",
        /// f16.
        Float16 = "float16" | "fp16" | "half",
        /// f32.
        Float32 = "float32" | "fp32",
    }
}

/// A switch under `transforms:`.
#[derive(Clone, Debug, PartialEq)]
pub struct Switch {
    /// The name as written.
    pub name: String,
    /// `enabled`.
    pub enabled: bool,
}

/// What was given; whatever is `None` has its default. A doubly optional value can be given as
/// null, which means "decide yourself".
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Options {
    /// `compile_backend`.
    pub compile_backend: Option<Given<CompileBackend>>,
    /// `runtime`.
    pub runtime: Option<Given<RuntimeKind>>,
    /// `free_mem_ratio`, from 0 to 1.
    pub free_mem_ratio: Option<Given<f64>>,
    /// `skip_loading_weights`.
    pub skip_loading_weights: Option<Given<bool>>,
    /// `cuda_graph_batch_sizes`.
    pub cuda_graph_batch_sizes: Option<Given<Option<Vec<u32>>>>,
    /// `attn_backend`.
    pub attn_backend: Option<Given<AttnBackend>>,
    /// `max_batch_size`.
    pub max_batch_size: Option<Given<Option<u32>>>,
    /// `max_seq_len`.
    pub max_seq_len: Option<Given<Option<u32>>>,
    /// `max_num_tokens`.
    pub max_num_tokens: Option<Given<Option<u32>>>,
    /// `attn_page_size`.
    pub attn_page_size: Option<Given<u32>>,
    /// `kv_cache_dtype`.
    pub kv_cache_dtype: Option<Given<KvCacheDtype>>,
    /// `model_kwargs`: each key with its value.
    pub model_kwargs: IndexMap<String, Given<serde_json::Value>>,
    /// `simple_shard_only`.
    pub simple_shard_only: Option<Given<bool>>,
    /// `enable_chunked_prefill`.
    pub enable_chunked_prefill: Option<Given<bool>>,
    /// Switches of stages and rules under `transforms`.
    pub switches: Vec<Given<Switch>>,
    /// `transforms.extract.decode_batch`: sequences for which the decode program is chosen.
    pub decode_batch: Option<Given<u32>>,
    /// `transforms.extract.decode_context`: cached tokens for which the decode program is chosen.
    pub decode_context: Option<Given<u32>>,
    /// `transforms.extract.prefill_tokens`: tokens for which the general program is chosen.
    pub prefill_tokens: Option<Given<u32>>,
    /// `transforms.autotune.enabled`.
    pub autotune: Option<Given<bool>>,
    /// `transforms.autotune.cublaslt`.
    pub cublaslt: Option<Given<bool>>,
}
