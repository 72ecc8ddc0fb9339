//! Settings that were given and change nothing in a run: each is said, with the reason.

use super::options::{Given, Source};
use super::resolved::Resolved;

/// What a command does with a model, as far as settings are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Continuous batching.
    Serving,
    /// One request after the other on the engine.
    Latency,
    /// One static batch after the other.
    StaticBatches,
    /// Some prompts as one batch.
    Generate,
    /// Against a reference.
    Verify,
    /// Single steps, timed by kernel.
    Kernels,
}

impl Resolved {
    /// The settings that somebody gave and that have no effect in a run, one a line with the reason.
    pub fn without_effect(&self, run: Run, on_cpu: bool) -> Vec<String> {
        let mut lines = Vec::new();
        let mut idle = |key: &str, source: &Source, why: Option<&str>| {
            if let (Some(why), false) = (why, *source == Source::Default) {
                lines.push(format!("{key} ({source}) has no effect: {why}"));
            }
        };
        let backend = &self.compile_backend;
        // Why the device or the backend has no use for a setting, if it has none.
        let unless = |used: bool, on_cpu_why: &str, why: &str| match (on_cpu, used) {
            (true, _) => Some(on_cpu_why.to_string()),
            (false, false) => Some(format!("compile_backend: {} {why}", backend.value)),
            (false, true) => None,
        };
        let graphs = unless(
            backend.value.cuda_graphs(),
            "the CPU has no CUDA graphs",
            "has no CUDA graphs",
        );
        idle(
            "cuda_graph_batch_sizes",
            &self.cuda_graph_batch_sizes.source,
            graphs.as_deref(),
        );
        let untimed = unless(
            backend.value.autotunes(),
            "the CPU has one kernel for each GEMM",
            "times no kernels",
        );
        idle(
            "transforms.autotune.enabled",
            &self.autotune.source,
            untimed.as_deref(),
        );
        let no_library = (!self.autotune.value)
            .then(|| "transforms.autotune.enabled: false times no kernels".to_string());
        idle(
            "transforms.autotune.cublaslt",
            &self.cublaslt.source,
            untimed.or(no_library).as_deref(),
        );
        idle(
            "simple_shard_only",
            &self.simple_shard_only.source,
            Some("on one device nothing is sharded"),
        );
        let only = |whys: &[(Run, &'static str)]| whys.iter().find(|w| w.0 == run).map(|w| w.1);
        const ONE_BATCH: &str = "all prompts are one batch";
        const STEPS: &str = "single steps are timed";
        const ONE_PAGE: &str = "each sequence has one page of its full length";
        idle(
            "runtime",
            &self.runtime.source,
            only(&[
                (Run::Generate, ONE_BATCH),
                (Run::Verify, ONE_BATCH),
                (Run::Kernels, STEPS),
            ]),
        );
        idle(
            "free_mem_ratio",
            &self.free_mem_ratio.source,
            only(&[
                (Run::StaticBatches, ONE_PAGE),
                (Run::Generate, ONE_PAGE),
                (Run::Verify, ONE_PAGE),
                (Run::Kernels, STEPS),
            ]),
        );
        idle(
            "attn_page_size",
            &self.attn_page_size.source,
            only(&[(Run::StaticBatches, ONE_PAGE), (Run::Generate, ONE_PAGE)]),
        );
        idle(
            "max_batch_size",
            &self.max_batch_size.source,
            only(&[
                (Run::Latency, "one request runs at a time"),
                (Run::Generate, ONE_BATCH),
                (Run::Verify, "the reference is one batch"),
                (Run::Kernels, "--batch says which steps are timed"),
            ]),
        );
        idle(
            "enable_chunked_prefill",
            &self.enable_chunked_prefill.source,
            only(&[
                (Run::Latency, "every prompt is computed in one step"),
                (Run::StaticBatches, "long prompts are always cut"),
                (Run::Generate, "long prompts are always cut"),
                (Run::Verify, "long prompts are always cut"),
                (Run::Kernels, STEPS),
            ]),
        );
        idle(
            "skip_loading_weights",
            &self.skip_loading_weights.source,
            only(&[(Run::Verify, "the checkpoint is what is verified")]),
        );
        lines
    }

    /// What the CPU leaves of a backend, if somebody asked for one that is more.
    pub fn backend_on_cpu(&self) -> Option<String> {
        let Given { value, source } = &self.compile_backend;
        let same = match (value.cuda_graphs(), value.fuses()) {
            (false, _) => return None,
            (true, false) => "torch-simple",
            (true, true) => "torch-compile",
        };
        (*source != Source::Default).then(|| {
            format!(
                "compile_backend: {value} ({source}) is {same} on the CPU, which has no CUDA graphs"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::example;
    use super::super::{KEYS, Options, parse};
    use super::*;

    fn idle(yaml: &str, run: Run, on_cpu: bool) -> Vec<String> {
        Resolved::new(Options::default(), parse("c.yaml", yaml).unwrap())
            .without_effect(run, on_cpu)
    }

    const RUNS: [Run; 5] = [
        Run::Serving,
        Run::Latency,
        Run::StaticBatches,
        Run::Generate,
        Run::Verify,
    ];

    #[test]
    fn what_nobody_gave_is_not_mentioned() {
        for run in RUNS {
            assert_eq!(idle("", run, true), [""; 0]);
        }
    }

    #[test]
    fn each_line_names_the_key_its_place_and_the_reason() {
        let yaml = "max_batch_size: 3\nsimple_shard_only: true\ncuda_graph_batch_sizes: [1]\n";
        assert_eq!(
            idle(yaml, Run::Latency, true),
            [
                "cuda_graph_batch_sizes (c.yaml:3) has no effect: the CPU has no CUDA graphs",
                "simple_shard_only (c.yaml:2) has no effect: on one device nothing is sharded",
                "max_batch_size (c.yaml:1) has no effect: one request runs at a time",
            ]
        );
        let graphs = "cuda_graph_batch_sizes: [1]\ncompile_backend: torch-compile";
        let lines = idle(graphs, Run::Serving, false);
        assert!(lines[0].ends_with("compile_backend: torch-compile has no CUDA graphs"));
        assert_eq!(
            idle("cuda_graph_batch_sizes: [1]", Run::Serving, false),
            [""; 0]
        );
    }

    #[test]
    fn timing_needs_a_gpu_and_a_backend_that_times() {
        let autotune = |more: &str, on_cpu| {
            let yaml = format!("transforms: {{autotune: {{{more}");
            idle(&yaml, Run::Serving, on_cpu)
        };
        assert_eq!(
            autotune("enabled: false, cublaslt: true}}", true),
            [
                "transforms.autotune.enabled (c.yaml:1) has no effect: the CPU has one kernel for each GEMM",
                "transforms.autotune.cublaslt (c.yaml:1) has no effect: the CPU has one kernel for each GEMM",
            ]
        );
        assert_eq!(autotune("enabled: false}}", false), [""; 0]);
        assert_eq!(autotune("cublaslt: true}}", false), [""; 0]);
        let found = autotune("enabled: false, cublaslt: true}}", false);
        assert_eq!(found.len(), 1, "{found:?}");
        let found = autotune("enabled: true}}\ncompile_backend: torch-simple", false);
        assert!(
            found[0].ends_with("compile_backend: torch-simple times no kernels"),
            "{found:?}"
        );
    }

    /// On the engine every key acts, but for those of other devices.
    #[test]
    fn on_the_engine_and_a_gpu_only_sharding_is_idle() {
        for (key, ..) in KEYS {
            let lines = idle(&format!("{key}: {}", example(key)), Run::Serving, false);
            assert_eq!(
                lines.len(),
                usize::from(*key == "simple_shard_only"),
                "{lines:?}"
            );
        }
    }

    #[test]
    fn backends_that_a_cpu_does_not_tell_apart() {
        let on_cpu = |yaml: &str| {
            Resolved::new(Options::default(), parse("c.yaml", yaml).unwrap()).backend_on_cpu()
        };
        assert_eq!(on_cpu(""), None);
        assert_eq!(on_cpu("compile_backend: compile"), None);
        let said = on_cpu("compile_backend: cudagraph").unwrap();
        assert!(said.starts_with("compile_backend: torch-cudagraph (c.yaml:1) is torch-simple on"));
    }
}
