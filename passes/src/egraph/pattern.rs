//! Patterns as rules spell them: operands that may be absent are given by name.
//!
//! `(gemm ?p (rmsnorm ?e ?x ?g) ?w bias=?b)` is a product whose first operand is a norm, with any bias or none,
//! and without the other operands that a `gemm` may have. A variable in an optional place also binds the
//! absence. The e-graph has every place, so that patterns of one operation are of one length.

use super::Lang;
use super::lang::ABSENT;
use egg::Pattern;
use lathe_ir::Op;
use std::iter::Peekable;

/// Reads a pattern.
///
/// # Errors
/// Unbalanced parentheses, an unknown operation or operand, or a required operand that is not given.
pub fn pattern(text: &str) -> Result<Pattern<Lang>, String> {
    let spaced = text.replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let mut out = String::with_capacity(text.len());
    term(&mut words, &mut out)?;
    match words.next() {
        Some(word) => Err(format!("'{word}' after the end of the pattern")),
        None => out.parse().map_err(|e| format!("{e}")),
    }
}

/// A variable, or an operation with its payload and operands; written to `out` with all its places.
fn term<'a>(
    words: &mut Peekable<impl Iterator<Item = &'a str>>,
    out: &mut String,
) -> Result<(), String> {
    let word = words.next().ok_or("the pattern ends too early")?;
    if word != "(" {
        out.push_str(word);
        return Ok(());
    }
    let name = words.next().ok_or("an operation is missing after '('")?;
    let op = Op::named(name).ok_or_else(|| format!("no operation named '{name}'"))?;
    let signature = op.signature();
    out.push('(');
    out.push_str(name);
    if op.has_payload() {
        out.push(' ');
        term(words, out)?;
    }
    let mut places: Vec<Option<String>> = vec![None; signature.slots.len()];
    let mut at = 0;
    loop {
        let word = *words.peek().ok_or("a ')' is missing")?;
        if word == ")" {
            words.next();
            break;
        }
        let mut operand = String::new();
        let place = match word.split_once('=') {
            Some((slot, rest)) => {
                words.next();
                // What stands behind '=' is the operand, or a parenthesis that begins it.
                operand.push_str(rest);
                signature.slot(slot).map(|s| s.index())
            }
            None if signature.variadic => {
                places.push(None);
                Some(places.len() - 1)
            }
            None => {
                at += 1;
                signature.slots.get(at - 1).map(|s| s.index())
            }
        };
        let place = place.ok_or_else(|| format!("'{name}' has no operand '{word}'"))?;
        if operand.is_empty() {
            term(words, &mut operand)?;
        }
        if places[place].replace(operand).is_some() {
            return Err(format!("operand '{word}' of '{name}' is given twice"));
        }
    }
    for (i, place) in places.iter().enumerate() {
        out.push(' ');
        match place {
            Some(operand) => out.push_str(operand),
            None if signature.slots[i].is_optional() => out.push_str(ABSENT),
            None => {
                let slot = signature.slots[i].name();
                return Err(format!("operand '{slot}' of '{name}' is not given"));
            }
        }
    }
    out.push(')');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_operands_need_not_be_spelled() {
        let full = |text| pattern(text).map(|p| p.to_string());
        assert_eq!(
            full("(gemm ?p (rmsnorm ?e ?x ?g) ?w residual=(silu ?r))").unwrap(),
            "(gemm ?p (rmsnorm ?e ?x ?g) ?w absent (silu ?r) absent absent)"
        );
        assert_eq!(full("(pack ?k ?a ?b)").unwrap(), "(pack ?k ?a ?b)");
        assert_eq!(full("(linear w=?w ?x)").unwrap(), "(linear ?x ?w)");
        for (bad, reason) in [
            ("(gemm ?p ?x)", "operand 'w' of 'gemm' is not given"),
            ("(gemm ?p ?x ?w gain=?g)", "'gemm' has no operand 'gain=?g'"),
            (
                "(linear ?x ?w x=?y)",
                "operand 'x=?y' of 'linear' is given twice",
            ),
            ("(sofmax ?x)", "no operation named 'sofmax'"),
            ("(silu ?x", "a ')' is missing"),
            ("(silu ?x))", "')' after the end of the pattern"),
        ] {
            assert_eq!(full(bad).unwrap_err(), reason, "{bad}");
        }
    }
}
