//! Smaller programs that are wrong in the same way.

use lathe_ir::ops::{Const, Weight};
use lathe_ir::{Graph, NodeId, Op, Operands, Prov, Real, WeightRef};

/// Programs that are tried at most.
const TRIES: usize = 400;

/// The smallest program found of which `fails` still holds.
pub(crate) fn shrink(graph: &Graph, fails: &mut dyn FnMut(&Graph) -> bool) -> Graph {
    let mut best = graph.without_dead();
    let mut tries = 0;
    let mut at = best.nodes().len();
    // From the results down; begun again as long as something goes away.
    let mut progress = false;
    while tries < TRIES {
        if at == 0 {
            if !progress {
                break;
            }
            progress = false;
            at = best.nodes().len();
        }
        at -= 1;
        for next in without(&best, NodeId(at as u32)) {
            if next.nodes().len() >= best.nodes().len() {
                continue;
            }
            tries += 1;
            if fails(&next) {
                best = next;
                progress = true;
                at = at.min(best.nodes().len());
                break;
            }
        }
    }
    best
}

/// Programs without a node: with an earlier value of its type in its place, or a leaf.
fn without(graph: &Graph, at: NodeId) -> Vec<Graph> {
    let node = graph.node(at);
    let Some(ty) = graph.tensor(at) else {
        return Vec::new();
    };
    if node.op.is_leaf() {
        return Vec::new();
    }
    let fits = |i: &&NodeId| graph.node(**i).ty == node.ty;
    let mut out: Vec<Graph> = (node.inputs.iter().filter(fits))
        .filter_map(|&i| replaced(graph, at, &Instead::Value(i)))
        .collect();
    let known: Option<Vec<i64>> = ty.shape.iter().map(|d| d.known()).collect();
    match known {
        Some(shape) if shape.is_empty() => {
            let value = Real::new(0.5);
            let dtype = ty.dtype;
            out.extend(replaced(
                graph,
                at,
                &Instead::Leaf(Const { value, dtype }.into()),
            ));
        }
        Some(shape) if ty.dtype.is_float() => {
            let name = format!("w{}", at.index());
            let weight = WeightRef { name, shape };
            let dtype = ty.dtype;
            out.extend(replaced(
                graph,
                at,
                &Instead::Leaf(Weight { weight, dtype }.into()),
            ));
        }
        _ => {
            let earlier = graph.ids().take(at.index());
            let fits = |i: &NodeId| graph.node(*i).ty == node.ty;
            if let Some(first) = earlier.into_iter().find(fits) {
                out.extend(replaced(graph, at, &Instead::Value(first)));
            }
        }
    }
    out
}

enum Instead {
    Value(NodeId),
    Leaf(Op),
}

fn replaced(graph: &Graph, at: NodeId, instead: &Instead) -> Option<Graph> {
    let mut out = Graph::new(&graph.name);
    let mut map: Vec<NodeId> = Vec::with_capacity(graph.nodes().len());
    for id in graph.ids() {
        let node = graph.node(id);
        let new = match instead {
            Instead::Value(other) if id == at => map[other.index()],
            Instead::Leaf(op) if id == at => out
                .add(op.clone(), Operands::default(), &Prov::global("cut"))
                .ok()?,
            _ => {
                let inputs = node.inputs.map(|i| map[i.index()]);
                out.add(node.op.clone(), inputs, &node.prov).ok()?
            }
        };
        map.push(new);
    }
    for (name, id) in graph.outputs() {
        out.set_output(name, map[id.index()]);
    }
    Some(out.without_dead())
}
