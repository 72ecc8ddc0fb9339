//! `selftest` on the CPU as a user runs it: the CPU's kernels against the interpreter.

use serde_json::Value;
use std::process::{Command, Output};

fn selftest(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lathe"))
        .args(["selftest", "--device", "cpu", "--quick"])
        .args(args)
        .output()
        .expect("the program runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

#[test]
fn every_family_passes_and_the_json_says_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("selftest.json");
    let output = selftest(&["--seed", "7", "--json", json.to_str().expect("UTF-8")]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}");
    let last = text.lines().last().expect("a last line");
    assert!(last.contains(" cases, 0 failed (cpu, seed 7"), "{last}");

    let value: Value =
        serde_json::from_str(&std::fs::read_to_string(json).expect("written")).expect("JSON");
    assert_eq!(value["failed"], 0);
    let cases = value["cases"].as_u64().expect("a number");
    assert!(
        cases > 500 && last.starts_with(&format!("{cases} cases")),
        "{last}"
    );
    let rows = value["families"].as_array().expect("rows");
    for family in [
        "attn_qkv",
        "attn_step",
        "gemm",
        "linear",
        "rmsnorm",
        "embedding",
        "sample",
    ] {
        let row = rows.iter().find(|r| r["family"] == family);
        let row = row.unwrap_or_else(|| panic!("no {family} in {text}"));
        assert!(row["error"].as_f64() <= row["tolerance"].as_f64());
        assert!(
            text.lines()
                .any(|l| l.starts_with(family) && l.ends_with(" ok"))
        );
    }
}

#[test]
fn a_filter_names_families() {
    let text = stdout(&selftest(&["--filter", "attn"]));
    let rows: Vec<&str> = text.lines().skip(1).collect();
    let (last, rows) = rows.split_last().expect("rows");
    assert!(last.contains("0 failed"));
    assert!(
        !rows.is_empty() && rows.iter().all(|r| r.contains("attn")),
        "{text}"
    );

    let none = selftest(&["--filter", "attn_quantum"]);
    assert_eq!(none.status.code(), Some(2));
    let error = String::from_utf8(none.stderr).expect("UTF-8");
    assert!(error.contains("no family has this in its name"), "{error}");
}
