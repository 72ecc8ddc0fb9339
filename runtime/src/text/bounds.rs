//! Bounds on what a filter, method or function of a chat template may allocate: fuel counts instructions, not bytes.

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, filters, functions};

use super::budget::{charge, charge_items, length, weigh};

/// Greatest number that a filter which repeats or splits takes.
const MOST: i64 = 10_000;

macro_rules! bound_filters {
    ($environment:ident: $($name:ident)*) => {
        $(
            $environment.add_filter(concat!("unbounded_", stringify!($name)), filters::$name);
            $environment.add_filter(stringify!($name), |state: &State, args: Rest<Value>| {
                bounded(state, stringify!($name), &args)
            });
        )*
    };
}

/// Replaces the filters and methods that make text or lists by ones that charge for them and refuse great numbers.
pub(super) fn bound(environment: &mut Environment<'static>) {
    bound_filters!(environment:
        upper lower title capitalize trim string escape safe pprint sum indent format join replace
        list split lines items dictsort reverse sort unique map select reject selectattr rejectattr groupby zip chain
        batch slice);
    environment.add_filter("e", |state: &State, args: Rest<Value>| {
        bounded(state, "escape", &args)
    });
    // Shows all there is.
    environment.remove_global("debug");
    environment.add_function("dict", |value: Option<Value>, kwargs: Kwargs| {
        charge_items(4 * value.as_ref().map_or(0, length))?;
        functions::dict(value, kwargs)
    });
    environment.add_function("namespace", |value: Option<Value>| {
        charge_items(4 * value.as_ref().map_or(0, length))?;
        functions::namespace(value)
    });
    environment.set_unknown_method_callback(|state, value, method, args| {
        let all: Vec<Value> = std::iter::once(value).chain(args).cloned().collect();
        match (value.kind(), method) {
            (
                ValueKind::String,
                "startswith" | "endswith" | "find" | "rfind" | "count" | "isalpha" | "isdigit",
            ) => {}
            (ValueKind::String, "rsplit") => cost("split", &all)?,
            (ValueKind::String, "splitlines") => cost("lines", &all)?,
            (ValueKind::String, "join") => {
                cost(
                    "join",
                    &[args.first().unwrap_or(value).clone(), value.clone()],
                )?;
            }
            (ValueKind::String, _) => cost(method, &all)?,
            _ => charge_items(length(value))?,
        }
        minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
    });
}

/// The filter, after its cost was charged.
fn bounded(state: &State, name: &str, args: &[Value]) -> Result<Value, Error> {
    cost(name, args)?;
    match name {
        "indent" | "slice" | "batch" => numbers(state, name, args),
        _ => state.apply_filter(&format!("unbounded_{name}"), args),
    }
}

/// Charges what a filter or a method of texts may make of its arguments, the value first.
fn cost(name: &str, args: &[Value]) -> Result<(), Error> {
    let Some(value) = args.first() else {
        return Ok(());
    };
    let text = |index: usize| args.get(index).map_or(0, length);
    let product = |a: u64, b: u64| charge(a.saturating_mul(b));
    match name {
        "list" | "lines" | "items" | "dictsort" | "reverse" | "sort" | "unique" | "map"
        | "select" | "reject" | "selectattr" | "rejectattr" | "groupby" | "zip" | "chain" => {
            for value in args {
                charge_items(length(value))?;
            }
        }
        "batch" | "slice" => charge_items(length(value) + MOST as u64)?,
        "split" => {
            charge(length(value))?;
            charge_items(length(value) / text(1).max(1) + 1)?;
        }
        "replace" => {
            charge(length(value))?;
            product(length(value) / text(1).max(1) + 1, text(2))?;
        }
        "join" => {
            charge(weigh(value)?)?;
            product(length(value), text(1))?;
        }
        "indent" => {
            let source = value.as_str().unwrap_or_default();
            charge(source.len() as u64)?;
            let lines = source.lines().count() as u64 + 1;
            product(lines, if args.len() > 1 { MOST as u64 } else { 4 })?;
        }
        "format" => {
            check_format(Some(value))?;
            let source = value.as_str().unwrap_or_default();
            let widths = source.split(|c: char| !c.is_ascii_digit());
            charge(widths.filter_map(|n| n.parse::<u64>().ok()).sum())?;
            let places = source.matches(['%', '{']).count() as u64 + 1;
            for value in args {
                product(places, weigh(value)?)?;
            }
        }
        _ => {
            for value in args {
                charge(weigh(value)?)?;
            }
        }
    }
    Ok(())
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
