//! Why a model has no step program.

use crate::egraph::extract::ExtractError;
use lathe_ir::TypeError;
use thiserror::Error;

/// Why a model has no step program.
#[derive(Clone, Debug, Error)]
pub enum CompileError {
    /// A switch names nothing.
    #[error("no rule or stage named '{0}'; `lathe passes` lists them")]
    UnknownRule(String),
    /// No executable form exists.
    #[error("{0}")]
    Extract(#[from] ExtractError),
    /// A stage did not saturate, which would make its result depend on the order of rules.
    #[error("stage {stage} of {template} stopped before saturation ({reason})")]
    NotSaturated {
        /// Stage.
        stage: &'static str,
        /// Template.
        template: String,
        /// egg's stop reason.
        reason: String,
    },
    /// An attention was not recognised in a layer.
    #[error(
        "layer {layer}: {path} is no attention that can be cached: {detail}; nearest rule {rule}"
    )]
    Attention {
        /// Layer.
        layer: u32,
        /// Module path.
        path: String,
        /// What was found.
        detail: String,
        /// The rule that would have matched.
        rule: String,
    },
    /// A name that the passes need for themselves.
    #[error("{what} '{name}' has a name that programs made from it use themselves; rename it")]
    Reserved {
        /// Input or weight.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A stage left something behind that is no program: a bug in the passes.
    #[error("internal: after {stage} of {program}, {value}{}: {reason}", by(.rule))]
    Malformed {
        /// Stage, or what chooses and joins programs after them.
        stage: &'static str,
        /// Template or program.
        program: String,
        /// Which value, with its operation and where it comes from.
        value: String,
        /// The rule that made it, where one is known.
        rule: Option<&'static str>,
        /// What is wrong.
        reason: String,
    },
    /// A program is ill-typed: a bug in the passes.
    #[error("internal: {0}")]
    Type(#[from] TypeError),
}

fn by(rule: &Option<&'static str>) -> String {
    rule.map_or(String::new(), |r| format!(" made by rule {r}"))
}
