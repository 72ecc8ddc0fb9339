//! One template: its e-graph, the stages on it, and the choice of its programs.

use super::check::check_forms;
use super::saturate::saturate;
use super::terms::{Term, Terms, open_windows};
use super::{CompileError, PassConfig, StageReport, TemplateReport};
use crate::diagnose::unmatched_attention;
use crate::egraph::analysis::Applied;
use crate::egraph::convert::add_graph;
use crate::egraph::cost::INFINITE;
use crate::egraph::extract::ExtractError;
use crate::egraph::{EGraph, Lang, TensorAnalysis};
use crate::explain::RuleSearch;
use crate::region::layer_name;
use crate::rule::Stage;
use egg::Id;
use indexmap::IndexMap;
use lathe_ir::{Both, Graph};
use std::collections::BTreeSet;
use std::time::Duration;

/// A template with all forms of it that were found so far.
pub(crate) struct Template<'a> {
    pub(crate) config: &'a PassConfig,
    /// `embed`, `layer` or `head`, with its number.
    pub(crate) name: String,
    /// Layers that use it.
    layers: Vec<u32>,
    graph: &'a Graph,
    /// The class of each imported node.
    pub(crate) imported: Vec<Id>,
    pub(crate) terms: Terms,
    /// Rule applications before the last stage.
    before: usize,
}

/// The programs chosen from a template.
pub(crate) struct Chosen {
    /// Of full sequences, after recognition; as imported where that has no executable form.
    pub(crate) full: Graph,
    /// The step programs.
    pub(crate) steps: Both<Result<Term, CompileError>>,
    /// The weight layouts of the decode program.
    pub(crate) layouts: BTreeSet<Id>,
}

impl<'a> Template<'a> {
    /// Puts a template into an e-graph of its own. `known` is what is known of the whole model.
    pub(crate) fn new(
        graph: &'a Graph,
        index: usize,
        layers: Vec<u32>,
        config: &'a PassConfig,
        known: &TensorAnalysis,
    ) -> Template<'a> {
        let mut egraph = EGraph::new(known.clone());
        let imported = add_graph(&mut egraph, graph);
        egraph.rebuild();
        let full = graph
            .outputs()
            .iter()
            .map(|(name, id)| (name.clone(), imported[id.index()]))
            .collect();
        let kind = graph.name.rsplit('/').next().unwrap_or("model");
        Template {
            config,
            name: format!("{index}-{kind}"),
            layers,
            graph,
            imported,
            terms: Terms {
                egraph,
                full,
                step: Vec::new(),
            },
            before: 0,
        }
    }

    /// Every rule application so far.
    fn log(&self) -> &[Applied] {
        &self.terms.egraph.analysis.log
    }

    /// Runs the rules of a stage until nothing changes. The first stage of step programs begins by
    /// asking for the windows of all outputs.
    ///
    /// # Errors
    /// The stage does not saturate.
    pub(crate) fn run(&mut self, stage: Stage) -> Result<StageReport, CompileError> {
        if stage == Stage::KvCache {
            self.terms.step = open_windows(&mut self.terms.egraph, &self.terms.full);
        }
        let known = self.log().len();
        self.before = known;
        let rules = self.config.rules_of(stage);
        let egraph = &mut self.terms.egraph;
        let iterations = saturate(egraph, &rules, stage.name(), &self.name)?;
        let mut matches = IndexMap::new();
        for applied in &self.log()[known..] {
            *matches.entry(applied.rule).or_insert(0) += 1;
        }
        matches.sort_keys();
        Ok(StageReport {
            stage,
            matches,
            nodes: self.terms.egraph.total_number_of_nodes(),
            classes: self.terms.egraph.number_of_classes(),
            iterations,
            saturate: Duration::ZERO,
        })
    }

    /// Checks what a stage that has just run made of the template.
    ///
    /// # Errors
    /// A value has a form of another type: a bug in a rule.
    pub(crate) fn check(&self, stage: Stage) -> Result<(), CompileError> {
        let applied = &self.log()[self.before..];
        check_forms(&self.terms.egraph, applied, stage.name(), &self.name)
    }

    /// What a form costs where the decode program is chosen.
    pub(crate) fn decode_cost(&self) -> impl Fn(Id, &Lang) -> u64 {
        |id, node| self.terms.step_cost(id, node, &self.config.points.decode)
    }

    /// What a form costs where the general program is chosen, which has these weight layouts.
    pub(crate) fn general_cost(&self, layouts: &BTreeSet<Id>) -> impl Fn(Id, &Lang) -> u64 {
        |id, node| match self.terms.reads_other_layout(id, node, layouts) {
            true => INFINITE,
            false => self.terms.step_cost(id, node, &self.config.points.general),
        }
    }

    /// The cheapest programs. Decode comes first: it fixes the weight layouts, which the general
    /// program obeys.
    pub(crate) fn choose(&self) -> Chosen {
        let Terms { full, step, .. } = &self.terms;
        let at = &self.config.points.general;
        let full = match self.terms.cheapest_at(&self.name, full, at) {
            Ok(term) => term.graph,
            Err(_) => self.graph.clone(),
        };
        let decode = match self.terms.cheapest(&self.name, step, &self.decode_cost()) {
            Ok(term) => term,
            Err(e) => {
                let e = self.refuse(e);
                return Chosen {
                    full,
                    steps: Both::from_fn(|_| Err(e.clone())),
                    layouts: BTreeSet::new(),
                };
            }
        };
        let roots: Vec<Id> = step.iter().map(|r| r.1).collect();
        let layouts = self.terms.weight_operands(&decode.choice, &roots);
        let general = self
            .terms
            .cheapest(&self.name, step, &self.general_cost(&layouts))
            .map_err(|e| self.refuse(e));
        Chosen {
            full,
            steps: Both {
                decode: Ok(decode),
                general,
            },
            layouts,
        }
    }

    /// Why there is no step program: an attention that was not recognised, or else the value
    /// without an executable form. Layers are those of the model, not of the template.
    fn refuse(&self, e: ExtractError) -> CompileError {
        let real = |layer: Option<u32>| self.layers.first().copied().or(layer);
        let place = |path: &str, layer: Option<u32>| match layer {
            Some(l) => layer_name(path, l),
            None => path.to_string(),
        };
        let off = &self.config.disabled;
        let Some(u) = unmatched_attention(&self.terms.egraph, off) else {
            let layer = e.layer.and_then(|l| real(Some(l)));
            let nearest = match &*e.op {
                "win" => RuleSearch::new(&self.terms, off).nearest_window(e.class),
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

    /// What was done to the template, and what was chosen.
    pub(crate) fn report(self, stages: Vec<StageReport>, chosen: &Chosen) -> TemplateReport {
        let graph = |term: &Result<Term, _>| term.as_ref().ok().map(|t| t.graph.clone());
        TemplateReport {
            name: self.name,
            layers: self.layers,
            imported: self.graph.clone(),
            stages,
            log: self.terms.egraph.analysis.log,
            steps: chosen.steps.as_ref().map(graph),
        }
    }
}
