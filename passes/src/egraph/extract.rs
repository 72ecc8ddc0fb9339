//! Choosing one form of each e-class so that the whole program is cheapest.
//!
//! A shared value is paid once: costs are those of the DAG, not of the tree, because each
//! residual add doubles the tree. First a greedy pass keeps for each class the form
//! whose set of needed classes is cheapest; then single classes, and the parts of one tuple
//! together, are switched as long as the whole gets cheaper. Tests hold the result against the
//! exact optimum of an integer program.

use super::analysis::{Data, is_step_shape, op_of, operands_of};
use super::convert::Choice;
use super::cost::{CostPoint, INFINITE, op_cost};
use super::lang::Lang;
use super::{EGraph, analysis::Value};
use crate::walk::{Reads, depth_first};
use egg::{Id, Language};
use fixedbitset::FixedBitSet;
use petgraph::visit::{Control, Dfs, DfsEvent, Visitable};
use std::iter::Copied;
use thiserror::Error;

/// The chosen forms with their cost.
#[derive(Clone, Debug)]
pub struct Extraction {
    /// The form of each class that a root needs (and of others that were considered).
    pub choice: Choice,
    /// Cost of the program in picoseconds.
    pub cost: u64,
}

/// No executable form exists.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("no executable form of {op} ({path}{layer}): {reason}", layer = layer.map(|l| format!(", layer {l}")).unwrap_or_default())]
pub struct ExtractError {
    /// The innermost operation without an executable form.
    pub op: String,
    /// Hugging Face module path of the value.
    pub path: String,
    /// Decoder layer of the value.
    pub layer: Option<u32>,
    /// What blocks it.
    pub reason: String,
    /// The e-class without an executable form.
    pub class: Id,
}

/// The cost of an e-node at a point; payload leaves are free.
pub fn node_cost(egraph: &EGraph, id: Id, node: &Lang, at: &CostPoint) -> u64 {
    if let Lang::Payload(_) | Lang::Absent = node {
        return 0;
    }
    let op = op_of(egraph, node);
    let inputs = operands_of(egraph, node).map(|&c| &egraph[c].data.value().ty);
    let value: &Value = egraph[id].data.value();
    op_cost(&op, &inputs, &value.ty, value.known, at)
}

struct Problem<'a> {
    egraph: &'a EGraph,
    /// Classes in id order.
    classes: Vec<Id>,
    /// Forms of each class: cost, child classes as indices, the node.
    forms: Vec<Vec<(u64, Vec<usize>, &'a Lang)>>,
}

/// A set of classes with the cost of the forms chosen in it.
#[derive(Clone)]
struct CostSet {
    classes: FixedBitSet,
    total: u64,
}

/// Chooses the cheapest program for the roots under a cost of e-nodes.
///
/// # Errors
/// Some root has no form of finite cost: the error names the innermost value that blocks it.
pub fn extract(
    egraph: &EGraph,
    roots: &[Id],
    cost: &dyn Fn(Id, &Lang) -> u64,
) -> Result<Extraction, ExtractError> {
    let problem = Problem::new(egraph, cost);
    let roots: Vec<usize> = roots.iter().map(|&r| problem.index(r)).collect();
    let mut pick = problem.greedy();
    for &r in &roots {
        if pick[r].is_none() {
            return Err(problem.blame(&pick, r));
        }
    }
    let cost = problem.improve(&mut pick, &roots);
    let mut choice = Choice::new();
    for (i, form) in pick.iter().enumerate() {
        if let Some(f) = form {
            choice.insert(problem.classes[i], problem.forms[i][*f].2.clone());
        }
    }
    Ok(Extraction { choice, cost })
}

/// A form that a value could have.
#[derive(Clone, Debug)]
pub struct Alternative {
    /// The form.
    pub node: Lang,
    /// Its own cost in picoseconds; `None` if it has no kernel at this point.
    pub own: Option<u64>,
    /// What the whole program would cost with this form and all else as it is; `None` if that
    /// cannot be executed.
    pub total: Option<u64>,
    /// Whether it was chosen.
    pub chosen: bool,
}

/// For every class that a program needs, all forms with what they would cost, cheapest first.
///
/// # Panics
/// The choice does not come from [`extract`] with these arguments.
pub fn alternatives(
    egraph: &EGraph,
    roots: &[Id],
    cost: &dyn Fn(Id, &Lang) -> u64,
    choice: &Choice,
) -> indexmap::IndexMap<Id, Vec<Alternative>> {
    let problem = Problem::new(egraph, cost);
    let roots: Vec<usize> = roots.iter().map(|&r| problem.index(r)).collect();
    let mut pick: Vec<Option<usize>> = problem
        .classes
        .iter()
        .zip(&problem.forms)
        .map(|(id, forms)| {
            let chosen = choice.get(id)?;
            forms.iter().position(|(_, _, n)| *n == chosen)
        })
        .collect();
    let program = pick.clone();
    let reads = problem.reads(&program);
    let mut walk = Dfs::from_parts(roots.clone(), reads.visit_map());
    let mut out = indexmap::IndexMap::new();
    while let Some(c) = walk.next(&reads) {
        let chosen = pick[c].expect("invariant: a chosen program is complete");
        let mut all: Vec<Alternative> = Vec::new();
        for (f, (own, _, node)) in problem.forms[c].iter().enumerate() {
            pick[c] = Some(f);
            all.push(Alternative {
                node: (*node).clone(),
                own: Some(*own),
                total: problem.total(&pick, &roots),
                chosen: f == chosen,
            });
        }
        pick[c] = Some(chosen);
        all.sort_by_key(|a| (!a.chosen, a.total.unwrap_or(u64::MAX)));
        let id = problem.classes[c];
        for node in &egraph[id].nodes {
            if !problem.forms[c].iter().any(|(_, _, n)| *n == node) {
                all.push(Alternative {
                    node: node.clone(),
                    own: None,
                    total: None,
                    chosen: false,
                });
            }
        }
        out.insert(id, all);
    }
    out
}

impl<'a> Problem<'a> {
    fn new(egraph: &'a EGraph, cost: &dyn Fn(Id, &Lang) -> u64) -> Problem<'a> {
        let mut classes: Vec<Id> = egraph.classes().map(|c| c.id).collect();
        classes.sort();
        let mut problem = Problem {
            egraph,
            classes,
            forms: Vec::new(),
        };
        for &id in &problem.classes {
            let mut forms: Vec<(u64, Vec<usize>, &Lang)> = egraph[id]
                .nodes
                .iter()
                .filter_map(|n| {
                    let c = cost(id, n);
                    let ch = n.children().iter().map(|&c| problem.index(c)).collect();
                    (c < INFINITE).then_some((c, ch, n))
                })
                .collect();
            forms.sort_by(|a, b| (a.0, &a.1, a.2).cmp(&(b.0, &b.1, b.2)));
            problem.forms.push(forms);
        }
        problem
    }

    fn index(&self, id: Id) -> usize {
        self.classes
            .binary_search(&self.egraph.find(id))
            .expect("invariant: canonical ids are classes")
    }

    /// Bottom-up choice by cost sets, iterated until nothing gets cheaper.
    fn greedy(&self) -> Vec<Option<usize>> {
        let n = self.classes.len();
        let mut pick: Vec<Option<usize>> = vec![None; n];
        let mut sets: Vec<Option<CostSet>> = vec![None; n];
        let mut parents: Vec<Vec<usize>> = vec![Vec::new(); n];
        for (i, forms) in self.forms.iter().enumerate() {
            for (_, ch, _) in forms {
                for &c in ch {
                    parents[c].push(i);
                }
            }
        }
        for p in &mut parents {
            p.dedup();
        }
        let mut queue: std::collections::BTreeSet<usize> = (0..n).collect();
        while let Some(i) = queue.pop_first() {
            let mut best: Option<(CostSet, usize)> = None;
            for (f, (own, ch, _)) in self.forms[i].iter().enumerate() {
                let Some(set) = self.union(i, *own, ch, &pick, &sets) else {
                    continue;
                };
                if best.as_ref().is_none_or(|(b, _)| set.total < b.total) {
                    best = Some((set, f));
                }
            }
            let Some((set, f)) = best else { continue };
            let better = sets[i].as_ref().is_none_or(|old| set.total < old.total);
            if better {
                sets[i] = Some(set);
                pick[i] = Some(f);
                queue.extend(parents[i].iter().copied());
            }
        }
        pick
    }

    fn union(
        &self,
        i: usize,
        own: u64,
        children: &[usize],
        pick: &[Option<usize>],
        sets: &[Option<CostSet>],
    ) -> Option<CostSet> {
        let mut classes = FixedBitSet::with_capacity(self.classes.len());
        for &c in children {
            let set = sets[c].as_ref()?;
            if set.classes.contains(i) {
                return None;
            }
            classes.union_with(&set.classes);
        }
        let mut total = own;
        for c in classes.ones() {
            total += self.forms[c][pick[c]?].0;
        }
        classes.insert(i);
        Some(CostSet { classes, total })
    }

    /// Cost of the program under the roots, or `None` if a form is missing or the choice cyclic.
    fn total(&self, pick: &[Option<usize>], roots: &[usize]) -> Option<u64> {
        let mut total = 0;
        let roots = roots.iter().copied();
        let complete = depth_first(&self.reads(pick), roots, |event| match event {
            DfsEvent::Discover(c, _) => {
                total += self.forms[c][pick[c].ok_or(())?].0;
                Ok(Control::Continue)
            }
            DfsEvent::BackEdge(..) => Err(()),
            _ => Ok(Control::Continue),
        });
        complete.ok().map(|()| total)
    }

    /// The program of a choice: each class reads what its form reads.
    fn reads<'p>(
        &'p self,
        pick: &'p [Option<usize>],
    ) -> Reads<impl Fn(usize) -> Copied<std::slice::Iter<'p, usize>>> {
        Reads::new(self.classes.len(), |c| {
            let children = pick[c].map_or(&[][..], |f| &self.forms[c][f].1);
            children.iter().copied()
        })
    }

    /// Switches forms as long as the program gets cheaper; returns its cost.
    fn improve(&self, pick: &mut [Option<usize>], roots: &[usize]) -> u64 {
        let mut best = self
            .total(pick, roots)
            .expect("invariant: the greedy choice is complete");
        let moves = self.moves();
        loop {
            let before = best;
            for m in &moves {
                let old: Vec<(usize, Option<usize>)> =
                    m.iter().map(|&(c, _)| (c, pick[c])).collect();
                for &(c, f) in m {
                    pick[c] = Some(f);
                }
                match self.total(pick, roots) {
                    Some(t) if t < best => best = t,
                    _ => {
                        for (c, f) in old {
                            pick[c] = f;
                        }
                    }
                }
            }
            if best == before {
                return best;
            }
        }
    }

    /// Single switches, for each tuple the switch of all classes that are its elements, and every
    /// pair of forms of two classes that are elements of one tuple: leaving a tuple pays off only
    /// when nothing is left to read from it.
    fn moves(&self) -> Vec<Vec<(usize, usize)>> {
        let mut moves = Vec::new();
        let mut parts: std::collections::BTreeMap<usize, Vec<(usize, usize)>> =
            std::collections::BTreeMap::new();
        for (c, forms) in self.forms.iter().enumerate() {
            if forms.len() < 2 {
                continue;
            }
            for (f, (_, children, node)) in forms.iter().enumerate() {
                moves.push(vec![(c, f)]);
                if node.name() == Some("get") {
                    parts.entry(children[1]).or_default().push((c, f));
                }
            }
        }
        let mut pairs = std::collections::BTreeSet::new();
        for p in parts.values() {
            for (i, &(a, _)) in p.iter().enumerate() {
                pairs.extend(
                    p[i + 1..]
                        .iter()
                        .map(|&(b, _)| (a, b))
                        .filter(|(a, b)| a != b),
                );
            }
        }
        moves.extend(parts.into_values().filter(|p| p.len() > 1));
        for (a, b) in pairs {
            for f in 0..self.forms[a].len() {
                moves.extend((0..self.forms[b].len()).map(|g| vec![(a, f), (b, g)]));
            }
        }
        moves
    }

    /// Walks down from a class without a form to the innermost value that blocks it.
    fn blame(&self, pick: &[Option<usize>], root: usize) -> ExtractError {
        let mut at = root;
        let mut seen = vec![false; self.classes.len()];
        loop {
            seen[at] = true;
            let id = self.classes[at];
            // A form with a finite cost of its own is blocked by one of its operands.
            let next = self.forms[at]
                .iter()
                .flat_map(|(_, ch, _)| ch)
                .copied()
                .find(|&c| pick[c].is_none() && !seen[c]);
            if let Some(n) = next {
                at = n;
                continue;
            }
            // Otherwise its only forms have no kernel: look through a window at what it shows.
            let node = &self.egraph[id].nodes[0];
            let inner = node.places().first().map(|&c| self.index(c));
            let shown = inner.map_or(id, |c| self.classes[c]);
            let names: Vec<&str> = self.egraph[shown]
                .nodes
                .iter()
                .filter_map(Lang::name)
                .collect();
            let prov = match &self.egraph[shown].data {
                Data::Value(v) => v.origin().cloned(),
                Data::Payload(_) | Data::Absent => None,
            };
            let op = node.name().unwrap_or("payload");
            let whole = match &self.egraph[id].data {
                Data::Value(v) => v.ty.as_tensor().is_some_and(|t| !is_step_shape(&t.shape)),
                Data::Payload(_) | Data::Absent => false,
            };
            return ExtractError {
                class: id,
                op: op.to_string(),
                path: prov.as_ref().map_or(String::new(), |p| p.path.to_string()),
                layer: prov.and_then(|p| p.layer),
                reason: match op {
                    "win" => format!(
                        "the rows of one step cannot be computed from those of earlier steps through {}",
                        names.join(" or ")
                    ),
                    "sdpa" => format!(
                        "its scores have an unknown modifier; they are {}",
                        names.join(" or ")
                    ),
                    _ if whole => {
                        "it is of whole sequences, which a step does not have".to_string()
                    }
                    _ => format!("no kernel at this size; forms: {}", names.join(", ")),
                },
            };
        }
    }
}
