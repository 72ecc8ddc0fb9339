//! Names and texts of files, as messages show them.

/// Text of unknown origin with what could break or rewrite a line of a terminal escaped as in Rust: control characters
/// and the line and paragraph separators of Unicode. Text that is escaped already stays as it is. Every message that
/// holds a name or text out of a file (tensors, shards, keys, templates) shows it so, which keeps it on its line.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn what_breaks_a_line_is_escaped_once() {
        let shown = "a\\nb\\u{1b}[2J\\u{85}\\u{2028}é";
        assert_eq!(printable("a\nb\u{1b}[2J\u{85}\u{2028}é"), shown);
        assert_eq!(printable(shown), shown);
    }
}
