//! What goes wrong, as a user meets it: one line that names the file, what was found and what to do,
//! the right exit code, and never a panic.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

fn golden() -> PathBuf {
    crate::common::golden("llama-rope3-tied")
}

/// A folder with a checkpoint, a dataset and other files to break.
struct Case {
    folder: tempfile::TempDir,
}

impl Case {
    fn new() -> Case {
        let case = Case {
            folder: tempfile::tempdir().unwrap(),
        };
        std::fs::create_dir(case.path("m")).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(golden().join(file), case.path("m").join(file)).unwrap();
        }
        case.write(
            "d.jsonl",
            r#"{"task_id": 0, "input_ids": [1, 2, 3], "output_tokens": 4}"#,
        );
        case
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// Exit code and stderr of a run in the folder.
    fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_lathe"))
            .current_dir(self.folder.path())
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!stderr.contains("panicked"), "{stderr}");
        (output.status.code(), stderr.trim_end().to_string())
    }

    /// A benchmark of the model on the CPU.
    fn benchmark(&self, dataset: &str, more: &[&str]) -> (Option<i32>, String) {
        let fixed = [
            "-m",
            "m",
            "--device",
            "cpu",
            "throughput",
            "--dataset",
            dataset,
        ];
        self.run(&[&fixed[..], more].concat())
    }

    /// The only line of a run that fails with this exit code.
    fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let (found, error) = self.run(arguments);
        assert_eq!(found, Some(code), "{arguments:?}: {error}");
        assert!(
            error.starts_with("error: ") && !error.contains('\n'),
            "{arguments:?}: {error}"
        );
        error["error: ".len()..].to_string()
    }

    /// The only line of a benchmark that fails with this exit code.
    fn benchmark_fails(&self, code: i32, more: &[&str]) -> String {
        let fixed = "-m m --device cpu throughput --dataset d.jsonl";
        let fixed: Vec<&str> = fixed.split(' ').collect();
        self.fails(code, &[&fixed[..], more].concat())
    }

    /// The only line of a benchmark that fails, and not because of how it was called.
    fn throughput(&self, more: &[&str]) -> String {
        self.benchmark_fails(1, more)
    }
}

#[test]
fn the_intact_case_runs() {
    let case = Case::new();
    let (code, error) = case.benchmark("d.jsonl", &[]);
    assert_eq!((code, error.as_str()), (Some(0), ""));
}

/// A mistyped extent is refused, or compiles as fast as any other.
#[test]
fn extents_in_the_billions() {
    let case = Case::new();
    let text = std::fs::read_to_string(case.path("m/config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    let compile = |changes: Value| {
        let mut config = config.clone();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        case.write("m/config.json", &config.to_string());
        let start = Instant::now();
        let outcome = case.run(&["-m", "m", "compile", "--target", "h100"]);
        // It takes well under a second; what depends on the extent would take minutes.
        assert!(start.elapsed() < Duration::from_secs(20), "{changes}");
        outcome
    };
    for (key, value, expected) in [
        ("vocab_size", 4_000_000_000_u64, "at most 2147483647"),
        ("intermediate_size", 1 << 62, "at most 2147483647"),
        ("num_hidden_layers", 2_000_000_000, "at most 4096 layers"),
        ("head_dim", 2_000_000_000, "at most 65536 features a head"),
        ("num_attention_heads", 2_000_000_000, "536870912 of all"),
    ] {
        let (code, error) = compile(json!({"head_dim": 16, key: value}));
        assert_eq!(code, Some(1), "{error}");
        assert!(
            error.starts_with("error: m/config.json: '") && error.contains(expected),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    for changes in [
        json!({"vocab_size": 2_000_000_000}),
        json!({"intermediate_size": 2_000_000_000}),
        json!({"max_position_embeddings": 2_000_000_000}),
        json!({"hidden_size": 2_000_000_000, "head_dim": 16}),
    ] {
        let (code, error) = compile(changes);
        assert_eq!((code, error.as_str()), (Some(0), ""));
    }
}

#[test]
fn the_model_folder() {
    let case = Case::new();
    std::fs::remove_file(case.path("m/config.json")).unwrap();
    assert_eq!(
        case.throughput(&[]),
        "m: no config.json; expected the folder of a Hugging Face checkpoint"
    );
    case.write("m/config.json", "{\"a\": 1,\n \"b\": }");
    assert_eq!(
        case.throughput(&[]),
        "m/config.json: expected value at line 2 column 7"
    );
    case.write(
        "m/config.json",
        r#"{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}"#,
    );
    let error = case.throughput(&[]);
    assert!(
        error.starts_with("m/config.json: ") && error.contains("mamba"),
        "{error}"
    );
    assert!(
        error.contains("supported: ") && error.contains("llama, mistral"),
        "{error}"
    );

    let (code, error) = case.run(&["-m", "none", "throughput", "--dataset", "d.jsonl"]);
    assert_eq!(code, Some(1));
    assert!(
        error.contains("--model none: neither a folder nor in the local Hugging Face cache"),
        "{error}"
    );
    let (code, error) = case.run(&["throughput", "--dataset", "d.jsonl"]);
    assert_eq!(code, Some(2));
    assert!(error.contains("--model is missing"), "{error}");
}

/// The header of a safetensors file and the bytes after it.
fn split(file: &[u8]) -> (serde_json::Map<String, Value>, Vec<u8>) {
    let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header = serde_json::from_slice(&file[8..8 + n]).unwrap();
    (header, file[8 + n..].to_vec())
}

fn joined(header: &serde_json::Map<String, Value>, data: &[u8]) -> Vec<u8> {
    let header = serde_json::to_vec(header).unwrap();
    [&(header.len() as u64).to_le_bytes()[..], &header, data].concat()
}

#[test]
fn the_weights() {
    let case = Case::new();
    let file = case.path("m/model.safetensors");
    let intact = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let error = case.throughput(&[]);
    assert!(
        error.contains("m: no model.safetensors and no model.safetensors.index.json"),
        "{error}"
    );

    std::fs::write(&file, &intact[..intact.len() / 2]).unwrap();
    let error = case.throughput(&[]);
    assert!(
        error.contains("m/model.safetensors: not a valid safetensors file: tensor"),
        "{error}"
    );

    let mut lying = intact.clone();
    lying[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    std::fs::write(&file, lying).unwrap();
    let error = case.throughput(&[]);
    assert!(
        error.contains("header should have 1152921504606846976 bytes"),
        "{error}"
    );

    // Everything that is wrong with the tensors at once.
    let (mut header, data) = split(&intact);
    let gone = header
        .remove("model.layers.0.input_layernorm.weight")
        .unwrap();
    header.insert("extra.weight".into(), gone);
    let down = &mut header["model.layers.0.mlp.down_proj.weight"];
    down["shape"] = json!([192, 128]);
    header["model.layers.1.mlp.gate_proj.weight"]["dtype"] = json!("I16");
    std::fs::write(&file, joined(&header, &data)).unwrap();
    let error = case.throughput(&[]);
    for part in [
        "1 tensor missing: model.layers.0.input_layernorm.weight",
        "1 tensor unexpected: extra.weight",
        "model.layers.0.mlp.down_proj.weight is [192, 128], expected [128, 192]",
        "model.layers.1.mlp.gate_proj.weight is I16",
    ] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }

    std::fs::remove_file(&file).unwrap();
    let index =
        json!({"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}});
    case.write("m/model.safetensors.index.json", &index.to_string());
    let error = case.throughput(&[]);
    assert!(
        error.contains("not in the folder: model-00001-of-00002.safetensors"),
        "{error}"
    );
}

#[test]
fn the_options_file() {
    let case = Case::new();
    let with = |yaml: &str| {
        case.write("c.yaml", yaml);
        case.benchmark_fails(2, &["--config", "c.yaml"])
    };
    let error = with("max_batch_size: [1\nx: 3\n");
    assert!(
        error.starts_with("c.yaml:2:2: did not find expected"),
        "{error}"
    );
    let error = with("max_batchsize: 3");
    assert_eq!(
        error,
        "c.yaml:1:1: unknown key 'max_batchsize'; did you mean 'max_batch_size'?"
    );
    let error = with("\"max\\nbatch\\e[2J\": \"a\\nb\"");
    assert!(
        error.starts_with("c.yaml:1:1: unknown key 'max\\nbatch\\u{1b}[2J'; "),
        "{error}"
    );
    let error = with("runtime: \"a\\nb\"");
    assert_eq!(
        error,
        "c.yaml:1:10: runtime is 'a\\nb', expected trtllm, demollm"
    );
    let error = with("model_kwargs: {hidden_size: 7.5}");
    assert!(
        error.starts_with("c.yaml:1: model_kwargs over m/config.json: 'hidden_size' is 7.5"),
        "{error}"
    );
    let error = with("kv_cache_dtype: float16");
    assert!(
        error.starts_with("kv_cache_dtype: float16 (c.yaml:1), "),
        "{error}"
    );
    let error = with("max_seq_len: 4000000000");
    assert!(
        error.contains("is longer than the model's max_position_embeddings"),
        "{error}"
    );
    // That a file is not there is no matter of how it should be written.
    let error = case.throughput(&["--config", "none.yaml"]);
    assert_eq!(error, "none.yaml: No such file or directory (os error 2)");

    case.write("s.yaml", "temperature: 1\ntop_q: 3\n");
    let error = case.benchmark_fails(2, &["--sampler_options", "s.yaml"]);
    assert!(
        error.starts_with("--sampler_options: s.yaml:2:1: unknown field `top_q`"),
        "{error}"
    );
    case.write("s.yaml", "top_p: -3\n");
    let error = case.benchmark_fails(2, &["--sampler_options", "s.yaml"]);
    assert!(error.contains("top_p"), "{error}");
    let error = case.throughput(&["--sampler_options", "none.yaml"]);
    assert_eq!(
        error,
        "--sampler_options: none.yaml: No such file or directory (os error 2)"
    );
}

#[test]
fn the_dataset() {
    let case = Case::new();
    let good = r#"{"task_id": 0, "input_ids": [1, 2], "output_tokens": 3}"#;
    case.write(
        "bad.jsonl",
        &format!(
            "{good}\n{{\"task_id\": 1}}\n{{bad\n{}\n",
            good.replace("[1, 2]", "[1, 999]")
        ),
    );
    let lathe = |dataset: &str, more: &[&str]| {
        let (code, error) = case.benchmark(dataset, more);
        assert_eq!(code, Some(1), "{error}");
        error
    };
    let error = lathe("bad.jsonl", &[]);
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(lines.len(), 3, "{error}");
    assert!(lines[0].starts_with("error: bad.jsonl:2: "), "{error}");
    assert!(
        lines[1].starts_with("bad.jsonl:3: not valid JSON"),
        "{error}"
    );
    assert_eq!(
        lines[2],
        "bad.jsonl:4: token id 999 at index 1 is outside the vocabulary of 256"
    );
    let error = lathe("d.jsonl", &["--max_seq_len", "6"]);
    assert!(
        error.contains("3 input + 4 output tokens are 7, max_seq_len is 6"),
        "{error}"
    );
    let error = lathe("none.jsonl", &[]);
    assert_eq!(
        error,
        "error: none.jsonl: No such file or directory (os error 2)"
    );
}

#[test]
fn a_model_that_does_not_fit_is_refused_before_anything_is_allocated() {
    let case = Case::new();
    // Terabytes of weights.
    case.write(
        "c.yaml",
        "skip_loading_weights: true\nmodel_kwargs: {hidden_size: 131072, num_attention_heads: 1024, \
         head_dim: 128, intermediate_size: 524288, num_hidden_layers: 64}",
    );
    let start = std::time::Instant::now();
    let error = case.throughput(&["--config", "c.yaml"]);
    assert!(
        error.starts_with("the weights need ") && error.ends_with(" TiB are missing"),
        "{error}"
    );
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
}

#[test]
fn devices() {
    let case = Case::new();
    let error = case.benchmark_fails(2, &["--tp", "2"]);
    assert!(
        error.starts_with("--tp 2: ") && error.contains("--tp 1"),
        "{error}"
    );
    if lathe_runtime::device::cuda::driver::device_count().is_ok_and(|n| n > 0) {
        return;
    }
    let (code, error) = case.run(&[
        "-m",
        "m",
        "--device",
        "cuda",
        "throughput",
        "--dataset",
        "d.jsonl",
    ]);
    assert_eq!(code, Some(1));
    assert!(
        error.contains("looked for libcuda.so.1 in") && error.contains("--device cpu"),
        "{error}"
    );
    assert_eq!(error.lines().count(), 1, "{error}");
}

#[test]
fn command_lines() {
    let case = Case::new();
    for (arguments, expected) in [
        (
            "throughput --no_such_flag",
            "unknown flag '--no_such_flag'; see lathe throughput --help",
        ),
        (
            "throughput --datasets d.jsonl",
            "unknown flag '--datasets'; did you mean '--dataset'? see lathe throughput --help",
        ),
        (
            "throughput --dataset",
            "--dataset has no value, expected <FILE>; see lathe throughput --help",
        ),
        (
            "-m m --dtype int8 compile",
            "--dtype is 'int8', expected auto, bfloat16, float16, float32; see lathe compile --help",
        ),
        (
            "-m m --device gpu throughput",
            "--device is 'gpu', expected auto, cpu, cuda or cuda:N; see lathe throughput --help",
        ),
        (
            "throughput --warmup two",
            "--warmup is 'two', expected a whole number from 0 to 100000; see lathe throughput --help",
        ),
        (
            "compare",
            "missing <REPORT> <REPORT>...; see lathe compare --help",
        ),
        (
            "no-such-command",
            "unknown command 'no-such-command'; see lathe --help",
        ),
        (
            "prepare-dataset real-dataset --dataset-name d --dataset-prompt a --dataset-prompt-key b",
            "--dataset-prompt cannot be used with --dataset-prompt-key; \
             see lathe prepare-dataset real-dataset --help",
        ),
        (
            "-m m compile --target v100",
            "--target v100: expected h100, h200 or cpu",
        ),
        (
            "passes --explain insert-kv-cach",
            "no rule 'insert-kv-cach'; did you mean 'insert-kv-cache'?",
        ),
        ("-m m explain --layer 99", "--layer 99: the last layer is 1"),
    ] {
        let words: Vec<&str> = arguments.split(' ').collect();
        assert_eq!(case.fails(2, &words), expected);
    }
    for arguments in [
        "-m m compile --dump-ir after=nothing",
        "passes --stage nothing",
        "-m m explain --op nothing",
        "-m m --device cpu generate --prompt a --top_p 7",
        "--log_level error selftest --quick --device cpu --filter nothing",
    ] {
        let words: Vec<&str> = arguments.split(' ').collect();
        let error = case.fails(2, &words);
        let named = words[words.len() - 1].trim_start_matches("after=");
        assert!(error.contains(named), "{error}");
    }
    // Help is no error, and as long as it needs to be.
    let output = Command::new(env!("CARGO_BIN_EXE_lathe"))
        .args(["throughput", "--help"])
        .output()
        .unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    assert!(String::from_utf8(output.stdout).unwrap().lines().count() > 30);

    let (code, error) = case.run(&["opt", "none.ir"]);
    assert_eq!(
        (code, error.as_str()),
        (
            Some(1),
            "error: none.ir: No such file or directory (os error 2)"
        )
    );
    case.write("x.ir", "graph \"x\" {\n  %0 = nothing : f32[B]\n}\n");
    let (code, error) = case.run(&["opt", "x.ir"]);
    assert_eq!(code, Some(1));
    assert!(error.starts_with("error: x.ir:2:"), "{error}");
    case.write(
        "x.ir",
        "graph \"x\" {\n  %0 = input {name=\"x\"} : f32[B]\n  return x=%0\n}\n",
    );
    let error = case.fails(2, &["opt", "x.ir", "--passes", "recogniz"]);
    assert_eq!(
        error,
        "no rule or stage named 'recogniz'; did you mean 'recognize'?"
    );
}
