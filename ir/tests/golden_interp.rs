//! Imported models through the interpreter against logits and tokens of transformers.

use lathe_ir::import::{HfConfig, ImportOptions, Model, import};
use lathe_ir::interp::{Float, Interp, Tensor, Value};
use lathe_ir::{DType, Sym, SymEnv, WeightRef, relative_error};
use safetensors::{Dtype, SafeTensors};
use std::path::{Path, PathBuf};

/// Longest relative distance of logits in f64 from the float32 logits of transformers.
const TOLERANCE: f64 = 5e-6;

struct Golden<'a> {
    name: &'a str,
    config: HfConfig,
    weights: Vec<u8>,
    reference: Vec<u8>,
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden")
}

fn golden(name: &str) -> Golden<'_> {
    let folder = goldens().join(name);
    let read = |file: &str| std::fs::read(folder.join(file)).expect(file);
    Golden {
        name,
        config: HfConfig::from_file(&folder).expect("config"),
        weights: read("model.safetensors"),
        reference: read("golden.safetensors"),
    }
}

/// Elements of a tensor in f64 (exact for all stored types), and its extents.
fn tensor(bytes: &[u8], name: &str) -> (Vec<usize>, Vec<f64>) {
    let file = SafeTensors::deserialize(bytes).expect("safetensors");
    let t = file.tensor(name).expect(name);
    let data = t.data();
    let values = match t.dtype() {
        Dtype::BF16 => {
            let of = |c: &[u8]| half::bf16::from_le_bytes([c[0], c[1]]).to_f64();
            data.chunks_exact(2).map(of).collect()
        }
        Dtype::F32 => {
            let of = |c: &[u8]| f64::from(f32::from_le_bytes(c.try_into().expect("4 bytes")));
            data.chunks_exact(4).map(of).collect()
        }
        Dtype::I64 => {
            let of = |c: &[u8]| i64::from_le_bytes(c.try_into().expect("8 bytes")) as f64;
            data.chunks_exact(8).map(of).collect()
        }
        other => panic!("{name} has dtype {other:?}"),
    };
    (t.shape().to_vec(), values)
}

fn ids(bytes: &[u8], name: &str) -> Tensor<i64> {
    let (shape, values) = tensor(bytes, name);
    Tensor::new(shape, values.into_iter().map(|v| v as i64).collect())
}

impl Golden<'_> {
    fn model(&self, dtype: DType) -> Model {
        let opts = ImportOptions {
            dtype,
            max_seq_len: None,
        };
        import(&self.config, &opts).expect("import")
    }

    /// Logits `[B,S,V]` of token ids `[B,S]`.
    fn logits<F: Float>(&self, model: &Model, tokens: Tensor<i64>, round: bool) -> Tensor<F> {
        let weights = |w: &WeightRef| -> Result<Vec<F>, String> {
            let (_, values) = tensor(&self.weights, &w.name);
            Ok(values.into_iter().map(F::from_f64).collect())
        };
        let syms = SymEnv::new(&[
            (Sym::B, tokens.shape[0] as i64),
            (Sym::S, tokens.shape[1] as i64),
        ]);
        let mut interp = Interp::new(syms, &weights).with_input("tokens", Value::Int(tokens));
        interp.round = round;
        let mut out = interp.run(&model.graph).expect(self.name);
        match out.swap_remove("logits") {
            Some(Value::Float(t)) => t,
            other => panic!("{}: logits are {other:?}", self.name),
        }
    }
}

fn argmax<F: Float>(row: &[F]) -> i64 {
    let mut best = 0;
    for (i, x) in row.iter().enumerate() {
        if *x > row[best] {
            best = i;
        }
    }
    best as i64
}

/// Logits in f64, then greedy tokens in f32 by full recompute.
fn check(name: &str) {
    let g = golden(name);
    let model = g.model(DType::F32);
    let (shape, expected) = tensor(&g.reference, "logits");
    let prompt = ids(&g.reference, "input_ids");
    let out: Tensor<f64> = g.logits(&model, prompt.clone(), false);
    assert_eq!(out.shape, shape);
    let error = relative_error(&out.data, &expected);
    assert!(error <= TOLERANCE, "{name}: relative error {error:.2e}");

    let generated = ids(&g.reference, "generated");
    let (batch, total) = (generated.shape[0], generated.shape[1]);
    let mut rows: Vec<Vec<i64>> = prompt
        .data
        .chunks(prompt.shape[1])
        .map(<[i64]>::to_vec)
        .collect();
    while rows[0].len() < total {
        let len = rows[0].len();
        let logits: Tensor<f32> = g.logits(&model, Tensor::new([batch, len], rows.concat()), false);
        let vocab = logits.last();
        for (row, of_row) in rows.iter_mut().zip(logits.data.chunks(len * vocab)) {
            row.push(argmax(&of_row[(len - 1) * vocab..]));
        }
    }
    assert_eq!(rows.concat(), generated.data, "{name}: greedy tokens");

    // In bf16 with every value rounded, the import is about as far from the float32 logits as
    // transformers' own bfloat16 run.
    let (_, theirs) = tensor(&g.reference, "logits_bf16");
    let theirs = relative_error(&theirs, &expected);
    let ours: Tensor<f64> = g.logits(&g.model(DType::BF16), prompt, true);
    let ours = relative_error(&ours.data, &expected);
    println!("{name}: f64 {error:.2e}, bf16 {ours:.4} (transformers {theirs:.4})");
    assert!(
        ours <= 1.5 * theirs,
        "{name}: bf16 error {ours:.4}, transformers' is {theirs:.4}"
    );
}

#[test]
fn every_golden_model_computes_what_transformers_computes() {
    let entries = std::fs::read_dir(goldens()).expect("goldens");
    let names = entries.map(|e| e.expect("entry").file_name().into_string().expect("utf-8"));
    let names: Vec<String> = names.collect();
    assert!(names.len() >= 14, "{names:?}");
    std::thread::scope(|scope| {
        for name in &names {
            let run = || check(name);
            let thread = std::thread::Builder::new().name(name.clone());
            thread.spawn_scoped(scope, run).expect("a thread");
        }
    });
}
