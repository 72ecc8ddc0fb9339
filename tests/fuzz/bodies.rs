//! What each fuzz target does with its bytes: whatever they are, no panic, and an error that stays on its line.
//!
//! The targets of `cargo fuzz` call these functions, and so does `tests/program/fuzz_seeds.rs` with the seeds, on a
//! stable compiler and in the workspace's own build.
#![allow(dead_code)] // Each target uses one of them.

use std::cell::RefCell;
use std::fmt::Display;
use std::path::Path;

use lathe::bench::comparison::{Leaves, table};
use lathe::bench::dataset::{Dataset, ReadOptions};
use lathe::errors::{Problems, one_line};
use lathe::golden::Golden;
use lathe_codegen::pack::{PackDType, PackRecipe};
use lathe_ir::import::{HfConfig, ImportOptions, import};
use lathe_ir::{DType, text};
use lathe_runtime::device::cuda::cubin_cache::CubinCache;
use lathe_runtime::device::cuda::nvrtc::Source;
use lathe_runtime::text::template::Rendering;
use lathe_runtime::text::{ChatMessage, ChatTemplate, Sandbox, TextTokenizer, eos_token_ids};
use lathe_runtime::weights::pack::pack_f32;
use lathe_runtime::weights::{Checkpoint, TensorData, WeightSource, parse_header};

/// A target's name and body.
pub(crate) type Target = (&'static str, fn(&[u8]));

/// All targets.
pub(crate) const TARGETS: [Target; 11] = [
    ("config", config),
    ("tokenizer", tokenizer),
    ("template", template),
    ("header", header),
    ("golden", golden),
    ("index", index),
    ("yaml", yaml),
    ("dataset", dataset),
    ("program", program),
    ("cubin", cubin),
    ("report", report),
];

/// What reaches the terminal of an error: lines that the program means, without commands.
fn check_error(error: impl Into<anyhow::Error>) {
    check_line(&one_line(&error.into()));
}

fn check_line(shown: &str) {
    let bad = |c: char| c.is_control() && c != '\n' || matches!(c, '\u{202a}'..='\u{202e}');
    assert!(!shown.contains(bad), "{shown:?}");
}

/// An error of a library, which says all on one line.
fn check_single(error: &dyn Display) {
    let shown = error.to_string();
    assert!(!shown.contains(char::is_control), "{shown:?}");
}

thread_local! {
    static FOLDER: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
}

/// A folder for the files of a target that reads files.
fn in_folder(work: impl FnOnce(&Path)) {
    FOLDER.with_borrow_mut(|folder| {
        let folder = folder.get_or_insert_with(|| tempfile::tempdir().unwrap());
        work(folder.path());
    });
}

/// config.json: read, and imported as a model of at most two layers.
pub(crate) fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let config = match HfConfig::parse("config.json", text) {
        Ok(config) => config,
        Err(error) => return check_error(error),
    };
    // More layers are more of the same.
    let two = serde_json::json!(2);
    let keys = ["num_hidden_layers", "n_layer"];
    let many = |key: &&str| config.get(key).and_then(|v| v.as_u64()) > Some(2);
    let cut: Vec<&str> = keys.into_iter().filter(many).collect();
    let config = match config.with_overrides(cut.into_iter().map(|key| (key, &two))) {
        Ok(config) => config,
        Err(error) => return check_error(error),
    };
    let options = ImportOptions {
        dtype: DType::BF16,
        max_seq_len: None,
    };
    match import(&config, &options) {
        Ok(model) => drop(model),
        Err(error) => check_error(error),
    }
}

/// tokenizer.json; what stands behind a line `---` is tokenizer_config.json.
pub(crate) fn tokenizer(bytes: &[u8]) {
    let at = bytes.windows(5).position(|w| w == b"\n---\n");
    let (tokenizer, config) = at.map_or((bytes, None), |at| (&bytes[..at], Some(&bytes[at + 5..])));
    in_folder(|folder| {
        let config_path = folder.join("tokenizer_config.json");
        std::fs::write(folder.join("tokenizer.json"), tokenizer).unwrap();
        match config {
            Some(config) => std::fs::write(config_path, config).unwrap(),
            None => drop(std::fs::remove_file(config_path)),
        }
        let outcome = TextTokenizer::load(folder).and_then(|tokenizer| {
            eos_token_ids(folder)?;
            let nobody = Sandbox::of("/no/such/program");
            ChatTemplate::load(folder, tokenizer.special(), &nobody)?;
            let ids = tokenizer.encode("a b<|end|>\u{e9} 12", true)?;
            tokenizer.decode(&ids, true)?;
            tokenizer.decode(&[0, u32::MAX], false)
        });
        if let Err(error) = outcome {
            check_error(error);
        }
    });
}

/// A chat template, in this process: what only a process of its own survives is left out.
pub(crate) fn template(bytes: &[u8]) {
    const MOST: usize = 2048;
    const FUEL: u64 = 2000;
    let Ok(source) = std::str::from_utf8(bytes) else {
        return;
    };
    // A namespace can hold itself, and these make much of little.
    let grows = [
        "namespace",
        "*",
        "~",
        "+",
        "range",
        "join",
        "replace",
        "indent",
        "format",
    ];
    if source.len() > MOST || grows.iter().any(|word| source.contains(word)) {
        return;
    }
    let rendering = Rendering {
        source: source.to_owned(),
        messages: vec![
            ChatMessage::new("system", "s\u{202e}"),
            ChatMessage::new("user", " Hello\n"),
        ],
        add_generation_prompt: true,
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
        pad_token: None,
        unk_token: None,
    };
    if let Err(refusal) = rendering.render_here(FUEL) {
        check_single(&refusal.reason);
    }
}

/// The header of a safetensors file.
pub(crate) fn header(bytes: &[u8]) {
    match parse_header(bytes, bytes.len() as u64) {
        Ok(entries) => {
            for entry in entries {
                assert!(entry.start <= entry.end && entry.end <= bytes.len() as u64);
                entry.info.matrix();
            }
        }
        Err(reason) => check_single(&reason),
    }
}

/// Reference logits.
pub(crate) fn golden(bytes: &[u8]) {
    match Golden::parse("golden.safetensors", bytes) {
        Ok(golden) => {
            let n = golden.batch * golden.len;
            assert_eq!(golden.input_ids.len(), n);
            assert_eq!(golden.logits.len(), n * golden.vocab);
            assert!(golden.logits.iter().all(|x| x.is_finite()));
        }
        Err(error) => check_error(error),
    }
}

/// The index of a sharded checkpoint of two shards, and the bytes of a third.
pub(crate) fn index(bytes: &[u8]) {
    let shard = |name: &str| {
        let json = format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
        let length = (json.len() as u64).to_le_bytes();
        [&length[..], json.as_bytes(), &[0, 0, 128, 63]].concat()
    };
    in_folder(|folder| {
        for name in ["a", "b"] {
            let path = folder.join(format!("{name}.safetensors"));
            if !path.exists() {
                std::fs::write(path, shard(name)).unwrap();
            }
        }
        std::fs::write(folder.join("model.safetensors.index.json"), bytes).unwrap();
        std::fs::write(folder.join("c.safetensors"), bytes).unwrap();
        match Checkpoint::open(folder) {
            Ok(checkpoint) => {
                for name in checkpoint.names() {
                    let Some(TensorData::Stored { .. }) = checkpoint.data(name) else {
                        panic!("{name} is not stored");
                    };
                    let recipe = PackRecipe::identity(name, 1, 1, PackDType::F32);
                    let _ = pack_f32(&recipe, &checkpoint).map_err(check_error);
                }
            }
            Err(error) => check_error(error),
        }
    });
}

/// A YAML file of options.
pub(crate) fn yaml(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Err(error) = lathe::config::parse("c.yaml", text) {
        let shown = one_line(&error.into());
        check_line(&shown);
        // Every line names the file; a position is never of before the first line.
        for line in shown.lines() {
            assert!(
                line.starts_with("c.yaml:") && !line.starts_with("c.yaml:0"),
                "{shown}"
            );
        }
    }
}

/// A dataset.
pub(crate) fn dataset(bytes: &[u8]) {
    let options = ReadOptions {
        num_requests: 0,
        vocab_size: Some(1000),
        tokenizer: None,
    };
    match Dataset::from_reader("d.jsonl", bytes, options) {
        Ok(dataset) => {
            dataset.stats();
            let _ = dataset
                .check_lengths("max_seq_len", 10)
                .map_err(check_error);
        }
        Err(error) => check_error(error),
    }
}

/// A program in text form: what is read is printed and read again as the same.
pub(crate) fn program(bytes: &[u8]) {
    let Ok(source) = std::str::from_utf8(bytes) else {
        return;
    };
    match text::parse(source) {
        Ok(graph) => {
            lathe_ir::verify(&graph);
            let printed = text::print(&graph);
            let again = text::parse(&printed).unwrap_or_else(|e| panic!("{e}: {printed}"));
            assert_eq!(printed, text::print(&again));
        }
        Err(error) => check_error(Problems::of_program("p.ir", &error)),
    }
}

/// An entry of the kernel cache.
pub(crate) fn cubin(bytes: &[u8]) {
    in_folder(|folder| {
        let cache = CubinCache::with_version(folder.join("cubins"), 1 << 20, (13, 0)).unwrap();
        let source = Source::new("k", "text");
        if let Some(compiled) = cache.decode(&source, bytes) {
            assert!(bytes.ends_with(&compiled.cubin));
        }
    });
}

/// Two reports; what stands behind a line `---` is the second.
pub(crate) fn report(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let (first, second) = text.split_once("\n---\n").unwrap_or((text, text));
    match Leaves::parse(first).and_then(|first| Ok([first, Leaves::parse(second)?])) {
        Ok(reports) => check_line(&table(&["a".into(), "b".into()], &reports)),
        Err(error) => check_line(&one_line(&error)),
    }
}
