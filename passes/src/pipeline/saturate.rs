//! Applying rules until nothing changes.

use super::CompileError;
use crate::egraph::{EGraph, Lang, TensorAnalysis};
use crate::rule::Rule;
use egg::{Runner, SimpleScheduler, StopReason};
use std::time::Duration;

/// Rounds after which a stage counts as not saturating. The longest chain of rewrites in a layer
/// is under 40 rounds; a limit in time would make results depend on the machine.
const ROUNDS: usize = 400;
/// E-nodes after which a stage counts as not saturating.
const NODES: usize = 2_000_000;

/// Applies rules until nothing changes; returns the number of rounds.
///
/// # Errors
/// They do not saturate; the error names `stage` and `template`.
pub(crate) fn saturate(
    egraph: &mut EGraph,
    rules: &[&Rule],
    stage: &'static str,
    template: &str,
) -> Result<usize, CompileError> {
    let rewrites: Vec<_> = rules.iter().flat_map(|r| r.rewrites()).collect();
    let runner = Runner::<Lang, TensorAnalysis>::default()
        .with_egraph(std::mem::take(egraph))
        .with_iter_limit(ROUNDS)
        .with_node_limit(NODES)
        .with_time_limit(Duration::from_secs(3600))
        .with_scheduler(SimpleScheduler)
        .run(&rewrites);
    *egraph = runner.egraph;
    match runner.stop_reason {
        Some(StopReason::Saturated) => Ok(runner.iterations.len()),
        reason => Err(CompileError::NotSaturated {
            stage,
            template: template.to_string(),
            reason: format!("{reason:?}"),
        }),
    }
}
