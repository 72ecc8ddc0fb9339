//! The values of what a program is given.

use super::eval::{Call, Eval};
use super::{CacheRef, Float, Tensor, Value};
use crate::dtype::DType;
use crate::operands::Operands;
use crate::ops::{Cache, Const, Input, Iota, Table, Weight};

type Out<F> = Result<Value<F>, String>;

impl Eval for Input {
    fn eval<F: Float>(&self, _: &Operands<&Value<F>>, call: &mut Call<'_, '_, F>) -> Out<F> {
        let given = call.state.inputs.get(&self.name).cloned();
        given.ok_or_else(|| format!("no value was given for input '{}'", self.name))
    }
}

impl Eval for Weight {
    fn eval<F: Float>(&self, _: &Operands<&Value<F>>, call: &mut Call<'_, '_, F>) -> Out<F> {
        let data = (call.state.weights)(&self.weight)?;
        let shape = call.state.extents(&self.weight.dims())?;
        if shape.iter().product::<usize>() != data.len() {
            return Err(format!(
                "weight '{}' has {} elements, expected {shape:?}",
                self.weight.name,
                data.len()
            ));
        }
        Ok(Value::Float(Tensor::new(shape, data)))
    }
}

impl Eval for Const {
    fn eval<F: Float>(&self, _: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        Ok(numbers(&[self.value.get()], Vec::new(), self.dtype))
    }
}

impl Eval for Table {
    fn eval<F: Float>(&self, _: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        let data: Vec<f64> = self.data.iter().map(|v| v.get()).collect();
        let n = data.len();
        Ok(numbers(&data, vec![n], DType::F32))
    }
}

impl Eval for Iota {
    fn eval<F: Float>(&self, _: &Operands<&Value<F>>, call: &mut Call<'_, '_, F>) -> Out<F> {
        let n = call.state.extents(&[self.len])?;
        let data: Vec<f64> = (0..n[0]).map(|i| i as f64).collect();
        Ok(numbers(&data, n, self.dtype))
    }
}

impl Eval for Cache {
    fn eval<F: Float>(&self, _: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        Ok(Value::Cache(CacheRef {
            layer: self.layer,
            kv_heads: self.kv_heads as usize,
            head_dim: self.head_dim as usize,
        }))
    }
}

/// Constants as a tensor of an element type.
pub(super) fn numbers<F: Float>(data: &[f64], shape: Vec<usize>, dtype: DType) -> Value<F> {
    match dtype {
        DType::Bool => Value::Bool(Tensor::new(shape, data.iter().map(|&v| v != 0.0).collect())),
        DType::I32 | DType::I64 => {
            Value::Int(Tensor::new(shape, data.iter().map(|&v| v as i64).collect()))
        }
        _ => Value::Float(Tensor::new(
            shape,
            data.iter().map(|&v| F::from_f64(v)).collect(),
        )),
    }
}
