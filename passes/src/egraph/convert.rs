//! Graphs into the e-graph and chosen terms back into graphs.

use super::EGraph;
use super::analysis::{Data, op_of, operands_of};
use super::lang::Lang;
use crate::walk::{Reads, depth_first};
use egg::Id;
use indexmap::IndexMap;
use lathe_ir::{Graph, NodeId, Op, Operands, Prov};
use petgraph::visit::{Control, DfsEvent};
use smallvec::SmallVec;
use std::convert::Infallible;

/// The e-node of an operation on e-classes; `leaf` gives the class of its payload and of absence.
pub fn e_node(op: &Op, operands: &Operands<Id>, mut leaf: impl FnMut(Lang) -> Id) -> Lang {
    let mut children: SmallVec<[Id; 4]> = SmallVec::new();
    if op.has_payload() {
        children.push(leaf(Lang::Payload(op.clone())));
    }
    let signature = op.signature();
    if signature.variadic {
        children.extend(operands.iter().copied());
    }
    for &slot in signature.slots {
        children.push(operands.get(slot).unwrap_or_else(|| leaf(Lang::Absent)));
    }
    Lang::App(op.name(), children)
}

/// Adds an operation on e-classes.
pub fn add_op(egraph: &mut EGraph, op: &Op, operands: &Operands<Id>) -> Id {
    let node = e_node(op, operands, |leaf| egraph.add(leaf));
    egraph.add(node)
}

/// Adds a whole graph; returns the class of each node.
pub fn add_graph(egraph: &mut EGraph, graph: &Graph) -> Vec<Id> {
    let mut ids: Vec<Id> = Vec::with_capacity(graph.nodes().len());
    egraph.analysis.note_shared(graph);
    for node in graph.nodes() {
        let operands = node.inputs.map(|i| ids[i.index()]);
        let id = add_op(egraph, &node.op, &operands);
        if let Data::Value(v) = &mut egraph[id].data {
            v.prov.get_or_insert_with(|| node.prov.clone());
        }
        ids.push(id);
    }
    ids
}

/// The form chosen for each e-class.
pub type Choice = IndexMap<Id, Lang>;

/// Builds the graph of the chosen terms under the given roots. Nodes stand in depth-first order
/// of the roots, so equal choices give equal graphs. A class without provenance takes that of
/// its first user.
///
/// # Panics
/// A class under a root has no chosen form, or the choice is cyclic (invariants of extraction).
pub fn to_graph(egraph: &EGraph, choice: &Choice, name: &str, roots: &[(String, Id)]) -> Graph {
    to_graph_with_classes(egraph, choice, name, roots).0
}

/// As [`to_graph`], with the class of each node.
///
/// # Panics
/// As [`to_graph`].
pub fn to_graph_with_classes(
    egraph: &EGraph,
    choice: &Choice,
    name: &str,
    roots: &[(String, Id)],
) -> (Graph, Vec<Id>) {
    let class = |at: usize| {
        *choice
            .get_index(at)
            .expect("invariant: places are of the choice")
            .0
    };
    let place = |id: Id| {
        let id = egraph.find(id);
        let place = choice.get_index_of(&id);
        place.unwrap_or_else(|| panic!("invariant: class {id} under a root has a chosen form"))
    };
    let reads = Reads::new(choice.len(), |at| {
        let present = |c: &&Id| !matches!(egraph[**c].data, Data::Absent);
        let places = choice[at].places().iter();
        places.filter(present).map(|&c| place(c))
    });
    let mut graph = Graph::new(name);
    let mut provs = vec![Prov::global(""); choice.len()];
    let mut done: IndexMap<usize, NodeId> = IndexMap::new();
    let roots_at = roots.iter().map(|r| place(r.1));
    let walk: Result<(), Infallible> = depth_first(&reads, roots_at, |event| {
        match event {
            DfsEvent::Discover(at, _) => {
                if let Data::Value(v) = &egraph[class(at)].data
                    && let Some(origin) = v.origin()
                {
                    provs[at] = origin.clone();
                }
            }
            DfsEvent::TreeEdge(user, at) => provs[at] = provs[user].clone(),
            DfsEvent::Finish(at, _) => {
                let operands = operands_of(egraph, &choice[at]).map(|&c| done[&place(c)]);
                let op = op_of(egraph, &choice[at]);
                let node = graph
                    .add(op, operands, &provs[at])
                    .unwrap_or_else(|e| panic!("invariant: e-graph terms are well-typed: {e}"));
                done.insert(at, node);
            }
            DfsEvent::BackEdge(..) => panic!("invariant: the chosen forms are acyclic"),
            DfsEvent::CrossForwardEdge(..) => {}
        }
        Ok(Control::Continue)
    });
    let Ok(()) = walk;
    for (name, root) in roots {
        graph.set_output(name, done[&place(*root)]);
    }
    // Classes are entered as their nodes are added.
    let classes = done.keys().map(|&at| class(at)).collect();
    (graph, classes)
}
