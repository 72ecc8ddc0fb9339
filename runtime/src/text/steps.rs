//! Compiled chat templates whose steps that make text are charged to the [budget](super::budget). minijinja counts
//! steps but not bytes, and has no hook for `+`, `~`, `*`, slices and raw text, so that a loop that doubles a text would
//! take all memory within few steps. Its instructions are replaced by ones that have a hook: calls of functions for the
//! operators, output of a constant, which goes through the formatter, for raw text.

use std::sync::LazyLock;

use minijinja::machinery::{Instruction, Instructions};
use minijinja::value::{Rest, Value};
use minijinja::{Environment, Error, ErrorKind, Expression, context, escape_formatter};

use super::budget::{charge, charge_items, length, weigh};

// No template can write these names.
const ADD: &str = "\0+";
const CONCAT: &str = "\0~";
const MUL: &str = "\0*";
const SLICE: &str = "\0[]";

/// The instructions with charged ones in the place of those that make text; jumps lead where they led.
///
/// # Errors
/// `*` or `**` in a call, which copies without a hook.
pub(super) fn charged<'s>(from: &Instructions<'s>) -> Result<Instructions<'s>, Error> {
    let count = from.len() as u32;
    let mut length = 0;
    let starts: Vec<u32> = (0..count)
        .map(|index| {
            let start = length;
            let is_raw = matches!(from.get(index), Some(Instruction::EmitRaw(_)));
            length += if is_raw { 2 } else { 1 };
            start
        })
        .collect();
    let target = |to: u32| starts.get(to as usize).copied().unwrap_or(length);
    let mut to = Instructions::new(from.name(), from.source());
    let mut add = |index: u32, instruction: Instruction<'s>| match from.get_span(index) {
        Some(span) => to.add_with_span(instruction, span),
        None => to.add_with_line(instruction, from.get_line(index).unwrap_or(0) as u16),
    };
    for index in 0..count {
        let Some(instruction) = from.get(index) else {
            break;
        };
        let call = |name, arguments| Instruction::CallFunction(name, Some(arguments));
        let instruction = match instruction {
            Instruction::EmitRaw(text) => {
                add(index, Instruction::LoadConst(Value::from(*text)));
                Instruction::Emit
            }
            Instruction::Add => call(ADD, 2),
            Instruction::StringConcat => call(CONCAT, 2),
            Instruction::Mul => call(MUL, 2),
            Instruction::Slice => call(SLICE, 4),
            Instruction::Iterate(t) => Instruction::Iterate(target(*t)),
            Instruction::Jump(t) => Instruction::Jump(target(*t)),
            Instruction::JumpIfFalse(t) => Instruction::JumpIfFalse(target(*t)),
            Instruction::JumpIfFalseOrPop(t) => Instruction::JumpIfFalseOrPop(target(*t)),
            Instruction::JumpIfTrueOrPop(t) => Instruction::JumpIfTrueOrPop(target(*t)),
            Instruction::BuildMacro(name, start, flags) => {
                Instruction::BuildMacro(name, target(*start), *flags)
            }
            Instruction::UnpackLists(_) | Instruction::MergeKwargs(_) => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    "* and ** in calls are not supported",
                ));
            }
            other => other.clone(),
        };
        add(index, instruction);
    }
    Ok(to)
}

/// Adds what [`charged`] instructions call.
pub(super) fn add_operators(environment: &mut Environment<'static>) {
    environment.set_formatter(|out, state, value| {
        charge(weigh(value)?)?;
        escape_formatter(out, state, value)
    });
    environment.add_function(ADD, |args: Rest<Value>| {
        let lengths = length(&args[0]).saturating_add(length(&args[1]));
        match is_text(&args[0]) && is_text(&args[1]) {
            true => charge(lengths)?,
            // Lists are joined when they are read, but then at once.
            false => charge_items(lengths)?,
        }
        evaluate(&SUM, &args)
    });
    environment.add_function(CONCAT, |args: Rest<Value>| {
        charge(weigh(&args[0])?.saturating_add(weigh(&args[1])?))?;
        evaluate(&CONCATENATION, &args)
    });
    environment.add_function(MUL, |args: Rest<Value>| {
        for (value, factor) in [(&args[0], &args[1]), (&args[1], &args[0])] {
            let Ok(factor) = u64::try_from(factor.clone()) else {
                continue;
            };
            let length = length(value).saturating_mul(factor);
            if is_text(value) {
                charge(length)?;
            } else if value.as_object().is_some() {
                charge_items(length)?;
            }
        }
        evaluate(&PRODUCT, &args)
    });
    environment.add_function(SLICE, |args: Rest<Value>| {
        match is_text(&args[0]) {
            true => charge(length(&args[0]))?,
            false => charge_items(length(&args[0]))?,
        }
        evaluate(&PART, &args)
    });
}

fn is_text(value: &Value) -> bool {
    value.as_str().is_some()
}

type Operation = LazyLock<Expression<'static, 'static>>;

static PLAIN: LazyLock<Environment<'static>> = LazyLock::new(Environment::new);
static SUM: Operation = LazyLock::new(|| operation("a + b"));
static CONCATENATION: Operation = LazyLock::new(|| operation("a ~ b"));
static PRODUCT: Operation = LazyLock::new(|| operation("a * b"));
static PART: Operation = LazyLock::new(|| operation("a[b:c:d]"));

fn operation(source: &'static str) -> Expression<'static, 'static> {
    PLAIN
        .compile_expression(source)
        .expect("the source is an expression")
}

/// The operation as minijinja defines it; its errors get the place in the template.
fn evaluate(operation: &Operation, args: &[Value]) -> Result<Value, Error> {
    let value = |index: usize| args.get(index).cloned().unwrap_or_default();
    let values = context! { a => value(0), b => value(1), c => value(2), d => value(3) };
    operation
        .eval(values)
        .map_err(|error| match error.detail() {
            Some(detail) => Error::new(error.kind(), detail.to_owned()),
            None => Error::from(error.kind()),
        })
}
