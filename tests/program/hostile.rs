//! Numbers and files that nobody would give, on the command line and in options files: a run, or an error of one line,
//! never a panic.

use std::path::Path;
use std::process::{Command, Stdio};

const NUMBERS: [&str; 7] = [
    "0",
    "65537",
    "4294967295",
    "9223372036854775807",
    "18446744073709551615",
    "-1",
    "nan",
];

/// A folder with a model and a dataset.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let golden = crate::common::golden("llama-rope3-tied");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(file), folder.path().join(file)).unwrap();
    }
    let line = r#"{"task_id": 0, "input_ids": [1, 2, 3], "output_tokens": 4}"#;
    std::fs::write(folder.path().join("d.jsonl"), line).unwrap();
    folder
}

/// Runs the words of a command line; whether it succeeded.
fn runs(folder: &Path, line: &str) -> bool {
    let output = Command::new(env!("CARGO_BIN_EXE_lathe"))
        .current_dir(folder)
        .args("-m . --device cpu --log_level internal_error".split(' '))
        .args(line.split(' '))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    let code = output.status.code();
    assert!(matches!(code, Some(0..=2)), "{line}: {code:?} {error}");
    assert!(!error.contains("panicked"), "{line}: {error}");
    if code != Some(0) {
        assert!(error.starts_with("error: "), "{line}: {error}");
        assert_eq!(error.lines().count(), 1, "{line}: {error}");
        assert!(
            !error.trim_end().contains(char::is_control),
            "{line}: {error:?}"
        );
    }
    code == Some(0)
}

/// Each of the flags with each of the numbers.
fn flags(folder: &Path, command: &str, flags: &str) {
    for flag in flags.split(' ') {
        for n in NUMBERS {
            runs(folder, &format!("{command} {flag} {n}"));
        }
    }
}

#[test]
fn flags_of_benchmarks() {
    let folder = folder();
    let command = "throughput --dataset d.jsonl";
    assert!(runs(folder.path(), command));
    flags(
        folder.path(),
        command,
        "--num_requests --warmup --max_batch_size --max_num_tokens --max_seq_len --target_input_len \
         --target_output_len --concurrency --eos_id --kv_cache_free_gpu_mem_fraction",
    );
    flags(
        folder.path(),
        "latency --dataset d.jsonl",
        "--num_requests --warmup --max_seq_len",
    );
}

#[test]
fn flags_of_other_commands() {
    let folder = folder();
    let path = folder.path();
    flags(path, "kernels --runs 1", "--batch --prefill --context");
    flags(path, "explain", "--layer");
    flags(
        path,
        "compile --target h100",
        "--max_batch_size --max_num_tokens --max_seq_len",
    );
    flags(path, "selftest --quick --filter zebra", "--seed");
    let given = "prepare-dataset -o o.json token-norm-dist";
    assert!(runs(
        path,
        &format!(
            "{given} --num-requests 2 --input-mean 3 --input-stdev 0 --output-mean 3 --output-stdev 0"
        )
    ));
    for n in NUMBERS {
        runs(
            path,
            &format!(
                "{given} --num-requests 1 --input-mean {n} --input-stdev 0 --output-mean 3 --output-stdev {n}"
            ),
        );
        runs(
            path,
            &format!(
                "prepare-dataset -o o.json token-unif-dist --num-requests 1 --input-min 1 --input-max {n} --output-min 1 --output-max 1"
            ),
        );
    }
    runs(
        path,
        "prepare-dataset -o o.json --rand-task-id 5 3 token-unif-dist --num-requests 1 --input-min 1 --input-max 1 --output-min 1 --output-max 1",
    );
}

#[test]
fn numbers_of_options_files() {
    let folder = folder();
    let yaml = folder.path().join("c.yaml");
    for key in [
        "free_mem_ratio",
        "cuda_graph_batch_sizes",
        "max_batch_size",
        "max_seq_len",
        "max_num_tokens",
        "attn_page_size",
        "transforms.extract.decode_batch",
        "transforms.extract.decode_context",
        "transforms.extract.prefill_tokens",
    ] {
        for n in NUMBERS {
            let value = match key {
                "cuda_graph_batch_sizes" => format!("[{n}]"),
                _ => n.to_string(),
            };
            let text = match key.strip_prefix("transforms.extract.") {
                Some(key) => format!("transforms: {{extract: {{{key}: {value}}}}}\n"),
                None => format!("{key}: {value}\n"),
            };
            for runtime in ["trtllm", "demollm"] {
                std::fs::write(&yaml, format!("runtime: {runtime}\n{text}")).unwrap();
                runs(
                    folder.path(),
                    "throughput --dataset d.jsonl --config c.yaml",
                );
            }
            runs(folder.path(), "compile --target h100 --config c.yaml");
            runs(folder.path(), "kernels --runs 1 --batch 1 --config c.yaml");
        }
    }
}

#[test]
fn options_files() {
    let folder = folder();
    for text in [
        "a: &a [*a]",
        "&a a: *a",
        "? [1, 2]\n: 3",
        "!x a: 1",
        "runtime: !t trtllm",
        "a: b: c",
        "\t",
        "- 1",
        "1",
        "\"\\u0000\": 1",
        "{a: 1",
        "model_kwargs: {1: 2, [a]: 3}",
        "<<: {a: 1}",
        "max_batch_size: 1\nmax_batch_size: 2",
        "transforms: {fuse: {enabled: !x true}}",
        "runtime: |\n  x\n  y\n",
        "runtime: \"\\e[2J\"",
        "\"a\\nb\": 1",
        "model_kwargs: {hidden_size: \"a\\nb\"}",
        "model_kwargs: {model_type: \"a\\nb\\e\"}",
        "a: \u{85}\u{2028}",
        &"[".repeat(3000),
        &"a: {".repeat(3000),
    ] {
        std::fs::write(folder.path().join("c.yaml"), text).unwrap();
        runs(
            folder.path(),
            "throughput --dataset d.jsonl --config c.yaml",
        );
        runs(
            folder.path(),
            "throughput --dataset d.jsonl --sampler_options c.yaml",
        );
    }
}
