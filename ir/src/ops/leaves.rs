//! Operations without operands: what a program is given.

use super::{Class, Fields, Level, Operation, Signature};
use crate::operands::Operands;
use crate::shape::Dim;
use crate::{DType, Real, Type};

type Rule = Result<Type, String>;

/// A value given at run time, by name (`tokens`, `positions`, `rows`, region boundaries).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Input {
    /// Name of the input.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Extents.
    pub shape: Vec<Dim>,
}

impl Operation for Input {
    const NAMES: &'static [&'static str] = &["input"];
    const SIGNATURE: Signature = Signature::LEAF;

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.dtype(&mut self.dtype)?;
        v.shape(&mut self.shape)?;
        v.text("name", &mut self.name)
    }

    fn ty(&self, _: &Operands<&Type>) -> Rule {
        Ok(Type::tensor(self.dtype, &self.shape[..]))
    }
}

/// A named tensor of the checkpoint.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct WeightRef {
    /// Name in the checkpoint, e.g. `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Extents; always constants.
    pub shape: Vec<i64>,
}

impl WeightRef {
    /// The extents as dims.
    pub fn dims(&self) -> Vec<Dim> {
        self.shape.iter().map(|&n| Dim::new(n)).collect()
    }
}

/// A tensor of the checkpoint, in the graph's element type.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Weight {
    /// Which tensor.
    pub weight: WeightRef,
    /// Element type in memory.
    pub dtype: DType,
}

impl Operation for Weight {
    const NAMES: &'static [&'static str] = &["weight"];
    const SIGNATURE: Signature = Signature::LEAF;

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.dtype(&mut self.dtype)?;
        v.known_shape(&mut self.weight.shape)?;
        v.text("name", &mut self.weight.name)
    }

    fn ty(&self, _: &Operands<&Type>) -> Rule {
        Ok(Type::tensor(self.dtype, self.weight.dims()))
    }
}

/// A rank-0 constant; broadcasting does the rest.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Const {
    /// The value.
    pub value: Real,
    /// Element type.
    pub dtype: DType,
}

impl Operation for Const {
    const NAMES: &'static [&'static str] = &["const"];
    const SIGNATURE: Signature = Signature::LEAF;

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.dtype(&mut self.dtype)?;
        v.real("value", &mut self.value)
    }

    fn ty(&self, _: &Operands<&Type>) -> Rule {
        Ok(Type::tensor(self.dtype, []))
    }
}

/// A small f32 vector known at compile time (rotary frequencies).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Table {
    /// What it is, for readers.
    pub name: String,
    /// The elements.
    pub data: Vec<Real>,
}

impl Operation for Table {
    const NAMES: &'static [&'static str] = &["table"];
    const SIGNATURE: Signature = Signature::LEAF;

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.text("name", &mut self.name)?;
        v.reals("data", &mut self.data)
    }

    fn ty(&self, _: &Operands<&Type>) -> Rule {
        Ok(Type::tensor(DType::F32, [Dim::from(self.data.len())]))
    }
}

/// `[0, 1, …, n-1]`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Iota {
    /// The extent.
    pub len: Dim,
    /// Element type.
    pub dtype: DType,
}

impl Operation for Iota {
    const NAMES: &'static [&'static str] = &["iota"];
    const SIGNATURE: Signature = Signature::LEAF;

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.dtype(&mut self.dtype)?;
        v.extent(&mut self.len)
    }

    fn ty(&self, _: &Operands<&Type>) -> Rule {
        Ok(Type::tensor(self.dtype, [self.len]))
    }
}

/// The KV cache of a layer. Holds rows `0..s_b` of k and v of each sequence when a step starts.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Cache {
    /// Layer index; also the index of the cache.
    pub layer: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Features per head.
    pub head_dim: u32,
}

impl Operation for Cache {
    const NAMES: &'static [&'static str] = &["cache"];
    // Importers know no caches: a rule makes them.
    const SIGNATURE: Signature = Signature::new(Level::Composite, Class::Movement, &[]);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.int("layer", &mut self.layer)?;
        v.int("kv_heads", &mut self.kv_heads)?;
        v.int("head_dim", &mut self.head_dim)
    }

    fn ty(&self, _: &Operands<&Type>) -> Rule {
        Ok(Type::Cache)
    }
}
