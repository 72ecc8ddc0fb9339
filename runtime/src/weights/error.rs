//! Errors of weight files and of their packing.

use std::io;
use std::path::{Path, PathBuf};

use lathe_ir::printable;
use safetensors::Dtype;

/// A tensor whose shape is not the expected one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misshaped {
    /// The tensor.
    pub name: String,
    /// Its shape.
    pub found: Vec<usize>,
    /// The shape that the model's config asks for.
    pub expected: Vec<usize>,
}

/// A tensor whose storage type cannot be a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongDtype {
    /// The tensor.
    pub name: String,
    /// Its storage type.
    pub found: Dtype,
}

/// What can be wrong with weights. Every message is one line, whatever the names in the files are.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file cannot be opened, read or mapped.
    #[error("{}: {source}", shown(path))]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder has no safetensors weights.
    #[error(
        "{}: no model.safetensors and no model.safetensors.index.json{hint}",
        shown(folder)
    )]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// What is there instead, or what to do.
        hint: &'static str,
    },
    /// A safetensors file contradicts its own size or its header is malformed.
    #[error("{}: not a valid safetensors file: {}", shown(path), printable(reason))]
    Header {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        reason: String,
    },
    /// The index is not what it should be.
    #[error("{}: {}", shown(path), printable(reason))]
    Index {
        /// The index file.
        path: PathBuf,
        /// What was found, with line and column for malformed JSON.
        reason: String,
    },
    /// The index names files that are not in the folder.
    #[error("{}: names {} that {} not in the folder: {}", shown(path), plural(files.len(), "shard"),
        if files.len() == 1 { "is" } else { "are" }, names(files))]
    AbsentShards {
        /// The index file.
        path: PathBuf,
        /// The absent files.
        files: Vec<String>,
    },
    /// The tensors are not the ones that the model's config asks for; all differences are listed.
    #[error(
        "{}: the weights do not fit config.json: {}",
        printable(origin),
        list(missing, unexpected, misshaped, wrong_dtype)
    )]
    Mismatch {
        /// The source.
        origin: String,
        /// Expected and absent.
        missing: Vec<String>,
        /// Present and not expected.
        unexpected: Vec<String>,
        /// Of another shape.
        misshaped: Vec<Misshaped>,
        /// Of a type that is not F32, BF16 or F16.
        wrong_dtype: Vec<WrongDtype>,
    },
    /// A recipe contradicts itself.
    #[error(transparent)]
    Recipe(#[from] lathe_codegen::pack::PackError),
    /// A recipe does not fit the tensors of the source.
    #[error(
        "{}: cannot pack {}: {}",
        printable(origin),
        printable(tensor),
        printable(reason)
    )]
    Pack {
        /// The source.
        origin: String,
        /// The tensor.
        tensor: String,
        /// What was found and what was expected.
        reason: String,
    },
}

fn shown(path: &Path) -> String {
    printable(&path.display().to_string())
}

fn names(list: &[String]) -> String {
    printable(&list.join(", "))
}

fn plural(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn list(
    missing: &[String],
    unexpected: &[String],
    misshaped: &[Misshaped],
    wrong: &[WrongDtype],
) -> String {
    let mut parts = Vec::new();
    if !missing.is_empty() {
        parts.push(format!(
            "{} missing: {}",
            plural(missing.len(), "tensor"),
            names(missing)
        ));
    }
    if !unexpected.is_empty() {
        parts.push(format!(
            "{} unexpected: {}",
            plural(unexpected.len(), "tensor"),
            names(unexpected)
        ));
    }
    if !misshaped.is_empty() {
        let each = misshaped
            .iter()
            .map(|m| format!("{} is {:?}, expected {:?}", m.name, m.found, m.expected));
        let each = names(&each.collect::<Vec<_>>());
        parts.push(format!(
            "{} of another shape: {each}",
            plural(misshaped.len(), "tensor")
        ));
    }
    if !wrong.is_empty() {
        let each = wrong.iter().map(|w| format!("{} is {}", w.name, w.found));
        let each = names(&each.collect::<Vec<_>>());
        let head = format!(
            "{} of a wrong dtype (expected BF16, F16 or F32)",
            plural(wrong.len(), "tensor")
        );
        parts.push(format!("{head}: {each}"));
    }
    parts.join("; ")
}
