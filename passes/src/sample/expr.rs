//! Fills holes: `$name`, or `$(2 * h + 1)` for an expression of integers.

/// The text with its holes filled.
///
/// # Errors
/// A hole has no value, or an expression is none: one clause that says which.
pub(super) fn substitute(text: &str, values: &[(&str, String)]) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out += &rest[..at];
        rest = &rest[at + 1..];
        if let Some(inner) = rest.strip_prefix('(') {
            let end = inner.find(')').ok_or("expected ')' after '$('")?;
            out += &evaluate(&inner[..end], values)?.to_string();
            rest = &inner[end + 1..];
        } else {
            let end = word(rest);
            out += value(&rest[..end], values)?;
            rest = &rest[end..];
        }
    }
    Ok(out + rest)
}

/// The names of the holes in a text, whether or not they are filled.
pub(super) fn names(text: &str) -> Vec<&str> {
    let mut names = Vec::new();
    for part in text.split('$').skip(1) {
        match part.strip_prefix('(') {
            Some(inner) => {
                let inner = inner.split(')').next().unwrap_or(inner);
                names.extend(tokens(inner).filter(|t| is_name(t)));
            }
            None => names.push(&part[..word(part)]),
        }
    }
    names
}

/// Whether a text is a name of a hole.
pub(super) fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase()) && word(text) == text.len()
}

fn word(text: &str) -> usize {
    text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .unwrap_or(text.len())
}

fn value<'a>(name: &str, values: &'a [(&str, String)]) -> Result<&'a str, String> {
    // A program's own hole hides one of the file.
    let found = values.iter().rev().find(|(n, _)| *n == name);
    found
        .map(|(_, v)| v.as_str())
        .ok_or_else(|| format!("no hole '${name}'"))
}

fn tokens(text: &str) -> impl Iterator<Item = &str> {
    text.split_whitespace()
}

/// Sums of products of integers and holes, with spaces between the tokens.
fn evaluate(text: &str, values: &[(&str, String)]) -> Result<i64, String> {
    let fail = || format!("'{text}' is no expression such as '2 * h + 1'");
    let number = |token: Option<&str>| -> Result<i64, String> {
        let token = token.ok_or_else(fail)?;
        let digits = if is_name(token) {
            value(token, values)?
        } else {
            token
        };
        digits.parse().map_err(|_| fail())
    };
    let mut tokens = tokens(text);
    let (mut sum, mut sign) = (0_i64, 1);
    let mut product = number(tokens.next())?;
    while let Some(operator) = tokens.next() {
        let next = number(tokens.next())?;
        match operator {
            "*" => product = product.checked_mul(next).ok_or_else(fail)?,
            "+" | "-" => {
                sum = sum.checked_add(sign * product).ok_or_else(fail)?;
                sign = if operator == "+" { 1 } else { -1 };
                product = next;
            }
            _ => return Err(fail()),
        }
    }
    sum.checked_add(sign * product).ok_or_else(fail)
}
