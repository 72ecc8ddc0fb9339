//! `lathe kernels` on the CPU device with a tiny model, as a user runs it.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn kernels(model: &str, arguments: &[&str]) -> Output {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    Command::new(env!("CARGO_BIN_EXE_lathe"))
        .arg("--model")
        .arg(folder.join(model))
        .args(["--device", "cpu", "--log_level", "error", "kernels"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    let map = value.as_object().expect("an object");
    map.keys().map(String::as_str).collect()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key} of {value}"))
}

#[test]
fn table_and_json_of_a_tiny_model() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("k.json");
    let arguments = [
        "--batch",
        "1,4",
        "--prefill",
        "24",
        "--context",
        "9",
        "--runs",
        "3",
        "--dtype",
        "float32",
        "--json",
        file.to_str().unwrap(),
    ];
    let output = kernels("golden/llama-rope3-tied", &arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    for part in [
        "llama-rope3-tied, f32, checkpoint weights, torch-opt, on cpu",
        "decode, batch 1, context 9",
        "decode, batch 4, context 9",
        "prefill of 24 tokens",
        "where the time goes",
        "of the roofline at the measured ceilings",
    ] {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
    let report: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(
        keys(&report),
        [
            "version",
            "model",
            "dtype",
            "weights",
            "compile_backend",
            "device",
            "gpu",
            "ceilings",
            "vendor",
            "steps"
        ]
    );
    assert_eq!(
        keys(&report["ceilings"]),
        [
            "read_gb_per_s",
            "copy_gb_per_s",
            "matrix_tflop_per_s",
            "matrix_source",
            "launch_us",
            "launch_pdl_us"
        ]
    );
    assert_eq!(keys(&report["vendor"]), ["name", "missing"]);
    assert!(report["vendor"]["missing"].is_string());
    let steps = report["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 3);
    for step in steps {
        check_step(step);
    }
    assert_eq!(steps[0]["kind"], "decode");
    assert_eq!(steps[2]["kind"], "prefill");
    check_work(&steps[1]["kernels"], 4, 4 * 10, 4 * 10);
    // 24 rows of one sequence: row i sees i keys.
    check_work(&steps[2]["kernels"], 24, 24, 24 * 25 / 2);
}

/// Shape, and sums that must agree.
fn check_step(step: &Value) {
    assert_eq!(
        keys(step),
        [
            "kind",
            "sequences",
            "tokens",
            "context",
            "launches",
            "graph",
            "step_us",
            "replay_us",
            "kernels_us",
            "gap_us",
            "roofline_us",
            "classes",
            "kernels"
        ]
    );
    let kernels = step["kernels"].as_array().unwrap();
    assert!(!kernels.is_empty());
    let mut sum = 0.0;
    for kernel in kernels {
        assert_eq!(
            keys(kernel),
            [
                "name",
                "class",
                "shape",
                "gemm",
                "path",
                "launches",
                "us",
                "percent",
                "bytes",
                "flops",
                "gb_per_s",
                "read_percent",
                "tflop_per_s",
                "matrix_percent",
                "vendor_us",
                "vendor_percent"
            ]
        );
        let (us, bytes) = (number(kernel, "us"), number(kernel, "bytes"));
        assert!(us > 0.0 && bytes > 0.0, "{kernel}");
        let rate = bytes / us * 1e-3;
        assert!((number(kernel, "gb_per_s") / rate - 1.0).abs() < 1e-9);
        sum += us * number(kernel, "launches");
    }
    assert!((number(step, "kernels_us") / sum - 1.0).abs() < 1e-9);
    let classes = step["classes"].as_array().unwrap();
    let names: Vec<&Value> = classes.iter().map(|c| &c["class"]).collect();
    assert_eq!(names, ["attention", "gemm", "pointwise", "other"]);
    let by_class: f64 = classes.iter().map(|c| number(c, "us")).sum();
    assert!((by_class / sum - 1.0).abs() < 1e-9);
    let gap = number(step, "step_us") - sum;
    assert!((number(step, "gap_us") - gap).abs() < 1e-6);
    assert!(number(step, "roofline_us") > 0.0);
}

/// Bytes and operations of the fixture (hidden 128, 8 and 2 heads of 16, MLP 192, vocabulary 256) by hand, for `rows`
/// rows, `live` cached tokens and `pairs` of a row and a key that it sees, in float32.
fn check_work(kernels: &Value, rows: usize, live: usize, pairs: usize) {
    let kernels = kernels.as_array().unwrap();
    let attention = kernels
        .iter()
        .find(|k| k["class"] == "attention")
        .expect("attention");
    assert_eq!(attention["shape"], "8/2 heads of 16");
    assert_eq!(number(attention, "flops"), (4 * 8 * 16 * pairs) as f64);
    // The packed rows in, the outputs out, the frequencies, and keys and values of the live tokens.
    let bytes = 4 * (rows * (8 + 2 * 2) * 16 + rows * 8 * 16 + 2 * 2 * 16 * live);
    let extra = number(attention, "bytes") - bytes as f64;
    assert!(
        (0.0..=4.0 * (8.0 + rows as f64)).contains(&extra),
        "{extra}"
    );
    let qkv = kernels
        .iter()
        .find(|k| k["gemm"] == serde_json::json!([rows, 192, 128]))
        .expect("the QKV projection");
    assert_eq!(number(qkv, "flops"), (2 * rows * 192 * 128) as f64);
    let operands = 4 * (rows * 128 + 192 * 128 + rows * 192);
    let norm = number(qkv, "bytes") - operands as f64;
    // Its norm's gain comes on top.
    assert!((0.0..=4.0 * 128.0).contains(&norm), "{norm}");
    let down = kernels
        .iter()
        .find(|k| k["gemm"] == serde_json::json!([rows, 128, 192]))
        .expect("the down projection");
    // With the residual that it adds.
    let operands = 4 * (rows * 192 + 128 * 192 + 2 * rows * 128);
    assert_eq!(number(down, "bytes"), operands as f64);
}

#[test]
fn without_weights_they_are_random() {
    let yaml = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        yaml.path(),
        "model_kwargs:\n  num_hidden_layers: 1\n  vocab_size: 512\n  hidden_size: 64\n  intermediate_size: 128\n",
    )
    .unwrap();
    let arguments = [
        "--batch",
        "2",
        "--context",
        "3",
        "--runs",
        "1",
        "--config",
        yaml.path().to_str().unwrap(),
    ];
    let output = kernels("configs/smollm2-135m", &arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    assert!(text.contains("bf16, random weights"), "{text}");
    assert!(!text.contains("prefill"), "{text}");
}

#[test]
fn what_cannot_be_timed_is_refused() {
    for (arguments, reason) in [
        (&["--batch", "0"][..], "expected a whole number from 1"),
        (&["--context", "100000"], "max_position_embeddings"),
        (&["--prefill", "1,x"], "expected a whole number from 1"),
    ] {
        let output = kernels("golden/llama-rope3-tied", arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success());
        assert!(errors.contains(reason), "{errors}");
    }
}
