//! The four values of `compile_backend` compute what the imported graph means: every golden family on the CPU, prompts
//! and decode steps, in float32, against the interpreter.

use std::path::Path;

use crate::common::{compiled, goldens};

use lathe::config::CompileBackend;
use lathe::model::WeightChoice;
use lathe_ir::import::{HfConfig, ImportOptions, import};
use lathe_ir::interp::{Interp, Tensor, Value};
use lathe_ir::{DType, Sym, SymEnv, WeightRef, relative_error};
use lathe_runtime::device::executor::Executor;
use lathe_runtime::device::load::LoadOptions;
use lathe_runtime::device::step::{RowSampler, StepBatch};
use lathe_runtime::sampling::{SamplingParams, argmax};
use safetensors::SafeTensors;

const BACKENDS: [&str; 4] = [
    "torch-simple",
    "torch-cudagraph",
    "torch-compile",
    "torch-opt",
];

/// Steps of a run: the prompts, then two tokens more of each.
const STEPS: usize = 3;

/// Two prompts of unequal length.
fn prompts() -> [Vec<i32>; 2] {
    [
        (0..11).map(|i| (i * 31 + 7) % 256).collect(),
        (0..5).map(|i| (i * 17 + 3) % 256).collect(),
    ]
}

/// Logits of the last token of both sequences after each step, and the tokens that follow.
fn outputs(executor: &mut dyn Executor) -> (Vec<f32>, Vec<i32>) {
    let mut logits = Vec::new();
    let mut tokens = Vec::new();
    let prompts = prompts();
    let mut at = [0, 0];
    let mut next = prompts.to_vec();
    for _ in 0..STEPS {
        let mut batch = StepBatch {
            max_pages: 4,
            ..StepBatch::default()
        };
        for (i, new) in next.iter().enumerate() {
            let sampler = RowSampler {
                params: SamplingParams::default(),
                request: i as u64,
                position: (at[i] + new.len()) as u32,
            };
            let pages: Vec<i32> = (0..4).map(|p| p + 4 * i as i32).collect();
            batch.push_sequence(new, at[i], &pages, Some(sampler));
            at[i] += new.len();
        }
        let out = executor.step(&batch, true).unwrap();
        logits.extend(out.logits.unwrap());
        tokens.extend(&out.next);
        next = out.next.iter().map(|&t| vec![t]).collect();
    }
    (logits, tokens)
}

/// The same by the interpreter, from the graph as it was imported, over whole sequences.
fn interpreted(folder: &Path) -> (Vec<f32>, Vec<i32>) {
    let config = HfConfig::from_file(folder).unwrap();
    let options = ImportOptions {
        dtype: DType::F32,
        max_seq_len: None,
    };
    let model = import(&config, &options).unwrap();
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let weights = |w: &WeightRef| -> Result<Vec<f32>, String> {
        let tensor = file.tensor(&w.name).map_err(|error| error.to_string())?;
        Ok(match tensor.dtype() {
            safetensors::Dtype::BF16 => {
                let (values, _) = tensor.data().as_chunks::<2>();
                let value = |&x| half::bf16::from_le_bytes(x).to_f32();
                values.iter().map(value).collect()
            }
            safetensors::Dtype::F32 => {
                let (values, _) = tensor.data().as_chunks::<4>();
                values.iter().map(|&x| f32::from_le_bytes(x)).collect()
            }
            other => return Err(format!("{other:?}")),
        })
    };
    let last_row = |sequence: &[i32]| -> Vec<f32> {
        let ids = sequence.iter().map(|&token| i64::from(token)).collect();
        let ids = Tensor::new([1, sequence.len()], ids);
        let sizes = SymEnv::new(&[(Sym::B, 1), (Sym::S, sequence.len() as i64)]);
        let mut interp = Interp::new(sizes, &weights).with_input("tokens", Value::Int(ids));
        interp.round = false;
        match interp.run(&model.graph).unwrap().swap_remove("logits") {
            Some(Value::Float(logits)) => logits.data[logits.data.len() - logits.last()..].to_vec(),
            other => panic!("logits are {other:?}"),
        }
    };
    let mut sequences = prompts();
    let (mut logits, mut tokens) = (Vec::new(), Vec::new());
    for _ in 0..STEPS {
        for sequence in &mut sequences {
            let row = last_row(sequence);
            let next = argmax(&row).unwrap() as i32;
            logits.extend(row);
            tokens.push(next);
            sequence.push(next);
        }
    }
    (logits, tokens)
}

#[test]
fn backends_agree_with_the_interpreter() {
    let options = LoadOptions {
        max_tokens: 32,
        max_rows: 4,
        max_sequences: 4,
        max_seq_len: 32,
        page_size: 8,
        pages: 8,
    };
    let mut head_sizes = std::collections::BTreeSet::new();
    for folder in goldens() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let (expected, expected_tokens) = interpreted(&folder);
        let mut n_steps = Vec::new();
        for backend in BACKENDS {
            let mut model = compiled(&folder, &format!("compile_backend: {backend}"));
            assert_eq!(model.backend, backend.parse::<CompileBackend>().unwrap());
            head_sizes.extend(model.plan.caches.iter().map(|cache| cache.head_dim));
            n_steps.push(model.plan.programs[0].steps.len());
            let mut executor = model.load(WeightChoice::Checkpoint, options).unwrap();
            let (logits, tokens) = outputs(&mut *executor);
            let error = relative_error(&logits, &expected);
            assert!(error <= 1e-5, "{name}, {backend}: {error:e}");
            assert_eq!(tokens, expected_tokens, "{name}, {backend}");
        }
        // They are not one plan under four names.
        assert!(n_steps[0] > n_steps[3], "{name}: {n_steps:?} steps");
    }
    assert_eq!(head_sizes.into_iter().collect::<Vec<_>>(), [16, 24, 32]);
}
