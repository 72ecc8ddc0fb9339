//! Assigning values to reusable slots.

use crate::plan::{Operand, Program, Slot, ValueId};
use lathe_ir::Operands;
use lathe_ir::{Sym, SymEnv, TensorType};

/// Sizes at which slots are compared: any point will do, since values of one kind of extent grow
/// alike; a large one keeps per-token values apart from constants.
fn reference() -> SymEnv {
    SymEnv::new(&[(Sym::B, 64), (Sym::S, 64), (Sym::T, 1024), (Sym::R, 64)])
}

/// Gives every value of a program a slot such that values alive at the same time never share one.
/// Results of a step get their slots before its operands are released, so no kernel works in
/// place.
pub fn assign_slots(program: &mut Program) {
    let last_use = last_uses(program);
    let env = reference();
    let mut slots: Vec<Slot> = Vec::new();
    let mut free: Vec<usize> = Vec::new();
    let size = |slots: &[Slot], i: usize| slots[i].bytes(&env);
    for (at, step) in program.steps.iter().enumerate() {
        for v in step.results.iter().flatten() {
            let (ty, slot) = &mut program.values[v.0 as usize];
            *slot = take(&mut slots, &mut free, ty, &env);
        }
        let mut ended: Vec<ValueId> = values_of(&step.operands)
            .chain(step.results.iter().flatten().copied())
            .filter(|v| last_use[v.0 as usize] == at)
            .collect();
        ended.sort_unstable();
        ended.dedup();
        free.extend(ended.iter().map(|v| program.values[v.0 as usize].1));
        free.sort_by_key(|&i| (size(&slots, i), i));
    }
    program.slots = slots;
}

/// The smallest free slot that is large enough, else the largest, which grows, else a new one.
fn take(slots: &mut Vec<Slot>, free: &mut Vec<usize>, ty: &TensorType, env: &SymEnv) -> usize {
    let need = ty.bytes(env);
    let fits = free.iter().position(|&i| slots[i].bytes(env) >= need);
    let slot = match fits.or(free.len().checked_sub(1)) {
        Some(i) => free.remove(i),
        None => {
            slots.push(Slot::default());
            slots.len() - 1
        }
    };
    if !slots[slot].types.contains(ty) {
        slots[slot].types.push(ty.clone());
    }
    slot
}

fn values_of(operands: &Operands<Operand>) -> impl Iterator<Item = ValueId> + '_ {
    operands.iter().filter_map(|o| match o {
        Operand::Value(v) => Some(*v),
        _ => None,
    })
}

/// The last step that reads each value; results of the program live to the end.
fn last_uses(program: &Program) -> Vec<usize> {
    let mut last = vec![0; program.values.len()];
    for (at, step) in program.steps.iter().enumerate() {
        for v in values_of(&step.operands).chain(step.results.iter().flatten().copied()) {
            last[v.0 as usize] = at;
        }
    }
    for (_, o, _) in &program.outputs {
        if let Operand::Value(v) = o {
            last[v.0 as usize] = usize::MAX;
        }
    }
    last
}

/// Checks that no two values alive at the same time share a slot; for tests and debug builds.
pub fn check_slots(program: &Program) -> Result<(), String> {
    let last = last_uses(program);
    let mut owner: Vec<Option<ValueId>> = vec![None; program.slots.len()];
    for (at, step) in program.steps.iter().enumerate() {
        for v in values_of(&step.operands) {
            if owner[program.slot(v)] != Some(v) {
                return Err(format!(
                    "step {at} reads value {} after its slot was reused",
                    v.0
                ));
            }
        }
        for &v in step.results.iter().flatten() {
            let slot = program.slot(v);
            if let Some(old) = owner[slot].filter(|o| last[o.0 as usize] >= at) {
                return Err(format!(
                    "step {at} overwrites value {} while it is alive",
                    old.0
                ));
            }
            owner[slot] = Some(v);
        }
    }
    Ok(())
}
