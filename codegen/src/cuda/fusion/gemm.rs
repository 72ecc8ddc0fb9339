//! The fusions of a GEMM: its kernel, and what the kernel does beside the product.

use super::row_sums::{self, OperandSums, ResultSums, RowSums};
use super::verdict::{Reason, Verdict};
use crate::cuda::bucket::Bucket;
use crate::cuda::gemm::NormSupport;
use crate::cuda::gemm::choices::Choices;
use crate::cuda::gemm::kernel::GemmKernel;
use crate::cuda::gemm::key::{GemmKey, Problem};
use crate::cuda::gemm::operands::{GemmStep, weight};
use crate::cuda::gemm::variant::Variant;
use crate::cuda::launch::Sampling;
use crate::cuda::limits::LIMITS;
use crate::plan::Operand;
use lathe_ir::ops::gemm;
use lathe_ir::{Epilogue, Op, Prologue};

/// What is decided of a GEMM step. What is `None` there is no occasion for.
#[derive(Clone, Debug, PartialEq)]
pub struct GemmFusion {
    /// The product, with the argmax if that is fused.
    pub problem: Problem,
    /// The kernel that computes it.
    pub kernel: GemmKernel,
    /// The library's algorithm that runs in its place, where the library is there.
    pub library: Option<usize>,
    /// The norm before it: part of the kernel, or a launch of its own.
    pub norm: Option<Verdict<NormFusion>>,
    /// The sampling step after it, whose token the kernel picks.
    pub argmax: Option<Verdict<usize>>,
    /// Sums of squares of the result's rows, for a later norm.
    pub sums: Option<Verdict<ResultSums>>,
    /// The weight of the next GEMM that the kernel brings into L2.
    pub prefetch: Option<Verdict<usize>>,
}

/// How a kernel takes the norm of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormFusion {
    /// It normalises the rows.
    Whole,
    /// As a factor a row, from these sums.
    Factors(OperandSums),
}

/// The key by which the kernel of a GEMM is chosen; `None` if it has no choice, or is more than the key says.
pub(super) fn key(problem: &Problem, plain: bool) -> Option<GemmKey> {
    (problem.is_tensor_core() && problem.beside.is_within(&[]) && !plain).then_some(problem.key)
}

/// The GEMM of a step with the argmax that follows it.
pub(super) fn problem(bucket: &Bucket<'_>, at: usize, g: &GemmStep<'_>) -> Problem {
    Problem {
        argmax: argmax(bucket, at, g).is_some_and(|v| v.is_made()),
        ..g.problem
    }
}

/// Decides the fusions of the GEMM of step `at`.
///
/// # Errors
/// The chosen kernel does not compute it.
pub(super) fn decide(
    bucket: &Bucket<'_>,
    choices: &Choices,
    sums: &mut RowSums,
    at: usize,
    g: &GemmStep<'_>,
) -> Result<GemmFusion, String> {
    let sms = bucket.options.sms as usize;
    let problem = problem(bucket, at, g);
    let key = key(&problem, bucket.options.plain);
    let chosen = key.and_then(|key| Some((key, choices.get(&key)?)));
    if let Some((key, variant)) = chosen {
        variant.check(&key, sms)?;
    }
    let own = chosen.and_then(|(_, variant)| variant.kernel());
    let heuristic = || GemmKernel::heuristic(&problem, sms, bucket.options.plain);
    let kernel = own.unwrap_or_else(heuristic);
    let library = match chosen {
        Some((_, Variant::CublasLt { algorithm })) => Some(algorithm),
        _ => None,
    };
    let norm = norm(sums, at, g, &problem, kernel, library.is_some());
    let cannot = match (kernel.adds_up_rows(), library) {
        (_, Some(_)) => Some("cuBLASLt leaves no sums of squares".to_owned()),
        (false, None) => Some(format!("the kernel {kernel} leaves no sums of squares")),
        // No norm follows gated features.
        (true, None) if g.problem.key.epilogue == Epilogue::SwiGlu => {
            Some("a gated result is half as wide as its tiles".to_owned())
        }
        (true, None) => None,
    };
    let size = (problem.key.m, problem.key.n);
    let result = g.y.filter(|_| !problem.argmax);
    Ok(GemmFusion {
        argmax: argmax(bucket, at, g),
        norm,
        sums: sums.of_result(at, result, size, problem.dtype, cannot),
        prefetch: prefetch(bucket, at, &problem, kernel),
        problem,
        kernel,
        library,
    })
}

/// Whether the step after this one samples its result greedily and nobody else wants it, so that
/// the kernel can keep the logits to itself.
fn argmax(bucket: &Bucket<'_>, at: usize, g: &GemmStep<'_>) -> Option<Verdict<usize>> {
    let next = bucket.program.steps.get(at + 1)?;
    if !matches!(next.op, Op::Sample(_)) || !next.reads(g.y?) {
        return None;
    }
    let rows = g.problem.key.m;
    let not = |reason: Reason| Some(Verdict::Not(reason));
    match bucket.sampling {
        Sampling::GreedyOnly => {}
        Sampling::Greedy => return not("the logits are wanted".into()),
        Sampling::Params => return not("rows are sampled by their parameters".into()),
    }
    if !matches!(bucket.program.steps[at].op, Op::Gemm(_)) || !g.is_bare() {
        return not(
            "the kernel that picks the largest output takes no bias and no epilogue".into(),
        );
    }
    if rows > LIMITS.prologue_rows {
        return not(format!("{rows} rows, and the GEMV takes {}", LIMITS.prologue_rows).into());
    }
    if bucket.options.plain {
        return not("plain kernels fuse nothing".into());
    }
    let fused = Problem {
        argmax: true,
        ..g.problem
    };
    if !GemmKernel::Gemv.computes(&fused, bucket.options.sms as usize) {
        return not("the GEMV does not compute this product".into());
    }
    Some(Verdict::made(
        at + 1,
        format!(
            "step {} picks the largest and nobody else reads the logits",
            at + 1
        ),
    ))
}

/// How the kernel takes the norm before it; `None` without one.
fn norm(
    sums: &mut RowSums,
    at: usize,
    g: &GemmStep<'_>,
    problem: &Problem,
    kernel: GemmKernel,
    library: bool,
) -> Option<Verdict<NormFusion>> {
    let eps = match g.prologue {
        Prologue::None => return None,
        Prologue::Rms { eps } => Some(eps),
        Prologue::AddRms { .. } => None,
    };
    if library {
        return Some(Verdict::not("cuBLASLt takes no norm"));
    }
    match kernel.norm(problem) {
        NormSupport::Whole => {
            let why = "the kernel normalises the rows in its registers";
            return Some(Verdict::made(NormFusion::Whole, why));
        }
        NormSupport::No(reason) => return Some(Verdict::not(reason)),
        NormSupport::Factors => {}
    }
    let no = |reason: &'static str| Some(Verdict::not(reason));
    let Some(eps) = eps else {
        return no("a sum stands before the norm");
    };
    if g.get(gemm::GAMMA).is_some() {
        return no("gamma is not in the weight");
    }
    if !row_sums::fits(problem.key.k, problem.dtype) {
        return no("rows are not whole parts of 64 columns");
    }
    if !row_sums::is_fine(eps) {
        return no("fixed-point sums are too coarse for so small an eps");
    }
    let (from, why) = sums.of_operand(at, g.get(gemm::X), problem.key.m);
    Some(Verdict::made(NormFusion::Factors(from), why))
}

/// Whether the kernel brings the first weights of the next GEMM into L2; `None` for kernels that never do.
fn prefetch(
    bucket: &Bucket<'_>,
    at: usize,
    problem: &Problem,
    kernel: GemmKernel,
) -> Option<Verdict<usize>> {
    let bytes = kernel.prefetched(problem, bucket.options.sms as usize)?;
    let mut later = bucket.program.steps.iter().enumerate().skip(at + 1);
    let next = later.find_map(|(i, step)| Some((i, weight(step)?)));
    Some(match next {
        None => Verdict::not("no GEMM follows"),
        Some((i, Operand::Weight(w))) => match bucket.plan.weights[*w].recipe.bytes() >= bytes {
            true => Verdict::made(*w, format!("step {i} reads this weight next")),
            false => Verdict::not(format!(
                "the weight of step {i} has fewer bytes than it takes"
            )),
        },
        Some((i, _)) => Verdict::not(format!("the weight of step {i} is computed in the step")),
    })
}
