//! The plan of a model: what every device executes.
//!
//! A plan holds up to three programs over one set of packed weights. Each is a list of steps, one
//! kernel family each, whose operands are values in reusable slots of memory, weights, tables,
//! caches or inputs. Views cost nothing: a reshape or an element of a tuple is the same operand
//! under another type.

use crate::pack::PackRecipe;
pub use lathe_ir::ProgramKind;
use lathe_ir::{
    DType, Op, OpWork, Operands, Prov, Real, Slot as Name, StepInput, SymEnv, TensorType, Type,
};

/// Index of a value of a program.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ValueId(pub u32);

/// A compiled model.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Name of the model.
    pub name: String,
    /// Element type of activations.
    pub dtype: DType,
    /// Packed weights, shared by all programs.
    pub weights: Vec<WeightBuffer>,
    /// Constant f32 vectors (rotary frequencies), shared by all programs.
    pub tables: Vec<Table>,
    /// KV caches by layer, in layer order.
    pub caches: Vec<CacheSpec>,
    /// The programs that exist, in the order of [`ProgramKind`].
    pub programs: Vec<Program>,
    /// What computes the weights without a recipe, once, after the others are loaded.
    pub once: Option<Once>,
}

/// A program over weights alone, and where its results stay.
#[derive(Clone, Debug, PartialEq)]
pub struct Once {
    /// The program; its outputs are its results again, as `weight.N`.
    pub program: Program,
    /// Its values that are weights, with their indices in [`Plan::weights`].
    pub results: Vec<(ValueId, usize)>,
}

/// One packed weight in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightBuffer {
    /// How it is filled from the checkpoint. Without segments it is computed by [`Plan::once`].
    pub recipe: PackRecipe,
    /// Extents and element type.
    pub ty: TensorType,
    /// The weight `[cols]` by which its columns are multiplied, in its place, after everything is
    /// loaded and [`Plan::once`] has run: products in f32, rounded to the element type.
    pub scaled_by: Option<usize>,
}

impl WeightBuffer {
    /// Whether it is computed from other weights rather than read.
    pub fn is_computed(&self) -> bool {
        self.recipe.segments.is_empty()
    }
}

/// A constant vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// What it is, for readers.
    pub name: String,
    /// The elements.
    pub data: Vec<Real>,
}

/// The KV cache of one layer: `[page][2][kv_heads][page_size][head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSpec {
    /// Layer.
    pub layer: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Features per head.
    pub head_dim: u32,
    /// Element type.
    pub dtype: DType,
}

impl CacheSpec {
    /// Bytes of one cached token of this layer, keys and values.
    pub fn token_bytes(&self) -> usize {
        2 * self.kv_heads as usize * self.head_dim as usize * self.dtype.size()
    }
}

/// A list of steps with their memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// What it computes.
    pub kind: ProgramKind,
    /// The run-time inputs and their types.
    pub inputs: Vec<(StepInput, TensorType)>,
    /// The steps in order.
    pub steps: Vec<Step>,
    /// Types of the values and the slots that hold them.
    pub values: Vec<(TensorType, usize)>,
    /// Memory of the values, reused along the program.
    pub slots: Vec<Slot>,
    /// Results by name.
    pub outputs: Vec<(String, Operand, TensorType)>,
}

/// One kernel family with its operands.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What is computed.
    pub op: Op,
    /// Operands by name.
    pub operands: Operands<Operand>,
    /// Types under which the operation sees them.
    pub types: Operands<Type>,
    /// Results: one for a tensor, one for each element of a tuple; `None` where nothing reads it
    /// and for caches.
    pub results: Vec<Option<ValueId>>,
    /// Type of the result.
    pub ty: Type,
    /// Where it comes from in the model.
    pub prov: Prov,
}

impl Step {
    /// An operand, if it is present.
    pub fn get(&self, operand: Name) -> Option<&Operand> {
        self.operands.get_ref(operand)
    }

    /// The tensor type of an operand, if it is present.
    pub fn tensor(&self, operand: Name) -> Option<&TensorType> {
        self.types.get_ref(operand)?.as_tensor()
    }

    /// The operands that are tensors, with their types.
    pub fn tensors(&self) -> impl Iterator<Item = (&Operand, &TensorType)> {
        let both = self.operands.iter().zip(&self.types);
        both.filter_map(|(o, ty)| Some((o, ty.as_tensor()?)))
    }

    /// Whether a value is among the operands.
    pub fn reads(&self, value: ValueId) -> bool {
        self.operands.iter().any(|o| *o == Operand::Value(value))
    }

    /// What it has to compute and to move, as the program says it.
    pub fn work(&self, env: &SymEnv) -> OpWork {
        OpWork::of(&self.op, &self.types.map(|t| t), &self.ty, env)
    }

    /// The type of a result that is read: the type itself, or a tuple's element.
    pub fn result_type(&self, i: usize) -> Option<&TensorType> {
        match &self.ty {
            Type::Tuple(ts) => ts.get(i)?.as_tensor(),
            t => t.as_tensor().filter(|_| i == 0),
        }
    }
}

/// What a step reads.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// A value of the program.
    Value(ValueId),
    /// A packed weight, by index.
    Weight(usize),
    /// A constant vector, by index.
    Table(usize),
    /// A run-time input, by index.
    Input(usize),
    /// A scalar.
    Const {
        /// Its value.
        value: Real,
        /// Its element type.
        dtype: DType,
    },
    /// The cache of a layer, by index.
    Cache(usize),
}

/// A piece of memory that holds values one after the other.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Slot {
    /// Types of the values that it holds.
    pub types: Vec<TensorType>,
}

impl Slot {
    /// Bytes needed under an assignment of the symbols.
    pub fn bytes(&self, env: &SymEnv) -> usize {
        self.types.iter().map(|t| t.bytes(env)).max().unwrap_or(0)
    }
}

impl Program {
    /// Bytes of all slots under an assignment of the symbols, each rounded up to 256.
    pub fn activation_bytes(&self, env: &SymEnv) -> usize {
        self.slots
            .iter()
            .map(|s| s.bytes(env).next_multiple_of(256))
            .sum()
    }

    /// The slot of a value.
    pub fn slot(&self, v: ValueId) -> usize {
        self.values[v.0 as usize].1
    }

    /// Steps that belong to a layer.
    pub fn steps_of_layer(&self, layer: u32) -> usize {
        self.steps
            .iter()
            .filter(|s| s.prov.layer == Some(layer))
            .count()
    }

    /// The result of a name.
    pub fn output(&self, name: &str) -> Option<&Operand> {
        self.outputs
            .iter()
            .find(|(n, ..)| n == name)
            .map(|(_, o, _)| o)
    }
}

impl Plan {
    /// Where the program of a kind is among the programs.
    pub fn position(&self, kind: ProgramKind) -> Option<usize> {
        self.programs.iter().position(|p| p.kind == kind)
    }

    /// The program of a kind.
    pub fn program(&self, kind: ProgramKind) -> Option<&Program> {
        self.programs.iter().find(|p| p.kind == kind)
    }

    /// Bytes of all weights, read and computed.
    pub fn weight_bytes(&self) -> usize {
        self.weights.iter().map(|w| w.recipe.bytes()).sum()
    }

    /// Bytes of one cached token over all layers.
    pub fn token_bytes(&self) -> usize {
        self.caches.iter().map(CacheSpec::token_bytes).sum()
    }

    /// Bytes of activations of the largest program under an assignment of the symbols.
    pub fn activation_bytes(&self, env: &SymEnv) -> usize {
        let once = self.once.iter().map(|o| &o.program);
        self.programs
            .iter()
            .chain(once)
            .map(|p| p.activation_bytes(env))
            .max()
            .unwrap_or(0)
    }
}
