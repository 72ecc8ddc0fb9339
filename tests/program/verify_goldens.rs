//! The goldens through the optimised plan and its cache on the CPU device, as a user checks them.

use crate::common::{golden, goldens};
use std::path::Path;
use std::process::{Command, Output};

fn verify(model: &Path, dtype: &str, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lathe"))
        .arg("--model")
        .arg(model)
        .args(["--device", "cpu", "--dtype", dtype, "verify"])
        .args(more)
        .output()
        .expect("the program runs")
}

fn passes(model: &Path, dtype: &str, more: &[&str]) -> String {
    let output = verify(model, dtype, more);
    let stdout = String::from_utf8(output.stdout).expect("UTF-8");
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(
        output.status.success(),
        "{}: {stdout}{stderr}",
        model.display()
    );
    stdout
}

#[test]
fn float32_in_both_spellings() {
    for golden in goldens() {
        let old = tempfile::tempdir().expect("a folder");
        for file in ["model.safetensors", "golden.safetensors"] {
            std::fs::copy(golden.join(file), old.path().join(file)).expect("copied");
        }
        let config = golden.join("config.old.json");
        std::fs::copy(config, old.path().join("config.json")).expect("copied");
        for folder in [golden, old.path().to_path_buf()] {
            let out = passes(&folder, "float32", &[]);
            assert!(out.contains("greedy tokens       all 48 equal"), "{out}");
        }
    }
}

#[test]
fn bfloat16_is_as_near_as_the_reference() {
    for golden in goldens() {
        passes(&golden, "bfloat16", &[]);
    }
}

#[test]
fn chunks_and_pages_change_nothing() {
    let more = ["--max_num_tokens", "7", "--attn_page_size", "16"];
    for name in ["llama-rope3-tied", "mistral-window"] {
        let out = passes(&golden(name), "float32", &more);
        assert!(out.contains("all 48 equal"), "{out}");
    }
}

#[test]
fn switched_off_stages_give_the_same_model() {
    for off in ["fuse", "qkv-join", "kv_cache"] {
        let out = passes(&golden("llama-rope3-tied"), "float32", &["--disable", off]);
        assert!(out.contains("all 48 equal"), "{off}: {out}");
    }
}

/// Families with operations that no rule fuses: chains, single kernels and the unfused program
/// agree, and weights that are computed while loading are the same in all of them.
#[test]
fn chains_give_the_same_model() {
    for name in ["gemma", "gemma3", "gpt2", "falcon", "phi"] {
        for off in ["chains", "fuse"] {
            let out = passes(&golden(name), "float32", &["--disable", off]);
            assert!(out.contains("all 48 equal"), "{name} without {off}: {out}");
        }
    }
}

#[test]
fn an_error_past_the_limit_fails() {
    let output = verify(&golden("qwen2"), "bfloat16", &["--rtol", "1e-6"]);
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(stderr.contains("past the limit"), "{stderr}");
}
