//! The rule that nearly matched, and where it stopped.

use super::Nearest;
use crate::egraph::Lang;
use crate::egraph::analysis::{Applied, Data};
use crate::egraph::pattern::pattern;
use crate::pipeline::Terms;
use crate::rule::{Rule, Stage};
use crate::rules;
use egg::{ENodeOrVar, Id, Language, Pattern, RecExpr, Var};
use lathe_ir::ops::X;
use std::collections::{BTreeMap, BTreeSet};

/// Looks for the rules that did not apply to a value.
pub(crate) struct RuleSearch<'a> {
    terms: &'a Terms,
    off: &'a BTreeSet<String>,
}

impl<'a> RuleSearch<'a> {
    /// Looks through all terms of a template; `off` names the rules and stages that are switched off.
    pub(crate) fn new(terms: &'a Terms, off: &'a BTreeSet<String>) -> RuleSearch<'a> {
        RuleSearch { terms, off }
    }

    /// Of the rules that give the rows of a step, the one that came nearest for a window. It tells
    /// something only where there is no program: every value of a step program has such a form.
    pub(crate) fn nearest_window(&self, class: Id) -> Option<Nearest> {
        self.nearest_of(&[self.terms.egraph.find(class)], &|r| is_window(r))
    }

    /// The rule that came nearest to giving a class another form: of those that did not apply to
    /// it, the one whose pattern has the largest matching part.
    ///
    /// Rules before `kv_cache` saw the value of whole sequences; they are asked about that one, and
    /// only while none of them recognised it.
    pub(crate) fn nearest(&self, class: Id) -> Option<Nearest> {
        let egraph = &self.terms.egraph;
        let class = egraph.find(class);
        let step = |r: &Rule| r.stage >= Stage::KvCache && !is_window(r);
        let own = self.nearest_of(&[class], &step);
        let nodes = egraph[class].nodes.iter();
        let mut whole: Vec<Id> = nodes
            .filter(|n| n.name() == Some("win"))
            .map(|n| egraph.find(n.place(X)))
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
        let of_class = |a: &&Applied| self.terms.egraph.find(a.class) == class;
        self.terms
            .egraph
            .analysis
            .log
            .iter()
            .filter(of_class)
            .map(|a| a.rule)
            .collect()
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
        let class = self.terms.egraph.find(class);
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
                if !matches!(self.terms.egraph[class].data, Data::Absent) {
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
        for form in &self.terms.egraph[class].nodes {
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
        let names: BTreeSet<&str> = self.terms.egraph[class]
            .nodes
            .iter()
            .filter_map(Lang::name)
            .collect();
        let names: Vec<&str> = names.into_iter().collect();
        let origin = match &self.terms.egraph[class].data {
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
