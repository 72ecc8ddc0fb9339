//! Bounds on what a chat template may ask minijinja to allocate in one step: fuel counts instructions, not bytes.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, filters};

/// Greatest number that a filter which repeats or splits takes.
const MOST: i64 = 10_000;

/// Replaces the filters whose work grows with a number by ones that refuse great numbers.
pub(super) fn bound(environment: &mut Environment<'static>) {
    environment.add_filter("unbounded_indent", filters::indent);
    environment.add_filter("unbounded_slice", filters::slice);
    environment.add_filter("unbounded_batch", filters::batch);
    environment.add_filter("unbounded_format", filters::format);
    environment.add_filter("indent", |state: &State, args: Rest<Value>| {
        numbers(state, "indent", &args)
    });
    environment.add_filter("slice", |state: &State, args: Rest<Value>| {
        numbers(state, "slice", &args)
    });
    environment.add_filter("batch", |state: &State, args: Rest<Value>| {
        numbers(state, "batch", &args)
    });
    environment.add_filter("format", |state: &State, args: Rest<Value>| {
        check_format(args.first())?;
        state.apply_filter("unbounded_format", &args)
    });
    environment.set_unknown_method_callback(|state, value, method, args| {
        if method == "format" {
            check_format(Some(value))?;
        }
        minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
    });
}

/// The filter, if none of its numbers is too great.
fn numbers(state: &State, name: &str, args: &[Value]) -> Result<Value, Error> {
    // What is filtered comes first.
    for argument in args.iter().skip(1) {
        let named = match argument.kind() {
            ValueKind::Map => argument.try_iter()?.collect(),
            _ => Vec::new(),
        };
        let named = named
            .into_iter()
            .filter_map(|key| argument.get_item(&key).ok());
        for value in named.chain([argument.clone()]) {
            check(name, &value)?;
        }
    }
    state.apply_filter(&format!("unbounded_{name}"), args)
}

/// An error if the value is a number that is too great.
pub(super) fn check(what: &str, value: &Value) -> Result<(), Error> {
    let number = value.kind() == ValueKind::Number;
    if number && !i64::try_from(value.clone()).is_ok_and(|n| n.abs() <= MOST) {
        return Err(refused(format!(
            "{what}: {value} is too much, at most {MOST} is allowed"
        )));
    }
    Ok(())
}

/// Widths and precisions of a format are numbers of at most four digits, none of them an argument (`*`).
fn check_format(format: Option<&Value>) -> Result<(), Error> {
    let Some(text) = format.and_then(Value::as_str) else {
        return Ok(());
    };
    let wide = text
        .split(|c: char| !c.is_ascii_digit())
        .any(|digits| digits.len() > 4);
    if wide || text.contains('*') {
        return Err(refused(
            "format: widths are at most four digits, given in the format".into(),
        ));
    }
    Ok(())
}

fn refused(reason: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}
