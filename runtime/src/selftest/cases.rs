//! Batches of odd sizes, and caches with random histories.

use super::POISON;
use crate::device::load::LoadOptions;
use crate::device::step::{RowSampler, StepBatch};
use crate::sampling::SamplingParams;
use half::bf16;
use lathe_codegen::cuda::{Choices, CudaError, CudaOptions, Sampling, Sizes, Variant, gemm_keys};
use lathe_codegen::plan::CacheSpec;
use lathe_codegen::{Plan, ProgramKind};
use lathe_ir::DType;

/// The rows of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One new row each of so many sequences of random lengths.
    Decode(usize),
    /// `(cached, new)` rows of each sequence.
    General(Vec<(usize, usize)>),
}

/// A batch and the program that runs it.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// What reports call it.
    pub label: String,
    /// The program.
    pub kind: ProgramKind,
    /// Whether the logits are wanted beside the tokens; greedy steps of few rows keep them to
    /// themselves otherwise.
    pub logits: bool,
    /// Which kernel each GEMM of the step gets, on a GPU: none is the heuristics' choice, and a number picks for one
    /// after the other of those that compute it.
    pub gemms: Option<usize>,
    /// The batch.
    pub batch: StepBatch,
}

impl Case {
    /// The same with other kernels for its GEMMs.
    pub fn with_gemms(mut self, number: usize) -> Case {
        self.label = format!("{}, GEMM kernels {number}", self.label);
        self.gemms = Some(number);
        self
    }

    /// The kernels of the GEMMs of its step, where they are not the heuristics'.
    ///
    /// # Errors
    /// A step of the program has no kernel.
    pub fn choices(
        &self,
        plan: &Plan,
        sizes: Sizes,
        sampling: Sampling,
        options: CudaOptions,
    ) -> Result<Choices, CudaError> {
        let mut choices = Choices::default();
        if let (Some(number), Some(program)) = (self.gemms, plan.program(self.kind)) {
            let keys = gemm_keys(plan, program, sizes, sampling, options)?;
            for (i, key) in keys.keys().enumerate() {
                let variants = Variant::all(key, options.sms as usize);
                choices.insert(*key, variants[(number * keys.len() + i) % variants.len()]);
            }
        }
        Ok(choices)
    }

    /// Rows in the cache before the step, by sequence.
    pub fn past(&self) -> Vec<usize> {
        let b = &self.batch;
        let rows = b.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize);
        b.kv_lens
            .iter()
            .zip(rows)
            .map(|(&len, n)| len as usize - n)
            .collect()
    }

    /// The longest sequence.
    pub fn longest(&self) -> usize {
        self.batch.kv_lens.iter().copied().max().unwrap_or(0) as usize
    }
}

/// A generator of random numbers: splitmix64.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of a seed.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is at least 1.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// A number in [-1, 1).
    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 * (1.0 / 8_388_608.0) - 1.0
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// Parameters of a row: greedy or any mixture of temperature, top-k and top-p.
    pub fn params(&mut self) -> SamplingParams {
        let mut params = SamplingParams {
            temperature: [0.0, 0.3, 1.0, 2.5][self.below(4)],
            top_k: [0, 1, 2, 7, 40, 100_000][self.below(6)],
            top_p: [1.0, 0.95, 0.5, 0.01][self.below(4)],
            seed: self.next(),
        };
        if self.below(4) == 0 {
            params.top_k = 0;
            params.top_p = 1.0;
        }
        params
    }
}

/// The case of a shape: random tokens, lengths and pages. With `draws`, rows have random sampling
/// parameters, else they are greedy.
///
/// # Panics
/// The shape does not fit the options (invariant: the lists of cases are written for them).
pub fn case(
    shape: &Shape,
    draws: bool,
    logits: bool,
    vocab: usize,
    o: &LoadOptions,
    rng: &mut Rng,
) -> Case {
    let sequences: Vec<(usize, usize)> = match shape {
        Shape::General(s) => s.clone(),
        Shape::Decode(n) => (0..*n)
            .scan(o.pages, |left, i| {
                // Every later sequence still needs a page.
                let spare = (*left - (n - i - 1)).min(1 + o.max_seq_len / o.page_size.max(1) / 2);
                let most = (spare * o.page_size).min(o.max_seq_len);
                let len = match rng.below(4) {
                    0 => 1 + rng.below(most),
                    _ => 1 + rng.below(most.min(3 * o.page_size)),
                };
                *left -= len.div_ceil(o.page_size);
                Some((len - 1, 1))
            })
            .collect(),
    };
    let mut pages: Vec<i32> = (0..o.pages as i32).collect();
    rng.shuffle(&mut pages);
    let needs = |(past, new): (usize, usize)| (past + new).div_ceil(o.page_size);
    let mut batch = StepBatch {
        max_pages: sequences.iter().map(|&s| needs(s)).max().unwrap_or(1),
        ..StepBatch::default()
    };
    for (i, &(past, new)) in sequences.iter().enumerate() {
        let own: Vec<i32> = pages.split_off(pages.len() - needs((past, new)));
        let tokens: Vec<i32> = (0..new).map(|_| rng.below(vocab) as i32).collect();
        let sampler = RowSampler {
            params: match draws {
                true => rng.params(),
                false => SamplingParams::default(),
            },
            request: rng.next(),
            position: (past + new) as u32,
        };
        // Of mixed batches some chunks are not the last of their prompt.
        let open = matches!(shape, Shape::General(_)) && i % 4 == 2;
        batch.push_sequence(&tokens, past, &own, (!open).then_some(sampler));
    }
    let (kind, name) = match shape {
        Shape::Decode(n) => (ProgramKind::Decode, format!("decode of {n}")),
        Shape::General(s) => {
            let parts: Vec<String> = s.iter().map(|(p, n)| format!("{p}+{n}")).collect();
            (ProgramKind::General, format!("general {}", parts.join(",")))
        }
    };
    let page = match o.page_size == o.max_seq_len {
        true => "contiguous".to_owned(),
        false => format!("pages of {}", o.page_size),
    };
    Case {
        label: format!("{name}, {page}{}", if draws { ", drawn" } else { "" }),
        kind,
        logits,
        gemms: None,
        batch,
    }
}

/// Where the vector of `(position, value, kv head)` of a sequence starts in a cache, in elements.
pub(crate) fn cache_offset(
    spec: &CacheSpec,
    batch: &StepBatch,
    page_size: usize,
    sequence: usize,
    position: usize,
    value: bool,
    head: usize,
) -> usize {
    let pages = &batch.block_table[sequence * batch.max_pages..][..batch.max_pages];
    let page = pages[position / page_size] as usize;
    let heads = spec.kv_heads as usize;
    let row = (page * 2 + usize::from(value)) * heads + head;
    (row * page_size + position % page_size) * spec.head_dim as usize
}

/// Calls `f` with the element offset of every vector that the rows `from(b)..to(b)` of the sequences
/// have in a cache: keys and values of all heads.
pub(crate) fn each_vector(
    spec: &CacheSpec,
    batch: &StepBatch,
    page_size: usize,
    rows: impl Fn(usize) -> std::ops::Range<usize>,
    mut f: impl FnMut(usize),
) {
    for b in 0..batch.sequences() {
        for position in rows(b) {
            for value in [false, true] {
                for head in 0..spec.kv_heads as usize {
                    f(cache_offset(
                        spec, batch, page_size, b, position, value, head,
                    ));
                }
            }
        }
    }
}

/// The bytes of a cache: random keys and values of size 1 in the rows before the step, poison elsewhere.
pub(crate) fn fill_cache(
    spec: &CacheSpec,
    case: &Case,
    options: &LoadOptions,
    rng: &mut Rng,
) -> Vec<u8> {
    let page_size = options.page_size;
    let words = options.pages * page_size * spec.token_bytes() / 4;
    let mut out = POISON.to_le_bytes().repeat(words);
    let past = case.past();
    let (d, size) = (spec.head_dim as usize, spec.dtype.size());
    each_vector(
        spec,
        &case.batch,
        page_size,
        |b| 0..past[b],
        |at| {
            for x in out[at * size..][..d * size].chunks_exact_mut(size) {
                let v = rng.uniform() * 3f32.sqrt();
                match spec.dtype {
                    DType::BF16 => x.copy_from_slice(&bf16::from_f32(v).to_le_bytes()),
                    _ => x.copy_from_slice(&v.to_le_bytes()),
                }
            }
        },
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn batches_are_valid_and_no_page_is_shared() {
        let mut rng = Rng::new(1);
        for page_size in [16, 64, 768] {
            let o = LoadOptions {
                max_tokens: 1024,
                max_rows: 256,
                max_sequences: 256,
                max_seq_len: 768,
                page_size,
                pages: 260,
            };
            let general = Shape::General(vec![(0, 1), (5, 7), (70, 130), (0, 700), (33, 1)]);
            for shape in [Shape::Decode(1), Shape::Decode(200), general] {
                let c = case(&shape, true, true, 97, &o, &mut rng);
                crate::device::cpu::executor::check_batch(&c.batch, &o, 97).unwrap();
                let mut seen = BTreeSet::new();
                for (b, &len) in c.batch.kv_lens.iter().enumerate() {
                    let row = &c.batch.block_table[b * c.batch.max_pages..];
                    for &p in &row[..(len as usize).div_ceil(page_size)] {
                        assert!(seen.insert(p), "page {p} twice");
                    }
                }
            }
        }
    }
}
