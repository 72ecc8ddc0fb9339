//! Checks what every program must satisfy, and reports everything that it does not.

use crate::Type;
use crate::graph::{Graph, Node, NodeId};
use crate::infer::infer;
use crate::ops::{Attn, AttnSpec, AttnStep, Op, Sdpa, SdpaStage, X, attn_qkv, attn_step};
use crate::shape::Dim;
use crate::text::format_type;
use std::collections::BTreeMap;
use thiserror::Error;

/// Something that a program must not have.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("{}{kind}", place(.node.as_ref()))]
pub struct VerifyError {
    /// Where, unless it concerns the program as a whole.
    pub node: Option<Culprit>,
    /// What is wrong.
    pub kind: VerifyKind,
}

/// The node that an error is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Culprit {
    /// Which node.
    pub id: NodeId,
    /// Its operation's name.
    pub op: &'static str,
    /// Its layer and module path, as the text shows them.
    pub prov: String,
}

fn place(node: Option<&Culprit>) -> String {
    match node {
        Some(c) if c.prov.is_empty() => format!("{} {}: ", c.id, c.op),
        Some(c) => format!("{} {} ({}): ", c.id, c.op, c.prov),
        None => String::new(),
    }
}

/// The kinds of errors.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[allow(missing_docs)]
pub enum VerifyKind {
    #[error("operand {0} does not come before it")]
    Operand(NodeId),
    #[error("{0}")]
    Infer(String),
    #[error("has type {found}, but its operation makes {derived}")]
    Type { found: String, derived: String },
    #[error("extent {0} is negative")]
    Negative(Dim),
    #[error("{what} stands in the program already, as {first}")]
    Duplicate { what: String, first: NodeId },
    #[error("{what} has another type at {first}")]
    Inconsistent { what: String, first: NodeId },
    #[error("an open attention must not be in stage 'closed'")]
    ClosedSdpa,
    #[error("an open attention cannot share KV heads, but has {0} query heads a KV head")]
    SharedSdpa(u32),
    #[error("the attention is still open")]
    OpenAttention,
    #[error("a step must not see later keys, but its mask is not causal")]
    NotCausal,
    #[error("{heads} query heads are not {kv_heads} KV heads times {groups}")]
    Heads {
        heads: u32,
        kv_heads: u32,
        groups: u32,
    },
    #[error("RoPE partners of heads of {0} features cannot be interleaved by 8")]
    Interleave(u32),
    #[error("works on {step}, but the cache holds {cache}")]
    CacheShape { step: String, cache: String },
    #[error("this cache version is used by {uses} steps, expected {expected}")]
    Linearity { uses: usize, expected: &'static str },
    #[error("a cache that a step replaces must not be a result")]
    StaleCache,
    #[error("output '{name}' is {id}, but there are {nodes} nodes")]
    OutputRange {
        name: String,
        id: NodeId,
        nodes: usize,
    },
    #[error("output '{0}' is declared twice")]
    OutputName(String),
}

/// All errors of a program; none if it is well formed.
///
/// Checked are: operands stand before their users; types are the derived ones and extents not
/// negative; inputs, weights and caches are unique by name or layer; the stages, masks and
/// head counts of attention fit its operation; each cache leaf is used by exactly one step, and
/// each later version by at most one; outputs exist and are uniquely named.
pub fn verify(graph: &Graph) -> Vec<VerifyError> {
    let mut v = Verifier {
        graph,
        errors: Vec::new(),
        sound: Vec::with_capacity(graph.nodes().len()),
    };
    for id in graph.ids() {
        v.node(id);
    }
    v.leaves();
    v.caches();
    v.outputs();
    v.errors
}

/// The cache that a step appends to.
fn appended(node: &Node) -> Option<NodeId> {
    match node.op {
        Op::AttnStep(_) => node.inputs.get(attn_step::CACHE),
        Op::AttnQkv(_) => node.inputs.get(attn_qkv::CACHE),
        _ => None,
    }
}

struct Verifier<'a> {
    graph: &'a Graph,
    errors: Vec<VerifyError>,
    /// Whether a node's operands are in range, so that other checks may follow them.
    sound: Vec<bool>,
}

impl Verifier<'_> {
    fn error(&mut self, id: NodeId, kind: VerifyKind) {
        let node = self.graph.node(id);
        let prov = match node.prov.layer {
            Some(l) => format!("L{l} {}", node.prov.path).trim_end().to_string(),
            None => node.prov.path.to_string(),
        };
        self.errors.push(VerifyError {
            node: Some(Culprit {
                id,
                op: node.op.name(),
                prov,
            }),
            kind,
        });
    }

    fn node(&mut self, id: NodeId) {
        let node = self.graph.node(id);
        let bad: Vec<NodeId> = node.inputs.iter().copied().filter(|&i| i >= id).collect();
        self.sound.push(bad.is_empty());
        for &i in &bad {
            self.error(id, VerifyKind::Operand(i));
        }
        if bad.is_empty() {
            let types = node.inputs.map(|&i| &self.graph.node(i).ty);
            match infer(&node.op, types) {
                Err(e) => self.error(id, VerifyKind::Infer(e.reason)),
                Ok(derived) if derived != node.ty => {
                    let (found, derived) = (format_type(&node.ty), format_type(&derived));
                    self.error(id, VerifyKind::Type { found, derived });
                }
                Ok(_) => {}
            }
        }
        let tensors = match &node.ty {
            Type::Tuple(ts) => ts.as_slice(),
            other => std::slice::from_ref(other),
        };
        for t in tensors.iter().filter_map(Type::as_tensor) {
            for &d in t.shape.iter().filter(|d| d.known().is_some_and(|n| n < 0)) {
                self.error(id, VerifyKind::Negative(d));
            }
        }
        self.attention(id);
    }

    /// Stages, masks and heads.
    fn attention(&mut self, id: NodeId) {
        let graph = self.graph;
        let op = &graph.node(id).op;
        let mut closed = |s: &AttnSpec, step: bool| {
            if s.stage != SdpaStage::Closed {
                self.error(id, VerifyKind::OpenAttention);
            }
            if step && !s.mask.causal {
                self.error(id, VerifyKind::NotCausal);
            }
        };
        match op {
            Op::Sdpa(Sdpa(s)) => {
                if s.stage == SdpaStage::Closed {
                    self.error(id, VerifyKind::ClosedSdpa);
                }
                if s.groups != 1 {
                    self.error(id, VerifyKind::SharedSdpa(s.groups));
                }
            }
            Op::Attn(Attn(s)) => closed(s, false),
            Op::AttnStep(AttnStep(s)) => closed(s, true),
            Op::AttnQkv(s) => {
                closed(&s.attn, true);
                if u64::from(s.heads) != u64::from(s.kv_heads) * u64::from(s.attn.groups) {
                    self.error(
                        id,
                        VerifyKind::Heads {
                            heads: s.heads,
                            kv_heads: s.kv_heads,
                            groups: s.attn.groups,
                        },
                    );
                }
                if s.rope.is_some() && !s.head_dim.is_multiple_of(16) {
                    self.error(id, VerifyKind::Interleave(s.head_dim));
                }
            }
            _ => {}
        }
    }

    /// One node for each input, weight and cache.
    fn leaves(&mut self) {
        let graph = self.graph;
        let mut seen: BTreeMap<String, NodeId> = BTreeMap::new();
        for id in graph.ids() {
            let what = match &graph.node(id).op {
                Op::Input(i) => format!("input '{}'", i.name),
                Op::Weight(w) => format!("weight '{}'", w.weight.name),
                Op::Cache(c) => format!("the cache of layer {}", c.layer),
                _ => continue,
            };
            match seen.get(&what) {
                None => {
                    seen.insert(what, id);
                }
                Some(&first) => {
                    let same = graph.node(first).op == graph.node(id).op;
                    self.error(
                        id,
                        if same {
                            VerifyKind::Duplicate { what, first }
                        } else {
                            VerifyKind::Inconsistent { what, first }
                        },
                    );
                }
            }
        }
    }

    /// Each cache version has one user, and steps fit the cache that they work on.
    fn caches(&mut self) {
        let graph = self.graph;
        let n = graph.nodes().len();
        let sound = std::mem::take(&mut self.sound);
        // The cache leaf that a value (or a step's tuple) is a version of, and the node that made
        // the version: the leaf or the step.
        let mut version: Vec<Option<(NodeId, NodeId)>> = vec![None; n];
        let mut uses = vec![0_usize; n];
        let mut replaced = vec![false; n];
        for id in graph.ids().filter(|id| sound[id.index()]) {
            let node = graph.node(id);
            match &node.op {
                Op::Cache(_) => version[id.index()] = Some((id, id)),
                Op::Get(_) if node.ty == Type::Cache => {
                    version[id.index()] = node.inputs.get(X).and_then(|x| version[x.index()]);
                }
                _ => {
                    if let Some(cache) = appended(node)
                        && let Some((leaf, maker)) = version[cache.index()]
                    {
                        uses[maker.index()] += 1;
                        replaced[maker.index()] = true;
                        version[id.index()] = Some((leaf, id));
                    }
                }
            }
        }
        for id in graph.ids().filter(|id| sound[id.index()]) {
            let node = graph.node(id);
            let (leaf, step) = match &node.op {
                Op::Cache(_) => (true, false),
                Op::AttnStep(_) | Op::AttnQkv(_) => (false, true),
                _ => continue,
            };
            let uses = uses[id.index()];
            if (leaf && uses != 1) || uses > 1 {
                let expected = if leaf { "exactly one" } else { "at most one" };
                self.error(id, VerifyKind::Linearity { uses, expected });
            }
            if step && let Some((leaf, _)) = version[id.index()] {
                self.cache_shape(id, leaf);
            }
        }
        for (_, id) in graph.outputs() {
            if id.index() >= n {
                continue;
            }
            let stale = match (&graph.node(*id).ty, version[id.index()]) {
                // A tuple is fine: its readers take the element they need.
                (Type::Cache, Some((_, maker))) => replaced[maker.index()],
                _ => false,
            };
            if stale {
                self.error(*id, VerifyKind::StaleCache);
            }
        }
    }

    fn cache_shape(&mut self, id: NodeId, leaf: NodeId) {
        let graph = self.graph;
        let Op::Cache(cache) = &graph.node(leaf).op else {
            return;
        };
        let (kv_heads, head_dim) = (cache.kv_heads, cache.head_dim);
        let node = graph.node(id);
        let (heads, dim) = match &node.op {
            Op::AttnQkv(s) => (
                Dim::from(i64::from(s.kv_heads)),
                Dim::from(i64::from(s.head_dim)),
            ),
            _ => match node.inputs.get(attn_step::K).and_then(|k| graph.tensor(k)) {
                Some(k) if k.rank() == 3 => (k.shape[1], k.shape[2]),
                _ => return,
            },
        };
        if !heads.is(i64::from(kv_heads)) || !dim.is(i64::from(head_dim)) {
            self.error(
                id,
                VerifyKind::CacheShape {
                    step: format!("{heads} KV heads of {dim}"),
                    cache: format!("{kv_heads} of {head_dim}"),
                },
            );
        }
    }

    fn outputs(&mut self) {
        let nodes = self.graph.nodes().len();
        for (i, (name, id)) in self.graph.outputs().iter().enumerate() {
            let mut kinds = Vec::new();
            if id.index() >= nodes {
                kinds.push(VerifyKind::OutputRange {
                    name: name.clone(),
                    id: *id,
                    nodes,
                });
            }
            if self.graph.outputs()[..i].iter().any(|(n, _)| n == name) {
                kinds.push(VerifyKind::OutputName(name.clone()));
            }
            self.errors.extend(
                kinds
                    .into_iter()
                    .map(|kind| VerifyError { node: None, kind }),
            );
        }
    }
}
