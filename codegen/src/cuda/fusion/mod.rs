//! What the kernels of a program do beside their own step, decided before any is generated.
//!
//! [`Fusions::decide`] is a pure function of a program, its sizes and the choices of autotuning. Its value says of each
//! step which kernel runs it and, of everything that a kernel could take over from its neighbours, whether it does and
//! why. The emitters do what it says and decide nothing.

mod attention;
mod gemm;
mod row_sums;
mod verdict;

pub use attention::{AttentionFusion, AttentionKernel};
pub use gemm::{GemmFusion, NormFusion};
pub use row_sums::{OperandSums, ResultSums};
pub use verdict::{Reason, Verdict};

use super::attention::heads::Heads;
use super::bucket::Bucket;
use super::error::CudaError;
use super::gemm::choices::Choices;
use super::gemm::key::GemmKey;
use super::gemm::operands::GemmStep;
use crate::plan::{Operand, Program, Step};
use attention::TileLists;
use row_sums::RowSums;
use std::fmt;

/// The decisions for the steps of a program, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Fusions {
    /// One for each step that is lowered.
    pub steps: Vec<StepFusion>,
}

/// The decisions for one step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepFusion {
    /// The step of the program.
    pub step: usize,
    /// Its operation.
    pub op: &'static str,
    /// Its path in the model.
    pub path: String,
    /// Whether its kernels start, and read weights, before their predecessors have ended.
    pub early: Verdict,
    /// What depends on the operation.
    pub kind: FusionKind,
}

/// What is decided of an operation.
#[derive(Clone, Debug, PartialEq)]
pub enum FusionKind {
    /// Its kernels do this step and nothing else.
    Alone,
    /// An earlier step's kernel does it: there is nothing to launch.
    Taken {
        /// That step.
        by: usize,
    },
    /// A matrix product.
    Gemm(Box<GemmFusion>),
    /// An attention over the cache.
    Attention(AttentionFusion),
}

impl Fusions {
    /// Decides for some steps of a program, which ascend.
    ///
    /// # Errors
    /// A step's operands are not what they should be, or a chosen kernel does not compute it.
    pub(super) fn decide(
        bucket: &Bucket<'_>,
        choices: &Choices,
        steps: impl IntoIterator<Item = usize>,
    ) -> Result<Fusions, CudaError> {
        let (program, env) = (bucket.program, bucket.sizes.env());
        if bucket.options.sms == 0 && !program.steps.is_empty() {
            let reason = "kernels are generated for at least one multiprocessor";
            return Err(CudaError::at(program, 0, reason));
        }
        let mut sums = RowSums::new(program, &env);
        let mut lists = TileLists::new();
        let mut taken = None;
        let mut decided = Vec::new();
        for at in steps {
            let step = &program.steps[at];
            let refuse = |reason: String| CudaError::at(program, at, reason);
            let kind = if let Some((_, by)) = taken.filter(|(sampled, _)| *sampled == at) {
                FusionKind::Taken { by }
            } else if let Some(g) = GemmStep::of(step, &env) {
                let g = g.map_err(refuse)?;
                let fusion = gemm::decide(bucket, choices, &mut sums, at, &g).map_err(refuse)?;
                let sampled = fusion.argmax.as_ref().and_then(Verdict::how);
                taken = sampled.map(|&sampled| (sampled, at)).or(taken);
                FusionKind::Gemm(Box::new(fusion))
            } else if let Some(heads) = Heads::of(step, &env) {
                let heads = heads.map_err(refuse)?;
                FusionKind::Attention(attention::decide(bucket, &mut lists, at, step, &heads))
            } else {
                FusionKind::Alone
            };
            decided.push(StepFusion {
                step: at,
                op: step.op.name(),
                path: step.prov.path.to_string(),
                early: early(program, bucket.options.pdl, step),
                kind,
            });
        }
        Ok(Fusions { steps: decided })
    }

    /// The decisions of a step.
    pub fn of_step(&self, step: usize) -> Option<&StepFusion> {
        self.steps.iter().find(|s| s.step == step)
    }
}

/// The key by which the kernel of a step's GEMM is chosen; `None` if there is no choice.
///
/// # Errors
/// The operands are not what they should be.
pub(super) fn gemm_key(bucket: &Bucket<'_>, at: usize) -> Result<Option<GemmKey>, CudaError> {
    let step = GemmStep::of(&bucket.program.steps[at], &bucket.sizes.env());
    let step = step.transpose();
    let step = step.map_err(|reason| CudaError::at(bucket.program, at, reason))?;
    let problem = step.map(|g| gemm::problem(bucket, at, &g));
    Ok(problem.and_then(|p| gemm::key(&p, bucket.options.plain)))
}

/// Kernels read weights before they wait for their predecessor; where a weight is computed by an earlier step, they
/// must not.
fn early(program: &Program, pdl: bool, step: &Step) -> Verdict {
    if !pdl {
        return Verdict::not("kernels run one after the other");
    }
    let weights = step.op.signature().slots.iter().filter(|s| s.is_weight());
    let computed = weights.filter_map(|&s| step.get(s)).find_map(|o| match o {
        Operand::Value(v) => Some(*v),
        _ => None,
    });
    let Some(value) = computed else {
        return Verdict::made((), "no weight that it reads is computed in the program");
    };
    let writes = |s: &Step| s.results.contains(&Some(value));
    let by = program.steps.iter().position(writes);
    Verdict::not(match by {
        Some(by) => format!("step {by} computes a weight that it reads"),
        None => "a weight that it reads is computed".to_owned(),
    })
}

impl fmt::Display for Fusions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.steps.iter().try_for_each(|s| s.fmt(f))
    }
}

/// A line with the step and its kernel, and a line for each decision: what, whether, why. That kernels start early goes
/// without saying.
impl fmt::Display for StepFusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:4}  {}", self.step, self.op)?;
        if !self.path.is_empty() {
            write!(f, " of {}", self.path)?;
        }
        match &self.kind {
            FusionKind::Alone => writeln!(f)?,
            FusionKind::Taken { by } => {
                return writeln!(f, ": nothing to launch, step {by} does it");
            }
            FusionKind::Gemm(g) => {
                let library = g
                    .library
                    .map_or(String::new(), |n| format!(" or cublaslt_{n}"));
                writeln!(f, ": {}{library}", g.kernel)?;
                line(f, "norm", g.norm.as_ref())?;
                line(f, "argmax", g.argmax.as_ref())?;
                line(f, "row sums", g.sums.as_ref())?;
                line(f, "prefetch", g.prefetch.as_ref())?;
            }
            FusionKind::Attention(a) => {
                writeln!(f, ": {}", a.kernel.name())?;
                line(f, "append", Some(&a.append))?;
                line(f, "decode rows", a.decode_rows.as_ref())?;
                line(f, "tiles", a.tiles.as_ref())?;
            }
        }
        let late = Some(&self.early).filter(|early| !early.is_made());
        line(f, "early start", late)
    }
}

fn line<T>(f: &mut fmt::Formatter<'_>, what: &str, verdict: Option<&Verdict<T>>) -> fmt::Result {
    match verdict {
        Some(verdict) => writeln!(f, "      {what:12} {verdict}"),
        None => Ok(()),
    }
}
