//! `throughput` and `latency` on the CPU device with tiny models, as a user runs them.

use crate::common::{golden, write_dataset};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn lathe(family: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lathe"))
        .arg("--model")
        .arg(golden(family))
        .args([
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--log_level",
            "error",
        ])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// `lathe throughput` on a dataset.
fn throughput(family: &str, dataset: &Path, more: &[&str]) -> Output {
    let dataset = ["throughput", "--dataset", dataset.to_str().unwrap()];
    lathe(family, &[&dataset, more].concat())
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

struct Files {
    folder: tempfile::TempDir,
    dataset: PathBuf,
}

impl Files {
    fn new(n: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dataset = folder.path().join("d.jsonl");
        write_dataset(&dataset, n);
        Self { folder, dataset }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn yaml(&self, text: &str) -> PathBuf {
        let path = self.path("options.yaml");
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Output tokens of all requests under the given flags.
    fn outputs(&self, family: &str, more: &[&str]) -> Value {
        let out = self.path("out.json");
        let mut arguments = vec!["--warmup", "0", "--output_json", out.to_str().unwrap()];
        arguments.extend(more);
        let output = throughput(family, &self.dataset, &arguments);
        assert!(
            output.status.success(),
            "{family} {more:?}: {}",
            stderr(&output)
        );
        json(&out)
    }
}

/// In float32 on the CPU: batched, in chunks, in small pages, as static batches and one by one, the
/// tokens are the same bit for bit. (`serving_tokens` has all families.)
#[test]
fn the_same_tokens_however_it_is_scheduled() {
    let files = Files::new(24);
    for family in ["llama-rope3-tied", "qwen3", "gpt2"] {
        let alone = files.outputs(family, &["--concurrency", "1"]);
        assert_eq!(alone.as_object().unwrap().len(), 24);
        let batched = files.outputs(family, &[]);
        assert_eq!(batched, alone, "{family}: batched");
        let yaml = files.yaml("attn_page_size: 4\n");
        let mut chunks = vec!["--max_num_tokens", "6", "--max_batch_size", "5"];
        chunks.extend(["--config", yaml.to_str().unwrap()]);
        let chunked = files.outputs(family, &chunks);
        assert_eq!(chunked, alone, "{family}: chunks");
        let yaml = files.yaml("runtime: demollm\nmax_batch_size: 7\n");
        let fixed = files.outputs(family, &["--config", yaml.to_str().unwrap()]);
        assert_eq!(fixed, alone, "{family}: static batches");
    }
}

#[test]
fn throughput_writes_all_its_files() {
    let files = Files::new(40);
    let [report, request, log] =
        ["report.json", "request.json", "log.jsonl"].map(|f| files.path(f));
    let start = std::time::Instant::now();
    let output = throughput(
        "llama-rope3-tied",
        &files.dataset,
        &[
            "--streaming",
            "--report_json",
            report.to_str().unwrap(),
            "--request_json",
            request.to_str().unwrap(),
            "--iteration_log",
            log.to_str().unwrap(),
        ],
    );
    let wall_ms = start.elapsed().as_secs_f64() * 1e3;
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "= PERFORMANCE OVERVIEW",
        "KV cache:",
        "Pre-emptions:         0",
        "host gap",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    let report = json(&report);
    let requests = json(&request);
    let requests = requests.as_array().unwrap();
    let number = |value: &Value, key: &str| value[key].as_f64().unwrap();
    let all = |key: &'static str| requests.iter().map(move |entry| number(entry, key));
    let begin = all("start_timestamp").fold(f64::MAX, f64::min);
    let end = all("end_timestamp").fold(0.0, f64::max);
    let tokens: f64 = all("num_total_output_tokens").sum();
    let performance = &report["performance"];
    let close = |a: f64, b: f64| (a / b - 1.0).abs() < 0.01;
    assert!(close(
        number(performance, "total_latency_ms"),
        (end - begin) * 1e-6
    ));
    let rate = number(performance, "system_output_throughput_tok_s");
    assert!(close(rate, tokens / (end - begin) * 1e9));
    assert!(number(performance, "total_latency_ms") < wall_ms);
    assert_eq!(requests.len(), 40);
    assert_eq!(report["request_info"]["num_requests"], 40);
    assert_eq!(
        report["world_info"]["scheduling_policy"],
        "guaranteed_no_evict"
    );
    assert!(number(&report["streaming_metrics"], "avg_ttft_ms") > 0.0);
    let breakdown = &report["lathe"]["step_breakdown"];
    let classes = ["attention_ms", "gemm_ms", "other_ms"].map(|key| number(breakdown, key));
    assert!(classes.iter().all(|&ms| ms > 0.0), "{breakdown}");
    assert!(close(classes.iter().sum(), number(breakdown, "device_ms")));
    assert!(number(breakdown, "sampled_steps") > 0.0);
    let steps = breakdown["steps"].as_u64().unwrap();
    let log = std::fs::read_to_string(&log).unwrap();
    assert_eq!(log.lines().count() as u64, steps);
    let generated: u64 = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|line| line["numCompletedRequests"].as_u64().unwrap())
        .sum();
    assert_eq!(generated, 40);
}

#[test]
fn latency_runs_one_request_at_a_time() {
    let files = Files::new(6);
    let report = files.path("report.json");
    let output = lathe(
        "qwen3",
        &[
            "latency",
            "--dataset",
            files.dataset.to_str().unwrap(),
            "--report_json",
            report.to_str().unwrap(),
        ],
    );
    assert!(output.status.success(), "{}", stderr(&output));
    let report = json(&report);
    assert_eq!(report["world_info"]["max_batch_size"], 1);
    let concurrent = report["request_info"]["avg_num_concurrent_requests"].as_f64();
    assert!(
        concurrent.is_some_and(|n| n > 0.5 && n <= 1.0),
        "{concurrent:?}"
    );
    assert!(report["streaming_metrics"]["avg_tpot_ms"].as_f64().unwrap() > 0.0);
}

#[test]
fn an_eos_ends_outputs() {
    let files = Files::new(12);
    let all = files.outputs("phi3", &[]);
    let first = all["1"][0].as_u64().unwrap().to_string();
    let ended = files.outputs("phi3", &["--eos_id", &first]);
    for (id, tokens) in all.as_object().unwrap() {
        let tokens: Vec<u64> = serde_json::from_value(tokens.clone()).unwrap();
        let stop = tokens.iter().position(|t| t.to_string() == first);
        let expected = &tokens[..stop.map_or(tokens.len(), |at| at + 1)];
        assert_eq!(ended[id], serde_json::json!(expected), "request {id}");
    }
    assert_eq!(ended["1"].as_array().unwrap().len(), 1);
}

#[test]
fn refusals_are_one_clear_outcome() {
    let files = Files::new(3);
    let outcome = |output: Output| (output.status.code(), stderr(&output));
    let refused = |more: &[&str]| outcome(throughput("gpt2", &files.dataset, more));
    let (code, text) = refused(&["--pp", "2", "--beam_width", "4"]);
    assert_eq!(code, Some(2));
    assert!(
        text.contains("pipeline parallelism") && text.contains("beam search"),
        "{text}"
    );
    let (code, _) = refused(&["--pp", "1", "--beam_width", "1"]);
    assert_eq!(code, Some(0), "what asks for nothing special is accepted");
    let (code, text) = refused(&["--scheduler_policy", "fifo"]);
    assert_eq!(code, Some(2));
    assert!(
        text.contains("guaranteed_no_evict or max_utilization"),
        "{text}"
    );
    let (code, text) = outcome(lathe(
        "gpt2",
        &[
            "latency",
            "--dataset",
            files.dataset.to_str().unwrap(),
            "--max_seq_len",
            "9",
        ],
    ));
    assert_eq!(code, Some(1));
    assert!(text.contains("max_seq_len is 9"), "{text}");
    let (code, text) = refused(&["--eos_id", "1000000"]);
    assert_eq!(code, Some(2));
    assert!(text.contains("outside the vocabulary"), "{text}");
    let none = ["--kv_cache_free_gpu_mem_fraction", "0"];
    let (code, text) = refused(&none);
    assert_eq!(code, Some(1));
    assert!(
        text.contains("KV cache") && text.lines().count() == 1,
        "{text}"
    );
    let uncut = ["--disable_chunked_context", "--max_num_tokens", "8"];
    let (code, text) = refused(&uncut);
    assert_eq!(code, Some(1));
    assert!(
        text.contains("Requests failed: the prompt of 11 tokens is longer"),
        "{text}"
    );
}

/// Results that could not be kept are refused before the run, all reasons at once.
#[test]
fn output_files_are_checked_before_the_run() {
    let files = Files::new(4);
    let absent = files.path("none/r.json");
    let same = files.path("same.json");
    let (absent, same) = (absent.to_str().unwrap(), same.to_str().unwrap());
    let dotted = same.replace("same.json", "./same.json");
    let output = throughput(
        "gpt2",
        &files.dataset,
        &[
            "--report_json",
            absent,
            "--request_json",
            &dotted,
            "--output_json",
            same,
        ],
    );
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    let expected = format!(
        "error: --report_json: {absent} cannot be written: No such file or directory (os error 2)\n\
         --request_json and --output_json both name {same}\n"
    );
    assert_eq!(stderr(&output), expected);
}

/// Datasets that are no fit for the model, or shorter than was asked for.
#[test]
fn dataset_and_model_are_compared() {
    let files = Files::new(4);
    let long = files.path("long.jsonl");
    let request = |osl| format!("{{\"task_id\":0,\"input_ids\":[1],\"output_tokens\":{osl}}}\n");
    std::fs::write(&long, request(2) + &request(100_000)).unwrap();
    let run = |dataset: &Path, more: &[&str]| {
        let dataset = ["latency", "--dataset", dataset.to_str().unwrap()];
        lathe("gpt2", &[&dataset, more].concat())
    };
    let output = run(&long, &[]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(
        text.contains("long.jsonl: request 1: 1 input + 100000 output tokens are 100001, the model's max_position_embeddings is ")
            && text.lines().count() == 1,
        "{text}"
    );
    let output = run(
        &files.dataset,
        &["--num_requests", "9", "--log_level", "warning"],
    );
    assert!(output.status.success());
    let text = stderr(&output);
    assert!(
        text.contains("--num_requests 9: the dataset has only 4 requests"),
        "{text}"
    );
}

/// /dev/full stands for a full disk: the report is on stdout, the other files are written.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_costs_one_file() {
    let files = Files::new(4);
    let request = files.path("request.json");
    let output = throughput(
        "gpt2",
        &files.dataset,
        &[
            "--report_json",
            "/dev/full",
            "--request_json",
            request.to_str().unwrap(),
        ],
    );
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains("/dev/full cannot be written"), "{text}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("Request Throughput (req/sec)"));
    assert_eq!(json(&request).as_array().unwrap().len(), 4);
}

/// Nothing can be printed, but the files are written.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_under_stdout_costs_the_text_alone() {
    let files = Files::new(4);
    let report = files.path("report.json");
    let output = Command::new(env!("CARGO_BIN_EXE_lathe"))
        .arg("--model")
        .arg(golden("gpt2"))
        .args(["--device", "cpu", "--dtype", "float32", "throughput"])
        .arg("--dataset")
        .arg(&files.dataset)
        .arg("--report_json")
        .arg(&report)
        .args(["--log_level", "error"])
        .stdin(Stdio::null())
        .stdout(std::fs::File::create("/dev/full").unwrap())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains("No space left"), "{text}");
    assert_eq!(json(&report)["request_info"]["num_requests"], 4);
}

/// All bad lines with their numbers, before anything runs; nothing is written.
#[test]
fn bad_lines_in_the_middle_of_a_dataset() {
    let files = Files::new(5);
    let mut lines: Vec<String> = std::fs::read_to_string(&files.dataset)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    lines.insert(2, "{\"task_id\":9,\"input_ids\":[1".into());
    lines.insert(4, "{\"task_id\":9,\"input_ids\":[1]}".into());
    std::fs::write(&files.dataset, lines.join("\n")).unwrap();
    let report = files.path("report.json");
    let report_json = ["--report_json", report.to_str().unwrap()];
    let output = throughput("gpt2", &files.dataset, &report_json);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    let name = files.dataset.display();
    assert!(
        text.contains(&format!("{name}:3: not valid JSON")),
        "{text}"
    );
    assert!(
        text.contains(&format!("{name}:5: output_tokens missing")),
        "{text}"
    );
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(output.stdout.is_empty() && !report.exists());
    // What comes before the first bad line can be run.
    let output = throughput("gpt2", &files.dataset, &["--num_requests", "2"]);
    assert!(output.status.success(), "{}", stderr(&output));
}

/// A request that the engine refuses: the others run, the report is written and names it.
#[test]
fn a_request_that_is_too_long_for_a_step_fails_alone() {
    let files = Files::new(6);
    let [report, requests] = ["report.json", "requests.json"].map(|name| files.path(name));
    let output = throughput(
        "gpt2",
        &files.dataset,
        &[
            "--disable_chunked_context",
            "--max_num_tokens",
            "11",
            "--report_json",
            report.to_str().unwrap(),
            "--request_json",
            requests.to_str().unwrap(),
        ],
    );
    // Prompts have 1, 6, 11, 2, 7 and 12 tokens.
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    let reason =
        "the prompt of 12 tokens is longer than max_num_tokens 11 and chunked context is off";
    let line = format!("error: Requests failed: {reason} (1 requests)\n");
    assert_eq!(text, line);
    let report = json(&report);
    assert_eq!(report["request_info"]["num_requests"], 5);
    assert_eq!(report["lathe"]["failed_requests"][0]["error"], reason);
    assert_eq!(report["lathe"]["failed_requests"][0]["count"], 1);
    let requests = json(&requests);
    let failed: Vec<u64> = requests
        .as_array()
        .unwrap()
        .iter()
        .filter(|entry| entry["error_tokens"] == 1)
        .map(|entry| entry["id"].as_u64().unwrap())
        .collect();
    assert_eq!(failed, [5]);
}

/// Flags of trtllm-bench that ask for what is the case anyway are taken, others refused, all at once.
#[test]
fn flags_of_trtllm_bench() {
    let files = Files::new(2);
    let dataset = files.dataset.to_str().unwrap();
    let neutral = "--backend _autodeploy --tp 1 --pp 1 --ep 1 --cluster_size 1 --beam_width 1 --max_input_len 4096 \
                   --image_data_format pt --data_device cuda --no_skip_tokenizer_init --enable_chunked_context \
                   --kv-cache-free-gpu-mem-fraction 0.9 --num-requests 0 --warmup 2 --concurrency -1 --eos_id -1 \
                   --scheduler_policy max_utilization --target_input_len 8 --target_output_len 8";
    let flags: Vec<&str> = neutral.split_whitespace().collect();
    let taken = throughput("gpt2", &files.dataset, &flags);
    assert!(taken.status.success(), "{}", stderr(&taken));
    let text = String::from_utf8(taken.stdout).unwrap();
    assert!(
        text.contains("Scheduling Policy:      max_utilization"),
        "{text}"
    );
    let foreign = "--backend tensorrt --engine_dir e --pp 2 --ep 2 --cluster_size 2 --beam_width 2 --medusa_choices m \
                   --modality image --image_data_format pil --max_input_len 1 --custom_module_dirs c";
    let flags: Vec<&str> = foreign.split_whitespace().collect();
    for command in ["throughput", "latency"] {
        let refused = lathe(
            "gpt2",
            &[&[command, "--dataset", dataset], &flags[..]].concat(),
        );
        assert_eq!(refused.status.code(), Some(2));
        let text = stderr(&refused);
        let names = flags.iter().filter(|flag| flag.starts_with("--"));
        for name in names {
            assert!(text.contains(*name), "{name} in {text}");
        }
        assert_eq!(text.lines().count(), 11, "{text}");
    }
}

/// Ctrl-C in the middle: the partial report, marked, and exit code 1.
#[cfg(unix)]
#[test]
fn an_interrupt_prints_the_partial_report() {
    let files = Files::new(4);
    let long = files.path("long.jsonl");
    let line = "{\"task_id\":0,\"input_ids\":[1,2,3],\"output_tokens\":40}\n";
    std::fs::write(&long, line.repeat(100_000)).unwrap();
    let report = files.path("report.json");
    let log = files.path("none");
    // On a busy machine the first requests take their time.
    for seconds in [3, 10, 40] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_lathe"))
            .arg("--model")
            .arg(golden("gpt2"))
            .args(["--device", "cpu", "--dtype", "float32", "throughput"])
            .args(["--max_batch_size", "2"])
            .arg("--dataset")
            .arg(&long)
            .arg("--report_json")
            .arg(&report)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_secs(seconds));
        assert!(child.try_wait().unwrap().is_none(), "it still runs");
        let kill = Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status();
        assert!(kill.unwrap().success());
        let output = child.wait_with_output().unwrap();
        // Before the benchmark the signal ends the program as usual.
        let Some(code) = output.status.code() else {
            continue;
        };
        assert_eq!(code, 1);
        let error = std::fs::read_to_string(&log).unwrap();
        assert!(
            error.contains("interrupted: ") && error.contains("of 100000 requests finished"),
            "{error}"
        );
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("INCOMPLETE (interrupted): "), "{text}");
        let report = json(&report);
        let incomplete = &report["lathe"]["incomplete"];
        assert_eq!(incomplete["reason"], "interrupted");
        assert_eq!(incomplete["planned"], 100_000);
        assert_eq!(
            incomplete["finished"],
            report["request_info"]["num_requests"]
        );
        if incomplete["finished"].as_u64().unwrap() > 0 {
            return;
        }
    }
    panic!("no request finished in 40 s");
}
