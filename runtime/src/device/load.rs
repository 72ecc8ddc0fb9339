//! What a device needs to know before it loads a plan.

use crate::device::step::Capacity;
use crate::weights::WeightSource;
use lathe_codegen::{Operand, Plan};
use lathe_ir::ops::{attn_qkv, rope};
use lathe_ir::{Op, Real, Sym, SymEnv};
use std::collections::BTreeMap;

/// Sizes that are fixed while a model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Most token rows of one step.
    pub max_tokens: usize,
    /// Most sampled rows of one general step.
    pub max_rows: usize,
    /// Most sequences of one step.
    pub max_sequences: usize,
    /// Longest sequence, prompt and output.
    pub max_seq_len: usize,
    /// Tokens a page of the KV cache.
    pub page_size: usize,
    /// Pages of the KV cache.
    pub pages: usize,
}

impl LoadOptions {
    /// A static batch with a contiguous cache: one page a sequence.
    pub fn contiguous(sequences: usize, max_seq_len: usize, max_tokens: usize) -> LoadOptions {
        LoadOptions {
            max_tokens: max_tokens.max(sequences),
            max_rows: sequences,
            max_sequences: sequences,
            max_seq_len,
            page_size: max_seq_len,
            pages: sequences,
        }
    }

    /// The limits as an executor reports them.
    pub fn capacity(&self, vocab: usize) -> Capacity {
        Capacity {
            max_tokens: self.max_tokens,
            max_sequences: self.max_sequences,
            max_seq_len: self.max_seq_len,
            page_size: self.page_size,
            pages: self.pages,
            vocab,
        }
    }

    /// Pages of the longest sequence: columns of the block table.
    pub fn max_pages(&self) -> usize {
        self.max_seq_len.div_ceil(self.page_size.max(1))
    }

    /// The largest values of the symbols in a general step.
    pub fn general_env(&self) -> SymEnv {
        SymEnv::new(&[
            (Sym::T, self.max_tokens as i64),
            (Sym::B, self.max_sequences as i64),
            (Sym::R, self.max_rows as i64),
        ])
    }

    /// The largest values of the symbols in a decode step.
    pub fn decode_env(&self) -> SymEnv {
        let n = self.max_sequences as i64;
        SymEnv::new(&[(Sym::T, n), (Sym::B, n), (Sym::R, n)])
    }
}

/// How kernels are made and launched, on devices that compile them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Decode steps are captured and launched as one graph.
    pub graphs: bool,
    /// Rows of decode steps that are captured; none: all.
    pub graph_sizes: Option<Vec<usize>>,
    /// Every operation of the plan is one launch.
    pub per_op: bool,
    /// GEMM kernels are chosen by timing.
    pub autotune: bool,
    /// Timing may choose the vendor's GEMM kernels.
    pub cublaslt: bool,
}

/// The tensors that a plan reads, with the shapes that the checkpoint must have.
pub fn expected_tensors(weights: &[lathe_ir::WeightRef]) -> Vec<(String, Vec<usize>)> {
    weights
        .iter()
        .map(|w| {
            let shape = w.shape.iter().map(|&n| n as usize).collect();
            (w.name.clone(), shape)
        })
        .collect()
}

/// A plan with the source of its weights.
#[derive(Clone, Copy)]
pub struct Loadable<'a> {
    /// What to execute.
    pub plan: &'a Plan,
    /// Where the weights come from.
    pub weights: &'a dyn WeightSource,
    /// Vocabulary size.
    pub vocab: usize,
}

/// Rotary tables `cos, sin` of `[positions, D/2]` each, by index of the frequency table and bits of
/// the scaling.
pub(crate) type RopeTables = BTreeMap<(usize, u64), (Vec<f32>, Vec<f32>)>;

/// Cosines and sines of position times frequency, scaled, for every table and scaling that a step
/// of the plan rotates by.
pub(crate) fn rope_tables(plan: &Plan, positions: usize) -> RopeTables {
    let mut tables = BTreeMap::new();
    for step in plan.programs.iter().flat_map(|p| &p.steps) {
        let (rotation, freq) = match &step.op {
            Op::AttnQkv(spec) => (spec.rope, attn_qkv::INV_FREQ),
            Op::Rope(spec) => (Some(*spec), rope::INV_FREQ),
            _ => continue,
        };
        let (Some(rope), Some(Operand::Table(t))) = (rotation, step.get(freq)) else {
            continue;
        };
        let scaling = rope.scaling.get();
        tables
            .entry((*t, scaling.to_bits()))
            .or_insert_with(|| waves(&plan.tables[*t].data, scaling as f32, positions));
    }
    tables
}

fn waves(freqs: &[Real], scaling: f32, positions: usize) -> (Vec<f32>, Vec<f32>) {
    let mut cos = Vec::with_capacity(positions * freqs.len());
    let mut sin = Vec::with_capacity(positions * freqs.len());
    for p in 0..positions {
        for f in freqs {
            // Hugging Face multiplies in f32: the angle is rounded before the functions.
            let angle = f64::from(p as f32 * f.get() as f32);
            cos.push(angle.cos() as f32 * scaling);
            sin.push(angle.sin() as f32 * scaling);
        }
    }
    (cos, sin)
}
