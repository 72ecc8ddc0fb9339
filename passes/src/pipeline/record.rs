//! Dumps: what the best programs were after each stage, and what became of each value.

use super::stitch::{Inputs, stitch};
use super::template::{Chosen, Template};
use super::terms::Term;
use super::{CompileError, Compiled, Observer, PassConfig, compile_watched};
use crate::explain::{History, Story, Told};
use crate::region::Regions;
use crate::rule::Stage;
use egg::Id;
use lathe_ir::{Both, Graph};
use std::cell::OnceCell;
use std::time::{Duration, Instant};

/// A compiled model with what was seen on the way.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The compiled model.
    pub compiled: Compiled,
    /// What was seen of each template, in the order of [`Compiled::templates`].
    pub templates: Vec<RecordedTemplate>,
    /// The model's name.
    model: String,
    /// Of which templates the model is made.
    regions: Regions,
    /// Joined when somebody asks.
    stages: OnceCell<Vec<StageProgram>>,
}

impl Recorded {
    /// The cheapest program of the whole model after each stage.
    ///
    /// # Errors
    /// A program is ill-typed, which would be a bug.
    pub fn stages(&self) -> Result<&[StageProgram], CompileError> {
        if let Some(stages) = self.stages.get() {
            return Ok(stages);
        }
        let all = Stage::ALL.into_iter().enumerate();
        let joined: Result<Vec<_>, CompileError> = all.map(|(i, s)| self.join(i, s)).collect();
        let joined = joined?;
        Ok(self.stages.get_or_init(|| joined))
    }

    fn join(&self, i: usize, stage: Stage) -> Result<StageProgram, CompileError> {
        let best: Option<Vec<&Graph>> = self
            .templates
            .iter()
            .map(|t| t.stages[i].best.as_ref().map(|(graph, _)| graph))
            .collect();
        let step = stage >= Stage::KvCache;
        let inputs = if step { Inputs::Step } else { Inputs::Full };
        let name = format!("{}/{}", self.model, stage.name());
        let graph = best
            .map(|terms| stitch(&self.regions, &name, &terms, inputs))
            .transpose()?;
        Ok(StageProgram { stage, step, graph })
    }
}

/// What was seen of one template.
#[derive(Clone, Debug)]
pub struct RecordedTemplate {
    /// Cost of the cheapest program before the first stage, in picoseconds; `None` where nothing
    /// executes it.
    pub cost: Option<u64>,
    /// What was seen after each stage.
    pub stages: Vec<RecordedStage>,
    /// What became of each value, if there is a decode term.
    pub story: Option<Story>,
}

impl RecordedTemplate {
    /// Cost of the cheapest program before and after a stage, in picoseconds.
    pub fn costs(&self, stage: usize) -> [Option<u64>; 2] {
        let after = |i: usize| self.stages[i].best.as_ref().map(|(_, cost)| *cost);
        let before = stage.checked_sub(1).map_or(self.cost, after);
        [before, after(stage)]
    }
}

/// The best programs of a template after a stage.
#[derive(Clone, Debug)]
pub struct RecordedStage {
    /// The cheapest program and its cost in picoseconds, if there is one: of full sequences at the
    /// general point, from `kv_cache` on of a step at the decode point.
    pub best: Option<(Graph, u64)>,
    /// The cheapest step at the general point, for stages of step programs, likewise.
    pub general: Option<(Graph, u64)>,
    /// Time that looking took.
    pub time: Duration,
}

/// The whole model after one stage.
#[derive(Clone, Debug)]
pub struct StageProgram {
    /// The stage.
    pub stage: Stage,
    /// Whether it is a step program (from `kv_cache` on) or one of full sequences.
    pub step: bool,
    /// The program; `None` if some part of the model has no executable form at this stage.
    pub graph: Option<Graph>,
}

/// Compiles a model as [`super::compile`] does and records how the programs came about.
///
/// # Errors
/// As [`super::compile`].
pub fn record(model: &Graph, config: &PassConfig) -> Result<Recorded, CompileError> {
    let mut recorder = Recorder::default();
    let compiled = compile_watched(model, config, Some(&mut recorder))?;
    Ok(Recorded {
        compiled,
        templates: recorder.templates,
        model: model.name.clone(),
        regions: recorder.regions,
        stages: OnceCell::new(),
    })
}

#[derive(Default)]
struct Recorder {
    templates: Vec<RecordedTemplate>,
    regions: Regions,
    /// Of the current template, the class of each node of the best term after each stage.
    classes: Both<Vec<Vec<Id>>>,
}

impl Recorder {
    fn current(&mut self) -> &mut RecordedTemplate {
        let current = self.templates.last_mut();
        current.expect("invariant: a template has begun")
    }
}

/// The cheapest term of a template: of full sequences before step programs are asked for.
fn best(template: &Template<'_>) -> Option<Term> {
    let (terms, points) = (&template.terms, &template.config.points);
    let (outputs, at) = if terms.step.is_empty() {
        (&terms.full, &points.general)
    } else {
        (&terms.step, &points.decode)
    };
    terms.cheapest_at(&template.name, outputs, at).ok()
}

/// A term as a recorded program and the class of each node.
fn split(term: Option<Term>) -> (Option<(Graph, u64)>, Vec<Id>) {
    term.map_or((None, Vec::new()), |t| (Some((t.graph, t.cost)), t.classes))
}

impl Observer for Recorder {
    fn begun(&mut self, template: &Template<'_>) {
        self.classes = Both::default();
        self.templates.push(RecordedTemplate {
            cost: best(template).map(|term| term.cost),
            stages: Vec::new(),
            story: None,
        });
    }

    fn saturated(&mut self, template: &Template<'_>, stage: Stage) {
        let start = Instant::now();
        let (best, classes) = split(best(template));
        self.classes.decode.push(classes);
        let (terms, at) = (&template.terms, &template.config.points.general);
        let general = (stage >= Stage::KvCache)
            .then(|| terms.cheapest_at(&template.name, &terms.step, at).ok())
            .flatten();
        let (general, classes) = split(general);
        self.classes.general.push(classes);
        self.current().stages.push(RecordedStage {
            best,
            general,
            time: start.elapsed(),
        });
    }

    fn chosen(&mut self, template: &Template<'_>, chosen: &Chosen) {
        let Ok(decode) = &chosen.steps.decode else {
            return;
        };
        let history = History {
            terms: &template.terms,
            off: &template.config.disabled,
            imported: &template.imported,
            stages: &self.classes,
        };
        let decode_cost = template.decode_cost();
        let general_cost = template.general_cost(&chosen.layouts);
        let decode = Told {
            term: decode,
            cost: &decode_cost,
        };
        let general = chosen.steps.general.as_ref().ok().map(|term| Told {
            term,
            cost: &general_cost,
        });
        let story = history.tell(&decode, general.as_ref());
        self.current().story = Some(story);
    }

    fn cut(&mut self, regions: &Regions) {
        self.regions = regions.clone();
    }
}
