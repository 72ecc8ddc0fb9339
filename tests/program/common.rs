//! What tests of the program share.

use lathe::config::{Options, Resolved, parse};
use lathe::model::CompiledModel;
use std::path::{Path, PathBuf};

/// The folder of a golden model.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/golden")
        .join(name)
}

/// The folders of all golden models, sorted.
pub(crate) fn goldens() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(golden("")).unwrap();
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 14, "{folders:?}");
    folders
}

/// Writes a dataset of `n` requests with prompts of 1 to 14 tokens and outputs of 1 to 13.
pub(crate) fn write_dataset(path: &Path, n: usize) {
    let line = |i: usize| {
        let ids: Vec<usize> = (0..1 + i * 5 % 14).map(|t| (i * 31 + t * 7) % 90).collect();
        let osl = 1 + i * 3 % 13;
        let request = serde_json::json!({"task_id": i, "input_ids": ids, "output_tokens": osl});
        format!("{request}\n")
    };
    let lines: String = (0..n).map(line).collect();
    std::fs::write(path, lines).unwrap();
}

/// A model compiled for the CPU in float32, with a YAML file of options.
pub(crate) fn compiled(folder: &Path, yaml: &str) -> CompiledModel {
    let arguments = [
        "lathe", "--device", "cpu", "--dtype", "float32", "doctor", "--model",
    ];
    let arguments = arguments.iter().map(Into::into).chain([folder.into()]);
    let cli = lathe::cli::parse(arguments).unwrap();
    let yaml = parse("c.yaml", yaml).unwrap();
    let resolved = Resolved::new(Options::default(), yaml);
    CompiledModel::compile(&cli.global, &resolved).unwrap()
}
