//! Names and texts of files, as messages show them.

/// Text of unknown origin with what could break, rewrite or reorder a line of a terminal escaped as in Rust: control
/// characters, the line and paragraph separators of Unicode, and characters that have no picture but an effect, such as
/// those that turn the direction of writing. Text that is escaped already stays as it is. Every message that holds a
/// name or text out of a file (tensors, shards, keys, templates) shows it so, which keeps it on its line.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || has_no_picture(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Separators of lines, marks of direction, joiners and spaces of no width, and tags.
fn has_no_picture(c: char) -> bool {
    matches!(
        c,
        '\u{00ad}'
            | '\u{061c}'
            | '\u{180e}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}'
    )
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

    #[test]
    fn what_reorders_or_hides_text_is_escaped() {
        let text = "a\u{202e}b\u{2066}c\u{200b}d\u{feff}e\u{e0041}";
        assert!(printable(text).is_ascii(), "{}", printable(text));
        assert_eq!(printable("naïve 模型 😀"), "naïve 模型 😀");
    }
}
