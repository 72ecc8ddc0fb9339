//! `prepare-dataset` as a user runs it.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn lathe(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lathe"))
        .args(arguments)
        .env_remove("LATHE_LOG")
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A folder with a config.json of 500 tokens, two of them ending a sequence.
fn model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(
        folder.path().join("config.json"),
        r#"{"vocab_size": 500, "eos_token_id": [2, 499]}"#,
    )
    .unwrap();
    folder
}

fn path(folder: &tempfile::TempDir) -> &str {
    folder.path().to_str().unwrap()
}

fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn norm_dist_to_stdout() {
    let model = model();
    let arguments =
        "--num-requests 20 --input-mean 32 --input-stdev 0 --output-mean 16 --output-stdev 4";
    let arguments: Vec<&str> = [
        "--model",
        path(&model),
        "prepare-dataset",
        "--stdout",
        "token-norm-dist",
    ]
    .into_iter()
    .chain(arguments.split(' '))
    .collect();
    let text = stdout(&lathe(&arguments));
    assert!(!text.contains(' '), "the lines have no spaces");
    let requests = lines(&text);
    assert_eq!(requests.len(), 20);
    for (index, request) in requests.iter().enumerate() {
        assert_eq!(
            request.as_object().unwrap().keys().collect::<Vec<_>>(),
            ["task_id", "input_ids", "output_tokens"]
        );
        assert_eq!(request["task_id"], index);
        let ids = request["input_ids"].as_array().unwrap();
        assert_eq!(ids.len(), 32);
        assert!(
            ids.iter()
                .all(|id| id.as_u64().unwrap() < 500 && *id != 2 && *id != 499)
        );
        assert!(request["output_tokens"].as_u64().unwrap() >= 1);
    }
    assert_eq!(
        stdout(&lathe(&arguments)),
        text,
        "the same seed gives the same bytes"
    );
    let other: Vec<&str> = arguments
        .iter()
        .copied()
        .chain(["--random-seed", "421"])
        .collect();
    assert_ne!(stdout(&lathe(&other)), text);
}

#[test]
fn flags_in_both_spellings_on_both_sides() {
    let model = model();
    let kebab = [
        "prepare-dataset",
        "--random-seed",
        "7",
        "--task-id",
        "5",
        "--stdout",
        "token-unif-dist",
        "--num-requests",
        "3",
        "--input-min",
        "2",
        "--input-max",
        "9",
        "--output-min",
        "1",
        "--output-max",
        "4",
        "--model_path",
        path(&model),
    ];
    let underscore = [
        "--model-path",
        path(&model),
        "prepare-dataset",
        "token-unif-dist",
        "--num_requests",
        "3",
        "--input_min=2",
        "--input_max",
        "9",
        "--output_min",
        "1",
        "--output_max",
        "4",
        "--random_seed=7",
        "--task_id=5",
        "--stdout",
    ];
    let text = stdout(&lathe(&kebab));
    assert_eq!(text, stdout(&lathe(&underscore)));
    for request in lines(&text) {
        assert_eq!(request["task_id"], 5);
        assert!((2..=9).contains(&request["input_ids"].as_array().unwrap().len()));
        assert!((1..=4).contains(&request["output_tokens"].as_u64().unwrap()));
    }
}

#[test]
fn to_a_file_with_random_ids() {
    let model = model();
    let file = model.path().join("synthetic_4_2.txt");
    let output = lathe(&[
        "-m",
        path(&model),
        "prepare-dataset",
        "--output",
        file.to_str().unwrap(),
        "--rand-task-id",
        "-3",
        "3",
        "token-norm-dist",
        "--num-requests",
        "50",
        "--input-mean",
        "4",
        "--input-stdev",
        "0",
        "--output-mean",
        "2",
        "--output-stdev",
        "0",
    ]);
    assert_eq!(stdout(&output), "");
    let requests = lines(&std::fs::read_to_string(file).unwrap());
    assert_eq!(requests.len(), 50);
    assert!(
        requests
            .iter()
            .all(|request| (-3..=3).contains(&request["task_id"].as_i64().unwrap()))
    );
    assert!(
        requests
            .iter()
            .any(|request| request["task_id"] != requests[0]["task_id"])
    );
}

#[track_caller]
fn assert_error(arguments: &[&str], code: i32, expected: &str) {
    let output = lathe(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(stderr.contains(expected), "{stderr}");
    assert!(output.stdout.is_empty());
}

#[test]
fn errors_have_one_line_and_a_code() {
    let norm = [
        "prepare-dataset",
        "--stdout",
        "token-norm-dist",
        "--num-requests",
        "1",
        "--input-mean",
        "4",
        "--input-stdev",
        "0",
        "--output-mean",
        "2",
        "--output-stdev",
        "0",
    ];
    let with = |extra: &[&'static str]| [norm.as_slice(), extra].concat();
    assert_error(
        &norm,
        2,
        "error: --model is missing: give a checkpoint folder or a hub id\n",
    );
    assert_error(
        &with(&["-m", "/no/such"]),
        1,
        "error: --model /no/such: neither a folder nor in the local",
    );
    assert_error(
        &with(&["--lora-dir", "x"]),
        2,
        "LoRA adapters are not supported",
    );
    assert_error(&norm[..9], 2, "--output-mean");
    let line = "prepare-dataset --stdout token-unif-dist --num-requests 1 --input-min 1 --input-max 1 --output-min 5 --output-max 3";
    let swapped: Vec<&str> = line.split(' ').chain(["-m", "/"]).collect();
    assert_error(
        &swapped,
        2,
        "error: --output-min 5 --output-max 3: expected 1 <= min <= max",
    );
    let empty = tempfile::tempdir().unwrap();
    let arguments = [norm.as_slice(), &["-m", path(&empty)]].concat();
    assert_error(
        &arguments,
        1,
        "neither vocab_size in a config.json nor a tokenizer.json",
    );
    let model = model();
    let full = [
        norm.as_slice(),
        &["-m", path(&model), "--output", "/dev/full"],
    ]
    .concat();
    let to_full: Vec<&str> = full
        .into_iter()
        .filter(|argument| *argument != "--stdout")
        .collect();
    if Path::new("/dev/full").exists() {
        assert_error(
            &to_full,
            1,
            "error: /dev/full cannot be written: No space left on device",
        );
    }
    std::fs::write(model.path().join("config.json"), "{").unwrap();
    assert_error(
        &[norm.as_slice(), &["-m", path(&model)]].concat(),
        1,
        "config.json: not valid JSON: EOF",
    );
}

#[test]
fn real_text() {
    let model = tokenizer_folder();
    let rows = model.path().join("train.jsonl");
    std::fs::write(
        &rows,
        "{\"question\":\"abc\",\"hint\":\"x\",\"answer\":\"hello\"}\n\n{\"question\":\"far too long\",\"hint\":\"x\",\"answer\":\"a\"}\n\
         {\"question\":\"d\",\"hint\":\"yz\",\"answer\":\"ok\"}\n",
    )
    .unwrap();
    let base = [
        "-m",
        path(&model),
        "prepare-dataset",
        "--stdout",
        "real-dataset",
        "--dataset-name",
        path(&model),
        "--dataset-input-key",
        "question",
        "--dataset-prompt-key",
        "hint",
    ];
    let requests = lines(&stdout(&lathe(
        &[
            base.as_slice(),
            &[
                "--dataset-split",
                "train",
                "--dataset-output-key",
                "answer",
                "--max-input-len",
                "6",
            ],
        ]
        .concat(),
    )));
    // One token a byte: "x abc" and "yz d"; answers of 5 and 2.
    let summary: Vec<(u64, usize, u64)> = requests
        .iter()
        .map(|r| {
            (
                r["task_id"].as_u64().unwrap(),
                r["input_ids"].as_array().unwrap().len(),
                r["output_tokens"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(summary, [(0, 5, 5), (1, 4, 2)]);

    let split = [
        "--dataset-split",
        "train",
        "--output-len-dist",
        "9,0",
        "--num-requests",
        "1",
    ];
    let requests = lines(&stdout(&lathe(&[base.as_slice(), &split].concat())));
    assert_eq!(
        (requests.len(), &requests[0]["output_tokens"]),
        (1, &Value::from(9))
    );

    let text = model.path().join("prompts.txt");
    std::fs::write(&text, "ab\ncdef\n").unwrap();
    let arguments = [
        "-m",
        path(&model),
        "prepare-dataset",
        "--stdout",
        "real-dataset",
        "--dataset-name",
        text.to_str().unwrap(),
        "--output-len-dist",
        "3,0",
    ];
    let requests = lines(&stdout(&lathe(&arguments)));
    assert_eq!(
        requests
            .iter()
            .map(|r| r["input_ids"].as_array().unwrap().len())
            .collect::<Vec<_>>(),
        [2, 4]
    );

    let bad = [
        base.as_slice(),
        &["--dataset-split", "train", "--dataset-output-key", "reply"],
    ]
    .concat();
    assert_error(
        &bad,
        1,
        "train.jsonl:1: no text field \"reply\"; the line has question, hint, answer",
    );
    assert_error(
        &[base.as_slice(), &["--dataset-output-key", "answer"]].concat(),
        2,
        "--dataset-split is needed",
    );
}

#[test]
fn real_text_with_every_flag() {
    let model = tokenizer_folder();
    let folder = model.path().join("set/main");
    std::fs::create_dir_all(&folder).unwrap();
    let rows = folder.join("test.jsonl");
    std::fs::write(
        &rows,
        "{\"q\":\"abc\",\"a\":\"hello\"}\n{\"q\":\"de\",\"a\":\"\"}\n",
    )
    .unwrap();
    let set = model.path().join("set");
    let base = [
        "-m",
        path(&model),
        "prepare-dataset",
        "--stdout",
        "--task-id",
        "7",
        "--random-seed",
        "1",
        "real-dataset",
        "--dataset-name",
        set.to_str().unwrap(),
        "--dataset-config-name",
        "main",
        "--dataset-split",
        "test",
        "--dataset-input-key",
        "q",
    ];
    let with = |more: &[&'static str]| [base.as_slice(), more].concat();
    let requests = lines(&stdout(&lathe(&with(&[
        "--dataset-prompt",
        "Say:",
        "--dataset-output-key",
        "a",
        "--num-requests",
        "9",
        "--max-input-len",
        "100",
    ]))));
    let summary: Vec<(i64, usize, u64)> = requests
        .iter()
        .map(|r| {
            (
                r["task_id"].as_i64().unwrap(),
                r["input_ids"].as_array().unwrap().len(),
                r["output_tokens"].as_u64().unwrap(),
            )
        })
        .collect();
    // "Say: abc" and "Say: de"; an empty answer counts as one token.
    assert_eq!(summary, [(7, 8, 5), (7, 7, 1)]);
    let distributed = with(&["--output-len-dist", "50,10"]);
    let text = stdout(&lathe(&distributed));
    assert_eq!(text, stdout(&lathe(&distributed)), "the seed decides");
    assert!(
        lines(&text)
            .iter()
            .all(|r| r["output_tokens"].as_u64().unwrap() > 1)
    );

    assert_error(&base, 2, "--dataset-output-key");
    assert_error(
        &with(&["--output-len-dist", "many"]),
        2,
        "expected MEAN,STDEV",
    );
    let both = [
        "--dataset-output-key",
        "a",
        "--dataset-prompt",
        "x",
        "--dataset-prompt-key",
        "q",
    ];
    assert_error(&with(&both), 2, "cannot be used with");
    let images = ["--dataset-output-key", "a", "--dataset-image-key", "image"];
    assert_error(&with(&images), 2, "only text is supported");
    let none = ["--dataset-output-key", "a", "--max-input-len", "1"];
    assert_error(&with(&none), 1, "no input is left");
    std::fs::write(&rows, "{\"q\":\"abc\",\"a\":\"hello\"}\nnot json\n").unwrap();
    assert_error(
        &with(&["--dataset-output-key", "a"]),
        1,
        "test.jsonl:2: not valid JSON",
    );
    std::fs::write(&rows, "{\"q\":5,\"a\":\"hello\"}\n").unwrap();
    let number = with(&["--dataset-output-key", "a"]);
    assert_error(
        &number,
        1,
        "test.jsonl:1: no text field \"q\"; the line has q, a",
    );
    let hub = [
        "-m",
        path(&model),
        "prepare-dataset",
        "real-dataset",
        "--dataset-name",
        "org/set",
        "--dataset-split",
        "test",
        "--output-len-dist",
        "3,0",
    ];
    assert_error(&hub, 1, "--dataset-name takes local files only");
}

/// A tokenizer with one token a printable ASCII character.
fn tokenizer_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let vocab: serde_json::Map<String, Value> = (' '..='~')
        .enumerate()
        .map(|(id, character)| {
            (
                if character == ' ' { 'Ġ' } else { character }.to_string(),
                Value::from(id),
            )
        })
        .collect();
    let byte_level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    folder
}

/// `lathe ... | head` ends without an error.
#[test]
fn a_reader_that_goes_away_is_no_error() {
    let model = model();
    let mut child = Command::new(env!("CARGO_BIN_EXE_lathe"))
        .args([
            "-m",
            path(&model),
            "prepare-dataset",
            "--stdout",
            "token-norm-dist",
            "--num-requests",
            "5000",
        ])
        .args([
            "--input-mean",
            "200",
            "--input-stdev",
            "0",
            "--output-mean",
            "2",
            "--output-stdev",
            "0",
        ])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
