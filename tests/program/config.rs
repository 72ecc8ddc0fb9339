//! The YAML file: each key, precedence, and what is refused.

use lathe::config::{
    AttnBackend, CompileBackend, GemmTuning, Given, KvCacheDtype, Options, Resolved, RuntimeKind,
    Source, parse,
};
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::PassConfig;
use serde_json::json;

/// The example of AutoDeploy's page "Benchmarking with trtllm-bench", as it stands there.
const EXAMPLE: &str = include_str!("../fixtures/autodeploy.yaml");

fn yaml(text: &str) -> Resolved {
    Resolved::new(Options::default(), parse("c.yaml", text).unwrap())
}

fn passes(text: &str) -> PassConfig {
    yaml(text).pass_config(DeviceModel::H100)
}

fn refused(text: &str) -> String {
    parse("c.yaml", text).unwrap_err().to_string()
}

#[test]
fn the_example_of_the_documentation_runs_unchanged() {
    let c = yaml(EXAMPLE);
    assert_eq!(c.compile_backend.value, CompileBackend::Opt);
    assert_eq!(c.runtime.value, RuntimeKind::Trtllm);
    assert!(!c.skip_loading_weights.value);
    assert_eq!(c.free_mem_ratio.value, 0.8);
    let sizes = c.cuda_graph_batch_sizes.value.unwrap();
    assert_eq!(sizes, [1, 2, 4, 8, 16, 32, 64, 128, 256]);
    assert_eq!(c.attn_backend.value, AttnBackend::Flashinfer);
    assert_eq!(c.max_batch_size.value, Some(256));
    assert_eq!(c.max_batch_size.source.to_string(), "c.yaml:20");
}

#[test]
fn defaults_are_those_of_a_benchmark() {
    for text in ["", "# nothing\n", "{}", "max_batch_size: null"] {
        let c = yaml(text);
        assert_eq!(c.compile_backend.value, CompileBackend::Opt);
        assert_eq!(c.free_mem_ratio.value, 0.95);
        assert_eq!(c.attn_page_size.value, 64);
        assert_eq!(c.max_batch_size.value, None);
        assert!(c.enable_chunked_prefill.value);
        assert!(passes(text).disabled.is_empty());
    }
}

#[test]
fn compile_backends() {
    let with = |b: &str| {
        let c = yaml(&format!("compile_backend: {b}"));
        let off = c.disabled().contains_key("fuse");
        let b = c.compile_backend.value;
        (off, b.cuda_graphs(), b.autotunes())
    };
    for (name, expected) in [
        ("simple", (true, false, false)),
        ("compile", (false, false, false)),
        ("cudagraph", (true, true, false)),
        ("opt", (false, true, true)),
    ] {
        assert_eq!(with(name), expected, "{name}");
        assert_eq!(with(&format!("torch-{name}")), expected, "torch-{name}");
    }
}

#[test]
fn autotuning_is_a_part_of_torch_opt() {
    let tuning = |text: &str| {
        let GemmTuning { timed, cublaslt } = yaml(text).tuning();
        (timed, cublaslt)
    };
    assert_eq!(tuning(""), (true, false));
    assert_eq!(tuning("compile_backend: torch-compile"), (false, false));
    let off = "transforms: {autotune: {enabled: false, cublaslt: true}}";
    assert_eq!(tuning(off), (false, false));
    let library = "transforms: {autotune: {cublaslt: true}}";
    assert_eq!(tuning(library), (true, true));
    assert_eq!(
        tuning(&format!("compile_backend: torch-simple\n{library}")),
        (false, false)
    );
    let error = parse("c.yaml", "transforms: {autotune: {cublas: true}}").unwrap_err();
    let text = error.to_string();
    assert!(text.contains("did you mean 'cublaslt'?"), "{text}");
}

#[test]
fn every_other_key_has_its_effect() {
    let c = yaml(
        "runtime: demollm\nskip_loading_weights: true\nmax_seq_len: 4096\nmax_num_tokens: 2048\n\
         attn_page_size: 32\nkv_cache_dtype: float16\nsimple_shard_only: true\n\
         enable_chunked_prefill: false\ncuda_graph_batch_sizes: null\nattn_backend: torch\n\
         model_kwargs: {num_hidden_layers: 2, rope_scaling: {factor: 4.0}}\n",
    );
    assert_eq!(c.runtime.value, RuntimeKind::Demollm);
    assert!(c.skip_loading_weights.value && c.simple_shard_only.value);
    assert!(!c.enable_chunked_prefill.value);
    assert_eq!(c.max_seq_len.value, Some(4096));
    assert_eq!(c.max_num_tokens.value, Some(2048));
    assert_eq!(c.attn_page_size.value, 32);
    assert_eq!(c.kv_cache_dtype.value, KvCacheDtype::Float16);
    assert_eq!(c.cuda_graph_batch_sizes.value, None);
    assert_eq!(c.cuda_graph_batch_sizes.source.to_string(), "c.yaml:9");
    assert!(c.disabled().contains_key("qkv-join"));
    let overrides: Vec<(&str, &serde_json::Value)> = c.overrides().collect();
    assert_eq!(overrides[0], ("num_hidden_layers", &json!(2)));
    assert_eq!(overrides[1], ("rope_scaling", &json!({"factor": 4.0})));
}

#[test]
fn transforms_switch_stages_and_rules_and_set_parameters() {
    let off = |text: &str| -> Vec<String> { passes(text).disabled.into_iter().collect() };
    assert_eq!(off("transforms: {fuse: {enabled: false}}"), ["fuse"]);
    assert_eq!(off("transforms: {rope: {enabled: false}}"), ["rope"]);
    assert_eq!(off("transforms: {fuse: {enabled: true}}"), [""; 0]);
    // AutoDeploy's names.
    assert_eq!(
        off("transforms:\n  insert_cached_attention:\n    enabled: false\n"),
        ["kv_cache"]
    );
    let c = yaml(
        "transforms:\n  compile_model: {backend: torch-simple, cuda_graph_batch_sizes: [3]}\n  \
         resize_kv_cache: {free_mem_ratio: 0.5}\n  detect_sharding: {simple_shard_only: true}\n  \
         extract: {decode_batch: 16, decode_context: 100, prefill_tokens: 64}\n",
    );
    assert_eq!(c.compile_backend.value, CompileBackend::Simple);
    assert_eq!(c.cuda_graph_batch_sizes.value, Some(vec![3]));
    assert_eq!(c.free_mem_ratio.value, 0.5);
    assert!(c.simple_shard_only.value);
    let p = c.pass_config(DeviceModel::CPU);
    assert_eq!(p.points.decode.env.get(lathe_ir::Sym::B), 16);
    assert_eq!(p.points.decode.context, 100);
    assert_eq!(p.points.general.env.get(lathe_ir::Sym::T), 64);
    // The key at the top wins over its spelling under transforms, in either order.
    for text in [
        "free_mem_ratio: 0.7\ntransforms: {resize_kv_cache: {free_mem_ratio: 0.5}}",
        "transforms: {resize_kv_cache: {free_mem_ratio: 0.5}}\nfree_mem_ratio: 0.7",
    ] {
        assert_eq!(yaml(text).free_mem_ratio.value, 0.7);
    }
}

#[test]
fn the_file_wins_over_the_command_line_which_wins_over_defaults() {
    let flags = Options {
        max_batch_size: Given::flag("--max_batch_size", Some(Some(8))),
        max_num_tokens: Given::flag("--max_num_tokens", Some(Some(100))),
        max_seq_len: Given::flag("--max_seq_len", None),
        ..Options::default()
    };
    let c = Resolved::new(flags, parse("c.yaml", "max_batch_size: 4").unwrap());
    assert_eq!(c.max_batch_size.value, Some(4));
    assert_eq!(c.max_num_tokens.value, Some(100));
    assert_eq!(c.max_num_tokens.source, Source::Flag("--max_num_tokens"));
    assert_eq!(c.max_seq_len.source, Source::Default);
    let rows = c.rows();
    let row = |key: &str| rows.iter().find(|r| r.0 == key).unwrap();
    assert_eq!(row("max_batch_size").2, "c.yaml:1");
    assert_eq!(row("max_num_tokens").2, "command line, --max_num_tokens");
    assert_eq!(row("max_seq_len").1, "automatic");
    assert_eq!(row("max_seq_len").2, "default");
}

#[test]
fn refusals_name_file_line_column_and_the_way_out() {
    for (text, expected) in [
        (
            "# x\nmax_batchsize: 3",
            "c.yaml:2:1: unknown key 'max_batchsize'; did you mean 'max_batch_size'?",
        ),
        (
            "free_mem_ratio: 1.5",
            "c.yaml:1:17: free_mem_ratio is 1.5, expected a number from 0.0 to 1.0",
        ),
        (
            "compile_backend: fast",
            "c.yaml:1:18: compile_backend is 'fast', expected torch-simple, torch-compile, \
             torch-cudagraph, torch-opt",
        ),
        (
            "max_seq_len: -1",
            "c.yaml:1:14: max_seq_len is -1, expected a positive integer, or null",
        ),
        (
            "cuda_graph_batch_sizes: [1, 0]",
            "c.yaml:1:25: cuda_graph_batch_sizes is [1,0], expected a list of positive integers, \
             or null",
        ),
        (
            "skip_loading_weights: 'yes'",
            "c.yaml:1:23: skip_loading_weights is 'yes', expected true or false",
        ),
        (
            "transforms:\n  fusee: {enabled: false}",
            "c.yaml:2:3: unknown stage or rule 'fusee'; did you mean 'fuse'?",
        ),
        (
            "transforms:\n  fuse: {enable: false}",
            "c.yaml:2:10: unknown parameter of fuse 'enable'; did you mean 'enabled'?",
        ),
        (
            "transforms:\n  fuse: false",
            "c.yaml:2:9: transforms.fuse is false, expected a mapping such as {enabled: false}",
        ),
        (
            "- 1",
            "c.yaml:1:1: expected a mapping of keys to values, found [1]",
        ),
        (
            "3: 4",
            "c.yaml:1:1: unknown key '3'; known: compile_backend, runtime, free_mem_ratio, \
             skip_loading_weights, cuda_graph_batch_sizes, attn_backend, max_batch_size, \
             max_seq_len, max_num_tokens, attn_page_size, kv_cache_dtype, model_kwargs, \
             simple_shard_only, transforms, enable_chunked_prefill",
        ),
    ] {
        assert_eq!(refused(text), expected, "{text}");
    }
    // All problems at once.
    let all = refused("runtme: x\nattn_page_size: 0\n");
    assert_eq!(all.lines().count(), 2, "{all}");
}

#[test]
fn malformed_yaml_has_a_position() {
    let e = refused("a: 1\nb: [1, 2\nc: 3\n");
    assert!(e.starts_with("c.yaml:3:"), "{e}");
    assert!(!e.contains('\n'), "{e}");
    let e = refused("max_seq_len: 1\nmax_seq_len: 2\n");
    assert!(e.starts_with("c.yaml:") && e.contains("max_seq_len"), "{e}");
}

/// Reading positions takes the time of the text, not its square; no more problems are listed than one can look at.
#[test]
fn thousands_of_keys() {
    let keys = |n: usize| (0..n).map(|i| format!("  key_{i}: {i}\n"));
    let text: String = keys(20_000).collect();
    let options = parse("c.yaml", &format!("model_kwargs:\n{text}")).unwrap();
    assert_eq!(options.model_kwargs.len(), 20_000);
    let source = &options.model_kwargs["key_19999"].source;
    assert!(format!("{source:?}").contains("line: 20001"), "{source:?}");
    let said = refused(&text.replace("  ", ""));
    assert_eq!(said.lines().count(), 101);
    assert!(said.ends_with("c.yaml: 19900 more problems"));
}
