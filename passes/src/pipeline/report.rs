//! A compiled model and how it came about.

use super::CompileError;
use crate::egraph::analysis::Applied;
use crate::rule::Stage;
use indexmap::IndexMap;
use lathe_ir::{Both, Graph};
use std::time::Duration;

/// A compiled model: its programs and how they came about.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The step programs. Decode takes one token a sequence and samples every row; the general
    /// program takes ragged rows and samples those that the input `step.rows` names.
    pub steps: Both<Option<Graph>>,
    /// The full-sequence program after recognition, for execution without a cache.
    pub full: Graph,
    /// Why there are no step programs, if there are none.
    pub no_step: Option<CompileError>,
    /// Reports of each template.
    pub templates: Vec<TemplateReport>,
    /// Phase times that add up to the wall time of the call.
    pub phases: IndexMap<&'static str, Duration>,
}

/// One template with what was done to it.
#[derive(Clone, Debug)]
pub struct TemplateReport {
    /// `embed`, `layer` or `head`, with its number.
    pub name: String,
    /// Layers that use it.
    pub layers: Vec<u32>,
    /// The template as imported.
    pub imported: Graph,
    /// Each stage in order.
    pub stages: Vec<StageReport>,
    /// Every rule application, for `explain`.
    pub log: Vec<Applied>,
    /// The chosen terms of the step programs, where there are any.
    pub steps: Both<Option<Graph>>,
}

/// What one stage did to one template.
#[derive(Clone, Debug)]
pub struct StageReport {
    /// Stage.
    pub stage: Stage,
    /// How often each rule gave a value a new form.
    pub matches: IndexMap<&'static str, usize>,
    /// E-nodes after the stage.
    pub nodes: usize,
    /// E-classes after the stage.
    pub classes: usize,
    /// Rounds until nothing changed.
    pub iterations: usize,
    /// Time of saturation.
    pub saturate: Duration,
}
