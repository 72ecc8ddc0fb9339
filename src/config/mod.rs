//! The configuration of a run: the YAML file of `--extra_llm_api_options`, the command line, and
//! defaults, resolved into one value whose every part knows where it came from.
//!
//! The YAML file wins over the command line, as in trtllm-bench. Its keys are AutoDeploy's
//! ([`KEYS`]); where the defaults differ from theirs, they are those that one would choose for a
//! benchmark:
//!
//! | key | here | AutoDeploy |
//! |---|---|---|
//! | `compile_backend` | `torch-opt` | `torch-compile` |
//! | `free_mem_ratio` | 0.95 | 0.0, a cache that holds next to nothing |
//! | `enable_chunked_prefill` | true | false |
//! | `max_batch_size`, `max_num_tokens` | from the memory and the dataset | 8, none |
//! | `max_seq_len` | from the dataset | 512 |

mod effect;
mod keys;
mod locate;
mod options;
mod resolved;
mod text;
mod transforms;
mod yaml;

pub use effect::Run;
pub use keys::{KEYS, nearest};
pub use locate::Position;
pub use options::{
    AttnBackend, CompileBackend, Given, KvCacheDtype, Options, RuntimeKind, Source, Switch,
};
pub use resolved::{GemmTuning, Resolved};
pub use text::ConfigError;
pub use yaml::{parse, read, read_as};
