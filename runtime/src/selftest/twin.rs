//! The CPU device step by step: every value of a program on the way, for the self-test.

use super::{POISON, SelftestError};
use crate::device::cpu::CpuLoadError;
use crate::device::cpu::executor::{CpuExecutor, check_batch};
use crate::device::cpu::kernels::Elem;
use crate::device::cpu::memory::padded_head;
use crate::device::cpu::run::Run;
use crate::device::load::{LoadOptions, Loadable, RopeTables};
use crate::device::step::StepBatch;
use half::bf16;
use lathe_codegen::plan::CacheSpec;
use lathe_codegen::{ProgramKind, ValueId};
use lathe_ir::DType;
use std::borrow::Cow;

/// What memory holds right after a step: the step's operands and results are all alive.
pub(crate) trait Snapshot {
    /// The bytes of a value.
    fn value(&self, v: ValueId) -> &[u8];
    /// The bytes of a cache as the plan lays it out, however the device fills heads up.
    fn cache(&self, i: usize) -> Cow<'_, [u8]>;
}

/// Called after each step with its index in the program.
pub(crate) type EachStep<'a> = dyn FnMut(usize, &dyn Snapshot) -> Result<(), SelftestError> + 'a;

/// A plan on the CPU that shows what it does.
pub(crate) trait Twin {
    /// The bytes of a packed weight.
    fn weight(&self, i: usize) -> &[u8];
    /// Cosines and sines.
    fn rope(&self) -> &RopeTables;
    /// Sets the bytes of a cache, as the plan lays it out, before a run.
    fn set_cache(&mut self, i: usize, bytes: &[u8]);
    /// Runs a program on a batch that fits the options. Each step's results are filled with
    /// [`POISON`] before it.
    fn trace(
        &mut self,
        kind: ProgramKind,
        batch: &StepBatch,
        each: &mut EachStep<'_>,
    ) -> Result<(), SelftestError>;
}

/// Loads a plan.
///
/// # Errors
/// As [`crate::device::cpu::load`].
pub(crate) fn load_twin(
    model: Loadable<'_>,
    options: LoadOptions,
) -> Result<Box<dyn Twin>, CpuLoadError> {
    Ok(match model.plan.dtype {
        DType::F32 => Box::new(CpuExecutor::<f32>::new(model, options)?),
        DType::BF16 => Box::new(CpuExecutor::<bf16>::new(model, options)?),
        other => return Err(CpuLoadError::DType(other)),
    })
}

fn bytes<E: Elem>(values: &[E]) -> &[u8] {
    // SAFETY: E is f32 or bf16, plain bytes without padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), std::mem::size_of_val(values)) }
}

fn bytes_mut<E: Elem>(values: &mut [E]) -> &mut [u8] {
    // SAFETY: as above, and every byte pattern is a value of E.
    unsafe {
        std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), std::mem::size_of_val(values))
    }
}

impl<E: Elem> Twin for CpuExecutor<E> {
    fn weight(&self, i: usize) -> &[u8] {
        bytes(&self.weights[i])
    }

    fn rope(&self) -> &RopeTables {
        &self.rope
    }

    fn set_cache(&mut self, i: usize, from: &[u8]) {
        let [narrow, wide] = head_bytes(&self.plan.caches[i]);
        let heads = bytes_mut(&mut self.caches[i]).chunks_exact_mut(wide);
        for (to, from) in heads.zip(from.chunks_exact(narrow)) {
            to[..narrow].copy_from_slice(from);
            to[narrow..].fill(0);
        }
    }

    fn trace(
        &mut self,
        kind: ProgramKind,
        batch: &StepBatch,
        each: &mut EachStep<'_>,
    ) -> Result<(), SelftestError> {
        check_batch(batch, &self.options, self.vocab)?;
        self.with_run(kind, batch, |run| {
            for (at, step) in run.program.steps.iter().enumerate() {
                for v in step.results.iter().copied().flatten() {
                    poison(run.bytes_mut(v));
                }
                run.step(step).map_err(|e| {
                    SelftestError::Cpu(format!("step {at} ({}): {e}", step.op.name()))
                })?;
                each(at, &*run)?;
            }
            Ok(())
        })
    }
}

fn poison(out: &mut [u8]) {
    for (i, b) in out.iter_mut().enumerate() {
        *b = POISON.to_le_bytes()[i % 4];
    }
}

impl<E: Elem> Snapshot for Run<'_, E> {
    fn value(&self, v: ValueId) -> &[u8] {
        self.bytes(v)
    }

    fn cache(&self, i: usize) -> Cow<'_, [u8]> {
        let all = bytes(&self.caches[i]);
        match head_bytes(&self.plan.caches[i]) {
            [narrow, wide] if narrow == wide => Cow::Borrowed(all),
            [narrow, wide] => {
                let heads = all.chunks_exact(wide).map(|head| &head[..narrow]);
                Cow::Owned(heads.collect::<Vec<_>>().concat())
            }
        }
    }
}

/// Bytes of a cached head of the plan, and as the CPU stores it.
fn head_bytes(spec: &CacheSpec) -> [usize; 2] {
    let head = spec.head_dim as usize;
    [head, padded_head(head)].map(|d| d * spec.dtype.size())
}
