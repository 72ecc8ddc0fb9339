//! The families of GEMM kernels as one: a kernel of any of them.

use super::family::{Family, NormSupport};
use super::gemv::Gemv;
use super::key::Problem;
use super::plain::Plain;
use super::request::Request;
use super::skinny::{Skinny, SkinnyForm};
use super::tiled::{Tile, Tiled};
use crate::cuda::context::Context;
use std::fmt;

/// A kernel of one of the families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GemmKernel {
    /// The weight-streaming kernel.
    Gemv,
    /// The tensor-core kernel with swapped operands.
    Skinny(SkinnyForm),
    /// The tiled tensor-core kernel.
    Tiled(Tile),
    /// The plain kernel.
    Plain,
}

impl fmt::Display for GemmKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GemmKernel::Gemv => f.write_str("gemv"),
            GemmKernel::Skinny(form) => write!(f, "skinny_{form}"),
            GemmKernel::Tiled(tile) => write!(f, "tiled_{tile}"),
            GemmKernel::Plain => f.write_str("plain"),
        }
    }
}

impl GemmKernel {
    /// What the families choose without measurements: the first that takes the GEMM. The plain kernel is last and
    /// takes every one that others do not; `plain` leaves out those of the tensor cores.
    pub(in crate::cuda) fn heuristic(problem: &Problem, sms: usize, plain: bool) -> GemmKernel {
        let gemv = || heuristic::<Gemv>(problem, sms).map(|()| GemmKernel::Gemv);
        let skinny = || heuristic::<Skinny>(problem, sms).map(GemmKernel::Skinny);
        let tiled = || heuristic::<Tiled>(problem, sms).map(GemmKernel::Tiled);
        let tensor_cores = || match plain {
            true => None,
            false => skinny().or_else(tiled),
        };
        gemv().or_else(tensor_cores).unwrap_or(GemmKernel::Plain)
    }

    /// Every form of the families that are chosen between.
    pub(in crate::cuda) fn forms() -> impl Iterator<Item = GemmKernel> {
        let skinny = Skinny::forms().into_iter().map(GemmKernel::Skinny);
        let tiled = Tiled::forms().into_iter().map(GemmKernel::Tiled);
        std::iter::once(GemmKernel::Gemv).chain(skinny).chain(tiled)
    }

    /// The forms that are worth timing, beside the heuristic's.
    pub(in crate::cuda) fn candidates(problem: &Problem, sms: usize) -> Vec<GemmKernel> {
        let skinny = Skinny::candidates(problem, sms).into_iter();
        let tiled = Tiled::candidates(problem, sms).into_iter();
        let tiled = tiled.map(GemmKernel::Tiled);
        skinny.map(GemmKernel::Skinny).chain(tiled).collect()
    }

    /// Whether it computes a GEMM on so many multiprocessors.
    pub(in crate::cuda) fn computes(self, problem: &Problem, sms: usize) -> bool {
        match self {
            GemmKernel::Gemv => shape::<Gemv>(problem, (), sms).is_some(),
            GemmKernel::Skinny(form) => shape::<Skinny>(problem, form, sms).is_some(),
            GemmKernel::Tiled(tile) => shape::<Tiled>(problem, tile, sms).is_some(),
            GemmKernel::Plain => shape::<Plain>(problem, (), sms).is_some(),
        }
    }

    /// How it takes an RMSNorm of its rows.
    pub(in crate::cuda) fn norm(self, problem: &Problem) -> NormSupport {
        match self {
            GemmKernel::Gemv => Gemv::norm(problem),
            GemmKernel::Skinny(_) => Skinny::norm(problem),
            GemmKernel::Tiled(_) => Tiled::norm(problem),
            GemmKernel::Plain => Plain::norm(problem),
        }
    }

    /// Whether it can add up the squares of its result's rows.
    pub(in crate::cuda) fn adds_up_rows(self) -> bool {
        matches!(self, GemmKernel::Skinny(_) | GemmKernel::Tiled(_))
    }

    /// Bytes that it brings into L2 of the weights that the next GEMM reads first; `None` if it does not.
    pub(in crate::cuda) fn prefetched(self, problem: &Problem, sms: usize) -> Option<usize> {
        match self {
            GemmKernel::Gemv => shape::<Gemv>(problem, (), sms).map(|s| s.prefetched()),
            _ => None,
        }
    }

    /// Launches it.
    ///
    /// # Errors
    /// It does not compute the GEMM.
    pub(in crate::cuda) fn emit(
        self,
        cx: &mut Context<'_>,
        request: &Request,
    ) -> Result<(), String> {
        match self {
            GemmKernel::Gemv => emit::<Gemv>(cx, request, ()),
            GemmKernel::Skinny(form) => emit::<Skinny>(cx, request, form),
            GemmKernel::Tiled(tile) => emit::<Tiled>(cx, request, tile),
            GemmKernel::Plain => emit::<Plain>(cx, request, ()),
        }
        .ok_or_else(|| self.refusal(&request.problem, cx.options.sms as usize))
    }

    /// Why it does not compute a GEMM.
    pub(in crate::cuda) fn refusal(self, problem: &Problem, sms: usize) -> String {
        let key = &problem.key;
        format!("the variant {self} does not compute {key} on {sms} multiprocessors")
    }
}

/// The geometry of a form; `None` if it does not compute the GEMM, or does not take its operands.
fn shape<F: Family>(problem: &Problem, form: F::Form, sms: usize) -> Option<F::Shape> {
    let takes = problem.beside.is_within(F::BESIDE);
    takes.then(|| F::shape(problem, form, sms)).flatten()
}

fn heuristic<F: Family>(problem: &Problem, sms: usize) -> Option<F::Form> {
    let takes = problem.beside.is_within(F::BESIDE);
    takes.then(|| F::heuristic(problem, sms)).flatten()
}

fn emit<F: Family>(cx: &mut Context<'_>, request: &Request, form: F::Form) -> Option<()> {
    let shape = shape::<F>(&request.problem, form, cx.options.sms as usize)?;
    F::emit(cx, request, form, &shape);
    Some(())
}
