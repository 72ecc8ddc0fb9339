//! Chains on the values of the arena.

use super::kernels::Elem;
use super::kernels::chain::{Floats, FloatsMut, chain};
use super::run::Run;
use half::bf16;
use lathe_codegen::chain::RowProgram;
use lathe_codegen::{Operand, Step};
use lathe_ir::DType;

/// Runs a step that is a chain.
pub(super) fn step<E: Elem>(run: &Run<'_, E>, step: &Step) -> Result<(), String> {
    let program = RowProgram::of_step(step).ok_or("it is no chain")??;
    let tables: Vec<Option<Vec<f32>>> = step
        .tensors()
        .map(|(o, _)| match o {
            Operand::Table(t) => {
                let data = run.plan.tables[*t].data.iter();
                Some(data.map(|x| x.get() as f32).collect())
            }
            _ => None,
        })
        .collect();
    let mut operands = Vec::with_capacity(step.operands.len());
    for ((operand, ty), table) in step.tensors().zip(&tables) {
        operands.push(match (operand, table, ty.dtype) {
            (_, Some(data), _) => Floats::F32(data),
            (Operand::Value(v), _, DType::F32) => Floats::F32(run.read::<f32>(*v, ty)),
            (Operand::Value(v), _, DType::BF16) => Floats::Bf16(run.read::<bf16>(*v, ty)),
            (Operand::Weight(w), _, DType::F32) => Floats::F32(run.weight::<f32>(*w, ty)),
            (Operand::Weight(w), _, DType::BF16) => Floats::Bf16(run.weight::<bf16>(*w, ty)),
            (o, _, d) => return Err(format!("an operand is {o:?} of {d}")),
        });
    }
    let mut results = Vec::with_capacity(program.results.len());
    for (i, r) in program.results.iter().enumerate() {
        let ty = step.result_type(i).ok_or("a result is no tensor")?;
        let v = step
            .results
            .get(i)
            .copied()
            .flatten()
            .ok_or("an unread result")?;
        results.push(match r.dtype {
            DType::F32 => FloatsMut::F32(run.write::<f32>(v, ty)),
            DType::BF16 => FloatsMut::Bf16(run.write::<bf16>(v, ty)),
            d => return Err(format!("result {i} is of {d}")),
        });
    }
    chain(&program, program.row_count(&run.env), &operands, results).map_err(|e| e.to_string())
}
