//! Plain tables: columns as wide as their longest cell.

/// Which side of a column its cells stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    /// The left one.
    Left,
    /// The right one.
    Right,
}

/// Rows as lines of text with two spaces between columns; no spaces at the end of a line.
pub(crate) fn table(rows: &[Vec<String>], align: impl Fn(usize) -> Align) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .enumerate()
            .map(|(i, cell)| match align(i) {
                Align::Left => format!("{cell:<0$}", widths[i]),
                Align::Right => format!("{cell:>0$}", widths[i]),
            })
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// A number with about three significant digits and no exponent.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["name", "n"], ["a·b", "10"]].map(|row| row.map(str::to_owned).to_vec());
        let right_after_first = |i| if i == 0 { Align::Left } else { Align::Right };
        assert_eq!(table(&rows, right_after_first), "name   n\na·b   10\n");
    }

    #[test]
    fn three_digits() {
        let texts = [3087.4, 96.77, 3.0, 0.375, -2.5].map(number);
        assert_eq!(texts, ["3087", "96.8", "3.00", "0.375", "-2.50"]);
    }
}
