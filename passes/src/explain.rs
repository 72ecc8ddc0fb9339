//! What became of each imported value: which operation of a step program stands for it, which
//! rules led there, what else was possible and at what cost, and which rule nearly matched where
//! an operation stayed as it was.
//!
//! Everything here is plain data, so that dumps and `explain` need no e-graph. A value is named by
//! a number; equal numbers in different stages are equal values.

use crate::egraph::analysis::{Applied, Data, op_of};
use crate::egraph::convert::Choice;
use crate::egraph::extract::alternatives;
use crate::egraph::pattern::pattern;
use crate::egraph::{EGraph, Lang};
use crate::pipeline::Terms;
use crate::predict::weight_only;
use crate::rule::{Rule, Stage};
use crate::rules;
use egg::{ENodeOrVar, Id, Language, Pattern, RecExpr, Var};
use lathe_ir::ops::X;
use lathe_ir::{Graph, NodeId, Op, text};
use std::collections::{BTreeMap, BTreeSet};

/// The number of a value: its e-class when all stages have run.
pub type ValueNo = usize;

/// One form of a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Form {
    /// Name of the operation.
    pub op: &'static str,
    /// Its attributes as in the text form, e.g. `{axis=1}`; empty without.
    pub attrs: String,
    /// Its operands.
    pub operands: Vec<ValueNo>,
    /// Its own cost where the program is chosen, in picoseconds; `None` if nothing executes it there.
    pub own: Option<u64>,
    /// What the whole template would cost with this form and all else as it is.
    pub total: Option<u64>,
    /// The rules that gave the value a form of this operation; none if it was imported.
    pub rules: Vec<&'static str>,
    /// Whether the program has it.
    pub chosen: bool,
}

/// A value that a step program computes.
#[derive(Clone, Debug, PartialEq)]
pub struct ValueStory {
    /// Its type, as in the text form.
    pub ty: String,
    /// Its forms, the chosen one first, then by cost.
    pub forms: Vec<Form>,
}

/// A rule that was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The rule.
    pub rule: &'static str,
    /// Its stage.
    pub stage: Stage,
    /// The value that gained a form.
    pub value: ValueNo,
    /// The operation of the new form.
    pub op: &'static str,
}

/// A rule that nearly matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nearest {
    /// The rule.
    pub rule: &'static str,
    /// Operations of its pattern that were found, of how many.
    pub matched: (usize, usize),
    /// Where it failed: what the pattern wants and what is there instead, or that its condition
    /// does not hold.
    pub reason: String,
}

/// How one operation of a step program came about.
#[derive(Clone, Debug, PartialEq)]
pub struct OpStory {
    /// The operation's node in the template's program.
    pub node: NodeId,
    /// The values that it stands for: its own, and those that it makes unnecessary.
    pub values: Vec<ValueNo>,
    /// The imported nodes among them.
    pub imported: Vec<NodeId>,
    /// The rules on the way, in the order in which they applied.
    pub steps: Vec<Step>,
    /// For an operation that no rule lowered: the rule that came nearest.
    pub nearest: Option<Nearest>,
}

/// The history of one template.
#[derive(Clone, Debug, PartialEq)]
pub struct Story {
    /// The value of each imported node.
    pub imported: Vec<ValueNo>,
    /// The value of each node of the best term after each stage; empty where there is none.
    pub stages: Vec<Vec<ValueNo>>,
    /// The same of the stages' terms at the general point, for stages of step programs.
    pub general_stages: Vec<Vec<ValueNo>>,
    /// The decode program.
    pub decode: ProgramStory,
    /// The general program, if there is one.
    pub general: Option<ProgramStory>,
}

/// How one program of a template came about.
#[derive(Clone, Debug, PartialEq)]
pub struct ProgramStory {
    /// The value of each node of the program.
    pub nodes: Vec<ValueNo>,
    /// Every value that the program computes.
    pub values: BTreeMap<ValueNo, ValueStory>,
    /// Every operation of the program that computes something, in order.
    pub ops: Vec<OpStory>,
}

/// What a story is told from.
pub(crate) struct History<'a> {
    pub(crate) terms: &'a Terms,
    pub(crate) log: &'a [Applied],
    pub(crate) off: &'a BTreeSet<String>,
    /// The class of each imported node, as it was then.
    pub(crate) imported: &'a [Id],
    /// The class of each node of the best term after each stage, as it was then.
    pub(crate) stages: &'a [Vec<Id>],
    /// The same at the general point.
    pub(crate) general_stages: &'a [Vec<Id>],
}

/// A program with where its nodes come from.
pub(crate) struct Told<'a> {
    pub(crate) graph: &'a Graph,
    /// The class of each node.
    pub(crate) classes: &'a [Id],
    pub(crate) choice: &'a Choice,
    /// The cost of a form where the program was chosen.
    pub(crate) cost: &'a dyn Fn(Id, &Lang) -> u64,
}

impl History<'_> {
    fn egraph(&self) -> &EGraph {
        &self.terms.egraph
    }

    fn number(&self, id: Id) -> ValueNo {
        usize::from(self.egraph().find(id))
    }

    fn numbers(&self, ids: &[Id]) -> Vec<ValueNo> {
        ids.iter().map(|&id| self.number(id)).collect()
    }

    /// The story of a template with these programs.
    pub(crate) fn tell(&self, decode: &Told<'_>, general: Option<&Told<'_>>) -> Story {
        let numbered = |all: &[Vec<Id>]| all.iter().map(|s| self.numbers(s)).collect();
        Story {
            imported: self.numbers(self.imported),
            stages: numbered(self.stages),
            general_stages: numbered(self.general_stages),
            decode: self.program(decode),
            general: general.map(|g| self.program(g)),
        }
    }

    fn program(&self, told: &Told<'_>) -> ProgramStory {
        ProgramStory {
            nodes: self.numbers(told.classes),
            values: self.values(told.choice, told.cost),
            ops: self.ops(told.graph, told.classes),
        }
    }

    fn values(
        &self,
        choice: &Choice,
        cost: &dyn Fn(Id, &Lang) -> u64,
    ) -> BTreeMap<ValueNo, ValueStory> {
        let roots: Vec<Id> = self.terms.step.iter().map(|r| r.1).collect();
        let mut made: BTreeMap<(ValueNo, &str), Vec<&'static str>> = BTreeMap::new();
        for a in self.log {
            let rules = made.entry((self.number(a.class), a.op)).or_default();
            if !rules.contains(&a.rule) {
                rules.push(a.rule);
            }
        }
        let mut values = BTreeMap::new();
        for (id, all) in alternatives(self.egraph(), &roots, cost, choice) {
            let Data::Value(v) = &self.egraph()[id].data else {
                continue;
            };
            let forms = all.iter().filter_map(|a| {
                let op = a.node.name()?;
                let attrs: Vec<String> = text::attrs(&op_of(self.egraph(), &a.node))
                    .iter()
                    .map(|(k, v)| format!("{k}={v}"))
                    .collect();
                Some(Form {
                    op,
                    attrs: if attrs.is_empty() {
                        String::new()
                    } else {
                        format!("{{{}}}", attrs.join(", "))
                    },
                    operands: self.numbers(a.node.places()),
                    own: a.own,
                    total: a.total,
                    rules: made
                        .get(&(self.number(id), op))
                        .cloned()
                        .unwrap_or_default(),
                    chosen: a.chosen,
                })
            });
            let story = ValueStory {
                ty: text::format_type(&v.ty),
                forms: forms.collect(),
            };
            values.insert(self.number(id), story);
        }
        values
    }

    /// Each imported value is told with the first operation, in program order, whose value it is
    /// an ingredient of. Elements of tuples and views belong to what they look at.
    fn ops(&self, program: &Graph, classes: &[Id]) -> Vec<OpStory> {
        let computed: BTreeSet<ValueNo> = classes.iter().map(|&c| self.number(c)).collect();
        let mut home: BTreeMap<ValueNo, Vec<NodeId>> = BTreeMap::new();
        for (i, &class) in self.imported.iter().enumerate() {
            let node = NodeId(i as u32);
            home.entry(self.number(class)).or_default().push(node);
        }
        let mut owner: Vec<NodeId> = Vec::with_capacity(program.nodes().len());
        let mut told: BTreeSet<ValueNo> = BTreeSet::new();
        let mut parts: BTreeMap<NodeId, BTreeSet<ValueNo>> = BTreeMap::new();
        for id in program.ids() {
            let node = program.node(id);
            let by = match node.op {
                Op::Get(_) | Op::Reshape(_) => owner[node.inputs[X].index()],
                _ => id,
            };
            owner.push(by);
            let own = self.number(classes[id.index()]);
            let part = self.ingredients(own, &computed, &mut told);
            parts.entry(by).or_default().extend(part);
        }
        let mut ops = Vec::new();
        let loaded = weight_only(program);
        for (node, values) in parts {
            let op = &program.node(node).op;
            if op.is_leaf() || loaded[node.index()] || matches!(op, Op::Permute(_)) {
                continue;
            }
            let imported: BTreeSet<NodeId> = values
                .iter()
                .filter_map(|v| home.get(v))
                .flatten()
                .copied()
                .collect();
            let steps = self
                .log
                .iter()
                .filter(|a| values.contains(&self.number(a.class)))
                .filter_map(|a| {
                    Some(Step {
                        rule: a.rule,
                        stage: rules::by_name(a.rule)?.stage,
                        value: self.number(a.class),
                        op: a.op,
                    })
                })
                .collect();
            let lowered = matches!(op, Op::Gemm(_) | Op::AttnQkv(_) | Op::AddRms(_));
            let class = classes[node.index()];
            ops.push(OpStory {
                node,
                values: values.into_iter().collect(),
                imported: imported.into_iter().collect(),
                steps,
                nearest: if lowered {
                    None
                } else {
                    self.nearest(class, false)
                },
            });
        }
        ops
    }

    /// The values that a value can be made of, down to those that the program computes itself.
    fn ingredients(
        &self,
        value: ValueNo,
        computed: &BTreeSet<ValueNo>,
        told: &mut BTreeSet<ValueNo>,
    ) -> Vec<ValueNo> {
        let mut part = Vec::new();
        let mut stack = vec![value];
        while let Some(v) = stack.pop() {
            if (v != value && computed.contains(&v)) || !told.insert(v) {
                continue;
            }
            part.push(v);
            for node in &self.egraph()[Id::from(v)].nodes {
                stack.extend(node.places().iter().map(|&c| self.number(c)));
            }
        }
        part
    }

    /// The rule that came nearest to giving a class another form: of those that did not apply to
    /// it, the one whose pattern has the largest matching part.
    ///
    /// Rules before `kv_cache` saw the value of whole sequences; they are asked about that one, and
    /// only while none of them recognised it. With `windows`, the rules that give the rows of a
    /// step are asked instead: every value of a step program has such a form, so that they only
    /// tell something where there is no program.
    pub(crate) fn nearest(&self, class: Id, windows: bool) -> Option<Nearest> {
        let class = self.egraph().find(class);
        if windows {
            return self.nearest_of(&[class], &|r| is_window(r));
        }
        let step = |r: &Rule| r.stage >= Stage::KvCache && !is_window(r);
        let own = self.nearest_of(&[class], &step);
        let nodes = self.egraph()[class].nodes.iter();
        let mut whole: Vec<Id> = nodes
            .filter(|n| n.name() == Some("win"))
            .map(|n| self.egraph().find(n.place(X)))
            .collect();
        if whole.is_empty() {
            whole.push(class);
        }
        let recognised = |&c: &Id| {
            self.applied(c).iter().any(|name| {
                let stage = rules::by_name(name).map(|r| r.stage);
                matches!(stage, Some(Stage::Recognize | Stage::Attention))
            })
        };
        if whole.iter().any(recognised) {
            return own;
        }
        let earlier = self.nearest_of(&whole, &|r| r.stage < Stage::KvCache);
        match (own, earlier) {
            (Some(a), Some(b)) => Some(if b.better(&a) { b } else { a }),
            (a, b) => a.or(b),
        }
    }

    /// Names of the rules that gave a class a form.
    fn applied(&self, class: Id) -> BTreeSet<&'static str> {
        let of_class = |a: &&Applied| self.egraph().find(a.class) == class;
        self.log.iter().filter(of_class).map(|a| a.rule).collect()
    }

    fn nearest_of(&self, classes: &[Id], wanted: &dyn Fn(&Rule) -> bool) -> Option<Nearest> {
        let mut best: Option<Nearest> = None;
        for &class in classes {
            let applied = self.applied(class);
            for rule in rules::all() {
                if !wanted(rule) || applied.contains(rule.name) {
                    continue;
                }
                let parts = rule.lhs.iter();
                for near in parts.filter_map(|lhs| self.near(rule, lhs, class)) {
                    if best.as_ref().is_none_or(|b| near.better(b)) {
                        best = Some(near);
                    }
                }
            }
        }
        best
    }

    fn near(&self, rule: &Rule, lhs: &str, class: Id) -> Option<Nearest> {
        let pattern: Pattern<Lang> = pattern(lhs).ok()?;
        let ast = &pattern.ast;
        let root = Id::from(ast.as_ref().len() - 1);
        let found = self.match_part(ast, root, class, &BTreeMap::new());
        if found.matched == 0 {
            return None;
        }
        let wanted = operations(ast, root);
        let reason = match found.failure {
            _ if self.off.contains(rule.name) || self.off.contains(rule.stage.name()) => {
                "it is switched off".to_string()
            }
            Some(reason) => reason,
            None => format!(
                "its pattern matches, its condition does not hold: {}",
                rule.doc
            ),
        };
        Some(Nearest {
            rule: rule.name,
            matched: (found.matched, wanted),
            reason,
        })
    }

    /// Matches as much of a pattern as possible below a class.
    fn match_part(
        &self,
        ast: &RecExpr<ENodeOrVar<Lang>>,
        at: Id,
        class: Id,
        bound: &BTreeMap<Var, Id>,
    ) -> Part {
        let class = self.egraph().find(class);
        let mut start = Part {
            matched: 0,
            failure: None,
            bound: bound.clone(),
        };
        let wanted = match &ast[at] {
            ENodeOrVar::Var(v) => {
                let before = *start.bound.entry(*v).or_insert(class);
                if before != class {
                    start.failure = Some(format!(
                        "both {v} must be one value, but they are {} and {}",
                        self.described(before),
                        self.described(class)
                    ));
                }
                return start;
            }
            ENodeOrVar::ENode(Lang::Absent) => {
                if !matches!(self.egraph()[class].data, Data::Absent) {
                    start.failure = Some(format!(
                        "it wants an operand to be absent, found {}",
                        self.described(class)
                    ));
                }
                return start;
            }
            ENodeOrVar::ENode(n) => n,
        };
        let mut best: Option<Part> = None;
        for form in &self.egraph()[class].nodes {
            let fits = form.name() == wanted.name()
                && form.children().len() == wanted.children().len()
                && form.name().is_some();
            if !fits {
                continue;
            }
            let mut part = Part {
                matched: 1,
                ..start.clone()
            };
            for (&p, &c) in wanted.children().iter().zip(form.children()) {
                let inner = self.match_part(ast, p, c, &part.bound);
                part.matched += inner.matched;
                part.bound = inner.bound;
                part.failure = part.failure.or(inner.failure);
            }
            if best.as_ref().is_none_or(|b| part.better(b)) {
                best = Some(part);
            }
        }
        best.unwrap_or_else(|| {
            start.failure = Some(format!(
                "it wants {}, found {}",
                wanted.name().unwrap_or("a payload"),
                self.described(class)
            ));
            start
        })
    }

    /// The operations of a class, with where it comes from.
    fn described(&self, class: Id) -> String {
        let names: BTreeSet<&str> = self.egraph()[class]
            .nodes
            .iter()
            .filter_map(Lang::name)
            .collect();
        let names: Vec<&str> = names.into_iter().collect();
        let origin = match &self.egraph()[class].data {
            Data::Value(v) => v.origin(),
            _ => None,
        };
        match origin {
            Some(p) if !p.path.is_empty() => format!("{} ({})", names.join(" or "), p.path),
            _ => names.join(" or "),
        }
    }
}

impl Nearest {
    /// By the share of the pattern; of equal shares the larger pattern says more.
    fn better(&self, other: &Nearest) -> bool {
        let (x, y) = (self.matched, other.matched);
        (x.0 * y.1, x.0) > (y.0 * x.1, y.0)
    }
}

/// Operations of a pattern, those of shared parts as often as they are matched.
fn operations(ast: &RecExpr<ENodeOrVar<Lang>>, at: Id) -> usize {
    match &ast[at] {
        ENodeOrVar::Var(_) | ENodeOrVar::ENode(Lang::Absent) => 0,
        ENodeOrVar::ENode(n) => {
            let below: usize = n.children().iter().map(|&c| operations(ast, c)).sum();
            1 + below
        }
    }
}

/// Whether a rule is about the rows of one step of a value.
fn is_window(rule: &Rule) -> bool {
    rule.stage == Stage::KvCache && rule.lhs.iter().all(|lhs| lhs.starts_with("(win "))
}

/// How much of a pattern matched.
#[derive(Clone, Debug)]
struct Part {
    matched: usize,
    /// The first place that did not.
    failure: Option<String>,
    bound: BTreeMap<Var, Id>,
}

impl Part {
    fn better(&self, other: &Part) -> bool {
        let key = |p: &Part| (p.failure.is_none(), p.matched);
        key(self) > key(other)
    }
}
