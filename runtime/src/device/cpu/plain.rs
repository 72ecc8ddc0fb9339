//! One plain kernel an operation: the interpreter on the values of the arena.
//!
//! Unfused programs and operations without a kernel of their own run here: values are read as
//! f32, computed by the oracle's code and rounded to their element type when written back.

use super::kernels::Elem;
use super::run::{Run, is_elem};
use half::{bf16, f16};
use lathe_codegen::{Operand, Step};
use lathe_ir::interp::{Interp, Tensor, Value, eval_op};
use lathe_ir::{DType, TensorType};
use lathe_ir::{StepInput, Type};

/// Runs a step by the interpreter.
pub(super) fn step<E: Elem>(run: &Run<'_, E>, step: &Step) -> Result<(), String> {
    let mut types = step.types.iter();
    let values = step.operands.try_map(|operand| match types.next() {
        Some(Type::Tensor(ty)) => load(run, operand, ty),
        _ => Err("an operand is no tensor".to_string()),
    })?;
    let refs = values.map(|v| v);
    let no_weights = |_: &lathe_ir::WeightRef| Err("weights are operands here".to_string());
    let mut state = Interp::new(run.env, &no_weights);
    state.round = true;
    let out = eval_op(&step.op, refs, &step.ty, &mut state).map_err(|e| e.to_string())?;
    match out {
        Value::Tuple(parts) => {
            for (i, part) in parts.iter().enumerate() {
                store(run, step, i, part)?;
            }
            Ok(())
        }
        v => store(run, step, 0, &v),
    }
}

fn load<E: Elem>(
    run: &Run<'_, E>,
    operand: &Operand,
    ty: &TensorType,
) -> Result<Value<f32>, String> {
    let shape: Vec<usize> = ty.shape.iter().map(|d| d.eval(&run.env) as usize).collect();
    let ints = |v: &[i32]| {
        Value::Int(Tensor::new(
            shape.clone(),
            v.iter().map(|&x| i64::from(x)).collect(),
        ))
    };
    Ok(match operand {
        Operand::Value(v) => match ty.dtype {
            DType::Bool => {
                let data = run.read::<u8>(*v, ty).iter().map(|&x| x != 0).collect();
                Value::Bool(Tensor::new(shape, data))
            }
            DType::I32 => ints(run.read(*v, ty)),
            DType::I64 => Value::Int(Tensor::new(shape, run.read::<i64>(*v, ty).to_vec())),
            d if is_elem::<E>(d) => floats(shape, run.read::<E>(*v, ty)),
            DType::F32 => Value::Float(Tensor::new(shape, run.read::<f32>(*v, ty).to_vec())),
            DType::BF16 => {
                let data = run
                    .read::<bf16>(*v, ty)
                    .iter()
                    .map(|x| x.to_f32())
                    .collect();
                Value::Float(Tensor::new(shape, data))
            }
            DType::F16 => {
                let data = run.read::<f16>(*v, ty).iter().map(|x| x.to_f32()).collect();
                Value::Float(Tensor::new(shape, data))
            }
        },
        Operand::Weight(w) => match ty.dtype {
            d if is_elem::<E>(d) => floats(shape, run.weight::<E>(*w, ty)),
            DType::F32 => Value::Float(Tensor::new(shape, run.weight::<f32>(*w, ty).to_vec())),
            DType::BF16 => floats(shape, run.weight::<bf16>(*w, ty)),
            d => return Err(format!("a weight of {d}")),
        },
        Operand::Table(t) => {
            let data = run.plan.tables[*t].data.iter();
            Value::Float(Tensor::new(shape, data.map(|x| x.get() as f32).collect()))
        }
        Operand::Const { value, dtype } => match dtype {
            DType::Bool => Value::Bool(Tensor::new(shape, vec![value.get() != 0.0])),
            DType::I32 | DType::I64 => Value::Int(Tensor::new(shape, vec![value.get() as i64])),
            _ => Value::Float(Tensor::new(shape, vec![value.get() as f32])),
        },
        Operand::Input(n) => {
            let b = run.inputs.batch;
            match run.program.inputs[*n].0 {
                StepInput::Tokens => ints(&b.tokens),
                StepInput::Positions => ints(&b.positions),
                StepInput::Rows => ints(&b.rows),
            }
        }
        Operand::Cache(_) => return Err("a cache is no tensor".to_string()),
    })
}

fn floats<E: Elem>(shape: Vec<usize>, data: &[E]) -> Value<f32> {
    Value::Float(Tensor::new(
        shape,
        data.iter().map(|x| x.to_f32()).collect(),
    ))
}

fn store<E: Elem>(
    run: &Run<'_, E>,
    step: &Step,
    i: usize,
    value: &Value<f32>,
) -> Result<(), String> {
    let (Some(v), Some(ty)) = (step.results.get(i).copied().flatten(), step.result_type(i)) else {
        return Ok(());
    };
    match (value, ty.dtype) {
        (Value::Float(t), d) if is_elem::<E>(d) => {
            fill(run.write::<E>(v, ty), &t.data, |&x| E::from_f32(x))
        }
        (Value::Float(t), DType::F32) => fill(run.write::<f32>(v, ty), &t.data, |&x| x),
        (Value::Float(t), DType::BF16) => {
            fill(run.write::<bf16>(v, ty), &t.data, |&x| bf16::from_f32(x))
        }
        (Value::Float(t), DType::F16) => {
            fill(run.write::<f16>(v, ty), &t.data, |&x| f16::from_f32(x))
        }
        (Value::Int(t), DType::I64) => fill(run.write::<i64>(v, ty), &t.data, |&x| x),
        (Value::Int(t), DType::I32) => fill(run.write::<i32>(v, ty), &t.data, |&x| x as i32),
        (Value::Bool(t), DType::Bool) => fill(run.write::<u8>(v, ty), &t.data, |&x| u8::from(x)),
        _ => Err(format!("result of another kind than {}", type_name(ty))),
    }
}

fn fill<A, B>(out: &mut [B], data: &[A], f: impl Fn(&A) -> B) -> Result<(), String> {
    if out.len() != data.len() {
        return Err(format!("{} elements for {}", data.len(), out.len()));
    }
    for (o, x) in out.iter_mut().zip(data) {
        *o = f(x);
    }
    Ok(())
}

fn type_name(ty: &TensorType) -> String {
    format!("{} of rank {}", ty.dtype, ty.rank())
}
