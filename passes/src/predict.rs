//! What a program will cost on a device, before it exists: kernels, traffic and roofline time of
//! each kind of operation, per layer and in all.

use crate::egraph::cost::{CostPoint, Work, picoseconds, work};
use indexmap::IndexMap;
use lathe_ir::ops::{Gemm, gemm};
use lathe_ir::{Class, Graph, Known, NodeId, Op, Operands, Prologue, Type};

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
    let known = Known::of_graph(graph);
    let mut p = Prediction::default();
    for id in graph.ids() {
        let node = graph.node(id);
        let inputs = node.inputs.map(|&i| &graph.node(i).ty);
        let kernels = match work(&node.op, &inputs, &node.ty, known[id.index()], at) {
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
    let gemm = work(&plain, inputs, output, Known::InStep, at)?;
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

/// The kernels of each distinct layer, as `(layers, kernel names in order)`.
pub fn kernels_by_layer(graph: &Graph, at: &CostPoint) -> Vec<(Vec<Option<u32>>, Vec<String>)> {
    let known = Known::of_graph(graph);
    let mut layers: IndexMap<Option<u32>, Vec<String>> = IndexMap::new();
    for id in graph.ids() {
        let node = graph.node(id);
        let inputs = node.inputs.map(|&i| &graph.node(i).ty);
        let launches =
            work(&node.op, &inputs, &node.ty, known[id.index()], at).map_or(1, |w| w.launches);
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
