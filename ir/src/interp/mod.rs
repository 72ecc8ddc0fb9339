//! The interpreter: what every operation means, without regard to speed beyond the obvious. It
//! is the reference that rewrites, plans and kernels are held against.
//!
//! Arithmetic is in `f32` or `f64` ([`Float`]). By default casts between floats are identities,
//! so that equality of two programs is equality over the reals. With [`Interp::round`] each value
//! of a narrow float type is rounded when it is produced, as a device that stores it would.

mod attention;
mod chain;
mod elementwise;
mod eval;
mod float;
mod leaves;
mod linalg;
mod movement;
mod rows;
mod value;

pub use attention::{KvRows, KvState, StepMeta};
pub use float::Float;
pub use value::{CacheRef, Tensor, Value};

use eval::{Call, Eval};

use crate::dtype::DType;
use crate::graph::{Graph, NodeId};
use crate::operands::Operands;
use crate::ops::{Cast, Get, Op, WeightRef, with_payload};
use crate::shape::{Dim, SymEnv};
use crate::{TensorType, Type};
use indexmap::IndexMap;
use std::collections::BTreeMap;
use std::fmt;
use thiserror::Error;

/// An operation could not be evaluated.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{}{op}: {reason}", Place(.at))]
pub struct InterpError {
    /// The operation's name.
    pub op: &'static str,
    /// Node and module path, when a graph was run.
    pub at: Option<(NodeId, String)>,
    /// What was found and what was expected.
    pub reason: String,
}

struct Place<'a>(&'a Option<(NodeId, String)>);

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some((id, path)) if path.is_empty() => write!(f, "{id}: "),
            Some((id, path)) => write!(f, "{id} ({path}): "),
            None => Ok(()),
        }
    }
}

/// Reads the elements of a tensor of the checkpoint, row-major.
pub type WeightFn<'a, F> = dyn Fn(&WeightRef) -> Result<Vec<F>, String> + 'a;

/// Picks the next token from row `i` of the logits: `(i, row) -> token`.
pub type SampleFn<'a, F> = dyn Fn(usize, &[F]) -> i64 + 'a;

/// An interpreter: the values of everything that a program leaves open, and the KV caches.
pub struct Interp<'a, F> {
    /// Values of the symbols.
    pub syms: SymEnv,
    /// Values of the inputs, by name.
    pub inputs: IndexMap<String, Value<F>>,
    /// Reads weights.
    pub weights: &'a WeightFn<'a, F>,
    /// The rows that this step computes; step programs need it.
    pub step: Option<StepMeta>,
    /// Whether values of narrow float types are rounded when they are produced.
    pub round: bool,
    /// The KV caches, by layer. A cache that is missing is empty.
    pub caches: BTreeMap<u32, KvState<F>>,
    /// How [`crate::ops::Sample`] picks a token; by default the one with the largest logit, the lowest
    /// one on ties.
    pub sampler: Option<&'a SampleFn<'a, F>>,
}

impl<'a, F: Float> Interp<'a, F> {
    /// An interpreter without inputs, step and caches, that does not round.
    pub fn new(syms: SymEnv, weights: &'a WeightFn<'a, F>) -> Interp<'a, F> {
        Interp {
            syms,
            inputs: IndexMap::new(),
            weights,
            step: None,
            round: false,
            caches: BTreeMap::new(),
            sampler: None,
        }
    }

    /// The same interpreter with one more input.
    #[must_use]
    pub fn with_input(mut self, name: &str, value: Value<F>) -> Interp<'a, F> {
        self.inputs.insert(name.to_string(), value);
        self
    }

    /// Runs a program. A value is freed after its last use. Nodes that no output depends on are
    /// not evaluated.
    ///
    /// # Errors
    /// An input is missing, an extent does not fit, or an operation fails. The caches may have
    /// been changed by then.
    pub fn run(&mut self, graph: &Graph) -> Result<IndexMap<String, Value<F>>, InterpError> {
        let n = graph.nodes().len();
        let in_order = graph
            .ids()
            .all(|id| graph.node(id).inputs.iter().all(|&i| i < id));
        if !in_order || graph.outputs().iter().any(|(_, id)| id.index() >= n) {
            return Err(InterpError {
                op: "graph",
                at: None,
                reason: "a value is used before it is defined".to_string(),
            });
        }
        let mut uses = vec![0_usize; n];
        for (_, id) in graph.outputs() {
            uses[id.index()] += 1;
        }
        for id in graph.ids().rev() {
            if uses[id.index()] > 0 {
                for i in &graph.node(id).inputs {
                    uses[i.index()] += 1;
                }
            }
        }
        let mut values: Vec<Option<Value<F>>> = vec![None; n];
        for id in graph.ids() {
            if uses[id.index()] == 0 {
                continue;
            }
            let node = graph.node(id);
            let result = match (&node.op, node.inputs.only()) {
                // Without a copy where this is the last use.
                (Op::Reshape(_) | Op::Get(_) | Op::Cast(_), Some(x)) if uses[x.index()] == 1 => {
                    let x = values[x.index()].take().expect("operands come first");
                    self.consume(&node.op, x, &node.ty)
                }
                _ => {
                    let value = |i: &NodeId| values[i.index()].as_ref();
                    let inputs = node.inputs.map(|i| value(i).expect("operands come first"));
                    eval_op(&node.op, inputs, &node.ty, self)
                }
            };
            let value = result.map_err(|e| InterpError {
                at: Some((id, node.prov.path.to_string())),
                ..e
            })?;
            values[id.index()] = Some(value);
            for i in &node.inputs {
                uses[i.index()] -= 1;
                if uses[i.index()] == 0 {
                    values[i.index()] = None;
                }
            }
        }
        Ok(graph
            .outputs()
            .iter()
            .map(|(name, id)| {
                let v = values[id.index()].clone().expect("outputs are evaluated");
                (name.clone(), v)
            })
            .collect())
    }

    /// Evaluates an operation that can take its only operand over.
    fn consume(&mut self, op: &Op, x: Value<F>, ty: &Type) -> Result<Value<F>, InterpError> {
        let reason = match (op, x) {
            (Op::Reshape(_), mut x) => {
                let shape = match ty {
                    Type::Tensor(t) => self.extents(&t.shape),
                    _ => Err("a reshape is a tensor".to_string()),
                };
                let own = match &mut x {
                    Value::Float(t) => Some((&mut t.shape, t.data.len())),
                    Value::Int(t) => Some((&mut t.shape, t.data.len())),
                    Value::Bool(t) => Some((&mut t.shape, t.data.len())),
                    _ => None,
                };
                match (shape, own) {
                    (Ok(to), Some((own, n))) if to.iter().product::<usize>() == n => {
                        *own = to;
                        return Ok(x);
                    }
                    (Ok(to), _) => format!("a value does not reshape to {to:?}"),
                    (Err(e), _) => e,
                }
            }
            (Op::Get(Get(i)), Value::Tuple(mut vs)) if usize::from(*i) < vs.len() => {
                return Ok(vs.swap_remove(usize::from(*i)));
            }
            (Op::Cast(Cast(to)), x @ Value::Float(_)) if to.is_float() => {
                match self.finish(x, ty) {
                    Ok(v) => return Ok(v),
                    Err(e) => e,
                }
            }
            (op, x) => return eval_op(op, [&x], ty, self),
        };
        Err(InterpError {
            op: op.name(),
            at: None,
            reason,
        })
    }

    /// The extents of a shape as numbers.
    fn extents(&self, shape: &[Dim]) -> Result<Vec<usize>, String> {
        let out: Vec<usize> = shape
            .iter()
            .map(|d| {
                let n = d.eval(&self.syms);
                usize::try_from(n).map_err(|_| format!("extent {d} is {n}"))
            })
            .collect::<Result<_, _>>()?;
        // Elements take at most 8 bytes, and no allocation may exceed isize::MAX bytes.
        out.iter()
            .try_fold(8_usize, |n, &d| n.checked_mul(d.max(1)))
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or_else(|| format!("{out:?} has too many elements"))?;
        Ok(out)
    }

    fn step(&self) -> Result<&StepMeta, String> {
        let step = self
            .step
            .as_ref()
            .ok_or("the program is a step, but no step was given")?;
        step.check()?;
        Ok(step)
    }

    /// The element type that values of a type are rounded to, if they are.
    fn rounding(&self, ty: &Type) -> Option<DType> {
        let first = match ty {
            Type::Tuple(ts) => ts.first().and_then(Type::as_tensor),
            other => other.as_tensor(),
        };
        first
            .map(|t| t.dtype)
            .filter(|d| self.round && matches!(d, DType::BF16 | DType::F16))
    }

    /// Checks a result against its type and rounds it.
    fn finish(&self, value: Value<F>, ty: &Type) -> Result<Value<F>, String> {
        match (value, ty) {
            (Value::Tuple(vs), Type::Tuple(ts)) if vs.len() == ts.len() => vs
                .into_iter()
                .zip(ts)
                .map(|(v, t)| self.finish(v, t))
                .collect::<Result<_, _>>()
                .map(Value::Tuple),
            (v @ Value::Cache(_), Type::Cache) => Ok(v),
            (v, Type::Tensor(t)) => self.finish_tensor(v, t, self.rounding(ty)),
            (v, ty) => Err(format!("result is {}, expected {ty:?}", v.kind())),
        }
    }

    fn finish_tensor(
        &self,
        mut value: Value<F>,
        ty: &TensorType,
        round: Option<DType>,
    ) -> Result<Value<F>, String> {
        let want = self.extents(&ty.shape)?;
        match value.shape() {
            Some(s) if s == want => {}
            Some(s) => return Err(format!("result has shape {s:?}, expected {want:?}")),
            None => return Err(format!("result is {}, expected a tensor", value.kind())),
        }
        match (&mut value, ty.dtype) {
            (Value::Float(t), d) if d.is_float() => {
                if let Some(d) = round {
                    for v in &mut t.data {
                        *v = v.round_to(d);
                    }
                }
            }
            (Value::Int(t), DType::I32) => {
                for v in &mut t.data {
                    *v = i64::from(*v as i32);
                }
            }
            (Value::Int(_), DType::I64) | (Value::Bool(_), DType::Bool) => {}
            (v, d) => return Err(format!("result is {}, expected dtype {d}", v.kind())),
        }
        Ok(value)
    }
}

/// Evaluates one operation, whose result has type `ty` (what [`crate::infer()`] derives for the
/// operands' types). `state` gives symbols, inputs, weights, step, caches and rounding.
///
/// # Errors
/// The operands do not fit the operation, or something that it needs is missing from `state`.
pub fn eval_op<'v, F: Float>(
    op: &Op,
    inputs: impl Into<Operands<&'v Value<F>>>,
    ty: &Type,
    state: &mut Interp<'_, F>,
) -> Result<Value<F>, InterpError> {
    let inputs = inputs.into();
    let round = state.rounding(ty);
    let checked = op.signature().check(&inputs);
    checked
        .and_then(|()| {
            let mut call = Call { state, ty, round };
            with_payload!(op, payload => Eval::eval(payload, &inputs, &mut call))
        })
        .and_then(|v| state.finish(v, ty))
        .map_err(|reason| InterpError {
            op: op.name(),
            at: None,
            reason,
        })
}
