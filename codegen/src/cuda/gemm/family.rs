//! What a family of GEMM kernels is to the rest: a question which of its forms compute a GEMM, and a launch.

use super::key::Problem;
use super::request::Request;
use crate::cuda::context::Context;
use lathe_ir::Slot;

/// A file of `kernels/` that multiplies `x[M, K] · w[N, K]ᵀ`, specialised in several forms.
pub(in crate::cuda) trait Family {
    /// What tells the kernels apart that the family has for a GEMM.
    type Form: Copy;
    /// Geometry of a launch.
    type Shape;

    /// Operands beside the common ones (x, w, bias, residual, gamma, delta) that all of its kernels take.
    const BESIDE: &'static [Slot] = &[];

    /// Every form, whether or not it computes a GEMM.
    fn forms() -> Vec<Self::Form>;

    /// The geometry with which a form computes a GEMM on so many multiprocessors; `None` if it does not.
    fn shape(problem: &Problem, form: Self::Form, sms: usize) -> Option<Self::Shape>;

    /// The form that the family takes without measurements; `None` if the family leaves the GEMM to others.
    fn heuristic(problem: &Problem, sms: usize) -> Option<Self::Form>;

    /// The forms that are worth timing, beside the heuristic's. Not all of them compute the GEMM.
    fn candidates(problem: &Problem, sms: usize) -> Vec<Self::Form>;

    /// How the family's kernels take an RMSNorm of their rows.
    fn norm(problem: &Problem) -> NormSupport;

    /// Launches the kernel of a form.
    fn emit(cx: &mut Context<'_>, request: &Request, form: Self::Form, shape: &Self::Shape);
}

/// How a kernel takes an RMSNorm of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) enum NormSupport {
    /// It normalises the rows before it multiplies them, with or without gamma and a sum before the norm.
    Whole,
    /// As a factor a row of the accumulators, from sums of squares; gamma is then in the weight.
    Factors,
    /// Not at all, for this reason.
    No(&'static str),
}
