//! Programs that exist, with a few things changed: an operation, a constant, an axis, an element type,
//! operands, casts, names. What comes out is well typed, and mostly wrong.

use crate::programs::build::NUMBERS;
use crate::rng::Rng;
use lathe_ir::ops::{Cast, Concat, Const, Expand, Input, Iota, Permute, Reduce, Reshape, Slice};
use lathe_ir::{
    BinaryFn, DType, Dim, Graph, NodeId, Op, Operands, Prov, Real, ReduceFn, Type, UnaryFn,
};

/// Attempts at one change before the program stays as it is.
const ATTEMPTS: usize = 40;

/// The program with so many changes.
pub(crate) fn mutate(graph: &Graph, changes: usize, rng: &mut Rng) -> Graph {
    let mut graph = graph.clone();
    for _ in 0..changes {
        for _ in 0..ATTEMPTS {
            if let Some(next) = change(&graph, rng) {
                graph = next;
                break;
            }
        }
    }
    graph.name = "fuzz".to_string();
    graph.without_dead()
}

/// A change of one node: what stands in its place.
enum Edit {
    /// Another operation on other operands.
    Op(Op, Operands<NodeId>),
    /// Another value.
    Value(NodeId),
    /// An operation after it.
    After(Vec<Op>),
}

fn change(graph: &Graph, rng: &mut Rng) -> Option<Graph> {
    let at = NodeId(rng.below(graph.nodes().len()) as u32);
    let edit = edit(graph, at, rng)?;
    apply(graph, at, edit)
}

fn edit(graph: &Graph, at: NodeId, rng: &mut Rng) -> Option<Edit> {
    let node = graph.node(at);
    let ty = graph.tensor(at)?;
    let same = |op: Op| Some(Edit::Op(op, node.inputs.clone()));
    match rng.below(12) {
        0..=5 => other_op(&node.op, rng).and_then(same),
        // Operands in another order, or one of them twice.
        6 => {
            let mut slots: Vec<NodeId> = node.inputs.iter().copied().collect();
            if slots.len() < 2 || !node.inputs.is_dense() {
                return None;
            }
            let (i, j) = (rng.below(slots.len()), rng.below(slots.len()));
            match rng.coin() {
                true => slots.swap(i, j),
                false => slots[i] = slots[j],
            }
            Some(Edit::Op(node.op.clone(), Operands::from(slots)))
        }
        // An operand of the same type instead of the value: the operation is gone.
        7 => {
            let fits = |i: &&NodeId| graph.node(**i).ty == node.ty;
            let all: Vec<NodeId> = node.inputs.iter().filter(fits).copied().collect();
            (!all.is_empty()).then(|| Edit::Value(rng.pick(&all)))
        }
        // Some earlier value of the same type.
        8 => {
            let fits = |i: &NodeId| *i < at && graph.node(*i).ty == node.ty;
            let all: Vec<NodeId> = graph.ids().filter(fits).collect();
            (!all.is_empty()).then(|| Edit::Value(rng.pick(&all)))
        }
        // Through another element type and back.
        9 => {
            let through = rng.pick(&DType::ALL);
            Some(Edit::After(vec![
                Cast(through).into(),
                Cast(ty.dtype).into(),
            ]))
        }
        10 => {
            let f = rng.pick(UnaryFn::ALL);
            Some(Edit::After(vec![f.into()]))
        }
        _ => {
            let k = ty.shape.len();
            if k < 2 {
                return None;
            }
            // Two axes of one extent change places.
            let (i, j) = (rng.below(k), rng.below(k));
            let mut perm: Vec<u8> = (0..k as u8).collect();
            perm.swap(i, j);
            (i != j && ty.shape[i] == ty.shape[j]).then(|| Edit::After(vec![Permute(perm).into()]))
        }
    }
}

fn other_op(op: &Op, rng: &mut Rng) -> Option<Op> {
    let near = |n: i64, rng: &mut Rng| n + rng.pick(&[-1, 1, 1, 2]);
    Some(match op {
        Op::Const(c) => Const {
            value: Real::new(match rng.below(3) {
                0 => rng.pick(&NUMBERS),
                1 => -c.value.get(),
                _ => c.value.get() * rng.pick(&[2.0, 0.5, 1.25]),
            }),
            ..c.clone()
        }
        .into(),
        Op::Unary(_) => rng.pick(UnaryFn::ALL).into(),
        Op::Binary(_) => rng.pick(BinaryFn::ALL).into(),
        Op::Cast(_) => Cast(rng.pick(&DType::ALL)).into(),
        Op::Iota(i) => Iota {
            len: match rng.one_in(3) {
                true => i.len + Dim::new(1),
                false => i.len,
            },
            dtype: rng.pick(&DType::ALL),
        }
        .into(),
        Op::Reduce(r) => match rng.below(3) {
            0 => Reduce {
                f: rng.pick(ReduceFn::ALL),
                ..*r
            },
            1 => Reduce {
                axis: rng.below(4) as u8,
                ..*r
            },
            _ => Reduce {
                keepdim: !r.keepdim,
                ..*r
            },
        }
        .into(),
        Op::Permute(Permute(perm)) => {
            let mut perm = perm.clone();
            let (i, j) = (rng.below(perm.len()), rng.below(perm.len()));
            perm.swap(i, j);
            Permute(perm).into()
        }
        Op::Slice(s) => {
            let by = near(0, rng);
            Slice {
                axis: s.axis,
                start: s.start + by,
                end: s.end + by,
            }
            .into()
        }
        Op::Concat(_) => Concat {
            axis: rng.below(4) as u8,
        }
        .into(),
        Op::Reshape(Reshape(shape)) => {
            let mut shape = shape.clone();
            let (i, j) = (rng.below(shape.len()), rng.below(shape.len()));
            if !shape.is_empty() {
                shape.swap(i, j);
            }
            Reshape(shape).into()
        }
        Op::Expand(Expand(shape)) => {
            let mut shape = shape.clone();
            let i = rng.below(shape.len());
            *shape.get_mut(i)? = rng.pick(&[Dim::new(1), Dim::new(2), Dim::new(3)]);
            Expand(shape).into()
        }
        Op::Input(i) => {
            let named = [
                "positions",
                "rows",
                "step.tokens",
                "step.positions",
                "x",
                "tokens",
            ];
            let name = rng.pick(&named).to_string();
            Input { name, ..i.clone() }.into()
        }
        Op::Weight(w) => {
            let mut w = w.clone();
            let names = ["model.layers.0.w", "model.w", "*"];
            match rng.coin() {
                true => w.weight.name = rng.pick(&names).to_string(),
                false => w.dtype = rng.pick(&[DType::F32, DType::BF16, DType::F16]),
            }
            w.into()
        }
        _ => return None,
    })
}

/// The program with a change; none where it is ill-typed.
fn apply(graph: &Graph, at: NodeId, edit: Edit) -> Option<Graph> {
    let mut out = Graph::new(&graph.name);
    let mut map: Vec<NodeId> = Vec::with_capacity(graph.nodes().len());
    for id in graph.ids() {
        let node = graph.node(id);
        let inputs = node.inputs.map(|i| map[i.index()]);
        let new = match &edit {
            Edit::Op(op, inputs) if id == at => {
                let inputs = inputs.map(|i| map[i.index()]);
                add(&mut out, op.clone(), inputs, &node.prov)?
            }
            Edit::Value(other) if id == at => map[other.index()],
            Edit::After(ops) if id == at => {
                let mut last = add(&mut out, node.op.clone(), inputs, &node.prov)?;
                for op in ops {
                    last = add(&mut out, op.clone(), [last].into(), &node.prov)?;
                }
                last
            }
            _ => add(&mut out, node.op.clone(), inputs, &node.prov)?,
        };
        map.push(new);
    }
    for (name, id) in graph.outputs() {
        let new = map[id.index()];
        // A model's results stay full sequences of floats.
        let (old_ty, new_ty) = (&graph.node(*id).ty, &out.node(new).ty);
        if name == "logits" && !similar(old_ty, new_ty) {
            return None;
        }
        out.set_output(name, new);
    }
    Some(out)
}

fn similar(a: &Type, b: &Type) -> bool {
    match (a.as_tensor(), b.as_tensor()) {
        (Some(a), Some(b)) => {
            a.rank() == b.rank() && a.shape[..2] == b.shape[..2] && b.dtype.is_float()
        }
        _ => false,
    }
}

/// Adds a node; a leaf that is there already is that one.
fn add(out: &mut Graph, op: Op, inputs: Operands<NodeId>, prov: &Prov) -> Option<NodeId> {
    if op.is_leaf()
        && let Some(at) = out.nodes().iter().position(|n| n.op == op)
    {
        return Some(NodeId(at as u32));
    }
    out.add(op, inputs, prov).ok()
}
