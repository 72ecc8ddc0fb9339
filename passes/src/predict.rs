//! What a program will cost on a device, before it exists: kernels, traffic and roofline time of
//! each kind of operation, per layer and in all.

use crate::egraph::cost::{CostPoint, Work, picoseconds, work};
use indexmap::IndexMap;
use lathe_ir::ops::{Gemm, Select};
use lathe_ir::ops::{X, gemm};
use lathe_ir::{Class, Operands};
use lathe_ir::{Graph, NodeId, Op, Prologue, Type};

pub use lathe_ir::kernel_name;

/// Sums over the operations of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Share {
    /// Kernels.
    pub kernels: u32,
    /// Operations on the matrix units and elsewhere (a multiply-add counts two).
    pub flops: f64,
    /// Bytes of memory traffic, each operand once.
    pub bytes: f64,
    /// Roofline time in picoseconds.
    pub picoseconds: u64,
}

impl Share {
    fn add(&mut self, w: &Work, ps: u64) {
        self.kernels += w.launches;
        self.flops += w.matrix + w.vector;
        self.bytes += w.bytes;
        self.picoseconds = self.picoseconds.saturating_add(ps);
    }
}

/// The prediction for one program at one point.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prediction {
    /// By kind of operation, largest first.
    pub by_class: IndexMap<Class, Share>,
    /// Kernels of each decoder layer, in order; all else under `None`.
    pub by_layer: IndexMap<Option<u32>, Share>,
    /// The whole program.
    pub total: Share,
    /// Nodes without a kernel, which make the program impossible to execute.
    pub no_kernel: Vec<NodeId>,
}

/// Predicts a program at a point.
pub fn predict(graph: &Graph, at: &CostPoint) -> Prediction {
    let weight_only = weight_only(graph);
    let mut p = Prediction::default();
    for id in graph.ids() {
        let node = graph.node(id);
        let inputs = node.inputs.map(|&i| &graph.node(i).ty);
        let kernels = match work(&node.op, &inputs, &node.ty, weight_only[id.index()], at) {
            Some(w) => vec![(node.op.class(), w)],
            None => match split_prologue(&node.op, &inputs, &node.ty, at) {
                Some([norm, gemm]) => vec![(Class::Norm, norm), (Class::Gemm, gemm)],
                None => {
                    p.no_kernel.push(id);
                    continue;
                }
            },
        };
        for (class, w) in kernels.iter().filter(|k| k.1.launches > 0) {
            let ps = picoseconds(w, &at.device);
            p.by_class.entry(*class).or_default().add(w, ps);
            p.by_layer.entry(node.prov.layer).or_default().add(w, ps);
            p.total.add(w, ps);
        }
    }
    p.by_class
        .sort_by(|a, x, b, y| y.picoseconds.cmp(&x.picoseconds).then(a.cmp(b)));
    p.by_layer.sort_keys();
    p
}

/// A GEMM whose norm prologue no kernel takes at so many rows: lowering makes the norm a kernel of its own, which
/// writes what the GEMM then reads. Norm and GEMM.
fn split_prologue(
    op: &Op,
    inputs: &Operands<&Type>,
    output: &Type,
    at: &CostPoint,
) -> Option<[Work; 2]> {
    let Op::Gemm(spec) = op else {
        return None;
    };
    if spec.prologue == Prologue::None {
        return None;
    }
    let plain = Op::Gemm(Gemm {
        prologue: Prologue::None,
        ..*spec
    });
    let gemm = work(&plain, inputs, output, false, at)?;
    let x = inputs.get(gemm::X)?.as_tensor()?;
    // The GEMM's operands hold the gain, and a delta with its sum; what comes on top is x and what is written.
    let norm = Work {
        bytes: 2.0 * x.bytes(&at.env) as f64,
        vector: 4.0 * x.elements(&at.env) as f64,
        launches: 1,
        ..Work::default()
    };
    Some([norm, gemm])
}

/// Which nodes depend on weights and constants only, so that they are computed once, while
/// loading. The same rule as the e-graph's analysis.
pub fn weight_only(graph: &Graph) -> Vec<bool> {
    let mut only = vec![false; graph.nodes().len()];
    let mut konst = vec![false; graph.nodes().len()];
    for id in graph.ids() {
        let node = graph.node(id);
        let at = |i: &NodeId| only[i.index()];
        only[id.index()] = match &node.op {
            Op::Weight(_) | Op::Pack(_) => true,
            op if op.is_leaf() => false,
            Op::Get(_) | Op::Win(_) | Op::Select(Select) => false,
            _ => {
                node.inputs.iter().any(at) && node.inputs.iter().all(|i| at(i) || konst[i.index()])
            }
        };
        konst[id.index()] = match &node.op {
            Op::Const(_) => true,
            Op::Cast(_) | Op::Reshape(_) | Op::Expand(_) => konst[node.inputs[X].index()],
            Op::Unary(lathe_ir::UnaryFn::Neg) => konst[node.inputs[X].index()],
            _ => false,
        };
    }
    only
}

/// The kernels of each distinct layer, as `(layers, kernel names in order)`.
pub fn kernels_by_layer(graph: &Graph, at: &CostPoint) -> Vec<(Vec<Option<u32>>, Vec<String>)> {
    let weight_only = weight_only(graph);
    let mut layers: IndexMap<Option<u32>, Vec<String>> = IndexMap::new();
    for id in graph.ids() {
        let node = graph.node(id);
        let inputs = node.inputs.map(|&i| &graph.node(i).ty);
        let launches = work(&node.op, &inputs, &node.ty, weight_only[id.index()], at)
            .map_or(1, |w| w.launches);
        if launches > 0 {
            let name = kernel_name(&node.op);
            let name = if launches > 1 {
                format!("{name} (×{launches})")
            } else {
                name
            };
            layers.entry(node.prov.layer).or_default().push(name);
        }
    }
    layers.sort_keys();
    let mut groups: Vec<(Vec<Option<u32>>, Vec<String>)> = Vec::new();
    for (layer, kernels) in layers {
        match groups.iter_mut().find(|g| g.1 == kernels) {
            Some(g) => g.0.push(layer),
            None => groups.push((vec![layer], kernels)),
        }
    }
    groups
}
