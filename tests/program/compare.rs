//! `compare` as a user runs it.

use std::process::{Command, Output};

fn compare(files: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lathe"))
        .arg("compare")
        .args(files)
        .output()
        .unwrap()
}

#[test]
fn two_reports() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let a = file(
        "a.json",
        r#"{"engine": {"model": "m"}, "performance": {"request_throughput_req_s": 2.0}}"#,
    );
    let b = file(
        "b.json",
        r#"{"engine": {"model": "m"}, "performance": {"request_throughput_req_s": 5.0}}"#,
    );
    let output = compare(&[&a, &b]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("performance.request_throughput_req_s") && text.contains("2.500x"),
        "{text}"
    );

    assert_eq!(compare(&[&a]).status.code(), Some(2));
    let bad = file("c.json", "{\"performance\": 3");
    let output = compare(&[&a, &bad]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("c.json: not valid JSON: EOF") && error.lines().count() == 1,
        "{error}"
    );
    let other = file("d.json", "{}");
    let error = String::from_utf8(compare(&[&a, &other]).stderr).unwrap();
    assert!(
        error.contains("d.json: no section \"performance\""),
        "{error}"
    );
}
