//! Rewrite rules as data: name, stage, equation, exactness, patterns, action. Their samples are files.
//!
//! README.md beside this crate has the rules for writing rules.

use crate::egraph::analysis::{Applied, Assumption, Value, operands_of};
use crate::egraph::convert::add_op;
use crate::egraph::mask::Fact;
use crate::egraph::pattern::pattern;
use crate::egraph::{Data, EGraph, Lang, TensorAnalysis};
use egg::{Applier, Id, Pattern, PatternAst, Rewrite, Subst, Symbol, Var};
use lathe_ir::Operands;
use lathe_ir::ops::Reshape;
use lathe_ir::ops::Variant;
use lathe_ir::{Op, TensorType, infer};

/// The rulesets, in the order in which they run on one e-graph.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Stage {
    /// Spellings of the same thing get one form.
    Canonicalize,
    /// Softmax, RMSNorm, RoPE, repeat_kv, SiLU from their parts.
    Recognize,
    /// Attention with its modifiers.
    Attention,
    /// Full-sequence values become step values with a KV cache.
    KvCache,
    /// Packed projections, norms with residuals, prologues and epilogues.
    Fuse,
}

impl Stage {
    /// All stages in order.
    pub const ALL: [Stage; 5] = [
        Stage::Canonicalize,
        Stage::Recognize,
        Stage::Attention,
        Stage::KvCache,
        Stage::Fuse,
    ];

    /// The name in YAML, dumps and logs.
    pub fn name(self) -> &'static str {
        ["canonicalize", "recognize", "attention", "kv_cache", "fuse"][self as usize]
    }
}

/// How far the two sides of a rule may differ when they are computed in floating point.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Exactness {
    /// The same operations on the same numbers: equal to 1e-12 relative in f64.
    Exact,
    /// Equal over the reals, with another order of operations: 1e-9 relative in f64.
    Reassociates,
    /// Equal up to this relative tolerance.
    Approximate(f64),
}

impl Exactness {
    /// The relative tolerance of the rule's property test in f64.
    pub fn tolerance(self) -> f64 {
        match self {
            Exactness::Exact => 1e-12,
            Exactness::Reassociates => 1e-9,
            Exactness::Approximate(t) => t,
        }
    }
}

/// One rewrite rule. Rules are directed: the form on the right is one that some kernel or a later
/// rule prefers.
#[derive(Clone, Copy)]
pub struct Rule {
    /// Unique name, as in `transforms:` and `passes --explain`.
    pub name: &'static str,
    /// When it runs.
    pub stage: Stage,
    /// `left => right`, for readers.
    pub equation: &'static str,
    /// What it does to rounding.
    pub exactness: Exactness,
    /// Why it exists and what its condition guards against.
    pub doc: &'static str,
    /// Patterns of the left side: spellings of the same thing.
    pub lhs: &'static [&'static str],
    /// Checks the condition and adds the right side; `None` if the condition does not hold.
    pub rhs: fn(&mut Apply<'_>) -> Option<Id>,
}

impl std::fmt::Debug for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rule({}: {})", self.name, self.equation)
    }
}

impl Rule {
    /// The rule as rewrites for the e-graph, one a pattern.
    ///
    /// # Panics
    /// A pattern does not parse (a bug in the rule; every rule is built in a test).
    pub fn rewrites(&self) -> Vec<Rewrite<Lang, TensorAnalysis>> {
        self.lhs
            .iter()
            .enumerate()
            .map(|(spelling, lhs)| {
                let pattern: Pattern<Lang> = pattern(lhs)
                    .unwrap_or_else(|e| panic!("rule {}: pattern {lhs}: {e}", self.name));
                let applier = Action {
                    name: self.name,
                    rhs: self.rhs,
                    spelling,
                };
                Rewrite::new(format!("{}.{spelling}", self.name), pattern, applier)
                    .unwrap_or_else(|e| panic!("rule {}: {e}", self.name))
            })
            .collect()
    }
}

struct Action {
    name: &'static str,
    rhs: fn(&mut Apply<'_>) -> Option<Id>,
    spelling: usize,
}

impl Applier<Lang, TensorAnalysis> for Action {
    fn apply_one(
        &self,
        egraph: &mut EGraph,
        eclass: Id,
        subst: &Subst,
        _ast: Option<&PatternAst<Lang>>,
        _rule: Symbol,
    ) -> Vec<Id> {
        let mut changed = Vec::new();
        let mut apply = Apply {
            egraph,
            root: eclass,
            spelling: self.spelling,
            subst,
            united: Vec::new(),
            assumes: None,
        };
        let Some(new) = (self.rhs)(&mut apply) else {
            return changed;
        };
        let mut pairs = std::mem::take(&mut apply.united);
        let assumes = apply.assumes.take();
        pairs.push((eclass, new));
        // Operands of other extents may give the new form another type: then it is another value.
        let ty = |id: Id| &egraph[id].data.value().ty;
        if pairs.iter().any(|&(old, new)| ty(old) != ty(new)) {
            return changed;
        }
        for (old, new) in pairs {
            let op = egraph[new].nodes[0].name().unwrap_or("payload");
            if egraph.union(old, new) {
                egraph.analysis.log.push(Applied {
                    rule: self.name,
                    class: egraph.find(old),
                    op,
                    assumes: assumes.clone(),
                });
                changed.push(egraph.find(old));
            }
        }
        changed
    }
}

/// What a rule's right side sees: the matched variables and the e-graph.
pub struct Apply<'a> {
    egraph: &'a mut EGraph,
    /// The matched class.
    pub root: Id,
    /// Which pattern of the rule matched, as an index into its `lhs`.
    pub spelling: usize,
    subst: &'a Subst,
    united: Vec<(Id, Id)>,
    assumes: Option<Assumption>,
}

impl Apply<'_> {
    /// The class bound to a variable.
    ///
    /// # Panics
    /// The pattern has no such variable (a bug in the rule).
    pub fn id(&self, var: &str) -> Id {
        let v: Var = var.parse().expect("invariant: variables start with ?");
        self.subst[v]
    }

    /// The payload bound to a variable.
    pub fn op(&self, var: &str) -> Op {
        self.egraph[self.id(var)].data.payload().clone()
    }

    /// Says what the rule rests on beside the program.
    pub fn assume(&mut self, assumption: Assumption) {
        self.assumes = Some(assumption);
    }

    /// Gives the KV cache of a layer to the matched rows of an attention; false if the layer has another
    /// attention, which has it.
    pub fn claim_cache(&mut self, layer: u32) -> bool {
        let root = self.egraph.find(self.root);
        let cached = &mut self.egraph.analysis.cached;
        let of = *cached.entry(layer).or_insert(root);
        self.egraph.find(of) == root
    }

    /// Facts about a class.
    pub fn value(&self, id: Id) -> &Value {
        self.egraph[id].data.value()
    }

    /// The tensor type of a class.
    pub fn tensor(&self, id: Id) -> Option<TensorType> {
        self.value(id).ty.as_tensor().cloned()
    }

    /// The tensor type of a variable's class.
    pub fn ty(&self, var: &str) -> Option<TensorType> {
        self.tensor(self.id(var))
    }

    /// The value of a variable's class, if it is a known constant.
    pub fn konst(&self, var: &str) -> Option<f64> {
        self.value(self.id(var)).konst
    }

    /// What is known of a variable's class as a mask or index.
    pub fn fact(&self, var: &str) -> Option<Fact> {
        self.value(self.id(var)).fact
    }

    /// The class bound to a variable in the place of an operand that may be absent.
    pub fn opt(&self, var: &str) -> Option<Id> {
        let id = self.id(var);
        (!matches!(self.egraph[id].data, Data::Absent)).then_some(id)
    }

    /// The payload bound to a variable, if it is of this kind.
    pub fn payload<P: Variant>(&self, var: &str) -> Option<P> {
        P::of(self.egraph[self.id(var)].data.payload()).cloned()
    }

    /// Adds an operation, or returns `None` if it does not accept these operands.
    pub fn add(&mut self, op: impl Into<Op>, operands: impl Into<Operands<Id>>) -> Option<Id> {
        let (op, operands) = (op.into(), operands.into());
        infer(&op, operands.map(|&i| &self.egraph[i].data.value().ty)).ok()?;
        Some(add_op(self.egraph, &op, &operands))
    }

    /// A reshape, or the value itself if it has these extents already.
    pub fn reshape(&mut self, id: Id, shape: Vec<lathe_ir::Dim>) -> Option<Id> {
        if self.tensor(id)?.shape == shape {
            return Some(id);
        }
        self.add(Reshape(shape), [id])
    }

    /// Also unites two other classes when the rule applies (elements of a tuple).
    pub fn unite(&mut self, a: Id, b: Id) {
        self.united.push((a, b));
    }

    /// The operands of the first form of a class with this name, with the operation.
    pub fn form(&self, id: Id, name: &str) -> Option<(Op, Operands<Id>)> {
        let node = self.egraph[id]
            .nodes
            .iter()
            .find(|n| n.name() == Some(name))?;
        let op = crate::egraph::analysis::op_of(self.egraph, node);
        Some((op, operands_of(self.egraph, node)))
    }

    /// The operands of every form of a class with this name, with the operation.
    pub fn forms(&self, id: Id, name: &str) -> Vec<(Op, Operands<Id>)> {
        let nodes = self.egraph[id].nodes.iter();
        let named = nodes.filter(|n| n.name() == Some(name));
        let of = |node| {
            let op = crate::egraph::analysis::op_of(self.egraph, node);
            (op, operands_of(self.egraph, node))
        };
        named.map(of).collect()
    }

    /// Whether two variables are the same class.
    pub fn same(&self, a: Id, b: Id) -> bool {
        self.egraph.find(a) == self.egraph.find(b)
    }
}
