//! A GEMM step as the program has it: its sizes and what its operands are.

use super::key::{GemmKey, Problem};
use crate::plan::{Operand, Step, ValueId};
use lathe_ir::ops::{Gemm, gemm};
use lathe_ir::{Epilogue, Op, Prologue, Slot, SymEnv};

/// A GEMM step taken apart.
pub(in crate::cuda) struct GemmStep<'a> {
    /// The product as its kernels see it, without what follows it.
    pub(in crate::cuda) problem: Problem,
    pub(in crate::cuda) prologue: Prologue,
    pub(in crate::cuda) x: &'a Operand,
    pub(in crate::cuda) w: &'a Operand,
    pub(in crate::cuda) bias: Option<&'a Operand>,
    pub(in crate::cuda) residual: Option<&'a Operand>,
    pub(in crate::cuda) gamma: Option<&'a Operand>,
    pub(in crate::cuda) delta: Option<&'a Operand>,
    /// Where `x + delta` goes, if somebody reads it.
    pub(in crate::cuda) sum: Option<ValueId>,
    /// Where the outputs go, if somebody reads them.
    pub(in crate::cuda) y: Option<ValueId>,
}

impl<'a> GemmStep<'a> {
    /// None if the step is no GEMM.
    ///
    /// # Errors
    /// An operand is no matrix.
    pub(in crate::cuda) fn of(step: &'a Step, env: &SymEnv) -> Option<Result<Self, String>> {
        let spec = match step.op {
            Op::Linear(_) => Gemm::PLAIN,
            Op::Gemm(spec) => spec,
            _ => return None,
        };
        let tensor = |operand: Slot| {
            let ty = step.tensor(operand);
            ty.ok_or_else(|| format!("operand '{}' is no tensor", operand.name()))
        };
        let present = |operand: Slot| {
            let found = step.get(operand);
            found.ok_or_else(|| format!("operand '{}' is missing", operand.name()))
        };
        let read = || {
            let (x, w) = (tensor(gemm::X)?, tensor(gemm::W)?);
            let k = x.shape.last().map_or(1, |d| d.eval(env)) as usize;
            let n = w.shape.first().map_or(1, |d| d.eval(env)) as usize;
            let key = GemmKey {
                m: x.elements(env) / k.max(1),
                n,
                k,
                norm: spec.prologue != Prologue::None,
                epilogue: spec.epilogue,
                bias: step.get(gemm::BIAS).is_some(),
            };
            let added = matches!(spec.prologue, Prologue::AddRms { .. });
            let result = |i: usize| step.results.get(i).copied().flatten();
            Ok(GemmStep {
                problem: Problem {
                    key,
                    dtype: x.dtype,
                    argmax: false,
                },
                prologue: spec.prologue,
                x: present(gemm::X)?,
                w: present(gemm::W)?,
                bias: step.get(gemm::BIAS),
                residual: step.get(gemm::RESIDUAL),
                gamma: step.get(gemm::GAMMA),
                delta: step.get(gemm::DELTA),
                sum: if added { result(0) } else { None },
                y: result(usize::from(added)),
            })
        };
        Some(read())
    }

    /// Whether the kernel computes nothing but products and, before them, a norm: what an argmax can follow.
    pub(in crate::cuda) fn is_bare(&self) -> bool {
        self.problem.key.epilogue == Epilogue::None && self.bias.is_none()
    }
}

/// The weight that a GEMM multiplies by; `None` if the step is no GEMM.
pub(in crate::cuda) fn weight(step: &Step) -> Option<&Operand> {
    match step.op {
        Op::Linear(_) | Op::Gemm(_) => step.get(gemm::W),
        _ => None,
    }
}
