//! A program: typed nodes in topological order.

use crate::infer::{TypeError, infer};
use crate::operands::Operands;
use crate::ops::Op;
use crate::{TensorType, Type};
use std::fmt;
use std::sync::Arc;

/// Index of a node. Operands always have smaller ids than their users.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NodeId(pub u32);

impl NodeId {
    /// The id as an index into [`Graph::nodes`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

/// Where a value comes from in the model.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Prov {
    /// Decoder layer, if it belongs to one.
    pub layer: Option<u32>,
    /// Module path in the Hugging Face implementation, e.g. `model.layers.3.self_attn.q_proj`.
    pub path: Arc<str>,
}

impl Prov {
    /// Provenance outside any layer.
    pub fn global(path: &str) -> Prov {
        Prov {
            layer: None,
            path: path.into(),
        }
    }

    /// Provenance in a decoder layer.
    pub fn layer(layer: u32, path: &str) -> Prov {
        Prov {
            layer: Some(layer),
            path: path.into(),
        }
    }
}

/// One operation with its operands, its type and its origin.
#[derive(Clone, PartialEq, Debug)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// From what.
    pub inputs: Operands<NodeId>,
    /// The type of the result; always what [`infer()`] derives.
    pub ty: Type,
    /// Where the value comes from.
    pub prov: Prov,
}

/// A program. Nodes are stored in topological order, so ids are deterministic and a single pass
/// over [`Graph::nodes`] visits operands before users.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Graph {
    /// Name of the program, e.g. the model's name and the stage.
    pub name: String,
    nodes: Vec<Node>,
    outputs: Vec<(String, NodeId)>,
}

impl Graph {
    /// An empty program.
    pub fn new(name: &str) -> Graph {
        Graph {
            name: name.to_string(),
            ..Graph::default()
        }
    }

    /// Appends an operation and derives its type.
    ///
    /// # Errors
    /// The operation does not accept operands of these types.
    ///
    /// # Panics
    /// An operand is not a node of this graph (invariant: operands come first).
    pub fn add(
        &mut self,
        op: impl Into<Op>,
        inputs: impl Into<Operands<NodeId>>,
        prov: &Prov,
    ) -> Result<NodeId, TypeError> {
        let (op, inputs) = (op.into(), inputs.into());
        let ty = infer(&op, inputs.map(|i| &self.nodes[i.index()].ty))?;
        let id = NodeId(self.nodes.len() as u32);
        self.nodes.push(Node {
            op,
            inputs,
            ty,
            prov: prov.clone(),
        });
        Ok(id)
    }

    /// Appends a node as it is, without checks: for the parser and for tests of the verifier.
    pub fn push_unchecked(&mut self, node: Node) -> NodeId {
        let id = NodeId(self.nodes.len() as u32);
        self.nodes.push(node);
        id
    }

    /// Declares a result of the program.
    pub fn set_output(&mut self, name: &str, id: NodeId) {
        self.outputs.push((name.to_string(), id));
    }

    /// All nodes, operands before users.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// All ids in topological order.
    pub fn ids(&self) -> impl DoubleEndedIterator<Item = NodeId> + use<> {
        (0..self.nodes.len() as u32).map(NodeId)
    }

    /// The results, in the order in which they were declared.
    pub fn outputs(&self) -> &[(String, NodeId)] {
        &self.outputs
    }

    /// The result of a name.
    pub fn output(&self, name: &str) -> Option<NodeId> {
        self.outputs
            .iter()
            .find(|(n, _)| n == name)
            .map(|&(_, id)| id)
    }

    /// The tensor type of a node, if it is a tensor.
    pub fn tensor(&self, id: NodeId) -> Option<&TensorType> {
        self.node(id).ty.as_tensor()
    }

    /// For each node, the nodes that use it, in order; a node that uses a value twice stands
    /// there twice.
    pub fn users(&self) -> Vec<Vec<NodeId>> {
        let mut users = vec![Vec::new(); self.nodes.len()];
        for id in self.ids() {
            for i in &self.node(id).inputs {
                users[i.index()].push(id);
            }
        }
        users
    }

    /// The same program without nodes that no output depends on, renumbered in order.
    #[must_use]
    pub fn without_dead(&self) -> Graph {
        let mut live = vec![false; self.nodes.len()];
        for (_, id) in &self.outputs {
            live[id.index()] = true;
        }
        for id in self.ids().rev() {
            if live[id.index()] {
                for i in &self.node(id).inputs {
                    live[i.index()] = true;
                }
            }
        }
        let mut out = Graph::new(&self.name);
        let mut map = vec![NodeId(0); self.nodes.len()];
        for id in self.ids().filter(|id| live[id.index()]) {
            let mut node = self.node(id).clone();
            node.inputs = node.inputs.map(|i| map[i.index()]);
            map[id.index()] = out.push_unchecked(node);
        }
        for (name, id) in &self.outputs {
            out.set_output(name, map[id.index()]);
        }
        out
    }

    /// Number of nodes of an operation name, for tests and reports.
    pub fn count(&self, name: &str) -> usize {
        self.nodes.iter().filter(|n| n.op.name() == name).count()
    }
}
