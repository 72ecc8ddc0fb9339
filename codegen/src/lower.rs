//! From graphs to a plan, one step an operation.

use crate::fold::{Folded, fixed, is_layout, recipe, scaled_columns};
use crate::liveness::{assign_slots, check_slots};
use crate::pack::{PackError, PackRecipe};
use crate::plan::{
    CacheSpec, Once, Operand, Plan, Program, ProgramKind, Step, Table, ValueId, WeightBuffer,
};
use indexmap::IndexMap;
use lathe_ir::StepInput;
use lathe_ir::ops::{Get, X};
use lathe_ir::{DType, Dim, Graph, NodeId, Op, Sym, SymEnv, TensorType, Type, TypeError};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
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
    /// What depends on weights alone is ill-typed by itself: a bug.
    #[error("internal: {0}")]
    Type(#[from] TypeError),
    /// A program reads something at run time that steps do not have.
    #[error("{program}: no run-time input named '{name}' of this type")]
    Input {
        /// Program.
        program: &'static str,
        /// Input.
        name: String,
    },
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
        once: None,
    };
    let mut once = Folded::default();
    let mut layouts = Layouts::default();
    let kinds = [
        (ProgramKind::Decode, graphs.decode),
        (ProgramKind::General, graphs.general),
        (ProgramKind::Full, graphs.full),
    ];
    for (kind, graph) in kinds {
        if let Some(g) = graph {
            let program = Lowering::new(&mut plan, &mut layouts, &mut once, kind, g).run()?;
            debug_assert_eq!(check_slots(&program), Ok(()));
            plan.programs.push(program);
        }
    }
    if !once.weights.is_empty() {
        let mut none = Folded::default();
        let kind = ProgramKind::Once;
        let lowering = Lowering::new(&mut plan, &mut layouts, &mut none, kind, &once.graph);
        plan.once = Some(lowering.run_once(&once.weights)?);
    }
    Ok(plan)
}

/// The weights of a plan by their layout: recipe, element type, and the weight that multiplies their columns. Views of
/// one weight differ in their type alone.
type Layouts = HashMap<(PackRecipe, DType, Option<usize>), usize>;

struct Lowering<'a> {
    plan: &'a mut Plan,
    layouts: &'a mut Layouts,
    once: &'a mut Folded,
    graph: &'a Graph,
    /// What depends on weights alone: see [`fixed`].
    fixed: Vec<bool>,
    program: Program,
    /// Operands that stand for each node: one, or one for each element of a tuple. What no step reads has none.
    operands: Vec<Vec<Option<Operand>>>,
    /// Users of each node.
    users: Vec<Vec<NodeId>>,
    /// Tuple elements that somebody takes.
    taken: Vec<Vec<bool>>,
}

impl<'a> Lowering<'a> {
    fn new(
        plan: &'a mut Plan,
        layouts: &'a mut Layouts,
        once: &'a mut Folded,
        kind: ProgramKind,
        graph: &'a Graph,
    ) -> Lowering<'a> {
        let mut taken: Vec<Vec<bool>> = graph
            .nodes()
            .iter()
            .map(|n| match &n.ty {
                Type::Tuple(ts) => vec![false; ts.len()],
                _ => vec![true],
            })
            .collect();
        for node in graph.nodes() {
            if let Op::Get(Get(i)) = node.op {
                taken[node.inputs[X].index()][usize::from(i)] = true;
            }
        }
        Lowering {
            plan,
            layouts,
            once,
            graph,
            fixed: match kind {
                ProgramKind::Once => graph.ids().map(|id| is_layout(graph, id)).collect(),
                _ => fixed(graph),
            },
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

    /// Lowers the program that computes weights; `weights` are its nodes that are results.
    fn run_once(mut self, weights: &IndexMap<NodeId, usize>) -> Result<Once, LowerError> {
        self.nodes()?;
        let mut results = Vec::with_capacity(weights.len());
        for (&id, &weight) in weights {
            let Some(Operand::Value(v)) = self.operands[id.index()][0] else {
                return Err(LowerError::Output {
                    program: self.program.kind.name(),
                    name: self.graph.node(id).prov.path.to_string(),
                });
            };
            results.push((v, weight));
            let ty = self.program.values[v.0 as usize].0.clone();
            let name = format!("weight.{weight}");
            self.program.outputs.push((name, Operand::Value(v), ty));
        }
        assign_slots(&mut self.program);
        debug_assert_eq!(check_slots(&self.program), Ok(()));
        Ok(Once {
            program: self.program,
            results,
        })
    }

    fn nodes(&mut self) -> Result<(), LowerError> {
        for id in self.graph.ids() {
            let operands = self.node(id)?;
            self.operands.push(operands);
        }
        Ok(())
    }

    fn run(mut self) -> Result<Program, LowerError> {
        self.nodes()?;
        for (name, id) in self.graph.outputs() {
            let operand = self.operands[id.index()][0].clone();
            let value = operand.filter(|o| matches!(o, Operand::Value(_)));
            let (Some(operand), Some(ty)) = (value, self.graph.tensor(*id)) else {
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

    fn node(&mut self, id: NodeId) -> Result<Vec<Option<Operand>>, LowerError> {
        let node = self.graph.node(id);
        let one = |operand| vec![Some(operand)];
        Ok(match &node.op {
            Op::Input(input) => {
                let ty = TensorType {
                    dtype: input.dtype,
                    shape: input.shape.clone(),
                };
                let which = StepInput::by_name(&input.name);
                let Some(which) = which.filter(|w| gives(self.program.kind, *w, &ty)) else {
                    return Err(LowerError::Input {
                        program: self.program.kind.name(),
                        name: input.name.clone(),
                    });
                };
                self.program.inputs.push((which, ty));
                one(Operand::Input(self.program.inputs.len() - 1))
            }
            Op::Const(c) => one(Operand::Const {
                value: c.value,
                dtype: c.dtype,
            }),
            Op::Table(t) => {
                let table = Table {
                    name: t.name.clone(),
                    data: t.data.clone(),
                };
                one(Operand::Table(index_of(&mut self.plan.tables, table)))
            }
            Op::Cache(c) => {
                let spec = CacheSpec {
                    layer: c.layer,
                    kv_heads: c.kv_heads,
                    head_dim: c.head_dim,
                    dtype: self.plan.dtype,
                };
                one(Operand::Cache(index_of(&mut self.plan.caches, spec)))
            }
            Op::Reshape(_) if !self.fixed[id.index()] => {
                vec![self.operands[node.inputs[X].index()][0].clone()]
            }
            Op::Get(Get(i)) => {
                vec![self.operands[node.inputs[X].index()][usize::from(*i)].clone()]
            }
            // What only other fixed values read is part of their recipe or of the program `once`.
            Op::Weight(_) => vec![self.weight(id)?],
            _ if self.fixed[id.index()] => vec![self.weight(id)?],
            Op::Win(_) | Op::Sdpa(_) | Op::Proj(_) => {
                return Err(self.no_kernel(id));
            }
            _ => self.step(id)?,
        })
    }

    fn step(&mut self, id: NodeId) -> Result<Vec<Option<Operand>>, LowerError> {
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
                    operands.push(Some(Operand::Value(v)));
                }
                None => {
                    results.push(None);
                    // A cache that was appended to lies where it lay before.
                    let cache = |i: &NodeId| self.graph.node(*i).ty == Type::Cache;
                    let cache = node.inputs.iter().find(|i| **ty == Type::Cache && cache(i));
                    operands.push(cache.and_then(|i| self.operands[i.index()][0].clone()));
                }
            }
        }
        let read = |i: &NodeId| self.operands[i.index()][0].clone();
        let step = Step {
            op: node.op.clone(),
            operands: (node.inputs).try_map(|i| read(i).ok_or_else(|| self.no_kernel(id)))?,
            types: node.inputs.map(|i| self.graph.node(*i).ty.clone()),
            results,
            ty: node.ty.clone(),
            prov: node.prov.clone(),
        };
        self.program.steps.push(step);
        Ok(operands)
    }

    /// The operand for a value that depends on weights alone: read through a recipe if its rows are
    /// rows of checkpoint tensors, computed once otherwise.
    fn weight(&mut self, id: NodeId) -> Result<Option<Operand>, LowerError> {
        let is_output = self.graph.outputs().iter().any(|(_, o)| *o == id);
        let is_read = self.users[id.index()]
            .iter()
            .any(|u| !self.fixed[u.index()]);
        if !is_read && !is_output {
            return Ok(None);
        }
        Ok(Some(Operand::Weight(self.place(id)?)))
    }

    /// The index of the weight that holds a value that depends on weights alone.
    fn place(&mut self, id: NodeId) -> Result<usize, LowerError> {
        let ty = self.graph.tensor(id).expect("weights are tensors").clone();
        if let Some(recipe) = recipe(self.graph, id)? {
            return Ok(self.stored(recipe, ty, None));
        }
        if matches!(self.graph.node(id).op, Op::Weight(_)) {
            return Err(self.no_kernel(id));
        }
        if let Some((w, by)) = scaled_columns(self.graph, id)
            && let Some(recipe) = recipe(self.graph, w)?
        {
            let by = self.place(by)?;
            return Ok(self.stored(recipe, ty, Some(by)));
        }
        // One column: a computed weight is never cut into rows.
        let recipe = PackRecipe {
            rows: ty.elements(&SymEnv::default()),
            cols: 1,
            dtype: ty.dtype.into(),
            segments: Vec::new(),
        };
        let computed = self.once.import(self.graph, id)?;
        if let Some(&index) = self.once.weights.get(&computed) {
            return Ok(index);
        }
        self.plan.weights.push(WeightBuffer {
            recipe,
            ty,
            scaled_by: None,
        });
        let index = self.plan.weights.len() - 1;
        self.once.weights.insert(computed, index);
        Ok(index)
    }

    /// The index of a weight of this recipe and factors.
    fn stored(&mut self, recipe: PackRecipe, ty: TensorType, scaled_by: Option<usize>) -> usize {
        let weights = &mut self.plan.weights;
        match self.layouts.entry((recipe, ty.dtype, scaled_by)) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                weights.push(WeightBuffer {
                    recipe: new.key().0.clone(),
                    ty,
                    scaled_by,
                });
                *new.insert(weights.len() - 1)
            }
        }
    }

    fn no_kernel(&self, id: NodeId) -> LowerError {
        let node = self.graph.node(id);
        LowerError::NoKernel {
            program: self.program.kind.name(),
            node: id,
            op: node.op.name(),
            path: node.prov.path.to_string(),
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

/// Whether a program is given a run-time input of this type.
fn gives(kind: ProgramKind, input: StepInput, ty: &TensorType) -> bool {
    let is = |syms: &[Sym]| {
        ty.shape
            .iter()
            .copied()
            .eq(syms.iter().map(|&s| Dim::sym(s)))
    };
    let extents = match (kind, input) {
        (ProgramKind::Full, StepInput::Tokens) => is(&[Sym::B, Sym::S]),
        (ProgramKind::Full | ProgramKind::Once, _) => false,
        (_, StepInput::Rows) => is(&[Sym::R]) || is(&[Sym::T]),
        (_, StepInput::Tokens | StepInput::Positions) => is(&[Sym::T]),
    };
    extents && matches!(ty.dtype, DType::I32 | DType::I64)
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
