//! From `--model` and `--model_path` to a folder on this machine.

use std::path::{Path, PathBuf};

use lathe_ir::foreign::{self, Kind};

use crate::errors::usage_error;
use crate::global_options::GlobalOptions;

/// The checkpoint folder: `--model_path`, else `--model` when it is a folder, else the newest snapshot of
/// that hub id in the local Hugging Face cache (`HF_HUB_CACHE`, `HF_HOME`, `~/.cache/huggingface`).
pub fn model_folder(global: &GlobalOptions) -> anyhow::Result<PathBuf> {
    if let Some(path) = &global.model_path {
        anyhow::ensure!(
            path.is_dir(),
            "--model_path {}: no such folder",
            path.display()
        );
        return Ok(path.clone());
    }
    let Some(model) = &global.model else {
        return Err(usage_error(
            "--model is missing: give a checkpoint folder or a hub id",
        ));
    };
    let path = PathBuf::from(model);
    if path.is_dir() {
        return Ok(path);
    }
    let cache = hub_cache();
    if let Some(snapshot) = cache.as_deref().and_then(|cache| snapshot(cache, model)) {
        return Ok(snapshot);
    }
    let looked = cache.map_or_else(
        || "no home folder".into(),
        |cache| cache.display().to_string(),
    );
    anyhow::bail!(
        "--model {model}: neither a folder nor in the local Hugging Face cache ({looked})"
    )
}

/// What the report calls the model: `--model` as it was given, else the folder.
pub fn model_name(global: &GlobalOptions, folder: &Path) -> String {
    global
        .model
        .clone()
        .unwrap_or_else(|| folder.display().to_string())
}

fn hub_cache() -> Option<PathBuf> {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/huggingface/hub")))
}

/// `models--ORG--NAME/snapshots/COMMIT`, where refs/main names the commit.
fn snapshot(cache: &Path, id: &str) -> Option<PathBuf> {
    let valid = id.split('/').count() <= 2
        && id
            .split('/')
            .all(|part| !part.is_empty() && !part.starts_with('.'));
    let repository = cache.join(format!("models--{}", id.replace('/', "--")));
    if !valid || !repository.is_dir() {
        return None;
    }
    let commit = foreign::read_text(&repository.join("refs/main"), Kind::Reference).ok()?;
    Some(repository.join("snapshots").join(commit.trim()))
        .filter(|folder| folder.join("config.json").is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cached_snapshot_is_found() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--org--name/snapshots/abc");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::create_dir_all(cache.path().join("models--org--name/refs")).unwrap();
        std::fs::write(cache.path().join("models--org--name/refs/main"), "abc\n").unwrap();
        assert_eq!(snapshot(cache.path(), "org/name"), None);
        std::fs::write(folder.join("config.json"), "{}").unwrap();
        assert_eq!(snapshot(cache.path(), "org/name"), Some(folder));
        assert_eq!(snapshot(cache.path(), "org/other"), None);
        assert_eq!(snapshot(cache.path(), "../name"), None);
    }
}
