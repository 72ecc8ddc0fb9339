//! All forms that the rules found for a program, and what they cost in a step.

use crate::egraph::analysis::{Data, is_step_shape};
use crate::egraph::convert::{Choice, add_op, to_graph_with_classes};
use crate::egraph::cost::{CostPoint, INFINITE};
use crate::egraph::extract::{ExtractError, Extraction, extract, node_cost};
use crate::egraph::{EGraph, Lang};
use crate::walk::Reads;
use egg::Id;
use lathe_ir::ops::{Input, Sample, Select, Win};
use lathe_ir::{DType, Dim, Graph, Operands, Output, Prov, StepInput, Sym};
use petgraph::visit::{Dfs, Visitable};
use std::collections::BTreeSet;

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

/// One program that was chosen among terms.
#[derive(Clone, Debug)]
pub(crate) struct Term {
    /// The program.
    pub(crate) graph: Graph,
    /// The class of each node.
    pub(crate) classes: Vec<Id>,
    /// The form of each class.
    pub(crate) choice: Choice,
    /// Its cost in picoseconds.
    pub(crate) cost: u64,
}

impl Terms {
    /// The cheapest program of some outputs under a cost of e-nodes.
    ///
    /// # Errors
    /// An output has no form of finite cost.
    pub(crate) fn cheapest(
        &self,
        name: &str,
        outputs: &[(String, Id)],
        cost: &dyn Fn(Id, &Lang) -> u64,
    ) -> Result<Term, ExtractError> {
        let roots: Vec<Id> = outputs.iter().map(|r| r.1).collect();
        let Extraction { choice, cost } = extract(&self.egraph, &roots, cost)?;
        let (graph, classes) = to_graph_with_classes(&self.egraph, &choice, name, outputs);
        Ok(Term {
            graph,
            classes,
            choice,
            cost,
        })
    }

    /// The cheapest program of some outputs at a point.
    ///
    /// # Errors
    /// An output has no executable form.
    pub(crate) fn cheapest_at(
        &self,
        name: &str,
        outputs: &[(String, Id)],
        at: &CostPoint,
    ) -> Result<Term, ExtractError> {
        let cost = |id: Id, n: &Lang| node_cost(&self.egraph, id, n, at);
        self.cheapest(name, outputs, &cost)
    }

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
        matches!(&self.egraph[id].data, Data::Value(v) if v.is_loaded())
    }

    /// Weight-only classes that the chosen program reads from elsewhere: the layouts in memory.
    pub fn weight_operands(&self, choice: &Choice, roots: &[Id]) -> BTreeSet<Id> {
        let place = |id: Id| {
            choice
                .get_index_of(&id)
                .expect("invariant: a chosen program is complete")
        };
        let operands = |at: usize| {
            let (&id, form) = choice
                .get_index(at)
                .expect("invariant: a place of the choice");
            let operands = form.places().iter().map(|&c| self.egraph.find(c));
            operands.map(move |c| (c, self.is_weight(c) && !self.is_weight(id)))
        };
        let computed = Reads::new(choice.len(), |at| {
            operands(at)
                .filter(|(_, loaded)| !loaded)
                .map(|(c, _)| place(c))
        });
        let roots = roots.iter().map(|&r| place(self.egraph.find(r))).collect();
        let mut walk = Dfs::from_parts(roots, computed.visit_map());
        let mut layouts = BTreeSet::new();
        while let Some(at) = walk.next(&computed) {
            layouts.extend(operands(at).filter(|(_, loaded)| *loaded).map(|(c, _)| c));
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
/// classes; logits are selected and sampled, which adds the output `next`. A value that has no rows
/// stays as it is: no step can compute it.
pub(crate) fn open_windows(egraph: &mut EGraph, full: &[(String, Id)]) -> Vec<(String, Id)> {
    let mut step = Vec::new();
    for (name, id) in full {
        let Some(window) = rows_of(egraph, *id) else {
            step.push((name.clone(), *id));
            continue;
        };
        let mut class = add_op(egraph, &window.into(), &[*id].into());
        let origin = egraph[*id].data.value().origin().cloned();
        let origin = origin.unwrap_or_else(|| Prov::global(name));
        let is_matrix = (egraph[class].data.value().ty.as_tensor()).is_some_and(|t| t.rank() == 2);
        if Output::by_name(name) == Some(Output::Logits) && is_matrix {
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

/// The window of a value over its batch and its sequence, if it has either.
fn rows_of(egraph: &EGraph, id: Id) -> Option<Win> {
    let shape = &egraph[id].data.value().ty.as_tensor()?.shape;
    let axis = |sym| shape.iter().position(|d| d.is_sym(sym)).map(|i| i as u8);
    let window = Win {
        batch: axis(Sym::B),
        seq: axis(Sym::S),
    };
    (window.batch.is_some() || window.seq.is_some()).then_some(window)
}

fn set_prov(egraph: &mut EGraph, id: Id, prov: Prov) {
    if let Data::Value(v) = &mut egraph[id].data {
        v.prov.get_or_insert(prov);
    }
}
