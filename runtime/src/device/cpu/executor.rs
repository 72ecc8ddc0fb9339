//! The CPU device: executes the same plan as the GPU, with the kernels of [`super::kernels`].

use super::kernels::Elem;
use super::kernels::pool::{SharedMut, parallel_for};
use super::memory::{Arena, Layout, meminfo, padded_head, token_bytes};
use super::pages::PageBuffer;
use super::run::{Inputs, Run};
use crate::device::executor::{Execution, Executor};
use crate::device::load::{LoadOptions, Loadable, RopeTables, rope_tables};
use crate::device::profile::{ProfileOptions, StepProfile};
use crate::device::step::{Capacity, StepBatch, StepError, StepKind, StepOutput, StepTime};
use crate::progress::{self, Unit};
use crate::weights::{WeightsError, pack::Packer};
use half::bf16;
use lathe_codegen::{Plan, ProgramKind};
use lathe_ir::{DType, Sym, SymEnv};
use std::collections::VecDeque;
use std::time::Instant;

/// A model cannot be loaded on the CPU.
#[derive(Debug, thiserror::Error)]
pub enum CpuLoadError {
    /// The weights do not fit the plan.
    #[error("{0}")]
    Weights(#[from] WeightsError),
    /// The CPU has no kernels for this element type.
    #[error("the CPU runs models in float32 or bfloat16, not in {0}; choose one with --dtype")]
    DType(DType),
    /// The plan has no program that decodes with a cache.
    #[error("the plan has no step program with a KV cache")]
    NoStepProgram,
    /// The system refuses memory.
    #[error("the system grants no memory: {0}")]
    Allocate(std::io::Error),
    /// What depends on weights alone cannot be computed.
    #[error("computing weights: {0}")]
    Once(StepError),
    /// Not enough memory.
    #[error(
        "{what} needs {needed:.2} GB, {available:.2} GB are available; lower the batch size or the sequence length"
    )]
    Memory {
        /// What was to be allocated.
        what: &'static str,
        /// Bytes wanted, in GB.
        needed: f64,
        /// Bytes available, in GB.
        available: f64,
    },
}

/// Loads a plan; the executor runs step programs.
///
/// # Errors
/// The element type has no kernels, the weights do not fit, or the memory does not suffice.
pub fn load(model: Loadable<'_>, options: LoadOptions) -> Result<Box<dyn Executor>, CpuLoadError> {
    if model.plan.program(ProgramKind::General).is_none() {
        return Err(CpuLoadError::NoStepProgram);
    }
    Ok(match model.plan.dtype {
        DType::F32 => Box::new(CpuExecutor::<f32>::new(model, options)?),
        DType::BF16 => Box::new(CpuExecutor::<bf16>::new(model, options)?),
        other => return Err(CpuLoadError::DType(other)),
    })
}

/// Runs whole sequences without a cache: `tokens` `[batch, len]` to logits `[batch, len, vocab]`.
///
/// # Errors
/// As [`load`], or a kernel fails.
pub fn run_full(
    model: Loadable<'_>,
    tokens: &[i32],
    batch: usize,
) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
    let len = tokens.len() / batch.max(1);
    let options = LoadOptions::contiguous(batch, len, tokens.len());
    Ok(match model.plan.dtype {
        DType::F32 => CpuExecutor::<f32>::new(model, options)?.full(tokens, batch, len)?,
        DType::BF16 => CpuExecutor::<bf16>::new(model, options)?.full(tokens, batch, len)?,
        other => return Err(CpuLoadError::DType(other).into()),
    })
}

/// A plan in memory, with activations and KV caches in element type `E`.
pub(crate) struct CpuExecutor<E> {
    pub(crate) plan: Plan,
    pub(crate) options: LoadOptions,
    pub(crate) weights: Vec<PageBuffer<E>>,
    /// Cosines and sines `[max_pos, D/2]` by table and scaling.
    pub(crate) rope: RopeTables,
    pub(crate) caches: Vec<PageBuffer<E>>,
    pub(crate) vocab: usize,
    arena: Arena,
    layouts: Vec<Layout>,
    scratch: Vec<E>,
    done: VecDeque<StepOutput>,
    last: Vec<i32>,
}

impl<E: Elem> CpuExecutor<E> {
    pub(crate) fn new(
        model: Loadable<'_>,
        options: LoadOptions,
    ) -> Result<CpuExecutor<E>, CpuLoadError> {
        let plan = model.plan.clone();
        let cache_bytes = options.pages * options.page_size * token_bytes(&plan);
        let full_env = SymEnv::new(&[
            (Sym::B, options.max_sequences as i64),
            (Sym::S, options.max_seq_len as i64),
        ]);
        let layouts: Vec<Layout> = plan
            .programs
            .iter()
            .map(|p| {
                let env = match p.kind {
                    ProgramKind::Decode => options.decode_env(),
                    ProgramKind::General => options.general_env(),
                    ProgramKind::Full => full_env,
                    ProgramKind::Once => SymEnv::default(),
                };
                Layout::new(p, &env)
            })
            .collect();
        // Without step programs the cache is never used; with them, the full program is not.
        let stepped = plan.program(ProgramKind::General).is_some();
        let wanted = |kind| (kind == ProgramKind::Full) != stepped;
        let arena_bytes = plan
            .programs
            .iter()
            .zip(&layouts)
            .filter(|(p, _)| wanted(p.kind))
            .map(|(_, l)| l.bytes)
            .max()
            .unwrap_or(0);
        check_memory(plan.weight_bytes() + cache_bytes + arena_bytes)?;
        let mut weights = Vec::with_capacity(plan.weights.len());
        let (mut packed, total) = (0, plan.weight_bytes() as u64);
        for w in &plan.weights {
            let mut data = buffer::<E>(w.recipe.bytes().div_ceil(size_of::<E>()))?;
            if w.is_computed() {
                weights.push(data);
                continue;
            }
            let packer = Packer::new(&w.recipe, model.weights)?;
            // SAFETY: E is f32 or bf16, plain bytes without padding or invalid patterns; the
            // slice covers exactly the vector's elements.
            let bytes = unsafe {
                std::slice::from_raw_parts_mut(
                    data.as_mut_ptr().cast::<u8>(),
                    std::mem::size_of_val(&data[..]),
                )
            };
            // A narrower element type may leave a part of the last element of E.
            packer.fill(0..w.recipe.rows, &mut bytes[..w.recipe.bytes()])?;
            weights.push(data);
            packed += w.recipe.bytes() as u64;
            progress::advance("load weights", Unit::Bytes, packed, total);
        }
        let caches = plan
            .caches
            .iter()
            .map(|c| {
                let row = 2 * c.kv_heads as usize * padded_head(c.head_dim as usize);
                let tokens = if stepped {
                    options.pages * options.page_size
                } else {
                    0
                };
                buffer(tokens * row)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let rope = rope_tables(&plan, options.max_seq_len);
        let mut executor = CpuExecutor {
            scratch: Vec::new(),
            plan,
            options,
            weights,
            rope,
            caches,
            vocab: model.vocab,
            arena: Arena::new(arena_bytes),
            layouts,
            done: VecDeque::new(),
            last: Vec::new(),
        };
        executor.compute_weights()?;
        executor.scale_weights();
        Ok(executor)
    }

    /// Runs the program of the weights that are computed, and keeps its results.
    fn compute_weights(&mut self) -> Result<(), CpuLoadError> {
        let Some(once) = &self.plan.once else {
            return Ok(());
        };
        let env = SymEnv::default();
        let layout = Layout::new(&once.program, &env);
        let mut arena = Arena::new(layout.bytes);
        let batch = StepBatch::default();
        let mut run = Run {
            plan: &self.plan,
            options: &self.options,
            weights: &self.weights,
            rope: &self.rope,
            program: &once.program,
            layout: &layout,
            base: arena.base(),
            env,
            inputs: &Inputs { batch: &batch },
            caches: &mut [],
            scratch: &mut Vec::new(),
        };
        run.all(false, None).map_err(CpuLoadError::Once)?;
        let computed: Vec<(usize, Vec<u8>)> = once
            .results
            .iter()
            .map(|&(v, weight)| (weight, run.bytes(v).to_vec()))
            .collect();
        for (weight, bytes) in computed {
            // SAFETY: plain memory of f32 or bf16, of which any bytes are values; the buffer was
            // made for the bytes of this weight, which are those of the program's result.
            let all = unsafe {
                std::slice::from_raw_parts_mut(
                    self.weights[weight].as_mut_ptr().cast::<u8>(),
                    size_of_val(&self.weights[weight][..]),
                )
            };
            all[..bytes.len()].copy_from_slice(&bytes);
        }
        Ok(())
    }

    /// Multiplies the columns of the weights that have factors.
    fn scale_weights(&mut self) {
        for (i, weight) in self.plan.weights.iter().enumerate() {
            let Some(by) = weight.scaled_by else {
                continue;
            };
            let (rows, cols) = (weight.recipe.rows, weight.recipe.cols);
            // The factors lie in another buffer; a copy tells the compiler so.
            let factors = self.weights[by][..cols].to_vec();
            let all = SharedMut::new(&mut self.weights[i][..rows * cols]);
            parallel_for(rows, |row| {
                // SAFETY: the row lies inside the weight, and the one task of its number writes it.
                let row = unsafe { std::slice::from_raw_parts_mut(all.at(row * cols), cols) };
                for (w, g) in row.iter_mut().zip(&factors) {
                    *w = E::from_f32(w.to_f32() * g.to_f32());
                }
            });
        }
    }

    fn run(
        &mut self,
        kind: ProgramKind,
        env: SymEnv,
        batch: &StepBatch,
        logits: bool,
        seconds: Option<&mut Vec<f64>>,
    ) -> Result<StepOutput, StepError> {
        let start = Instant::now();
        let mut out = self.with_env(kind, env, batch, |run| run.all(logits, seconds))?;
        out.time = StepTime {
            device: start.elapsed().as_secs_f64(),
        };
        Ok(out)
    }

    /// A step program on a batch, ready to be run by `f`.
    pub(crate) fn with_run<R, X: From<StepError>>(
        &mut self,
        kind: ProgramKind,
        batch: &StepBatch,
        f: impl FnOnce(&mut Run<'_, E>) -> Result<R, X>,
    ) -> Result<R, X> {
        self.with_env(kind, Self::env(batch), batch, f)
    }

    fn with_env<R, X: From<StepError>>(
        &mut self,
        kind: ProgramKind,
        env: SymEnv,
        batch: &StepBatch,
        f: impl FnOnce(&mut Run<'_, E>) -> Result<R, X>,
    ) -> Result<R, X> {
        let at = self
            .plan
            .position(kind)
            .ok_or_else(|| StepError::Device(format!("the plan has no {} program", kind.name())))?;
        let mut caches = std::mem::take(&mut self.caches);
        let mut scratch = std::mem::take(&mut self.scratch);
        let base = self.arena.base();
        let mut run = Run {
            plan: &self.plan,
            options: &self.options,
            weights: &self.weights,
            rope: &self.rope,
            program: &self.plan.programs[at],
            layout: &self.layouts[at],
            base,
            env,
            inputs: &Inputs { batch },
            caches: &mut caches,
            scratch: &mut scratch,
        };
        let result = f(&mut run);
        self.caches = caches;
        self.scratch = scratch;
        result
    }

    fn full(&mut self, tokens: &[i32], batch: usize, len: usize) -> Result<Vec<f32>, StepError> {
        check_tokens(tokens, self.vocab)?;
        let env = SymEnv::new(&[(Sym::B, batch as i64), (Sym::S, len as i64)]);
        let step = StepBatch {
            tokens: tokens.to_vec(),
            ..StepBatch::default()
        };
        let out = self.run(ProgramKind::Full, env, &step, true, None)?;
        out.logits
            .ok_or_else(|| StepError::Device("the full program has no logits".into()))
    }

    /// Puts sampled tokens of the previous step in the place of references to them.
    fn resolve(&self, batch: &StepBatch) -> Result<StepBatch, StepError> {
        let mut batch = batch.clone();
        for t in &mut batch.tokens {
            if *t < 0 {
                let i = (-1 - *t) as usize;
                *t = *self.last.get(i).ok_or_else(|| {
                    StepError::Batch(format!(
                        "token refers to sampled row {i} of a step of {}",
                        self.last.len()
                    ))
                })?;
            }
        }
        Ok(batch)
    }

    /// The program that runs a batch.
    pub(super) fn kind(&self, batch: &StepBatch) -> ProgramKind {
        match batch.kind() {
            StepKind::Decode if self.plan.program(ProgramKind::Decode).is_some() => {
                ProgramKind::Decode
            }
            _ => ProgramKind::General,
        }
    }

    /// The sizes of a batch.
    pub(super) fn env(batch: &StepBatch) -> SymEnv {
        SymEnv::new(&[
            (Sym::T, batch.tokens_len() as i64),
            (Sym::B, batch.sequences() as i64),
            (Sym::R, batch.rows.len() as i64),
        ])
    }

    /// Runs a step; with `seconds`, the times of the program's steps are added to it.
    pub(super) fn execute(
        &mut self,
        batch: &StepBatch,
        logits: bool,
        seconds: Option<&mut Vec<f64>>,
    ) -> Result<StepOutput, StepError> {
        let resolved;
        let batch = if batch.tokens.iter().any(|&t| t < 0) {
            resolved = self.resolve(batch)?;
            &resolved
        } else {
            batch
        };
        check_batch(batch, &self.options, self.vocab)?;
        let (kind, env) = (self.kind(batch), Self::env(batch));
        let out = self.run(kind, env, batch, logits, seconds)?;
        self.last.clone_from(&out.next);
        Ok(out)
    }
}

impl<E: Elem> Executor for CpuExecutor<E> {
    fn capacity(&self) -> Capacity {
        self.options.capacity(self.vocab)
    }

    /// Kernels were compiled with the program.
    fn warm_up(&mut self) -> Result<(), StepError> {
        Ok(())
    }

    fn execution(&self) -> Option<Execution> {
        None
    }

    fn step(&mut self, batch: &StepBatch, logits: bool) -> Result<StepOutput, StepError> {
        self.execute(batch, logits, None)
    }

    fn profile(
        &mut self,
        batch: &StepBatch,
        options: ProfileOptions,
    ) -> Result<Option<StepProfile>, StepError> {
        self.profile_batch(batch, options).map(Some)
    }

    fn submit(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        let out = self.step(batch, false)?;
        self.done.push_back(out);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, StepError> {
        self.done
            .pop_front()
            .ok_or_else(|| StepError::Batch("nothing was submitted".into()))
    }
}

fn check_tokens(tokens: &[i32], vocab: usize) -> Result<(), StepError> {
    match tokens
        .iter()
        .find(|&&t| !usize::try_from(t).is_ok_and(|t| t < vocab))
    {
        None => Ok(()),
        Some(t) => Err(StepError::Batch(format!(
            "token id {t} is outside the vocabulary of {vocab}"
        ))),
    }
}

/// Checks a batch against the limits that it was loaded with, so that kernels cannot leave their
/// buffers.
pub(crate) fn check_batch(b: &StepBatch, o: &LoadOptions, vocab: usize) -> Result<(), StepError> {
    let fail = |what: String| Err(StepError::Batch(what));
    let (t, n) = (b.tokens.len(), b.kv_lens.len());
    if t == 0
        || t > o.max_tokens
        || n > o.max_sequences
        || b.rows.len() > o.max_rows.max(o.max_sequences)
    {
        return fail(format!(
            "{t} tokens of {n} sequences with {} sampled rows; limits are {}, {} and {}",
            b.rows.len(),
            o.max_tokens,
            o.max_sequences,
            o.max_rows
        ));
    }
    if b.positions.len() != t || b.row_seq.len() != t || b.cu_seqlens.len() != n + 1 {
        return fail("metadata of another length than the rows".into());
    }
    if b.block_table.len() != n * b.max_pages {
        return fail("a block table of another size than the sequences".into());
    }
    check_tokens(&b.tokens, vocab)?;
    let inside = |v: &[i32], limit: usize| {
        v.iter()
            .all(|&x| usize::try_from(x).is_ok_and(|x| x < limit))
    };
    if !inside(&b.positions, o.max_seq_len) {
        return fail(format!("a position beyond max_seq_len {}", o.max_seq_len));
    }
    if !inside(&b.row_seq, n) || !inside(&b.rows, t) || !inside(&b.block_table, o.pages) {
        return fail("an index outside its range".into());
    }
    let reach = b.max_pages * o.page_size;
    if b.kv_lens
        .iter()
        .any(|&l| l < 1 || l as usize > reach.min(o.max_seq_len))
    {
        return fail("a sequence longer than its pages".into());
    }
    Ok(())
}

fn buffer<E: Elem>(len: usize) -> Result<PageBuffer<E>, CpuLoadError> {
    PageBuffer::zeroed(len).map_err(CpuLoadError::Allocate)
}

/// Compares with the memory that the system says is available, where it says so.
fn check_memory(needed: usize) -> Result<(), CpuLoadError> {
    match meminfo("MemAvailable") {
        Some(available) if needed as u64 > available => Err(CpuLoadError::Memory {
            what: "weights, KV cache and activations",
            needed: needed as f64 / 1e9,
            available: available as f64 / 1e9,
        }),
        _ => Ok(()),
    }
}
