//! Programs as snapshots show them: long tables cut short, and two programs as their difference.

use lathe_ir::Graph;
use lathe_ir::text::print;
use similar::{Algorithm, ChangeTag, capture_diff_slices, group_diff_ops};

/// Numbers of a table that are shown; the rest are counted.
const SHOWN: usize = 3;

/// The text of a program with long tables cut short: `data=[1.0, 0.1, 0.01, 5 more]`.
pub fn short(graph: &Graph) -> String {
    print(graph).lines().map(|l| elide(l) + "\n").collect()
}

fn elide(line: &str) -> String {
    let Some((before, rest)) = line.split_once("data=[") else {
        return line.to_string();
    };
    let (data, after) = rest.split_once(']').expect("a closing bracket");
    let numbers: Vec<&str> = data.split(", ").collect();
    if numbers.len() <= SHOWN + 1 {
        return line.to_string();
    }
    let (shown, more) = numbers.split_at(SHOWN);
    let shown = shown.join(", ");
    format!("{before}data=[{shown}, {} more]{after}", more.len())
}

/// What one program has and the other has not, each operation compared without the names of its
/// operands, which change with every line; one line around each place for orientation. `None`
/// where that is hardly shorter than the second program.
pub fn difference(before: &Graph, after: &Graph) -> Option<String> {
    let (before, after) = (operations(before), operations(after));
    let keys = |lines: &[String]| lines.iter().map(|l| nameless(l)).collect::<Vec<_>>();
    let ops = capture_diff_slices(Algorithm::Patience, &keys(&before), &keys(&after));
    let mut out: Vec<String> = Vec::new();
    for group in group_diff_ops(ops, 1) {
        if !out.is_empty() {
            out.push("  ..".to_string());
        }
        let changes = group.iter().flat_map(|op| op.iter_changes(&before, &after));
        for change in changes {
            // A line that both have is shown with the names of the second program.
            let (mark, line) = match (change.tag(), change.new_index()) {
                (ChangeTag::Equal, Some(i)) => (' ', &after[i]),
                (ChangeTag::Insert, _) => ('+', &change.value()),
                _ => ('-', &change.value()),
            };
            out.push(format!("{mark} {line}"));
        }
    }
    if out.is_empty() {
        out.push("the same operations".to_string());
    }
    (4 * out.len() <= 3 * after.len()).then(|| out.join("\n") + "\n")
}

/// The lines of the operations, without where they come from.
fn operations(graph: &Graph) -> Vec<String> {
    let text = short(graph);
    let lines = text.lines().filter(|l| l.starts_with("  %"));
    lines
        .map(|l| l.split("  // ").next().unwrap_or(l).trim().to_string())
        .collect()
}

/// A line without the numbers of values.
fn nameless(line: &str) -> String {
    let mut parts = line.split('%');
    let mut out = parts.next().unwrap_or("").to_string();
    for part in parts {
        out.push('%');
        out += part.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    out
}
