//! What the e-graph knows of each class: its type, constants, masks, and whether it depends on
//! weights or positions only.

use super::EGraph;
use super::bound::bound;
use super::constant::constant;
use super::lang::Lang;
use super::mask::{self, Fact, Operand};
use egg::{Analysis, DidMerge, Id};
use lathe_ir::Operands;
use lathe_ir::ops::Weight;
use lathe_ir::{Dim, Graph, Known, Op, Prov, Real, Sym, Type, infer};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Facts about one e-class.
#[derive(Clone, Debug)]
pub enum Data {
    /// A payload leaf.
    Payload(Op),
    /// A value.
    Value(Value),
    /// No value: what stands in the place of an absent operand.
    Absent,
}

/// Facts about a value.
#[derive(Clone, Debug)]
pub struct Value {
    /// Its type. All members of a class have the same.
    pub ty: Type,
    /// The value of all its elements, if they are one known constant.
    pub konst: Option<f64>,
    /// A number that no element's magnitude exceeds, if one is known.
    pub bound: Option<f64>,
    /// When it is known: what depends on weights and constants only is computed once, at load.
    pub known: Known,
    /// It is made of a weight that other operations read as it is, such as a tied embedding.
    pub shared: bool,
    /// What is known of it as a mask or index.
    pub fact: Option<Fact>,
    /// Where it comes from, if it was imported or stands for an imported value.
    pub prov: Option<Prov>,
    /// Where its operands come from: stands in for values that only rules made.
    pub near: Option<Prov>,
}

impl Value {
    /// Whether it is made of weights alone, so that it can be folded into another weight.
    pub fn is_loaded(&self) -> bool {
        self.known == Known::Loaded
    }

    /// Where the value comes from, or else its operands.
    pub fn origin(&self) -> Option<&Prov> {
        self.prov.as_ref().or(self.near.as_ref())
    }
}

/// Whether a step can have a value of these extents: it knows its rows, but neither whole
/// sequences nor their number.
pub fn is_step_shape(shape: &[Dim]) -> bool {
    shape
        .iter()
        .all(|d| d.coef(Sym::B) == 0 && d.coef(Sym::S) == 0)
}

/// What a rule takes for granted, because nothing in the program says otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assumption {
    /// No score of the attention exceeds this magnitude.
    pub scores_below: Real,
    /// What its hidden scores are filled with, taken for −∞.
    pub fill: Real,
    /// The module path of the mask.
    pub mask: String,
}

impl fmt::Display for Assumption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (below, fill, mask) = (self.scores_below, self.fill, &self.mask);
        write!(
            f,
            "no score exceeds {below}, so that {fill} of the mask {mask} hides it as −∞ would"
        )
    }
}

/// One application of a rule: for `explain`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The rule.
    pub rule: &'static str,
    /// The class that gained a form.
    pub class: Id,
    /// Name of the operation that was added.
    pub op: &'static str,
    /// What it rests on beside the program.
    pub assumes: Option<Assumption>,
}

/// The analysis with its log of applied rules.
#[derive(Clone, Debug, Default)]
pub struct TensorAnalysis {
    /// Every union made by a rule, in order.
    pub log: Vec<Applied>,
    /// Names of the weights that several operations read, one of them whole.
    pub shared: BTreeSet<String>,
    /// The attention, as its rows of a step, that has the KV cache of a layer.
    pub cached: BTreeMap<u32, Id>,
}

impl TensorAnalysis {
    /// Notes which weights of a graph are shared. Slices are no readers of the whole: the parts of a
    /// fused projection are laid out together again.
    pub fn note_shared(&mut self, graph: &Graph) {
        let users = graph.users();
        let mut readers: BTreeMap<&str, (usize, bool)> = BTreeMap::new();
        for id in graph.ids() {
            if let Op::Weight(Weight { weight, .. }) = &graph.node(id).op {
                let of = readers.entry(&weight.name).or_default();
                for &user in &users[id.index()] {
                    of.0 += 1;
                    of.1 |= !matches!(graph.node(user).op, Op::Slice(_));
                }
            }
        }
        let shared = readers.iter().filter(|(_, (n, whole))| *n > 1 && *whole);
        self.shared.extend(shared.map(|(name, _)| name.to_string()));
    }
}

impl Data {
    /// The value's facts.
    ///
    /// # Panics
    /// The class is a payload (invariant: operands of operations are values).
    pub fn value(&self) -> &Value {
        match self {
            Data::Value(v) => v,
            Data::Payload(op) => panic!("invariant: payload {op:?} used as a value"),
            Data::Absent => panic!("invariant: an absent operand used as a value"),
        }
    }

    /// The operation of a payload leaf.
    ///
    /// # Panics
    /// The class is a value (invariant: the first child of a payload operation is its payload).
    pub fn payload(&self) -> &Op {
        match self {
            Data::Payload(op) => op,
            Data::Value(v) => panic!("invariant: a value of type {:?} used as a payload", v.ty),
            Data::Absent => panic!("invariant: an absent operand used as a payload"),
        }
    }
}

/// The operation of an e-node that is not a payload.
pub fn op_of(egraph: &EGraph, node: &Lang) -> Op {
    match node {
        Lang::Payload(op) => op.clone(),
        Lang::Absent => panic!("invariant: an absent operand is no operation"),
        Lang::App(name, ch) => match Op::plain(name) {
            Some(op) => op,
            None => egraph[ch[0]].data.payload().clone(),
        },
    }
}

/// The operands of an e-node.
pub fn operands_of(egraph: &EGraph, node: &Lang) -> Operands<Id> {
    let present = |&id: &Id| !matches!(egraph[id].data, Data::Absent);
    Operands::of_slots((node.places().iter()).map(|id| Some(*id).filter(present)))
}

impl Analysis<Lang> for TensorAnalysis {
    type Data = Data;

    fn make(egraph: &mut EGraph, node: &Lang, _id: Id) -> Data {
        match node {
            Lang::Payload(op) => return Data::Payload(op.clone()),
            Lang::Absent => return Data::Absent,
            Lang::App(..) => {}
        }
        let op = op_of(egraph, node);
        let operands = operands_of(egraph, node).map(|&c| egraph[c].data.value());
        let ty = infer(&op, operands.map(|v| &v.ty))
            .unwrap_or_else(|e| panic!("invariant: rules add only well-typed terms: {e}"));
        let konst = constant(&op, &operands.map(|v| v.konst), &ty);
        let bound = bound(&op, &operands.map(|v| v.bound), konst);
        let known = Known::of(&op, operands.iter().map(|v| v.known), &ty);
        let shared = match &op {
            Op::Weight(Weight { weight, .. }) => egraph.analysis.shared.contains(&weight.name),
            _ => known == Known::Loaded && operands.iter().any(|v| v.shared),
        };
        let fact = fact(&op, &operands, &ty);
        // A projection is named after its weight, all else after its first operand in a layer.
        let near = operands
            .iter()
            .filter(|v| v.is_loaded())
            .find_map(|v| v.origin())
            .or_else(|| {
                let mut origins = operands.iter().filter_map(|v| v.origin());
                origins.find(|p| p.layer.is_some())
            })
            .or_else(|| operands.iter().find_map(|v| v.origin()))
            .cloned();
        Data::Value(Value {
            ty,
            konst,
            bound,
            known,
            shared,
            fact,
            prov: None,
            near,
        })
    }

    fn merge(&mut self, a: &mut Data, b: Data) -> DidMerge {
        match (a, b) {
            (Data::Payload(x), Data::Payload(y)) => {
                assert_eq!(*x, y, "invariant: payload leaves are never united");
                DidMerge(false, false)
            }
            (Data::Value(x), Data::Value(y)) => {
                assert_eq!(
                    x.ty, y.ty,
                    "invariant: a rule may unite only values of one type"
                );
                let konst = merge_option(&mut x.konst, y.konst);
                // Readers look at it when they are made: no reason to look at them again.
                x.bound = match (x.bound, y.bound) {
                    (Some(a), Some(b)) => Some(a.min(b)),
                    (a, b) => a.or(b),
                };
                let fact = merge_option(&mut x.fact, y.fact);
                let prov = merge_option(&mut x.prov, y.prov);
                let known = DidMerge(y.known > x.known, x.known > y.known);
                x.known = x.known.max(y.known);
                let shared = DidMerge(y.shared && !x.shared, x.shared && !y.shared);
                x.shared |= y.shared;
                // A stand-in is for readers only: no reason to look at the users again.
                if x.near.is_none() {
                    x.near = y.near;
                }
                konst | fact | prov | known | shared
            }
            (Data::Absent, Data::Absent) => DidMerge(false, false),
            _ => panic!("invariant: payload leaves are never united with values"),
        }
    }
}

fn merge_option<T: PartialEq>(a: &mut Option<T>, b: Option<T>) -> DidMerge {
    match (&a, &b) {
        (None, Some(_)) => {
            *a = b;
            DidMerge(true, false)
        }
        (Some(_), None) => DidMerge(false, true),
        _ => DidMerge(false, false),
    }
}

fn fact(op: &Op, x: &Operands<&Value>, ty: &Type) -> Option<Fact> {
    let shape = &ty.as_tensor()?.shape;
    let mut operands = Vec::with_capacity(x.len());
    for v in x {
        operands.push(Operand {
            fact: v.fact,
            konst: v.konst,
            shape: &v.ty.as_tensor()?.shape,
        });
    }
    mask::derive(op, &operands, shape)
}
