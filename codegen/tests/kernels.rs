//! The files of `kernels/`: each says at its top what it computes, who calls it, what it is specialised by, its
//! parameters, its geometry and why it is as it is; and has no macro that nothing sets.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn cuda() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda")
}

/// Files below a folder with an extension, with their texts.
fn files(folder: &Path, extension: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            found.push((name, std::fs::read_to_string(&path).unwrap()));
        }
    }
    found.sort();
    found
}

fn header(text: &str) -> Vec<&str> {
    text.lines().take_while(|l| l.starts_with("//")).collect()
}

/// The macros that a header lists, one a line.
fn listed<'a>(header: &[&'a str]) -> BTreeSet<&'a str> {
    let lines = header
        .iter()
        .skip_while(|l| !l.starts_with("// Defines"))
        .skip(1)
        .take_while(|l| l.starts_with("//   "));
    let names = lines.filter_map(|l| l[5..].split([' ', '(']).next());
    names.filter(|n| !n.is_empty()).collect()
}

#[test]
fn headers_have_one_form() {
    let kernels = files(&cuda().join("kernels"), "cu");
    assert!(kernels.len() >= 20, "{}", kernels.len());
    for (name, text) in kernels {
        let header = header(&text);
        assert!(header[0].starts_with(&format!("// {name}: ")), "{name}");
        let mut rest = header.iter();
        for part in ["Called by: ", "Defines", "Parameters", "Geometry", "Why: "] {
            let start = format!("// {part}");
            let found = rest.any(|l| l.starts_with(&start));
            assert!(found, "{name}: no '{part}' in its place");
        }
        assert!(header.iter().all(|l| l.len() <= 120), "{name}");
    }
}

/// A macro that a kernel asks for is set by an emitter, and is in the kernel's header.
#[test]
fn every_macro_is_set_and_described() {
    let emitters: String = files(&cuda(), "rs")
        .into_iter()
        .map(|(_, text)| text)
        .collect();
    let prelude = ["LATHE_NAME", "LATHE_DTYPE", "LATHE_PDL"];
    for (name, text) in files(&cuda().join("kernels"), "cu") {
        let listed = listed(&header(&text));
        for define in &listed {
            let set = [format!("\"{define}\""), format!("\"{define}(")];
            assert!(
                set.iter().any(|s| emitters.contains(s)),
                "{name}: nothing sets {define}"
            );
        }
        let code: Vec<&str> = text.lines().filter(|l| !l.starts_with("//")).collect();
        let code = code.join("\n");
        let words = code.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let used: BTreeSet<&str> = words.filter(|w| w.starts_with("LATHE_")).collect();
        for word in used {
            let known = listed.contains(word) || prelude.contains(&word);
            assert!(known, "{name}: {word} is not in its header");
        }
    }
}
