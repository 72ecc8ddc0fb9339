//! Programs on the CPU device.

use crate::oracle::{Numbers, Rows};
use lathe_codegen::Plan;
use lathe_ir::interp::StepMeta;
use lathe_ir::ops::Weight;
use lathe_ir::{Graph, Op};
use lathe_passes::trial::Trial;
use lathe_runtime::device::cpu::{load, run_full};
use lathe_runtime::device::load::{LoadOptions, Loadable};
use lathe_runtime::device::step::{RowSampler, StepBatch};
use lathe_runtime::sampling::SamplingParams;
use lathe_runtime::weights::{Dtype, ReadAt, TensorData, TensorInfo, WeightSource};
use std::collections::BTreeMap;

/// The bytes of a tensor in memory.
#[derive(Debug)]
struct Bytes(Vec<u8>);

impl ReadAt for Bytes {
    fn read_at(&self, out: &mut [u8], at: u64) -> std::io::Result<usize> {
        let from = self.0.get(at as usize..).unwrap_or_default();
        let n = from.len().min(out.len());
        out[..n].copy_from_slice(&from[..n]);
        Ok(n)
    }
}

/// The weights of a program in a trial, stored as f32.
pub(crate) struct Stored(BTreeMap<String, (TensorInfo, Bytes)>);

impl Stored {
    pub(crate) fn new(trial: &Trial<'_>) -> Stored {
        let weights = trial.program.nodes().iter().filter_map(|n| match &n.op {
            Op::Weight(Weight { weight, .. }) => Some(weight),
            _ => None,
        });
        let tensor = |w: &lathe_ir::WeightRef| {
            let bytes = trial.weight::<f32>(w);
            let info = TensorInfo {
                dtype: Dtype::F32,
                shape: w.shape.iter().map(|&n| n as usize).collect(),
            };
            let bytes = bytes.iter().flat_map(|v| v.to_le_bytes()).collect();
            (w.name.clone(), (info, Bytes(bytes)))
        };
        Stored(weights.map(tensor).collect())
    }
}

impl WeightSource for Stored {
    fn describe(&self) -> String {
        "weights of a trial".to_string()
    }

    fn names(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.0.get(name).map(|t| &t.0)
    }

    fn data(&self, name: &str) -> Option<TensorData<'_>> {
        let tensor = self.0.get(name)?;
        Some(TensorData::Stored {
            at: 0,
            file: &tensor.1,
        })
    }
}

/// The input `tokens` of the program.
fn tokens(trial: &Trial<'_>) -> Result<Vec<i32>, String> {
    let none = |_: &lathe_ir::WeightRef| Err("tokens are no weight".to_string());
    let interp = trial.interp::<f64>(trial.program, trial.whole(), &none)?;
    let given = interp.inputs.get("tokens").and_then(|v| v.as_int());
    let given = given.ok_or("the program reads no tokens")?;
    Ok(given.data.iter().map(|&t| t as i32).collect())
}

/// Rows of the vocabulary, of which tokens must be.
fn vocabulary(graph: &Graph) -> usize {
    let logits = graph.output("logits").and_then(|id| graph.tensor(id));
    let last = logits.and_then(|t| t.shape.last()?.known()).unwrap_or(0);
    (last as usize).max(lathe_passes::trial::INTEGERS)
}

/// The logits of a plan's program of whole sequences.
///
/// # Errors
/// The device refuses it.
pub(crate) fn whole(trial: &Trial<'_>, plan: &Plan, weights: &Stored) -> Result<Numbers, String> {
    let model = Loadable {
        plan,
        weights,
        vocab: vocabulary(trial.program),
    };
    let logits = run_full(model, &tokens(trial)?, trial.batch).map_err(|e| e.to_string())?;
    Ok(logits.into_iter().map(f64::from).collect())
}

/// The logits of all rows of a plan's step programs, in the order of whole sequences.
///
/// # Errors
/// The device refuses it.
pub(crate) fn stepped(
    trial: &Trial<'_>,
    plan: &Plan,
    weights: &Stored,
    steps: &[StepMeta],
    page_size: usize,
) -> Result<Numbers, String> {
    let model = Loadable {
        plan,
        weights,
        vocab: vocabulary(trial.program),
    };
    let pages = trial.len.div_ceil(page_size);
    let options = LoadOptions {
        max_tokens: trial.batch * trial.len,
        max_rows: trial.batch * trial.len,
        max_sequences: trial.batch,
        max_seq_len: trial.len,
        page_size,
        pages: pages * trial.batch,
    };
    let tokens = tokens(trial)?;
    let mut device = load(model, options).map_err(|e| e.to_string())?;
    let mut rows = Rows::new(trial);
    for step in steps {
        let mut batch = StepBatch {
            max_pages: pages,
            ..StepBatch::default()
        };
        for (seq, &past) in step.past.iter().enumerate() {
            let new = step.cu_seqlens[seq + 1] - step.cu_seqlens[seq];
            let first = seq * trial.len + past;
            // The pages of the sequences alternate.
            let own: Vec<i32> = (0..pages).map(|p| (p * trial.batch + seq) as i32).collect();
            batch.push_sequence(&tokens[first..first + new], past, &own, None);
        }
        batch.rows = (0..step.tokens() as i32).collect();
        let sampler = RowSampler {
            params: SamplingParams::default(),
            request: 0,
            position: 0,
        };
        batch.samplers = vec![sampler; step.tokens()];
        let out = device.step(&batch, true).map_err(|e| e.to_string())?;
        let logits: Vec<f64> = (out.logits.unwrap_or_default().iter())
            .map(|&v| f64::from(v))
            .collect();
        rows.put(step, &logits);
    }
    Ok(rows.numbers())
}
