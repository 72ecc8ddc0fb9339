use std::fs;
use std::path::Path;

use half::bf16;
use lathe_codegen::pack::{PackDType, PackRecipe};
use serde_json::json;
use tempfile::TempDir;

use super::pack::{pack_bf16, pack_f32};
use super::*;

/// Writes a safetensors file of tensors that count 0, 1, 2, … in bf16 (or zeros of another type).
fn write_file(path: &Path, tensors: &[(&str, &str, &[usize])]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape) in tensors {
        let n: usize = shape.iter().product();
        let start = data.len();
        match *dtype {
            "BF16" => data.extend((0..n).flat_map(|i| bf16::from_f32(i as f32).to_le_bytes())),
            _ => data.extend(std::iter::repeat_n(0, n)),
        }
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert((*name).to_owned(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    fs::write(path, file).unwrap();
}

fn write_index(folder: &Path, map: serde_json::Value) {
    let text = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
    fs::write(folder.join("model.safetensors.index.json"), text).unwrap();
}

/// The message of opening `folder`, without the folder's own path.
fn failure(folder: &Path) -> String {
    let error = Checkpoint::open(folder)
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    assert!(!error.contains('\n'), "{error}");
    error
        .replace(&format!("{}/", folder.display()), "")
        .replace(&folder.display().to_string(), "FOLDER")
}

fn sharded() -> TempDir {
    let dir = TempDir::new().unwrap();
    write_file(
        &dir.path().join("a.safetensors"),
        &[("q.weight", "BF16", &[4, 6]), ("n.weight", "BF16", &[6])],
    );
    // A run long enough to be read instead of copied from the mapping.
    write_file(
        &dir.path().join("b.safetensors"),
        &[("big.weight", "BF16", &[128, 256])],
    );
    write_index(
        dir.path(),
        json!({"q.weight": "a.safetensors", "n.weight": "a.safetensors", "big.weight": "b.safetensors"}),
    );
    dir
}

#[test]
fn shards_are_read() {
    let dir = sharded();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names(), ["big.weight", "n.weight", "q.weight"]);
    assert_eq!(checkpoint.bytes(), 2 * (24 + 6 + 128 * 256));
    let values = pack_f32(
        &PackRecipe::identity("q.weight", 4, 6, PackDType::F32),
        &checkpoint,
    )
    .unwrap();
    assert!(values.iter().enumerate().all(|(i, v)| *v == i as f32));
    let big = pack_bf16(
        &PackRecipe::identity("big.weight", 128, 256, PackDType::Bf16),
        &checkpoint,
    )
    .unwrap();
    assert!(
        big.iter()
            .enumerate()
            .all(|(i, v)| *v == bf16::from_f32(i as f32))
    );
    let vector = pack_f32(
        &PackRecipe::identity("n.weight", 6, 1, PackDType::F32),
        &checkpoint,
    )
    .unwrap();
    assert_eq!(vector, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
}

#[test]
fn bad_folders_are_named() {
    let dir = TempDir::new().unwrap();
    assert_eq!(
        failure(dir.path()),
        "FOLDER: no model.safetensors and no model.safetensors.index.json"
    );
    fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    assert!(
        failure(dir.path()).ends_with("pytorch_model.bin is not read, convert it to safetensors")
    );

    let dir = sharded();
    let index = dir.path().join("model.safetensors.index.json");
    fs::write(&index, "{\n\"weight_map\": {\"a\": 1}}").unwrap();
    assert!(
        failure(dir.path()).starts_with(
            "model.safetensors.index.json: malformed index: invalid type: integer `1`"
        )
    );
    assert!(failure(dir.path()).contains("line 2 column"));
    write_index(
        dir.path(),
        json!({"q.weight": "a.safetensors", "x": "d.safetensors", "y": "c.safetensors"}),
    );
    assert_eq!(
        failure(dir.path()),
        "model.safetensors.index.json: names 2 shards that are not in the folder: c.safetensors, d.safetensors"
    );
    write_index(dir.path(), json!({"q.weight": "../a.safetensors"}));
    assert_eq!(
        failure(dir.path()),
        "model.safetensors.index.json: shard \"../a.safetensors\" is not a plain file name"
    );
    write_index(
        dir.path(),
        json!({"q.weight": "b.safetensors", "z": "a.safetensors"}),
    );
    assert_eq!(
        failure(dir.path()),
        "model.safetensors.index.json: tensors that are not where the index says: q.weight in b.safetensors, z in a.safetensors"
    );
    write_file(
        &dir.path().join("b.safetensors"),
        &[("q.weight", "BF16", &[1])],
    );
    assert_eq!(
        failure(dir.path()),
        "b.safetensors: not a valid safetensors file: tensor q.weight is in another shard too"
    );

    let single = dir.path().join("model.safetensors");
    fs::write(&single, "").unwrap();
    assert_eq!(
        failure(dir.path()),
        "model.safetensors: not a valid safetensors file: it is empty"
    );
    write_file(&single, &[("q.weight", "BF16", &[4, 6])]);
    let whole = fs::read(&single).unwrap();
    fs::write(&single, &whole[..whole.len() - 1]).unwrap();
    assert_eq!(
        failure(dir.path()),
        "model.safetensors: not a valid safetensors file: tensor q.weight lies at bytes 0..48 of the data, which has 47"
    );
}

#[test]
fn all_differences_are_listed_at_once() {
    let dir = TempDir::new().unwrap();
    write_file(
        &dir.path().join("model.safetensors"),
        &[
            ("layers.0.attn.rotary_emb.inv_freq", "BF16", &[4]),
            ("lm_head.weight", "BF16", &[2, 2]),
            ("a.weight", "BF16", &[2, 3]),
            ("b.weight", "I8", &[2, 2]),
            ("h.0.attn.c_attn.bias", "BF16", &[2]),
        ],
    );
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let expect = |names: &[(&str, &[usize])]| -> Vec<(String, Vec<usize>)> {
        names
            .iter()
            .map(|(n, s)| ((*n).to_owned(), s.to_vec()))
            .collect()
    };
    let expected = expect(&[
        ("a.weight", &[3, 2]),
        ("b.weight", &[2, 2]),
        ("c.weight", &[1]),
        ("d.weight", &[1]),
    ]);
    let message = check(&checkpoint, &expected, None).unwrap_err().to_string();
    assert_eq!(
        message
            .strip_prefix(&dir.path().display().to_string())
            .unwrap(),
        ": the weights do not fit config.json: 2 tensors missing: c.weight, d.weight; \
         1 tensor unexpected: h.0.attn.c_attn.bias; 1 tensor of another shape: a.weight is [2, 3], expected [3, 2]; \
         1 tensor of a wrong dtype (expected BF16, F16 or F32): b.weight is I8"
    );
    write_file(
        &dir.path().join("model.safetensors"),
        &[
            ("layers.0.attn.rotary_emb.inv_freq", "BF16", &[4]),
            ("a.weight", "BF16", &[2, 3]),
        ],
    );
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let checked = check(&checkpoint, &expect(&[("a.weight", &[2, 3])]), None).unwrap();
    assert_eq!(checked.ignored, ["layers.0.attn.rotary_emb.inv_freq"]);
    // A model that is cut on purpose leaves whole layers over, and nothing else.
    let shape: &[usize] = &[2];
    let tensors = |names: &[&'static str]| -> Vec<(&'static str, &'static str, &'static [usize])> {
        names
            .iter()
            .map(|&n| (n, "BF16", &[2usize] as &'static [usize]))
            .collect()
    };
    let layers = ["h.0.w", "h.1.w", "h.2.w"];
    write_file(&dir.path().join("model.safetensors"), &tensors(&layers));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let first = expect(&[("h.0.w", shape)]);
    assert_eq!(
        check(&checkpoint, &first, Some(1)).unwrap().cut,
        ["h.1.w", "h.2.w"]
    );
    assert!(check(&checkpoint, &first, None).is_err());
    assert!(check(&checkpoint, &first, Some(2)).is_err());
    write_file(
        &dir.path().join("model.safetensors"),
        &tensors(&["h.0.w", "h.1.other"]),
    );
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(check(&checkpoint, &first, Some(1)).is_err());
}

/// Names out of files are shown escaped, whatever is wrong with them.
#[test]
fn names_of_files_stay_on_the_line() {
    const NAME: &str = "a\nb\u{1b}[2J";
    const SHOWN: &str = "a\\nb\\u{1b}[2J";
    let dir = TempDir::new().unwrap();
    let fails = |index: serde_json::Value, expected: &str| {
        write_index(dir.path(), index);
        let message = failure(dir.path());
        assert!(message.contains(expected), "{message}");
        assert!(!message.contains(char::is_control), "{message:?}");
    };
    fails(json!({"w": NAME}), &format!("not in the folder: {SHOWN}"));
    fails(json!({"w": "../a\nb"}), "shard \"../a\\nb\" is not");
    write_file(&dir.path().join("a.safetensors"), &[("w", "BF16", &[2])]);
    fails(
        json!({NAME: "a.safetensors"}),
        &format!("{SHOWN} in a.safetensors"),
    );
    fs::write(dir.path().join(NAME), "").unwrap();
    fails(json!({"w": NAME}), &format!("{SHOWN}: not a valid"));

    let check_one = |name: &'static str, dtype: &'static str, expected: (&str, &[usize])| {
        write_file(
            &dir.path().join("model.safetensors"),
            &[(name, dtype, &[2])],
        );
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let expected = [(expected.0.to_owned(), expected.1.to_vec())];
        let message = check(&checkpoint, &expected, None).unwrap_err().to_string();
        assert!(!message.contains(char::is_control), "{message:?}");
        message
    };
    for (message, expected) in [
        (
            check_one("w", "BF16", (NAME, &[2])),
            "1 tensor missing: NAME",
        ),
        (
            check_one(NAME, "BF16", ("w", &[2])),
            "1 tensor unexpected: NAME",
        ),
        (
            check_one(NAME, "BF16", (NAME, &[3])),
            "NAME is [2], expected [3]",
        ),
        (check_one(NAME, "I8", (NAME, &[2])), "NAME is I8"),
    ] {
        assert!(
            message.contains(&expected.replace("NAME", SHOWN)),
            "{message}"
        );
    }
}
