//! A GEMM step as the program has it: its sizes and what its operands are.

use super::key::{Beside, GemmKey, Problem};
use crate::plan::{Operand, Step, ValueId};
use lathe_ir::ops::{Gemm, gemm};
use lathe_ir::{Epilogue, Op, Operands, Prologue, Slot, SymEnv};

/// What every family of kernels takes.
const COMMON: [Slot; 6] = [
    gemm::X,
    gemm::W,
    gemm::BIAS,
    gemm::RESIDUAL,
    gemm::GAMMA,
    gemm::DELTA,
];

/// A GEMM step taken apart.
pub(in crate::cuda) struct GemmStep<'a> {
    /// The product as its kernels see it, without what follows it.
    pub(in crate::cuda) problem: Problem,
    pub(in crate::cuda) prologue: Prologue,
    operands: &'a Operands<Operand>,
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
            let mut beside = Beside::default();
            for (i, ty) in step.types.enumerate() {
                if !COMMON.iter().any(|common| common.index() == i) {
                    beside.add(Slot::nth(i), ty.as_tensor().map_or(0, |t| t.bytes(env)));
                }
            }
            let added = matches!(spec.prologue, Prologue::AddRms { .. });
            let result = |i: usize| step.results.get(i).copied().flatten();
            Ok(GemmStep {
                problem: Problem {
                    key,
                    dtype: x.dtype,
                    argmax: false,
                    beside,
                },
                prologue: spec.prologue,
                operands: &step.operands,
                sum: if added { result(0) } else { None },
                y: result(usize::from(added)),
            })
        };
        Some(read())
    }

    /// All operands, by name.
    pub(in crate::cuda) fn operands(&self) -> &'a Operands<Operand> {
        self.operands
    }

    /// An operand, if it is present.
    pub(in crate::cuda) fn get(&self, operand: Slot) -> Option<&'a Operand> {
        self.operands.get_ref(operand)
    }

    /// Whether the kernel computes nothing but products and, before them, a norm: what an argmax can follow.
    pub(in crate::cuda) fn is_bare(&self) -> bool {
        self.problem.key.epilogue == Epilogue::None && self.get(gemm::BIAS).is_none()
    }
}

/// The weight that a GEMM multiplies by; `None` if the step is no GEMM.
pub(in crate::cuda) fn weight(step: &Step) -> Option<&Operand> {
    match step.op {
        Op::Linear(_) | Op::Gemm(_) => step.get(gemm::W),
        _ => None,
    }
}
