//! Golden models, random values and runs of the interpreter that the tests of the passes share.
#![allow(dead_code, unreachable_pub)]

pub mod build;
pub mod case;
pub mod render;

use lathe_ir::import::{HfConfig, ImportOptions, import};
use lathe_ir::interp::{Interp, KvState, StepMeta, Tensor, Value};
use lathe_ir::{DType, Graph, Op, Sym, SymEnv, Type, WeightRef};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub type V = Value<f64>;

/// Golden models of the Llama shape.
pub const LLAMA_SHAPE: [&str; 6] = [
    "llama-linear",
    "llama-mha-bias",
    "llama-rope3-tied",
    "mistral-window",
    "qwen2",
    "qwen3",
];

/// Full-size configurations of the Llama shape.
pub const LLAMA_CONFIGS: [&str; 7] = [
    "llama-3.1-70b",
    "llama-3.1-8b",
    "llama-3.2-1b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-8b",
    "smollm2-135m",
];

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures"))
}

/// The programs of the file tests, `tests/files/**/*.ir`, in order.
pub fn programs() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/files");
    let mut paths = Vec::new();
    find_programs(&root, &mut paths);
    paths.sort();
    assert!(paths.len() >= 12, "the files are not where they should be");
    paths
}

fn find_programs(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            find_programs(&path, out);
        } else if path.extension().is_some_and(|e| e == "ir") {
            out.push(path);
        }
    }
}

/// The names of all golden models, sorted.
pub fn goldens() -> Vec<String> {
    let entries = std::fs::read_dir(fixtures().join("golden")).unwrap();
    let name = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name().into_string();
    let mut names: Vec<String> = entries.map(|e| name(e).unwrap()).collect();
    names.sort();
    assert!(names.len() >= 14, "{names:?}");
    names
}

/// The configuration of a golden model or of a full-size model.
pub fn config(name: &str) -> HfConfig {
    let golden = fixtures().join("golden").join(name);
    let folder = if golden.is_dir() {
        golden
    } else {
        fixtures().join("configs").join(name)
    };
    HfConfig::from_file(&folder).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// The naive graph of a configuration.
pub fn graph_of(config: &HfConfig, dtype: DType) -> Graph {
    let opts = ImportOptions {
        dtype,
        max_seq_len: None,
    };
    import(config, &opts).expect("import").graph
}

/// The naive graph of a model of the fixtures.
pub fn model(name: &str, dtype: DType) -> Graph {
    graph_of(&config(name), dtype)
}

/// The weights of a golden model in f64 (exact for the stored types).
pub struct Weights(BTreeMap<String, Vec<f64>>);

impl Weights {
    pub fn golden(name: &str) -> Weights {
        let path = fixtures()
            .join("golden")
            .join(name)
            .join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let n = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + n]).expect("header");
        let mut tensors = BTreeMap::new();
        for (name, t) in header.as_object().expect("an object") {
            if name == "__metadata__" {
                continue;
            }
            let at = |i: usize| t["data_offsets"][i].as_u64().expect("an offset") as usize;
            let data = &bytes[8 + n + at(0)..8 + n + at(1)];
            let values = match t["dtype"].as_str() {
                Some("BF16") => data
                    .chunks_exact(2)
                    .map(|c| f32::from_bits(u32::from_le_bytes([0, 0, c[0], c[1]])).into())
                    .collect(),
                Some("F32") => data
                    .chunks_exact(4)
                    .map(|c| f32::from_le_bytes(c.try_into().expect("4 bytes")).into())
                    .collect(),
                other => panic!("{name} has dtype {other:?}"),
            };
            tensors.insert(name.clone(), values);
        }
        Weights(tensors)
    }

    pub fn get(&self, w: &WeightRef) -> Result<Vec<f64>, String> {
        self.0
            .get(&w.name)
            .cloned()
            .ok_or_else(|| format!("no weight '{}'", w.name))
    }
}

/// SplitMix64 over a seed and a name.
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64, name: &str) -> Noise {
        let mut state = seed ^ 0x243F_6A88_85A3_08D3;
        for b in name.bytes() {
            state = (state ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3);
        }
        Noise(state)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Values in `[-1, 1)`.
    pub fn floats(&mut self, n: usize) -> Vec<f64> {
        (0..n)
            .map(|_| (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
            .collect()
    }
}

/// A random weight, the same for the same seed and name.
pub fn random_weight(seed: u64, w: &WeightRef) -> Result<Vec<f64>, String> {
    let n: i64 = w.shape.iter().product();
    Ok(Noise::new(seed, &w.name).floats(n as usize))
}

/// A random value for an input. Integers are below `limit`.
pub fn random_input(
    seed: u64,
    name: &str,
    dtype: DType,
    shape: &[lathe_ir::Dim],
    env: &SymEnv,
    limit: usize,
) -> V {
    let shape: Vec<usize> = shape.iter().map(|d| d.eval(env) as usize).collect();
    let n = shape.iter().product();
    let mut noise = Noise::new(seed, name);
    match dtype {
        DType::I32 | DType::I64 => Value::Int(Tensor::new(
            shape,
            (0..n).map(|_| noise.below(limit) as i64).collect(),
        )),
        DType::Bool => Value::Bool(Tensor::new(
            shape,
            (0..n).map(|_| noise.below(2) == 1).collect(),
        )),
        _ => Value::Float(Tensor::new(shape, noise.floats(n))),
    }
}

/// The largest difference of two values relative to the larger of 1 and the largest element;
/// infinite where integers, shapes or the places of NaN and infinities differ.
pub fn distance(a: &V, b: &V) -> f64 {
    match (a, b) {
        (Value::Float(x), Value::Float(y)) if x.shape == y.shape => {
            let finite = y.data.iter().filter(|v| v.is_finite());
            let scale = finite.fold(1.0f64, |m, v| m.max(v.abs()));
            x.data
                .iter()
                .zip(&y.data)
                .map(|(x, y)| match (x.is_finite(), y.is_finite()) {
                    (true, true) => (x - y).abs() / scale,
                    _ if x == y || (x.is_nan() && y.is_nan()) => 0.0,
                    _ => f64::INFINITY,
                })
                .fold(0.0, f64::max)
        }
        (a, b) if a == b => 0.0,
        _ => f64::INFINITY,
    }
}

/// A program of a model over its steps: the caches are kept between the calls.
pub struct Session<'a> {
    pub graph: &'a Graph,
    pub weights: &'a dyn Fn(&WeightRef) -> Result<Vec<f64>, String>,
    pub caches: BTreeMap<u32, KvState<f64>>,
}

impl Session<'_> {
    /// Runs one step: `new[b]` are the new tokens of sequence b after `past[b]` cached ones; the
    /// logits of the token rows `rows` come back.
    pub fn step(&mut self, new: &[&[i64]], past: &[usize], rows: &[usize]) -> Tensor<f64> {
        let lens: Vec<usize> = new.iter().map(|t| t.len()).collect();
        let step = StepMeta::new(&lens, past);
        let t = step.tokens();
        let env = SymEnv::new(&[
            (Sym::B, new.len() as i64),
            (Sym::T, t as i64),
            (Sym::R, rows.len() as i64),
        ]);
        let ints = |v: Vec<i64>| Value::Int(Tensor::new([v.len()], v));
        let positions = step.rows().map(|(_, p)| p as i64).collect();
        let mut interp = Interp::new(env, self.weights)
            .with_input("step.tokens", ints(new.concat()))
            .with_input("step.positions", ints(positions))
            .with_input("step.rows", ints(rows.iter().map(|&r| r as i64).collect()));
        interp.step = Some(step);
        interp.caches = std::mem::take(&mut self.caches);
        let mut out = interp
            .run(self.graph)
            .unwrap_or_else(|e| panic!("{}: {e}", self.graph.name));
        self.caches = interp.caches;
        match out.swap_remove("logits") {
            Some(Value::Float(t)) => t,
            other => panic!("logits are {other:?}"),
        }
    }
}

/// Logits `[B,S,V]` of a full-sequence graph.
pub fn full_logits(
    graph: &Graph,
    weights: &dyn Fn(&WeightRef) -> Result<Vec<f64>, String>,
    tokens: &[Vec<i64>],
) -> Tensor<f64> {
    let (b, s) = (tokens.len(), tokens[0].len());
    let env = SymEnv::new(&[(Sym::B, b as i64), (Sym::S, s as i64)]);
    let tokens = Value::Int(Tensor::new([b, s], tokens.concat()));
    let mut out = Interp::new(env, weights)
        .with_input("tokens", tokens)
        .run(graph)
        .unwrap_or_else(|e| panic!("{}: {e}", graph.name));
    match out.swap_remove("logits") {
        Some(Value::Float(t)) => t,
        other => panic!("logits are {other:?}"),
    }
}

/// The program with every tensor as an output, named `n<node>`.
pub fn all_outputs(graph: &Graph) -> Graph {
    let mut out = Graph::new(&graph.name);
    for node in graph.nodes() {
        out.push_unchecked(node.clone());
    }
    for id in graph.ids() {
        if matches!(graph.node(id).ty, Type::Tensor(_)) {
            out.set_output(&format!("n{}", id.index()), id);
        }
    }
    out
}

/// Whether an operation is a kernel of its own: leaves, views, tuple elements and packed weights
/// are not.
pub fn is_kernel(op: &Op) -> bool {
    !op.is_leaf() && !matches!(op, Op::Reshape(_) | Op::Get(_) | Op::Pack(_))
}

/// For each node a hash of the whole term under it: equal for equal terms whatever their numbers.
pub fn term_hashes(graph: &Graph) -> Vec<u64> {
    let mut hashes: Vec<u64> = Vec::with_capacity(graph.nodes().len());
    for node in graph.nodes() {
        let inputs: Vec<u64> = node.inputs.iter().map(|i| hashes[i.index()]).collect();
        hashes.push(Noise::new(0, &format!("{:?}{inputs:?}", node.op)).next());
    }
    hashes
}
