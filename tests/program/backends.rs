//! The four values of `compile_backend` compute the same: every golden family on the CPU, prompts
//! and decode steps, in float32.

use crate::common::{compiled, goldens};

use lathe::config::CompileBackend;
use lathe::model::WeightChoice;
use lathe_ir::relative_error;
use lathe_runtime::device::executor::Executor;
use lathe_runtime::device::load::LoadOptions;
use lathe_runtime::device::step::{RowSampler, StepBatch};
use lathe_runtime::sampling::SamplingParams;

const BACKENDS: [&str; 4] = [
    "torch-simple",
    "torch-cudagraph",
    "torch-compile",
    "torch-opt",
];

/// Logits of two prompts of unequal length and of two decode steps after them, with the tokens.
fn outputs(executor: &mut dyn Executor) -> (Vec<f32>, Vec<i32>) {
    let mut logits = Vec::new();
    let mut tokens = Vec::new();
    let prompts: [Vec<i32>; 2] = [
        (0..11).map(|i| (i * 31 + 7) % 256).collect(),
        (0..5).map(|i| (i * 17 + 3) % 256).collect(),
    ];
    let mut at = [0, 0];
    let mut next = prompts.to_vec();
    for _ in 0..3 {
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

#[test]
fn backends_agree() {
    let options = LoadOptions {
        max_tokens: 32,
        max_rows: 4,
        max_sequences: 4,
        max_seq_len: 32,
        page_size: 8,
        pages: 8,
    };
    let mut n_run = 0;
    for folder in goldens() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let mut reference: Option<(Vec<f32>, Vec<i32>)> = None;
        for backend in BACKENDS {
            let mut model = compiled(&folder, &format!("compile_backend: {backend}"));
            assert_eq!(model.backend, backend.parse::<CompileBackend>().unwrap());
            // The device refuses other heads with a reason of its own.
            if model.plan.caches.iter().any(|c| c.head_dim % 16 != 0) {
                continue;
            }
            let mut executor = model.load(WeightChoice::Checkpoint, options).unwrap();
            let (logits, tokens) = outputs(&mut *executor);
            match &reference {
                None => reference = Some((logits, tokens)),
                Some((expected, expected_tokens)) => {
                    let error = relative_error(&logits, expected);
                    assert!(error <= 1e-5, "{name}, {backend}: {error:e}");
                    assert_eq!(&tokens, expected_tokens, "{name}, {backend}");
                }
            }
            n_run += 1;
        }
    }
    assert!(n_run >= 4 * 12, "{n_run} runs");
}
