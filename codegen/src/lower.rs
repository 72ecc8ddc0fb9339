//! From graphs to a plan, one step an operation.

use crate::liveness::{assign_slots, check_slots};
use crate::pack::{PackDType, PackError, PackRecipe, RowPerm, Segment};
use crate::plan::{
    CacheSpec, Operand, Plan, Program, ProgramKind, Step, Table, ValueId, WeightBuffer,
};
use lathe_ir::{DType, Graph, NodeId, Op, PackKind, TensorType, Type};
use thiserror::Error;

/// The graphs of a model's programs.
#[derive(Clone, Copy, Debug)]
pub struct Programs<'a> {
    /// One row a sequence.
    pub decode: Option<&'a Graph>,
    /// Ragged rows.
    pub general: Option<&'a Graph>,
    /// Whole sequences, without a cache.
    pub full: Option<&'a Graph>,
}

/// A graph cannot be lowered.
#[derive(Clone, Debug, Error)]
pub enum LowerError {
    /// An operation that no device executes is left in a program.
    #[error("{program}: {node} = {op} ({path}) has no kernel")]
    NoKernel {
        /// Program.
        program: &'static str,
        /// Node.
        node: NodeId,
        /// Operation.
        op: &'static str,
        /// Module path.
        path: String,
    },
    /// A weight has no layout in memory.
    #[error("{0}")]
    Pack(#[from] PackError),
    /// A program result is no tensor value.
    #[error("{program}: result {name} is not computed by a step")]
    Output {
        /// Program.
        program: &'static str,
        /// Result.
        name: String,
    },
}

/// Lowers the graphs of a model into one plan. Packed weights that several programs read are
/// stored once.
///
/// # Errors
/// An operation without a kernel, or a weight without a layout.
pub fn lower(name: &str, dtype: DType, graphs: &Programs<'_>) -> Result<Plan, LowerError> {
    let mut plan = Plan {
        name: name.to_string(),
        dtype,
        weights: Vec::new(),
        tables: Vec::new(),
        caches: Vec::new(),
        programs: Vec::new(),
    };
    let kinds = [
        (ProgramKind::Decode, graphs.decode),
        (ProgramKind::General, graphs.general),
        (ProgramKind::Full, graphs.full),
    ];
    for (kind, graph) in kinds {
        if let Some(g) = graph {
            let program = Lowering::new(&mut plan, kind, g).run()?;
            debug_assert_eq!(check_slots(&program), Ok(()));
            plan.programs.push(program);
        }
    }
    Ok(plan)
}

struct Lowering<'a> {
    plan: &'a mut Plan,
    graph: &'a Graph,
    program: Program,
    /// Operands that stand for each node: one, or one for each element of a tuple.
    operands: Vec<Vec<Operand>>,
    /// Users of each node.
    users: Vec<Vec<NodeId>>,
    /// Tuple elements that somebody takes.
    taken: Vec<Vec<bool>>,
}

impl<'a> Lowering<'a> {
    fn new(plan: &'a mut Plan, kind: ProgramKind, graph: &'a Graph) -> Lowering<'a> {
        let mut taken: Vec<Vec<bool>> = graph
            .nodes()
            .iter()
            .map(|n| match &n.ty {
                Type::Tuple(ts) => vec![false; ts.len()],
                _ => vec![true],
            })
            .collect();
        for node in graph.nodes() {
            if let Op::Get(i) = node.op {
                taken[node.inputs[0].index()][usize::from(i)] = true;
            }
        }
        Lowering {
            plan,
            graph,
            program: Program {
                kind,
                inputs: Vec::new(),
                steps: Vec::new(),
                values: Vec::new(),
                slots: Vec::new(),
                outputs: Vec::new(),
            },
            operands: Vec::new(),
            users: graph.users(),
            taken,
        }
    }

    fn run(mut self) -> Result<Program, LowerError> {
        for id in self.graph.ids() {
            let operands = self.node(id)?;
            self.operands.push(operands);
        }
        for (name, id) in self.graph.outputs() {
            let operand = self.operands[id.index()][0].clone();
            let ty = self
                .graph
                .tensor(*id)
                .filter(|_| matches!(operand, Operand::Value(_)));
            let Some(ty) = ty else {
                return Err(LowerError::Output {
                    program: self.program.kind.name(),
                    name: name.clone(),
                });
            };
            self.program
                .outputs
                .push((name.clone(), operand, ty.clone()));
        }
        self.drop_unread();
        assign_slots(&mut self.program);
        Ok(self.program)
    }

    fn node(&mut self, id: NodeId) -> Result<Vec<Operand>, LowerError> {
        let node = self.graph.node(id);
        Ok(match &node.op {
            Op::Input { name, dtype, shape } => {
                let ty = TensorType {
                    dtype: *dtype,
                    shape: shape.clone(),
                };
                self.program.inputs.push((name.clone(), ty));
                vec![Operand::Input(self.program.inputs.len() - 1)]
            }
            Op::Const { value, dtype } => vec![Operand::Const {
                value: *value,
                dtype: *dtype,
            }],
            Op::Table { name, data } => {
                let table = Table {
                    name: name.clone(),
                    data: data.clone(),
                };
                vec![Operand::Table(index_of(&mut self.plan.tables, table))]
            }
            Op::Cache {
                layer,
                kv_heads,
                head_dim,
            } => {
                let spec = CacheSpec {
                    layer: *layer,
                    kv_heads: *kv_heads,
                    head_dim: *head_dim,
                    dtype: self.plan.dtype,
                };
                vec![Operand::Cache(index_of(&mut self.plan.caches, spec))]
            }
            Op::None => vec![Operand::None],
            Op::Reshape(_) => vec![self.operands[node.inputs[0].index()][0].clone()],
            Op::Get(i) => {
                vec![self.operands[node.inputs[0].index()][usize::from(*i)].clone()]
            }
            Op::Weight { .. } | Op::Permute(_) | Op::Pack(_) => match self.layout(id)? {
                // The layout of a weight that only another layout reads is not stored.
                Some(recipe) if self.is_read(id) => {
                    let ty = self.graph.tensor(id).expect("weights are tensors").clone();
                    let weight = WeightBuffer { recipe, ty };
                    vec![Operand::Weight(index_of(&mut self.plan.weights, weight))]
                }
                Some(_) => vec![Operand::None],
                None => self.step(id)?,
            },
            Op::Win(_) | Op::Sdpa(_) | Op::Proj(_) => {
                return Err(LowerError::NoKernel {
                    program: self.program.kind.name(),
                    node: id,
                    op: node.op.name(),
                    path: node.prov.path.to_string(),
                });
            }
            _ => self.step(id)?,
        })
    }

    fn step(&mut self, id: NodeId) -> Result<Vec<Operand>, LowerError> {
        let node = self.graph.node(id);
        let elements: Vec<&Type> = match &node.ty {
            Type::Tuple(ts) => ts.iter().collect(),
            t => vec![t],
        };
        let mut results = Vec::with_capacity(elements.len());
        let mut operands = Vec::with_capacity(elements.len());
        for (i, ty) in elements.iter().enumerate() {
            match ty.as_tensor().filter(|_| self.taken[id.index()][i]) {
                Some(t) => {
                    let v = ValueId(self.program.values.len() as u32);
                    self.program.values.push((t.clone(), 0));
                    results.push(Some(v));
                    operands.push(Operand::Value(v));
                }
                None => {
                    results.push(None);
                    operands.push(Operand::None);
                }
            }
        }
        let step = Step {
            op: node.op.clone(),
            operands: node
                .inputs
                .iter()
                .map(|i| self.operands[i.index()][0].clone())
                .collect(),
            types: node
                .inputs
                .iter()
                .map(|i| self.graph.node(*i).ty.clone())
                .collect(),
            results,
            ty: node.ty.clone(),
            prov: node.prov.clone(),
        };
        self.program.steps.push(step);
        Ok(operands)
    }

    /// Whether a weight layout is read by something else than another layout.
    fn is_read(&self, id: NodeId) -> bool {
        let outer_layout = |user: NodeId| {
            matches!(self.graph.node(user).op, Op::Permute(_) | Op::Pack(_))
                && matches!(self.layout(user), Ok(Some(_)))
        };
        self.users[id.index()].iter().any(|&u| !outer_layout(u))
    }

    /// The recipe of a weight, a transposed weight or a pack of weights.
    fn layout(&self, id: NodeId) -> Result<Option<PackRecipe>, LowerError> {
        let node = self.graph.node(id);
        let Some(ty) = self.graph.tensor(id) else {
            return Ok(None);
        };
        let Some((rows, cols)) = matrix(ty) else {
            return Ok(None);
        };
        let segments = match &node.op {
            Op::Weight { .. } | Op::Permute(_) => match self.source(id) {
                Some(s) => vec![s],
                None => return Ok(None),
            },
            Op::Pack(kind) => {
                let mut sources = Vec::with_capacity(node.inputs.len());
                for &i in &node.inputs {
                    match self.source(i) {
                        Some(s) => sources.push(s),
                        None => return Ok(None),
                    }
                }
                place(*kind, sources)
            }
            _ => return Ok(None),
        };
        let recipe = PackRecipe {
            rows,
            cols,
            dtype: pack_dtype(ty.dtype),
            segments,
        };
        recipe.validate()?;
        Ok(Some(recipe))
    }

    /// A whole checkpoint tensor, perhaps transposed, as a segment at row 0.
    fn source(&self, id: NodeId) -> Option<Segment> {
        let node = self.graph.node(id);
        let (rows, cols) = matrix(self.graph.tensor(id)?)?;
        match &node.op {
            Op::Weight { weight, .. } => Some(Segment::whole(&weight.name, rows, cols, 0)),
            Op::Permute(p) if p[..] == [1, 0] => {
                let Op::Weight { weight, .. } = &self.graph.node(node.inputs[0]).op else {
                    return None;
                };
                let mut s = Segment::whole(&weight.name, rows, cols, 0);
                s.transpose = true;
                Some(s)
            }
            _ => None,
        }
    }

    /// Steps whose results nobody reads (layout leftovers) are dropped, last first.
    fn drop_unread(&mut self) {
        let mut read = vec![false; self.program.values.len()];
        for (_, o, _) in &self.program.outputs {
            if let Operand::Value(v) = o {
                read[v.0 as usize] = true;
            }
        }
        let mut kept = Vec::with_capacity(self.program.steps.len());
        for step in std::mem::take(&mut self.program.steps).into_iter().rev() {
            let appends = matches!(step.op, Op::AttnStep(_) | Op::AttnQkv(_));
            let wanted = step.results.iter().flatten().any(|v| read[v.0 as usize]);
            if appends || wanted {
                for o in &step.operands {
                    if let Operand::Value(v) = o {
                        read[v.0 as usize] = true;
                    }
                }
                kept.push(step);
            }
        }
        kept.reverse();
        self.program.steps = kept;
    }
}

/// Segments of a pack with their places and permutations.
fn place(kind: PackKind, sources: Vec<Segment>) -> Vec<Segment> {
    let mut row = 0;
    sources
        .into_iter()
        .enumerate()
        .map(|(i, mut s)| {
            let rows = s.src_rows.len();
            match kind {
                PackKind::GateUp => {
                    s.perm = RowPerm::Interleave8 { part: i };
                }
                PackKind::Qkv {
                    head_dim,
                    interleave,
                } => {
                    s.dst_row = row;
                    if interleave && i < 2 {
                        s.perm = RowPerm::RopeHalves {
                            head_dim: head_dim as usize,
                        };
                    }
                }
                PackKind::Head { head_dim } => {
                    s.perm = RowPerm::RopeHalves {
                        head_dim: head_dim as usize,
                    };
                }
            }
            row += rows;
            s
        })
        .collect()
}

fn matrix(ty: &TensorType) -> Option<(usize, usize)> {
    match ty.shape[..] {
        [n] => Some((n.known()? as usize, 1)),
        [n, k] => Some((n.known()? as usize, k.known()? as usize)),
        _ => None,
    }
}

fn pack_dtype(dtype: DType) -> PackDType {
    match dtype {
        DType::BF16 => PackDType::Bf16,
        DType::F16 => PackDType::F16,
        _ => PackDType::F32,
    }
}

/// The index of an equal entry, or of a new one.
fn index_of<T: PartialEq>(list: &mut Vec<T>, item: T) -> usize {
    match list.iter().position(|x| *x == item) {
        Some(i) => i,
        None => {
            list.push(item);
            list.len() - 1
        }
    }
}
