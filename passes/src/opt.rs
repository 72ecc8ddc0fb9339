//! Chosen passes on one graph: what the `opt` command and the file tests run.
//!
//! Unlike [`crate::pipeline`], the graph is not cut into regions, the passes are those named, in
//! the order named, and the result is extracted even if some operation has no kernel yet, so that
//! intermediate forms (`sdpa`, `proj`, `win`) can be looked at.

use crate::chains::{self, fuse_chains};
use crate::egraph::analysis::Assumption;
use crate::egraph::convert::{add_graph, e_node, to_graph};
use crate::egraph::cost::{CostPoint, INFINITE};
use crate::egraph::extract::{extract, node_cost};
use crate::egraph::{EGraph, Lang, TensorAnalysis};
use crate::pipeline::{CompileError, open_windows, saturate};
use crate::rule::{Rule, Stage};
use crate::rules;
use egg::{Id, Language};
use indexmap::IndexMap;
use lathe_ir::{Dim, Graph, NodeId, Sym};
use std::collections::BTreeSet;

/// What the result is chosen by.
#[derive(Clone, Debug, PartialEq)]
pub enum Goal {
    /// The fewest operations: shows what a rule makes, whether or not it pays.
    Size,
    /// As few of the given operations as possible, then the fewest: shows what the rules make even
    /// where that is not smaller.
    Rewritten,
    /// The least time at a point, as the pipeline chooses. Operations without a kernel count as a
    /// second each.
    Time(CostPoint),
}

/// What an operation of the given program counts under [`Goal::Rewritten`].
const GIVEN: u64 = 1000;
/// Picoseconds that an operation without a kernel counts.
const NO_KERNEL: u64 = 1_000_000_000_000;

/// What the passes did.
#[derive(Clone, Debug)]
pub struct OptReport {
    /// The chosen program.
    pub graph: Graph,
    /// How often each rule gave a value a new form.
    pub matches: IndexMap<&'static str, usize>,
    /// E-nodes after the last pass.
    pub nodes: usize,
    /// E-classes after the last pass.
    pub classes: usize,
    /// Cost of the result: operations or picoseconds.
    pub cost: u64,
    /// What the rules took for granted.
    pub assumptions: Vec<Assumption>,
}

/// The rules of a pass: of a stage if it names one, else the rule.
///
/// # Errors
/// It names neither.
pub fn rules_of(pass: &str) -> Result<Vec<&'static Rule>, CompileError> {
    if let Some(stage) = Stage::ALL.into_iter().find(|s| s.name() == pass) {
        return Ok(rules::all()
            .into_iter()
            .filter(|r| r.stage == stage)
            .collect());
    }
    rules::by_name(pass)
        .map(|r| vec![r])
        .ok_or_else(|| CompileError::UnknownRule(pass.to_string()))
}

/// Runs passes (names of stages or rules) in order on one e-graph and extracts the best program. Chains, which are no
/// rule, are made in the program that was extracted, wherever their name stands.
///
/// The stage `kv_cache` first asks for the windows of all full-sequence outputs (`[B,S,..]`), as
/// the pipeline does; its rules by name do not.
///
/// # Errors
/// A name is neither a rule nor a stage; a pass does not saturate.
pub fn run(graph: &Graph, passes: &[&str], goal: &Goal) -> Result<OptReport, CompileError> {
    let with_chains = passes.contains(&chains::NAME);
    let selected: Vec<(&str, Vec<&'static Rule>)> = passes
        .iter()
        .filter(|p| **p != chains::NAME)
        .map(|p| Ok((*p, rules_of(p)?)))
        .collect::<Result<_, CompileError>>()?;
    let mut egraph = EGraph::new(TensorAnalysis::default());
    let ids = add_graph(&mut egraph, graph);
    egraph.rebuild();
    let mut roots: Vec<(String, Id)> = graph
        .outputs()
        .iter()
        .map(|(name, id)| (name.clone(), ids[id.index()]))
        .collect();
    for (name, rules) in &selected {
        if *name == Stage::KvCache.name() && is_full_sequence(graph) {
            roots = open_windows(&mut egraph, &roots);
        }
        let stage = rules.first().map_or("", |r| r.name);
        saturate(&mut egraph, rules, stage, &graph.name)?;
    }
    let classes: Vec<Id> = roots.iter().map(|r| r.1).collect();
    let given = given(&egraph, graph, &ids);
    let chosen = extract(&egraph, &classes, &|id, n| {
        if *goal == Goal::Rewritten && given.contains(n) {
            GIVEN
        } else {
            cost(&egraph, id, n, goal)
        }
    })?;
    let mut matches = IndexMap::new();
    for applied in &egraph.analysis.log {
        *matches.entry(applied.rule).or_insert(0) += 1;
    }
    let log = egraph.analysis.log.iter();
    let assumptions = log.filter_map(|a| a.assumes.clone()).collect();
    let mut best = to_graph(&egraph, &chosen.choice, &graph.name, &roots);
    if with_chains {
        best = fuse_chains(&best)?;
    }
    Ok(OptReport {
        graph: best,
        matches,
        nodes: egraph.total_number_of_nodes(),
        classes: egraph.number_of_classes(),
        cost: chosen.cost,
        assumptions,
    })
}

/// The e-nodes of the operations of a graph, as the e-graph has them now.
fn given(egraph: &EGraph, graph: &Graph, ids: &[Id]) -> BTreeSet<Lang> {
    let mut nodes = BTreeSet::new();
    for node in graph.nodes().iter().filter(|n| !n.inputs.is_empty()) {
        let lookup = |leaf| egraph.lookup(leaf).expect("invariant: the graph was added");
        nodes.insert(
            e_node(&node.op, &node.inputs.map(|i| ids[i.index()]), lookup)
                .map_children(|c| egraph.find(c)),
        );
    }
    nodes
}

fn cost(egraph: &EGraph, id: Id, node: &Lang, goal: &Goal) -> u64 {
    match (goal, node) {
        (_, Lang::Payload(_) | Lang::Absent) => 0,
        (Goal::Size | Goal::Rewritten, Lang::App(..)) => u64::from(!node.places().is_empty()),
        (Goal::Time(at), Lang::App(..)) => match node_cost(egraph, id, node, at) {
            c if c >= INFINITE => NO_KERNEL,
            c => c,
        },
    }
}

/// Whether every output is a full-sequence value, `[B,S,..]`.
pub fn is_full_sequence(graph: &Graph) -> bool {
    !graph.outputs().is_empty()
        && graph.outputs().iter().all(|&(_, id)| {
            graph
                .tensor(id)
                .is_some_and(|t| matches!(t.shape[..], [b, s, ..] if full(b, s)))
        })
}

fn full(b: Dim, s: Dim) -> bool {
    b.is_sym(Sym::B) && s.is_sym(Sym::S)
}

/// The graph whose outputs are the windows of another graph's full-sequence outputs: what a step
/// program has to compute, for comparison by the interpreter.
///
/// # Errors
/// An output is no full-sequence value.
pub fn windowed(graph: &Graph) -> Result<Graph, CompileError> {
    let mut egraph = EGraph::new(TensorAnalysis::default());
    let ids = add_graph(&mut egraph, graph);
    let roots: Vec<(String, Id)> = graph
        .outputs()
        .iter()
        .map(|(name, id): &(String, NodeId)| (name.clone(), ids[id.index()]))
        .collect();
    let roots = open_windows(&mut egraph, &roots);
    let classes: Vec<Id> = roots.iter().map(|r| r.1).collect();
    let chosen = extract(&egraph, &classes, &|id, n| {
        cost(&egraph, id, n, &Goal::Size)
    })?;
    Ok(to_graph(&egraph, &chosen.choice, &graph.name, &roots))
}
