//! Launches a GEMM step: what was decided for it, on the operands of the step. A norm that the kernel does not take is a
//! launch of its own before it.

use super::operands::GemmStep;
use super::request::{NormArgs, Request, Sums};
use crate::cuda::context::Context;
use crate::cuda::error::CudaError;
use crate::cuda::fusion::{GemmFusion, NormFusion, OperandSums, Verdict};
use crate::cuda::launch::Ref;
use crate::cuda::norm::{self, Norm};
use crate::cuda::row_sums;
use crate::work::{KernelClass, Work};
use lathe_ir::Prologue;
use lathe_ir::ops::gemm;

/// Launches the kernels of a step as they were decided.
///
/// # Errors
/// An operand is missing, or the kernel does not compute the GEMM.
pub(in crate::cuda) fn step(cx: &mut Context<'_>, fusion: &GemmFusion) -> Result<(), CudaError> {
    let step = match GemmStep::of(cx.step(), &cx.env) {
        Some(step) => step.map_err(|reason| cx.refuse(reason))?,
        None => return Err(cx.refuse("it is no GEMM")),
    };
    let operands = step.operands().try_map(|o| cx.place(o))?;
    let gamma = operands.get_ref(gemm::GAMMA).cloned();
    let gamma = gamma.unwrap_or(Ref::Null);
    let delta = operands.get_ref(gemm::DELTA).cloned();
    let argmax = fusion.problem.argmax;
    let y = match step.y {
        _ if argmax => Ref::Sampled,
        Some(v) => Ref::Value(v),
        None => return Err(cx.refuse("the result has no place")),
    };
    let (key, dtype) = (fusion.problem.key, fusion.problem.dtype);
    let added = match (step.prologue, step.sum) {
        (Prologue::AddRms { .. }, Some(v)) => Some(Ref::Value(v)),
        (Prologue::AddRms { .. }, None) => Some(cx.work("sum", key.m * key.k * dtype.size(), None)),
        _ => None,
    };
    let added = delta.zip(added);
    let mut request = Request {
        problem: fusion.problem,
        operands,
        y,
        norm: NormArgs::None,
        sums: None,
        next: None,
        library: fusion.library,
    };
    if let (Prologue::Rms { eps } | Prologue::AddRms { eps }, Some(taken)) =
        (step.prologue, &fusion.norm)
    {
        let eps = eps.get();
        match taken.how() {
            Some(NormFusion::Whole) => request.norm = NormArgs::Whole { eps, gamma, added },
            Some(NormFusion::Factors(from)) => {
                let sums = operand_sums(cx, &request, *from);
                request.norm = NormArgs::Factors { sums, eps };
            }
            None => launch_norm(cx, &mut request, eps, gamma, added),
        }
    }
    if let Some(Verdict::Made(s, _)) = &fusion.sums {
        request.sums = Some(Sums {
            add: row_sums::buffer(cx, s.add, s.rows),
            clear: row_sums::buffer(cx, s.clear, s.rows),
        });
    }
    let next = fusion.prefetch.as_ref().and_then(Verdict::how);
    request.next = next.map(|&weight| Ref::Weight(weight));
    let emitted = fusion.kernel.emit(cx, &request);
    emitted.map_err(|reason| cx.refuse(reason))
}

/// The buffer with the sums of squares of the rows of x, which are made here if nobody has left them.
fn operand_sums(cx: &mut Context<'_>, g: &Request, from: OperandSums) -> Ref {
    let (rows, cols) = (g.problem.key.m, g.problem.key.k);
    match from {
        OperandSums::Left { buffer } => row_sums::buffer(cx, buffer, rows),
        OperandSums::Launched { buffer, clear } => {
            let sums = row_sums::buffer(cx, buffer, rows);
            let clear = clear.map(|c| row_sums::buffer(cx, c, rows));
            row_sums::launch(
                cx,
                &g.at(gemm::X),
                &sums,
                clear,
                (rows, cols),
                g.problem.dtype,
            );
            sums
        }
    }
}

/// The norm as a launch of its own; the GEMM then reads its result.
fn launch_norm(
    cx: &mut Context<'_>,
    g: &mut Request,
    eps: f64,
    gamma: Ref,
    added: Option<(Ref, Ref)>,
) {
    let (rows, cols, dtype) = (g.problem.key.m, g.problem.key.k, g.problem.dtype);
    let y = cx.work("normed", rows * cols * dtype.size(), None);
    // The GEMM's own launch counts the weights; the norm moves rows: x and y, with `delta` also that and
    // the sum.
    let tensors = if added.is_some() { 4 } else { 2 };
    let own_gamma = usize::from(gamma != Ref::Null);
    let bytes = (tensors * rows + own_gamma) * cols * dtype.size();
    let (delta, sum) = added.unzip();
    let norm = Norm {
        x: g.at(gemm::X),
        delta,
        gamma,
        y: y.clone(),
        sum: sum.unwrap_or(Ref::Null),
        rows,
        cols,
        eps,
        dtype,
    };
    let work = Work::rows(KernelClass::Pointwise, rows, cols, bytes);
    norm::launch(cx, norm, work);
    g.operands.set(gemm::X, y);
}
