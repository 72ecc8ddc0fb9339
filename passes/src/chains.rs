//! Grouping pointwise operations and row reductions of a chosen program into chains.
//!
//! Runs on the result of extraction, because there is nothing to choose: every operation that may
//! join a chain does. Which operations those are is a matter of types alone ([`lathe_ir::chain`]);
//! no model is known here. Switched off with the stage `fuse` or by its own name, [`NAME`].
//!
//! Two operations belong together if one reads the other, both work on the same domain, and
//! nothing outside the chain stands between them. The last is decided on an order of units (chains
//! and single operations) that stays topological: a path from the earlier to the later of two
//! units can only lead through units between them.

use lathe_ir::Operands;
use lathe_ir::chain::{self, Access, ChainArg, ChainOp, MAX_STATEMENTS, Statement, access};
use lathe_ir::ops::{Const, Get};
use lathe_ir::{Chain, Dim, Graph, Known, NodeId, Op, Prov, TypeError};
use std::collections::BTreeMap;

/// The name under which chains are switched off.
pub const NAME: &str = "chains";

/// Most operands in memory: each is a pointer of the kernel.
const MAX_OPERANDS: usize = 10;
/// Most results.
const MAX_RESULTS: usize = 6;
/// Most operations of one chain that reduce rows: each costs a pass over the row.
const MAX_REDUCTIONS: usize = 4;
/// Longest row that one block of threads reduces.
const MAX_ROW: i64 = 16384;

/// The program with its chains as single operations.
///
/// # Errors
/// A chain is ill-typed, which would be a bug.
pub fn fuse_chains(graph: &Graph) -> Result<Graph, TypeError> {
    let mut g = Grouping::new(graph);
    for id in graph.ids() {
        g.join(id);
    }
    g.rebuild()
}

/// Operations that run together; alone, an operation is a unit too.
#[derive(Clone, Debug)]
struct Unit {
    members: Vec<NodeId>,
    /// The extents that a chain works on; `None` for what joins none.
    domain: Option<Vec<Dim>>,
}

struct Grouping<'a> {
    graph: &'a Graph,
    users: Vec<Vec<NodeId>>,
    units: Vec<Unit>,
    /// The unit of each node.
    unit: Vec<usize>,
    /// Units in an order in which each can run after those before it.
    order: Vec<usize>,
    /// The place of each unit in the order.
    place: Vec<usize>,
}

impl<'a> Grouping<'a> {
    fn new(graph: &'a Graph) -> Grouping<'a> {
        let n = graph.nodes().len();
        let known = Known::of_graph(graph);
        let units = graph
            .ids()
            .map(|id| Unit {
                members: vec![id],
                domain: if known[id.index()].before_steps() {
                    None
                } else {
                    own_domain(graph, id)
                },
            })
            .collect();
        Grouping {
            graph,
            users: graph.users(),
            units,
            unit: (0..n).collect(),
            order: (0..n).collect(),
            place: (0..n).collect(),
        }
    }

    /// Puts an operation into one chain with the operations that it reads, where that is possible.
    fn join(&mut self, id: NodeId) {
        if self.units[self.unit[id.index()]].domain.is_none() {
            return;
        }
        for &operand in &self.graph.node(id).inputs {
            let (a, b) = (self.unit[operand.index()], self.unit[id.index()]);
            if a == b {
                continue;
            }
            // Merging moves chains about, but what is read always stands first.
            let (a, b) = if self.place[a] < self.place[b] {
                (a, b)
            } else {
                (b, a)
            };
            if let Some(domain) = self.common_domain(a, b)
                && self.fits(a, b, &domain)
            {
                self.merge(a, b, domain);
            }
        }
    }

    /// The domain of two units as one: equal, or one of them has a value a row of the other.
    fn common_domain(&self, a: usize, b: usize) -> Option<Vec<Dim>> {
        let (x, y) = (
            self.units[a].domain.as_ref()?,
            self.units[b].domain.as_ref()?,
        );
        if x == y || access(y, x) == Some(Access::Row) {
            return Some(x.clone());
        }
        (access(x, y) == Some(Access::Row)).then(|| y.clone())
    }

    /// Whether two units may be one chain, apart from what stands between them.
    fn fits(&self, a: usize, b: usize, domain: &[Dim]) -> bool {
        let members: Vec<NodeId> = self.units[a]
            .members
            .iter()
            .chain(&self.units[b].members)
            .copied()
            .collect();
        let inside = |id: &NodeId| [a, b].contains(&self.unit[id.index()]);
        let mut operands = Vec::new();
        let (mut reductions, mut results) = (0, 0);
        for &m in &members {
            let node = self.graph.node(m);
            reductions += usize::from(ChainOp::of(&node.op).is_some_and(|op| op.reduces_rows()));
            results += usize::from(self.is_read_outside(m, &inside));
            for i in node
                .inputs
                .iter()
                .filter(|i| !inside(i) && !self.is_const(**i))
            {
                let lies = self
                    .graph
                    .tensor(*i)
                    .is_some_and(|t| access(&t.shape, domain).is_some());
                if !lies {
                    return false;
                }
                if !operands.contains(i) {
                    operands.push(*i);
                }
            }
        }
        let row = domain.last().and_then(|d| d.known()).unwrap_or(i64::MAX);
        members.len() <= MAX_STATEMENTS
            && operands.len() <= MAX_OPERANDS
            && (1..=MAX_RESULTS).contains(&results)
            && reductions <= MAX_REDUCTIONS
            && (reductions == 0 || row <= MAX_ROW)
    }

    fn is_const(&self, id: NodeId) -> bool {
        matches!(self.graph.node(id).op, Op::Const(_))
    }

    fn is_read_outside(&self, id: NodeId, inside: &impl Fn(&NodeId) -> bool) -> bool {
        self.users[id.index()].iter().any(|u| !inside(u))
            || self.graph.outputs().iter().any(|(_, o)| *o == id)
    }

    /// Makes one unit of `a` and the later `b`, unless something between them needs `a` and is
    /// needed by `b`.
    fn merge(&mut self, a: usize, b: usize, domain: Vec<Dim>) {
        let (first, last) = (self.place[a], self.place[b]);
        let mut after = vec![false; last - first + 1];
        after[0] = true;
        for at in first + 1..=last {
            let reads = self.units[self.order[at]].members.iter().any(|m| {
                self.graph.node(*m).inputs.iter().any(|i| {
                    let place = self.place[self.unit[i.index()]];
                    (first..at).contains(&place)
                        && after[place - first]
                        && !(at == last && place == first)
                })
            });
            after[at - first] = reads;
        }
        if after[last - first] {
            return;
        }
        let (mut before, mut behind) = (Vec::new(), vec![a]);
        for at in first + 1..last {
            match after[at - first] {
                false => before.push(self.order[at]),
                true => behind.push(self.order[at]),
            }
        }
        // The place of `b` stays empty.
        let window = before.into_iter().chain(behind).chain([b]);
        for (at, u) in (first..).zip(window) {
            self.order[at] = u;
            self.place[u] = at;
        }
        let members = std::mem::take(&mut self.units[b].members);
        for m in &members {
            self.unit[m.index()] = a;
        }
        self.units[b].domain = None;
        let unit = &mut self.units[a];
        unit.members.extend(members);
        unit.members.sort_unstable();
        unit.domain = Some(domain);
    }

    fn rebuild(&self) -> Result<Graph, TypeError> {
        let mut out = Graph::new(&self.graph.name);
        let mut map: Vec<NodeId> = vec![NodeId(0); self.graph.nodes().len()];
        for &u in &self.order {
            match &self.units[u].members[..] {
                [] => {}
                &[id] => {
                    let node = self.graph.node(id);
                    let inputs = node.inputs.map(|i| map[i.index()]);
                    map[id.index()] = out.add(node.op.clone(), inputs, &node.prov)?;
                }
                members => self.add_chain(u, members, &mut out, &mut map)?,
            }
        }
        for (name, id) in self.graph.outputs() {
            out.set_output(name, map[id.index()]);
        }
        Ok(out.without_dead())
    }

    fn add_chain(
        &self,
        unit: usize,
        members: &[NodeId],
        out: &mut Graph,
        map: &mut [NodeId],
    ) -> Result<(), TypeError> {
        let mut operands: Vec<NodeId> = Vec::new();
        let mut statement: BTreeMap<NodeId, u8> = BTreeMap::new();
        let mut statements = Vec::with_capacity(members.len());
        for (at, &m) in members.iter().enumerate() {
            let node = self.graph.node(m);
            let mut args = Vec::with_capacity(node.inputs.len());
            for i in &node.inputs {
                args.push(match (statement.get(i), &self.graph.node(*i).op) {
                    (Some(&s), _) => ChainArg::Value(s),
                    (None, Op::Const(Const { value, dtype })) => ChainArg::Const {
                        value: *value,
                        dtype: *dtype,
                    },
                    _ => {
                        let at = operands.iter().position(|o| o == i).unwrap_or_else(|| {
                            operands.push(*i);
                            operands.len() - 1
                        });
                        ChainArg::Operand(at as u8)
                    }
                });
            }
            statement.insert(m, at as u8);
            let op = ChainOp::of(&node.op).expect("invariant: members of chains are chainable");
            statements.push(Statement { op, args });
        }
        let inside = |id: &NodeId| self.unit[id.index()] == unit;
        let read: Vec<NodeId> = members
            .iter()
            .copied()
            .filter(|m| self.is_read_outside(*m, &inside))
            .collect();
        let results = read.iter().map(|m| statement[m]).collect();
        let chain = Chain {
            statements,
            results,
        };
        let inputs: Operands<NodeId> = operands.iter().map(|i| map[i.index()]).collect();
        let prov = self.prov(members);
        let id = out.add(chain, inputs, &prov)?;
        for (i, m) in read.iter().enumerate() {
            map[m.index()] = match read.len() {
                1 => id,
                _ => out.add(Get(i as u8), [id], &self.graph.node(*m).prov)?,
            };
        }
        Ok(())
    }

    /// A chain over the end of one layer and the start of the next belongs to the next.
    fn prov(&self, members: &[NodeId]) -> Prov {
        let last = members.last().expect("invariant: a chain has members");
        self.graph.node(*last).prov.clone()
    }
}

/// The domain of an operation that may join a chain.
fn own_domain(graph: &Graph, id: NodeId) -> Option<Vec<Dim>> {
    let node = graph.node(id);
    let op =
        ChainOp::of(&node.op).filter(|_| graph.tensor(id).is_some_and(|t| t.dtype.is_float()))?;
    let operands: Vec<_> = (node.inputs.iter())
        .map(|i| graph.tensor(*i))
        .collect::<Option<_>>()?;
    let domain = chain::domain(operands.iter().copied()).ok()?;
    domain.last()?.known().filter(|&n| n > 0)?;
    for t in &operands {
        access(&t.shape, &domain).filter(|_| t.dtype.is_float())?;
    }
    if let (ChainOp::Reduce { axis, .. }, &[x]) = (op, &operands[..])
        && usize::from(axis) + 1 != x.rank()
    {
        return None;
    }
    let shape = &graph.tensor(id)?.shape;
    let whole = access(shape, &domain) == Some(Access::Full);
    (whole || op.reduces_rows()).then_some(domain)
}
