//! From the imported graph to step programs: the stages, in order, on one e-graph a template.

use crate::chains::{self, fuse_chains};
use crate::diagnose::unmatched_attention;
use crate::egraph::analysis::{Applied, Data, is_step_shape};
use crate::egraph::convert::{Choice, add_graph, add_op, to_graph, to_graph_with_classes};
use crate::egraph::cost::{CostPoint, INFINITE};
use crate::egraph::extract::{ExtractError, Extraction, extract, node_cost};
use crate::egraph::{EGraph, Lang, TensorAnalysis};
use crate::explain::{History, Story, Told};
use crate::region::{Regions, cut, layer_name, select_all, whole};
use crate::rule::{Rule, Stage};
use crate::rules::{self, STEP};
use egg::{Id, Runner, SimpleScheduler, StopReason};
use indexmap::IndexMap;
use lathe_ir::ops::{Cache, Input, Sample, Select, Weight, Win};
use lathe_ir::{DType, Dim, Graph, NodeId, Op, Prov, Sym, TypeError};
use lathe_ir::{Operands, Output, StepInput};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use thiserror::Error;

/// What to run and for which sizes.
#[derive(Clone, Debug)]
pub struct PassConfig {
    /// Names of rules and stages that are switched off.
    pub disabled: BTreeSet<String>,
    /// Optimise the whole model as one region instead of one template a kind of layer.
    pub no_roll: bool,
    /// Where the decode program is chosen.
    pub decode: CostPoint,
    /// Where the general program is chosen.
    pub general: CostPoint,
}

impl PassConfig {
    /// Everything on, for one device: decode at batch 1 and a general step of 2,048 tokens.
    pub fn new(device: crate::egraph::cost::DeviceModel) -> PassConfig {
        PassConfig {
            disabled: BTreeSet::new(),
            no_roll: false,
            decode: CostPoint::decode(1, 512, device.clone()),
            general: CostPoint::prefill(2048, device),
        }
    }

    /// Switches rules or stages off by name.
    ///
    /// # Errors
    /// A name is neither a rule nor a stage.
    pub fn disable(mut self, names: &[&str]) -> Result<PassConfig, CompileError> {
        for n in names {
            let known = rules::by_name(n).is_some()
                || Stage::ALL.iter().any(|s| s.name() == *n)
                || *n == chains::NAME;
            if !known {
                return Err(CompileError::UnknownRule((*n).to_string()));
            }
            self.disabled.insert((*n).to_string());
        }
        Ok(self)
    }

    /// Whether pointwise operations are grouped into chains: not without the stage `fuse`.
    pub fn makes_chains(&self) -> bool {
        !self.disabled.contains(chains::NAME) && !self.disabled.contains(Stage::Fuse.name())
    }

    fn runs(&self, rule: &Rule) -> bool {
        !self.disabled.contains(rule.name) && !self.disabled.contains(rule.stage.name())
    }
}

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
    /// A program is ill-typed: a bug in the passes.
    #[error("internal: {0}")]
    Type(#[from] TypeError),
}

/// What one stage did to one template.
#[derive(Clone, Debug)]
pub struct StageReport {
    /// Stage.
    pub stage: Stage,
    /// How often each rule gave a value a new form.
    pub matches: IndexMap<&'static str, usize>,
    /// E-nodes and e-classes after the stage.
    pub nodes: usize,
    /// E-classes after the stage.
    pub classes: usize,
    /// Rounds until nothing changed.
    pub iterations: usize,
    /// Cost of the cheapest program before the stage, in picoseconds; `None` without `dumps` and
    /// where there is no executable program.
    pub cost_before: Option<u64>,
    /// Cost of the cheapest program after the stage, likewise: of full sequences at the general
    /// point, from `kv_cache` on of a step at the decode point.
    pub cost_after: Option<u64>,
    /// Time of saturation.
    pub saturate: Duration,
    /// Time of extraction of the best term after the stage (dumps only).
    pub extract: Duration,
    /// The cheapest term after the stage, if there is one.
    pub best: Option<Graph>,
    /// The cheapest step at the general point, for stages of step programs, likewise.
    pub general: Option<(Graph, u64)>,
}

/// One template with what was done to it.
#[derive(Clone, Debug)]
pub struct TemplateReport {
    /// `embed`, `layer` or `head`, numbered if there are several.
    pub name: String,
    /// Layers that use it.
    pub layers: Vec<u32>,
    /// The template as imported.
    pub imported: Graph,
    /// Each stage in order.
    pub stages: Vec<StageReport>,
    /// Every rule application, for `explain`.
    pub log: Vec<Applied>,
    /// The chosen decode and general terms, if there is a step program.
    pub decode: Option<Graph>,
    /// The chosen general term.
    pub general: Option<Graph>,
    /// What became of each value (dumps only, and only if there is a decode term).
    pub story: Option<Story>,
}

/// A compiled model: its step programs and how they came about.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// One token a sequence; every row is sampled.
    pub decode: Option<Graph>,
    /// Ragged rows; the rows named by the input `step.rows` are sampled.
    pub general: Option<Graph>,
    /// The full-sequence program after recognition, for execution without a cache.
    pub full: Graph,
    /// Why there are no step programs, if there are none.
    pub no_step: Option<CompileError>,
    /// Reports of each template.
    pub templates: Vec<TemplateReport>,
    /// The cheapest program of the whole model after each stage (dumps only).
    pub stages: Vec<StageProgram>,
    /// Phase times that add up to the wall time of the call.
    pub phases: IndexMap<&'static str, Duration>,
}

/// The whole model after one stage, for dumps.
#[derive(Clone, Debug)]
pub struct StageProgram {
    /// The stage.
    pub stage: Stage,
    /// Whether it is a step program (from `kv_cache` on) or one of full sequences.
    pub step: bool,
    /// The program; `None` if some part of the model has no executable form at this stage.
    pub graph: Option<Graph>,
}

/// Rounds after which a stage counts as not saturating. The longest chain of rewrites in a layer
/// is under 40 rounds; a limit in time would make results depend on the machine.
const ROUNDS: usize = 400;
/// E-nodes after which a stage counts as not saturating.
const NODES: usize = 2_000_000;

/// Optimises a full-sequence model.
///
/// # Errors
/// A stage does not saturate or a program is ill-typed. A model that has no step program is not
/// an error: [`Compiled::no_step`] says why.
pub fn compile(model: &Graph, config: &PassConfig) -> Result<Compiled, CompileError> {
    compile_with(model, config, false)
}

/// As [`compile`]; with `dumps`, the best term after every stage is extracted too.
///
/// # Errors
/// As [`compile`].
pub fn compile_with(
    model: &Graph,
    config: &PassConfig,
    dumps: bool,
) -> Result<Compiled, CompileError> {
    let mut clock = Clock::default();
    let regions = if config.no_roll {
        whole(model)
    } else {
        cut(model)?
    };
    // Across regions: an embedding that is the head too is read in two.
    let mut shared = TensorAnalysis::default();
    shared.note_shared(model);
    clock.lap("regions");
    let mut templates = Vec::new();
    let mut chosen = Vec::new();
    for (i, template) in regions.templates.iter().enumerate() {
        let layers = regions
            .regions
            .iter()
            .filter(|r| r.template == i)
            .filter_map(|r| r.layer);
        let mut t = Template::new(template, i, layers.collect(), config, &shared);
        t.run(dumps, &mut clock)?;
        chosen.push(t.choose(dumps, &mut clock));
        templates.push(t.report);
    }
    let full = stitch(&regions, &model.name, |i| chosen[i].full.clone(), false)?;
    let mut no_step = None;
    let mut programs = [None, None];
    for (slot, general) in [(0, false), (1, true)] {
        let graphs: Result<Vec<Graph>, CompileError> = chosen
            .iter()
            .map(|c| {
                if general {
                    c.general.clone()
                } else {
                    c.decode.clone()
                }
            })
            .collect();
        match graphs {
            Ok(gs) => {
                let name = format!(
                    "{}/{}",
                    model.name,
                    if general { "general" } else { "decode" }
                );
                let g = stitch(&regions, &name, |i| gs[i].clone(), true)?;
                let g = if general {
                    g.without_dead()
                } else {
                    select_all(&g)?
                };
                programs[slot] = Some(g);
            }
            Err(e) => no_step = Some(e),
        }
    }
    for (report, c) in templates.iter_mut().zip(&chosen) {
        report.decode = c.decode.as_ref().ok().cloned();
        report.general = c.general.as_ref().ok().cloned();
    }
    clock.lap("stitch");
    if config.makes_chains() {
        for program in programs.iter_mut().flatten() {
            *program = fuse_chains(program)?;
        }
        clock.lap("chains");
    }
    let mut stages = Vec::new();
    if dumps {
        for (i, stage) in Stage::ALL.into_iter().enumerate() {
            let best: Option<Vec<Graph>> = templates
                .iter()
                .map(|t: &TemplateReport| t.stages[i].best.clone())
                .collect();
            let step = stage >= Stage::KvCache;
            let graph = match best {
                Some(gs) => {
                    let name = format!("{}/{}", model.name, stage.name());
                    Some(stitch(&regions, &name, |t| gs[t].clone(), step)?)
                }
                None => None,
            };
            stages.push(StageProgram { stage, step, graph });
        }
        clock.lap("dumps");
    }
    let [decode, general] = programs;
    Ok(Compiled {
        decode,
        general,
        full,
        no_step,
        templates,
        stages,
        phases: clock.laps,
    })
}

/// Attributes wall time to phases without gaps.
#[derive(Debug)]
struct Clock {
    last: Instant,
    laps: IndexMap<&'static str, Duration>,
}

impl Default for Clock {
    fn default() -> Self {
        Clock {
            last: Instant::now(),
            laps: IndexMap::new(),
        }
    }
}

impl Clock {
    fn lap(&mut self, phase: &'static str) -> Duration {
        let now = Instant::now();
        let d = now - self.last;
        self.last = now;
        *self.laps.entry(phase).or_default() += d;
        d
    }
}

struct Chosen {
    full: Graph,
    decode: Result<Graph, CompileError>,
    general: Result<Graph, CompileError>,
}

/// All forms that the rules found for a program.
#[derive(Clone, Debug)]
pub struct Terms {
    /// The forms.
    pub egraph: EGraph,
    /// Output names and their full-sequence classes.
    pub full: Vec<(String, Id)>,
    /// Output names and their step classes, once the `kv_cache` stage has begun.
    pub step: Vec<(String, Id)>,
}

/// Runs all stages on one program and returns everything that they found: for tests and tools.
///
/// # Errors
/// As [`compile`].
pub fn terms_of(graph: &Graph, config: &PassConfig) -> Result<Terms, CompileError> {
    let none = TensorAnalysis::default();
    let mut t = Template::new(graph, 0, Vec::new(), config, &none);
    t.run(false, &mut Clock::default())?;
    Ok(t.terms)
}

struct Template<'a> {
    config: &'a PassConfig,
    terms: Terms,
    report: TemplateReport,
    /// The class of each imported node.
    imported: Vec<Id>,
    /// The class of each node of the best term after each stage.
    stage_classes: Vec<Vec<Id>>,
    /// The same at the general point.
    general_classes: Vec<Vec<Id>>,
}

impl<'a> Template<'a> {
    fn new(
        graph: &Graph,
        index: usize,
        layers: Vec<u32>,
        config: &'a PassConfig,
        known: &TensorAnalysis,
    ) -> Template<'a> {
        let mut egraph = EGraph::new(known.clone());
        let ids = add_graph(&mut egraph, graph);
        egraph.rebuild();
        let full = graph
            .outputs()
            .iter()
            .map(|(name, id)| (name.clone(), ids[id.index()]))
            .collect();
        Template {
            config,
            terms: Terms {
                egraph,
                full,
                step: Vec::new(),
            },
            report: TemplateReport {
                name: format!(
                    "{index}-{}",
                    graph.name.rsplit('/').next().unwrap_or("model")
                ),
                layers,
                imported: graph.clone(),
                stages: Vec::new(),
                log: Vec::new(),
                decode: None,
                general: None,
                story: None,
            },
            imported: ids,
            stage_classes: Vec::new(),
            general_classes: Vec::new(),
        }
    }

    fn run(&mut self, dumps: bool, clock: &mut Clock) -> Result<(), CompileError> {
        let mut cost = self.best(dumps).map(|e| e.cost);
        clock.lap("extract");
        for stage in Stage::ALL {
            if stage == Stage::KvCache {
                self.terms.step = open_windows(&mut self.terms.egraph, &self.terms.full);
            }
            let mut report = self.saturate(stage)?;
            report.saturate = clock.lap("saturate");
            report.cost_before = cost;
            let best = self.best(dumps);
            cost = best.as_ref().map(|e| e.cost);
            let (graph, classes) = self.term(best.as_ref(), stage);
            report.best = graph;
            self.stage_classes.push(classes);
            let mut classes = Vec::new();
            if dumps && stage >= Stage::KvCache {
                let best = self.best_at(&self.terms.step, &self.config.general);
                let (graph, own) = self.term(best.as_ref(), stage);
                report.general = graph.zip(best.map(|e| e.cost));
                classes = own;
            }
            self.general_classes.push(classes);
            report.cost_after = cost;
            report.extract = clock.lap("extract");
            self.report.stages.push(report);
        }
        self.report.log = std::mem::take(&mut self.terms.egraph.analysis.log);
        Ok(())
    }

    /// The cheapest program of the current stage; nothing without `dumps`, which need it.
    fn best(&self, dumps: bool) -> Option<Extraction> {
        if !dumps {
            return None;
        }
        let (roots, at) = if self.terms.step.is_empty() {
            (&self.terms.full, &self.config.general)
        } else {
            (&self.terms.step, &self.config.decode)
        };
        self.best_at(roots, at)
    }

    fn best_at(&self, roots: &[(String, Id)], at: &CostPoint) -> Option<Extraction> {
        let roots: Vec<Id> = roots.iter().map(|r| r.1).collect();
        extract(&self.terms.egraph, &roots, &|id, n| {
            node_cost(&self.terms.egraph, id, n, at)
        })
        .ok()
    }

    /// An extraction as a graph, with the class of each node.
    fn term(&self, best: Option<&Extraction>, stage: Stage) -> (Option<Graph>, Vec<Id>) {
        let Some(e) = best else {
            return (None, Vec::new());
        };
        let roots = if stage >= Stage::KvCache {
            &self.terms.step
        } else {
            &self.terms.full
        };
        let name = &self.report.name;
        let (graph, classes) = to_graph_with_classes(&self.terms.egraph, &e.choice, name, roots);
        (Some(graph), classes)
    }

    fn saturate(&mut self, stage: Stage) -> Result<StageReport, CompileError> {
        let rules: Vec<&Rule> = rules::all()
            .into_iter()
            .filter(|r| r.stage == stage && self.config.runs(r))
            .collect();
        let known = self.terms.egraph.analysis.log.len();
        let iterations = saturate(
            &mut self.terms.egraph,
            &rules,
            stage.name(),
            &self.report.name,
        )?;
        let mut matches = IndexMap::new();
        for applied in &self.terms.egraph.analysis.log[known..] {
            *matches.entry(applied.rule).or_insert(0) += 1;
        }
        matches.sort_keys();
        Ok(StageReport {
            stage,
            matches,
            nodes: self.terms.egraph.total_number_of_nodes(),
            classes: self.terms.egraph.number_of_classes(),
            iterations,
            cost_before: None,
            cost_after: None,
            saturate: Duration::ZERO,
            extract: Duration::ZERO,
            best: None,
            general: None,
        })
    }

    /// Why there is no step program: an attention that was not recognised, or else the value
    /// without an executable form. Layers are those of the model, not of the template.
    fn refuse(&self, e: ExtractError) -> CompileError {
        let real = |layer: Option<u32>| self.report.layers.first().copied().or(layer);
        let place = |path: &str, layer: Option<u32>| match layer {
            Some(l) => layer_name(path, l),
            None => path.to_string(),
        };
        let Some(u) = unmatched_attention(&self.terms.egraph, &self.config.disabled) else {
            let layer = e.layer.and_then(|l| real(Some(l)));
            let nearest = match &*e.op {
                "win" => self.history().nearest(e.class, true),
                _ => None,
            };
            let reason = match nearest {
                None => e.reason.clone(),
                Some(n) => format!("{}; nearest rule {}: {}", e.reason, n.rule, n.reason),
            };
            return CompileError::Extract(ExtractError {
                path: place(&e.path, layer),
                reason: place(&reason, layer),
                layer,
                ..e
            });
        };
        let layer = real(u.prov.layer);
        CompileError::Attention {
            layer: layer.unwrap_or(0),
            path: place(&u.prov.path, layer),
            detail: place(&u.detail, layer),
            rule: u.rule.to_string(),
        }
    }

    fn history(&self) -> History<'_> {
        History {
            terms: &self.terms,
            log: &self.report.log,
            off: &self.config.disabled,
            imported: &self.imported,
            stages: &self.stage_classes,
            general_stages: &self.general_classes,
        }
    }

    /// Decode first: it fixes the weight layouts; then the general program under them.
    fn choose(&mut self, dumps: bool, clock: &mut Clock) -> Chosen {
        let name = &self.report.name;
        let mut story = None;
        let full_roots: Vec<Id> = self.terms.full.iter().map(|r| r.1).collect();
        let at = &self.config.general;
        let full = extract(&self.terms.egraph, &full_roots, &|id, n| {
            node_cost(&self.terms.egraph, id, n, at)
        })
        .map_or_else(
            |_| self.report.imported.clone(),
            |e| to_graph(&self.terms.egraph, &e.choice, name, &self.terms.full),
        );
        let roots: Vec<Id> = self.terms.step.iter().map(|r| r.1).collect();
        let at = &self.config.decode;
        let decode = extract(&self.terms.egraph, &roots, &|id, n| {
            self.terms.step_cost(id, n, at)
        });
        let chosen = match decode {
            Err(e) => {
                let e = self.refuse(e);
                Chosen {
                    full,
                    decode: Err(e.clone()),
                    general: Err(e),
                }
            }
            Ok(d) => {
                let layouts = self.terms.weight_operands(&d.choice, &roots);
                let general_at = &self.config.general;
                let general_cost = |id: Id, n: &Lang| {
                    if self.terms.reads_other_layout(id, n, &layouts) {
                        INFINITE
                    } else {
                        self.terms.step_cost(id, n, general_at)
                    }
                };
                let general = extract(&self.terms.egraph, &roots, &general_cost);
                let built = |choice: &Choice| {
                    to_graph_with_classes(&self.terms.egraph, choice, name, &self.terms.step)
                };
                let (decode, decode_classes) = built(&d.choice);
                let general = general.map(|e| {
                    let (graph, classes) = built(&e.choice);
                    (graph, classes, e.choice)
                });
                clock.lap("extract");
                if dumps {
                    let decode_cost = |id: Id, n: &Lang| self.terms.step_cost(id, n, at);
                    let told = Told {
                        graph: &decode,
                        classes: &decode_classes,
                        choice: &d.choice,
                        cost: &decode_cost,
                    };
                    let general = general.as_ref().ok().map(|(graph, classes, choice)| Told {
                        graph,
                        classes,
                        choice,
                        cost: &general_cost,
                    });
                    story = Some(self.history().tell(&told, general.as_ref()));
                    clock.lap("dumps");
                }
                Chosen {
                    full,
                    decode: Ok(decode),
                    general: general.map(|(graph, ..)| graph).map_err(|e| self.refuse(e)),
                }
            }
        };
        clock.lap("extract");
        self.report.story = story;
        chosen
    }
}

impl Terms {
    /// The cost of a form in a step program, which has no values of whole sequences.
    pub fn step_cost(&self, id: Id, node: &Lang, at: &CostPoint) -> u64 {
        let whole = match &self.egraph[id].data {
            Data::Value(v) => v.ty.as_tensor().is_some_and(|t| !is_step_shape(&t.shape)),
            Data::Payload(_) | Data::Absent => false,
        };
        if whole {
            return INFINITE;
        }
        node_cost(&self.egraph, id, node, at)
    }

    /// Whether a class is a weight in some layout.
    fn is_weight(&self, id: Id) -> bool {
        matches!(&self.egraph[id].data, Data::Value(v) if v.weight_only)
    }

    /// Weight-only classes that the chosen program reads from elsewhere: the layouts in memory.
    pub fn weight_operands(&self, choice: &Choice, roots: &[Id]) -> BTreeSet<Id> {
        let mut layouts = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut stack: Vec<Id> = roots.iter().map(|&r| self.egraph.find(r)).collect();
        while let Some(id) = stack.pop() {
            if !seen.insert(id) {
                continue;
            }
            for &c in choice[&id].places() {
                let c = self.egraph.find(c);
                if self.is_weight(c) && !self.is_weight(id) {
                    layouts.insert(c);
                } else {
                    stack.push(c);
                }
            }
        }
        layouts
    }

    /// Whether a form reads a weight in another layout than these.
    pub fn reads_other_layout(&self, id: Id, node: &Lang, layouts: &BTreeSet<Id>) -> bool {
        if matches!(node, Lang::Payload(_) | Lang::Absent) || self.is_weight(id) {
            return false;
        }
        node.places()
            .iter()
            .map(|&c| self.egraph.find(c))
            .any(|c| self.is_weight(c) && !layouts.contains(&c))
    }
}

/// Adds the windows of full-sequence outputs: what a step has to compute. Returns their names and
/// classes; logits are selected and sampled, which adds the output `next`.
pub(crate) fn open_windows(egraph: &mut EGraph, full: &[(String, Id)]) -> Vec<(String, Id)> {
    let mut step = Vec::new();
    for (name, id) in full {
        let window = Win {
            batch: Some(0),
            seq: Some(1),
        };
        let mut class = add_op(egraph, &window.into(), &[*id].into());
        let origin = egraph[*id].data.value().origin().cloned();
        let origin = origin.unwrap_or_else(|| Prov::global(name));
        if Output::by_name(name) == Some(Output::Logits) {
            let rows = Input {
                name: StepInput::Rows.name().into(),
                dtype: DType::I32,
                shape: vec![Dim::sym(Sym::R)],
            };
            let rows = add_op(egraph, &rows.into(), &Operands::default());
            class = add_op(egraph, &Select.into(), &[class, rows].into());
            let next = add_op(egraph, &Sample.into(), &[class].into());
            set_prov(egraph, next, Prov::global("sample"));
            step.push((Output::Next.name().into(), next));
        }
        set_prov(egraph, class, origin);
        step.push((name.clone(), class));
    }
    egraph.rebuild();
    step
}

fn set_prov(egraph: &mut EGraph, id: Id, prov: Prov) {
    if let Data::Value(v) = &mut egraph[id].data {
        v.prov.get_or_insert(prov);
    }
}

/// Applies rules until nothing changes; returns the number of rounds.
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

/// Replays the chosen term of each template for every region and joins them.
fn stitch(
    regions: &Regions,
    name: &str,
    term: impl Fn(usize) -> Graph,
    step: bool,
) -> Result<Graph, CompileError> {
    let mut out = Graph::new(name);
    let mut leaves: BTreeMap<Op, NodeId> = BTreeMap::new();
    let mut results: Vec<BTreeMap<String, NodeId>> = Vec::new();
    let terms: Vec<Graph> = (0..regions.templates.len()).map(&term).collect();
    let mut finals = Vec::new();
    for region in &regions.regions {
        let graph = &terms[region.template];
        let mut bound: BTreeMap<String, NodeId> = BTreeMap::new();
        for b in &region.inputs {
            let input = if step {
                format!("{STEP}{}", b.input)
            } else {
                b.input.clone()
            };
            bound.insert(input, results[b.region][&b.output]);
        }
        let mut map: Vec<NodeId> = Vec::with_capacity(graph.nodes().len());
        for node in graph.nodes() {
            let prov = place(&node.prov, region.layer);
            if let Op::Input(Input { name, .. }) = &node.op
                && let Some(&id) = bound.get(name)
            {
                map.push(id);
                continue;
            }
            let op = match (&node.op, region.layer) {
                (Op::Weight(Weight { weight, dtype }), Some(l)) => Op::Weight(Weight {
                    weight: lathe_ir::WeightRef {
                        name: layer_name(&weight.name, l),
                        shape: weight.shape.clone(),
                    },
                    dtype: *dtype,
                }),
                (
                    Op::Cache(Cache {
                        kv_heads, head_dim, ..
                    }),
                    Some(l),
                ) => Op::Cache(Cache {
                    layer: l,
                    kv_heads: *kv_heads,
                    head_dim: *head_dim,
                }),
                (op, _) => op.clone(),
            };
            let inputs = node.inputs.map(|i| map[i.index()]);
            let id = if op.is_leaf() {
                match leaves.get(&op) {
                    Some(&id) => id,
                    None => {
                        let id = out.add(op.clone(), inputs, &prov)?;
                        leaves.insert(op, id);
                        id
                    }
                }
            } else {
                out.add(op, inputs, &prov)?
            };
            map.push(id);
        }
        let mut named = BTreeMap::new();
        for (name, id) in graph.outputs() {
            named.insert(name.clone(), map[id.index()]);
        }
        for name in [Output::Next, Output::Logits].map(Output::name) {
            if let Some(&id) = named.get(name) {
                finals.push((name, id));
            }
        }
        results.push(named);
    }
    for (name, id) in finals {
        out.set_output(name, id);
    }
    Ok(out.without_dead())
}

fn place(prov: &Prov, layer: Option<u32>) -> Prov {
    match (layer, prov.layer) {
        (Some(l), Some(_)) => Prov {
            layer: Some(l),
            path: layer_name(&prov.path, l).into(),
        },
        _ => prov.clone(),
    }
}
