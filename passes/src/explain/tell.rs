//! Telling the story of a template from its e-graph.

use super::{Form, OpStory, ProgramStory, RuleSearch, Step, Story, ValueNo, ValueStory};
use crate::egraph::analysis::{Applied, Data, op_of};
use crate::egraph::extract::alternatives;
use crate::egraph::{EGraph, Lang};
use crate::pipeline::{Term, Terms};
use crate::rules;
use egg::Id;
use lathe_ir::ops::X;
use lathe_ir::{Both, Known, NodeId, Op, text};
use std::collections::{BTreeMap, BTreeSet};

/// What a story is told from.
pub(crate) struct History<'a> {
    pub(crate) terms: &'a Terms,
    pub(crate) off: &'a BTreeSet<String>,
    /// The class of each imported node, as it was then.
    pub(crate) imported: &'a [Id],
    /// The class of each node of the best terms after each stage, as it was then.
    pub(crate) stages: &'a Both<Vec<Vec<Id>>>,
}

/// A program with where its nodes come from.
pub(crate) struct Told<'a> {
    pub(crate) term: &'a Term,
    /// The cost of a form where the program was chosen.
    pub(crate) cost: &'a dyn Fn(Id, &Lang) -> u64,
}

impl History<'_> {
    fn egraph(&self) -> &EGraph {
        &self.terms.egraph
    }

    fn log(&self) -> &[Applied] {
        &self.egraph().analysis.log
    }

    fn number(&self, id: Id) -> ValueNo {
        usize::from(self.egraph().find(id))
    }

    fn numbers(&self, ids: &[Id]) -> Vec<ValueNo> {
        ids.iter().map(|&id| self.number(id)).collect()
    }

    /// The story of a template with these programs.
    pub(crate) fn tell(&self, decode: &Told<'_>, general: Option<&Told<'_>>) -> Story {
        let numbered = |all: &Vec<Vec<Id>>| all.iter().map(|s| self.numbers(s)).collect();
        Story {
            imported: self.numbers(self.imported),
            stages: self.stages.as_ref().map(numbered),
            decode: self.program(decode),
            general: general.map(|g| self.program(g)),
        }
    }

    fn program(&self, told: &Told<'_>) -> ProgramStory {
        ProgramStory {
            nodes: self.numbers(&told.term.classes),
            values: self.values(told),
            ops: self.ops(told.term),
        }
    }

    fn values(&self, told: &Told<'_>) -> BTreeMap<ValueNo, ValueStory> {
        let roots: Vec<Id> = self.terms.step.iter().map(|r| r.1).collect();
        let mut made: BTreeMap<(ValueNo, &str), Vec<&'static str>> = BTreeMap::new();
        for a in self.log() {
            let rules = made.entry((self.number(a.class), a.op)).or_default();
            if !rules.contains(&a.rule) {
                rules.push(a.rule);
            }
        }
        let mut values = BTreeMap::new();
        for (id, all) in alternatives(self.egraph(), &roots, told.cost, &told.term.choice) {
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
    fn ops(&self, term: &Term) -> Vec<OpStory> {
        let (program, classes) = (&term.graph, &term.classes);
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
        let known = Known::of_graph(program);
        let search = RuleSearch::new(self.terms, self.off);
        for (node, values) in parts {
            let op = &program.node(node).op;
            if op.is_leaf() || known[node.index()].before_steps() || matches!(op, Op::Permute(_)) {
                continue;
            }
            let imported: BTreeSet<NodeId> = values
                .iter()
                .filter_map(|v| home.get(v))
                .flatten()
                .copied()
                .collect();
            let steps = self
                .log()
                .iter()
                .filter(|a| values.contains(&self.number(a.class)))
                .filter_map(|a| {
                    Some(Step {
                        rule: a.rule,
                        stage: rules::by_name(a.rule)?.stage,
                        value: self.number(a.class),
                        op: a.op,
                        assumes: a.assumes.clone(),
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
                nearest: (!lowered).then(|| search.nearest(class)).flatten(),
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
}
