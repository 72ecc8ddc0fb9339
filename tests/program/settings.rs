//! Each key of the YAML file, by what it changes when a model is compiled and run.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn golden() -> PathBuf {
    crate::common::golden("llama-rope3-tied")
}

/// A folder with a dataset, a YAML file and what runs leave behind.
struct Bench {
    folder: tempfile::TempDir,
    model: PathBuf,
}

/// What a benchmark left behind.
struct Ran {
    report: Value,
    steps: Vec<Value>,
    tokens: Value,
}

impl Ran {
    /// The largest sum of some numbers of a step.
    fn most(&self, keys: &[&str]) -> u64 {
        let of = |step: &Value| -> u64 {
            let stats = &step["inflightBatchingStats"];
            keys.iter().map(|k| stats[*k].as_u64().unwrap()).sum()
        };
        self.steps.iter().map(of).max().unwrap()
    }

    fn warned(&self, text: &str) -> bool {
        let all = self.report["lathe"]["warnings"].as_array();
        let mut all = all.into_iter().flatten();
        all.any(|w| w.as_str().unwrap().contains(text))
    }
}

impl Bench {
    /// With 24 requests.
    fn new() -> Bench {
        let bench = Bench {
            folder: tempfile::tempdir().unwrap(),
            model: golden(),
        };
        crate::common::write_dataset(&bench.path("d.jsonl"), 24);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn lathe(&self, yaml: &str, arguments: &[&str]) -> Output {
        std::fs::write(self.path("c.yaml"), yaml).unwrap();
        Command::new(env!("CARGO_BIN_EXE_lathe"))
            .current_dir(self.folder.path())
            .arg("--model")
            .arg(&self.model)
            .args(["--device", "cpu", "--dtype", "float32"])
            .args(arguments)
            .args(["--config", "c.yaml"])
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn benchmark(&self, command: &str, yaml: &str, more: &[&str]) -> Ran {
        let mut arguments = vec![command, "--dataset", "d.jsonl", "--warmup", "0"];
        arguments.extend(["--report_json", "report.json"]);
        if !yaml.contains("demollm") {
            arguments.extend(["--iteration_log", "log.jsonl"]);
        }
        if command == "throughput" {
            arguments.extend(["--output_json", "tokens.json"]);
        }
        arguments.extend(more);
        let output = self.lathe(yaml, &arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{yaml}: {stderr}");
        let read = |name: &str| std::fs::read_to_string(self.path(name)).unwrap_or_default();
        let json = |text: &str| serde_json::from_str(text).unwrap_or(Value::Null);
        Ran {
            report: json(&read("report.json")),
            steps: read("log.jsonl").lines().map(json).collect(),
            tokens: json(&read("tokens.json")),
        }
    }

    fn throughput(&self, yaml: &str) -> Ran {
        self.benchmark("throughput", yaml, &[])
    }

    /// What a run that is refused says.
    fn refused(&self, command: &str, yaml: &str, more: &[&str]) -> String {
        let mut arguments = vec![command];
        if ["throughput", "latency"].contains(&command) {
            arguments.extend(["--dataset", "d.jsonl"]);
        }
        arguments.extend(more);
        let output = self.lathe(yaml, &arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{command} {yaml}: {stderr}");
        stderr.trim_end().to_string()
    }

    fn compiled(&self, yaml: &str, target: &str) -> String {
        let output = self.lathe(yaml, &["compile", "--dry-run", "--target", target]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{yaml}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }
}

/// Kernels of a decode step, by the dry run.
fn kernels(out: &str) -> usize {
    let line = out.lines().find(|l| l.starts_with("decode program ("));
    let words: Vec<&str> = line.unwrap().split_whitespace().collect();
    words[words.len() - 2].parse().unwrap()
}

/// The line below `decode steps`.
fn steps(out: &str) -> &str {
    let (_, rest) = out.split_once("decode steps\n  ").unwrap();
    rest.lines().next().unwrap()
}

#[test]
fn compile_backend_decides_about_fusion_and_graphs() {
    let bench = Bench::new();
    let plain = bench.throughput("").tokens;
    assert_eq!(plain.as_object().unwrap().len(), 24);
    let mut unfused = 0;
    for (name, fused, graphs) in [
        ("simple", false, false),
        ("cudagraph", false, true),
        ("compile", true, false),
        ("opt", true, true),
    ] {
        for word in [name.to_string(), format!("torch-{name}")] {
            let yaml = format!("compile_backend: {word}");
            let out = bench.compiled(&yaml, "h100");
            match fused {
                false => unfused = kernels(&out),
                true => assert!(kernels(&out) < unfused, "{} of {unfused}", kernels(&out)),
            }
            let launched = steps(&out).starts_with("one CUDA graph each");
            assert_eq!(launched, graphs, "{word}: {}", steps(&out));
        }
        let ran = bench.throughput(&format!("compile_backend: {name}"));
        assert_eq!(ran.tokens, plain, "{name}");
        let same = format!("compile_backend: torch-{name} (c.yaml:1) is torch-");
        assert_eq!(ran.warned(&same), graphs, "the CPU captures nothing");
    }
}

#[test]
fn runtime_chooses_continuous_or_static_batches() {
    let bench = Bench::new();
    let policy = |r: &Ran| r.report["world_info"]["scheduling_policy"].clone();
    let engine = bench.throughput("runtime: trtllm");
    let fixed = bench.throughput("runtime: demollm\nmax_batch_size: 7");
    assert_eq!(policy(&engine), "guaranteed_no_evict");
    assert_eq!(policy(&fixed), "static");
    assert_eq!(engine.tokens, fixed.tokens);
    let targets = ["--target_input_len", "4"];
    let idle = bench.benchmark("throughput", "runtime: demollm", &targets);
    assert!(idle.warned("--target_input_len has no effect: runtime: demollm"));
    assert!(!idle.warned("--scheduler_policy"));
    let idle = bench.throughput("runtime: demollm\nattn_page_size: 4");
    assert!(idle.warned("attn_page_size (c.yaml:2) has no effect: each sequence has one page"));
}

/// Bytes of a line of /proc/meminfo.
#[cfg(target_os = "linux")]
fn meminfo(key: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|l| l.starts_with(key)).unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024.0
}

#[cfg(target_os = "linux")]
#[test]
fn free_mem_ratio_bounds_the_cache() {
    let bench = Bench::new();
    let pages = |r: &Ran| r.report["lathe"]["kv_cache"]["num_pages"].as_u64().unwrap();
    let all = bench.throughput("attn_page_size: 4\nfree_mem_ratio: 0.9");
    // Half of the pages, by the memory that there is now: it changes, but hardly by half.
    let page_bytes = 4.0 * (2 * 2 * 2 * 16 * 4) as f64;
    let free = meminfo("MemAvailable:").min(meminfo("MemTotal:") / 4.0);
    let ratio = pages(&all) as f64 / 2.0 * page_bytes / free;
    let some = bench.throughput(&format!("attn_page_size: 4\nfree_mem_ratio: {ratio:.12}"));
    assert!(
        pages(&some) < pages(&all),
        "{} {}",
        pages(&some),
        pages(&all)
    );
    assert_eq!(some.tokens, all.tokens);
    let none = bench.refused("throughput", "free_mem_ratio: 0.0", &[]);
    assert!(none.contains("KV cache, 0 B are left for it"), "{none}");
}

#[test]
fn skip_loading_weights_needs_none() {
    let mut bench = Bench::new();
    let bare = bench.path("model");
    std::fs::create_dir(&bare).unwrap();
    std::fs::copy(golden().join("config.json"), bare.join("config.json")).unwrap();
    bench.model = bare;
    let missing = bench.refused("throughput", "skip_loading_weights: false", &[]);
    assert!(missing.contains("safetensors"), "{missing}");
    let ran = bench.throughput("skip_loading_weights: true");
    assert_eq!(ran.report["request_info"]["num_requests"], 24);
}

#[test]
fn cuda_graph_batch_sizes_are_what_steps_are_padded_to() {
    let bench = Bench::new();
    let yaml = "cuda_graph_batch_sizes: [1, 4, 16]\nmax_batch_size: 20";
    let out = bench.compiled(yaml, "h100");
    assert_eq!(
        steps(&out),
        "one CUDA graph each, padded to 1, 4, 16 rows; kernel by kernel, padded to 24 rows"
    );
    let usual = bench.compiled("max_batch_size: 20", "h100");
    assert_eq!(
        steps(&usual),
        "one CUDA graph each, padded to 1, 2, 4, 8, 16, 24 rows"
    );
    let why = "cuda_graph_batch_sizes (c.yaml:1) has no effect: the CPU has no CUDA graphs";
    assert!(
        bench
            .compiled(yaml, "cpu")
            .contains(&format!("note: {why}"))
    );
    assert!(bench.throughput(yaml).warned(why));
}

#[test]
fn attn_backend_torch_leaves_attention_unfused() {
    let bench = Bench::new();
    let [fused, apart] = ["flashinfer", "torch"].map(|word| {
        let yaml = format!("attn_backend: {word}");
        let out = bench.compiled(&yaml, "h100");
        let (_, program) = out.split_once("decode program (").unwrap();
        let whole = program.contains("attn_qkv");
        assert_eq!(whole, word == "flashinfer", "{out}");
        assert_eq!(program.contains("attn_step"), !whole, "{out}");
        (kernels(&out), bench.throughput(&yaml).tokens)
    });
    assert!(fused.0 < apart.0, "{} {}", fused.0, apart.0);
    assert_eq!(fused.1, apart.1);
}

#[test]
fn sizes_of_steps() {
    let bench = Bench::new();
    let usual = bench.throughput("");
    let few = bench.throughput("max_batch_size: 3");
    assert_eq!(few.most(&["numScheduledRequests"]), 3);
    assert!(usual.most(&["numScheduledRequests"]) > 3);
    assert_eq!(few.report["world_info"]["max_batch_size"], 3);
    let rows = ["numCtxTokens", "numGenRequests"];
    let short = bench.throughput("max_num_tokens: 6\nmax_batch_size: 5");
    assert!(short.most(&rows) <= 6 && usual.most(&rows) > 6);
    let pages = bench.throughput("attn_page_size: 4");
    for (ran, size) in [(&usual, 64), (&pages, 4)] {
        let step = &ran.steps[0]["kvCacheStats"];
        assert_eq!(step["tokensPerBlock"], size);
    }
    for ran in [few, short, pages] {
        assert_eq!(ran.tokens, usual.tokens);
    }
    let long = bench.refused("throughput", "max_seq_len: 9", &[]);
    assert!(long.contains("max_seq_len is 9"), "{long}");
    // The file wins over the flag.
    let both = bench.benchmark(
        "throughput",
        "max_batch_size: 3",
        &["--max_batch_size", "9"],
    );
    assert_eq!(both.report["world_info"]["max_batch_size"], 3);
}

#[test]
fn enable_chunked_prefill_cuts_long_prompts() {
    let bench = Bench::new();
    let sizes = "max_num_tokens: 8\nmax_batch_size: 4\n";
    let cut = bench.throughput(&format!("{sizes}enable_chunked_prefill: true"));
    assert!(cut.most(&["numCtxTokens"]) <= 8);
    let whole = format!("{sizes}enable_chunked_prefill: false");
    let failed = bench.refused("throughput", &whole, &[]);
    assert!(
        failed.contains("the prompt of 11 tokens is longer than max_num_tokens 8"),
        "{failed}"
    );
}

#[test]
fn kv_cache_dtype_is_that_of_the_activations() {
    let bench = Bench::new();
    let ran = bench.throughput("kv_cache_dtype: float32");
    assert_eq!(ran.report["engine"]["kv_cache_dtype"], "f32");
    for command in ["throughput", "compile"] {
        let error = bench.refused(command, "# x\nkv_cache_dtype: bfloat16", &[]);
        assert_eq!(
            error,
            "error: kv_cache_dtype: bfloat16 (c.yaml:2), but the cache has the type of the activations, \
             float32; use auto, or --dtype bfloat16"
        );
    }
}

#[test]
fn model_kwargs_change_the_model() {
    let bench = Bench::new();
    let two = bench.compiled("", "h100");
    let three = bench.compiled("model_kwargs: {num_hidden_layers: 3}", "h100");
    assert!(two.contains(", 2 layers,") && three.contains(", 3 layers,"));
    assert!(kernels(&three) > kernels(&two));
    // The checkpoint has no third layer; its second one may be left out.
    let missing = bench.refused("throughput", "model_kwargs: {num_hidden_layers: 3}", &[]);
    assert!(missing.contains("model.layers.2."), "{missing}");
    let cut = "model_kwargs: {num_hidden_layers: 1}";
    assert_ne!(bench.throughput(cut).tokens, bench.throughput("").tokens);
    let random = "skip_loading_weights: true\nmodel_kwargs: {num_hidden_layers: ";
    let [one, three] = [1, 3].map(|n| bench.throughput(&format!("{random}{n}}}")).tokens);
    assert_ne!(one, three);
}

#[test]
fn simple_shard_only_says_that_nothing_is_sharded() {
    let bench = Bench::new();
    let why = "simple_shard_only (c.yaml:1) has no effect: on one device nothing is sharded";
    let out = bench.compiled("simple_shard_only: true", "h100");
    assert!(out.contains(&format!("note: {why}")), "{out}");
    assert!(bench.throughput("simple_shard_only: true").warned(why));
    let two = bench.refused("throughput", "simple_shard_only: true", &["--tp", "2"]);
    assert!(two.contains("--tp 2"), "{two}");
}

#[test]
fn transforms_switch_and_set() {
    let bench = Bench::new();
    let usual = bench.throughput("").tokens;
    let all = kernels(&bench.compiled("", "h100"));
    for name in [
        "fuse",
        "swiglu",
        "gate-up-join",
        "fuse_gemms",
        "match_swiglu_pattern",
    ] {
        let yaml = format!("transforms: {{{name}: {{enabled: false}}}}");
        let n = kernels(&bench.compiled(&yaml, "h100"));
        assert!(n > all, "{name}: {n} of {all}");
        assert_eq!(bench.throughput(&yaml).tokens, usual, "{name}");
    }
    let off = "transforms: {insert_cached_attention: {enabled: false}}";
    let none = bench.refused("throughput", off, &[]);
    assert!(
        none.contains("no KV cache") && none.contains("switched off"),
        "{none}"
    );
    // Parameters: those of `extract`, and other spellings of keys.
    let at = "transforms: {extract: {decode_batch: 16, decode_context: 100, prefill_tokens: 64}}";
    let out = bench.compiled(at, "h100");
    for part in ["batch 16, context 100, h100", "64 tokens, h100"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let time = |out: &str| {
        let line = out.lines().find(|l| l.starts_with("roofline of decode"));
        line.unwrap().split(": ").nth(1).unwrap().to_string()
    };
    assert_ne!(time(&out), time(&bench.compiled("", "h100")));
    let simple = bench.compiled(
        "transforms: {compile_model: {backend: torch-simple}}",
        "h100",
    );
    assert!(kernels(&simple) > all && steps(&simple).starts_with("launched kernel by kernel"));
    let torch = "transforms: {insert_cached_attention: {backend: torch}}";
    assert!(kernels(&bench.compiled(torch, "h100")) > all);
    let sizes = "transforms: {compile_model: {cuda_graph_batch_sizes: [2]}}\nmax_batch_size: 2";
    assert_eq!(
        steps(&bench.compiled(sizes, "h100")),
        "one CUDA graph each, padded to 2 rows"
    );
    let zero = "transforms: {resize_kv_cache: {free_mem_ratio: 0.0}}";
    let none = bench.refused("throughput", zero, &[]);
    assert!(none.contains("KV cache"), "{none}");
    let shard = bench.throughput("transforms: {detect_sharding: {simple_shard_only: true}}");
    assert!(shard.warned("simple_shard_only (c.yaml:1) has no effect"));
}

/// The example of AutoDeploy's page, as it stands there.
#[test]
fn the_example_of_the_documentation_runs() {
    let bench = Bench::new();
    let yaml = include_str!("../fixtures/autodeploy.yaml");
    let ran = bench.throughput(yaml);
    assert_eq!(ran.tokens, bench.throughput("").tokens);
    assert_eq!(ran.report["world_info"]["kv_cache_percentage"], 0.8);
    let out = bench.compiled(yaml, "h100");
    assert_eq!(
        steps(&out),
        "one CUDA graph each, padded to 1, 2, 4, 8, 16, 32, 64, 128, 256 rows"
    );
}

/// The file is read by every command that runs a model, under both names.
#[test]
fn commands_that_take_the_file() {
    let mut bench = Bench::new();
    let latency = bench.benchmark("latency", "attn_page_size: 4\nmax_batch_size: 5", &[]);
    assert_eq!(latency.report["lathe"]["kv_cache"]["page_size"], 4);
    assert!(latency.warned("max_batch_size (c.yaml:2) has no effect: one request runs at a time"));

    let verify = |yaml: &str| bench.lathe(yaml, &["verify"]);
    let fine = verify("max_num_tokens: 5\nattn_page_size: 3\ntransforms: {fuse: {enabled: false}}");
    assert!(
        fine.status.success(),
        "{}",
        String::from_utf8_lossy(&fine.stderr)
    );
    let idle = String::from_utf8(verify("max_batch_size: 3").stderr).unwrap();
    assert!(
        idle.contains("max_batch_size (c.yaml:1) has no effect"),
        "{idle}"
    );
    let other = verify("model_kwargs: {rms_norm_eps: 0.5}");
    assert_eq!(other.status.code(), Some(1), "another model");
    let short = bench.refused("verify", "max_seq_len: 9", &[]);
    assert!(short.contains("max_seq_len is 9"), "{short}");

    // A tokenizer of the words w0 to w255.
    let worded = bench.path("model");
    std::fs::create_dir(&worded).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden().join(file), worded.join(file)).unwrap();
    }
    let vocab: serde_json::Map<String, Value> =
        (0..256).map(|i| (format!("w{i}"), json!(i))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
        "decoder": null, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    });
    std::fs::write(worded.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    bench.model = worded;
    let prompt = [
        "--prompt",
        "w3 w14 w15 w9",
        "--max_tokens",
        "6",
        "--ignore_eos",
    ];
    let generate = |yaml: &str| {
        let output = bench.lathe(yaml, &[&["generate"], &prompt[..]].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{yaml}: {stderr}");
        (String::from_utf8(output.stdout).unwrap(), stderr)
    };
    let (text, _) = generate("");
    assert_eq!(text.split_whitespace().count(), 6, "{text}");
    assert_eq!(
        generate("max_num_tokens: 2\ntransforms: {fuse: {enabled: false}}").0,
        text
    );
    assert_ne!(generate("skip_loading_weights: true").0, text);
    let (_, idle) = generate("free_mem_ratio: 0.5");
    assert!(
        idle.contains("free_mem_ratio (c.yaml:1) has no effect"),
        "{idle}"
    );
    let short = bench.refused("generate", "max_seq_len: 9", &prompt);
    assert!(short.contains("10 tokens, max_seq_len is 9"), "{short}");

    for (command, more) in [
        ("throughput", &[][..]),
        ("latency", &[]),
        ("generate", &prompt),
        ("verify", &[]),
        ("compile", &[]),
        ("explain", &[]),
    ] {
        let error = bench.refused(command, "max_batchsize: 3", more);
        let expected =
            "error: c.yaml:1:1: unknown key 'max_batchsize'; did you mean 'max_batch_size'?";
        assert_eq!(error, expected, "{command}");
        // The other name of the flag, and its other spelling.
        for flag in ["--extra_llm_api_options", "--extra-llm-api-options"] {
            let output = Command::new(env!("CARGO_BIN_EXE_lathe"))
                .current_dir(bench.folder.path())
                .args([&["-m", "model", command, flag, "c.yaml"], more].concat())
                .output()
                .unwrap();
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert!(stderr.contains(expected), "{command} {flag}: {stderr}");
        }
    }
}

#[test]
fn phases_of_a_benchmark_in_json_logs_and_in_the_report() {
    let bench = Bench::new();
    let arguments = [
        "throughput",
        "--dataset",
        "d.jsonl",
        "--report_json",
        "r.json",
    ];
    let json_logs = [&arguments[..], &["--log_format", "json"]].concat();
    let output = bench.lathe("", &json_logs);
    let lines = String::from_utf8(output.stderr).unwrap();
    let phases: Vec<String> = lines
        .lines()
        .map(|l| serde_json::from_str::<Value>(l).unwrap_or_else(|e| panic!("{l}: {e}")))
        .filter(|l| l["seconds"].is_number())
        .map(|l| l["phase"].as_str().unwrap().to_string())
        .collect();
    assert_eq!(phases, ["compile", "load weights", "benchmark"]);
    // Without a terminal nothing of it is drawn.
    let output = bench.lathe("", &arguments);
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    let report: Value =
        serde_json::from_str(&std::fs::read_to_string(bench.path("r.json")).unwrap()).unwrap();
    let named: Vec<&str> = report["lathe"]["phases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        named,
        ["import", "passes", "lower", "load weights", "benchmark"]
    );
}
