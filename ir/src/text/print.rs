//! Prints a program as SSA text.

use super::attrs::attrs;
use super::quote::quote;
use crate::graph::{Graph, Node, NodeId, Prov};
use crate::types::format_type;
use std::fmt::Write;

/// Column at which the comments start, where the line is short enough.
const COMMENT_COLUMN: usize = 64;

/// The program as text; [`super::parse`] reads it back.
pub fn print(graph: &Graph) -> String {
    let mut out = format!("graph {} {{\n", quote(&graph.name));
    for id in graph.ids() {
        let _ = writeln!(out, "  {}", print_node(id, graph.node(id)));
    }
    out.push_str("  return");
    for (i, (name, id)) in graph.outputs().iter().enumerate() {
        let sep = if i > 0 { "," } else { "" };
        let name = if is_word(name) {
            name.clone()
        } else {
            quote(name)
        };
        let _ = write!(out, "{sep} {name}={id}");
    }
    out.push_str("\n}\n");
    out
}

/// The line of one node.
pub fn print_node(id: NodeId, node: &Node) -> String {
    let mut line = format!("{id} = {}{}", node.op.name(), operands(node));
    let attrs = attrs(&node.op);
    for (i, (name, value)) in attrs.iter().enumerate() {
        let _ = write!(line, "{}{name}={value}", if i > 0 { ", " } else { " {" });
    }
    if !attrs.is_empty() {
        line.push('}');
    }
    let _ = write!(line, " : {}", format_type(&node.ty));
    if let Some(comment) = comment(&node.prov) {
        let width = line.chars().count();
        let pad = COMMENT_COLUMN.saturating_sub(width).max(2);
        let _ = write!(line, "{:pad$}// {comment}", "");
    }
    line
}

/// The operands with a blank before them: by name where the operation has several, except for primitives.
fn operands(node: &Node) -> String {
    let signature = node.op.signature();
    let mut out = String::new();
    let mut positional = !signature.is_named();
    for (n, (i, x)) in node.inputs.enumerate().enumerate() {
        // A gap is legal in a graph that was built without checks.
        positional &= n == i;
        let sep = if n > 0 { ", " } else { " " };
        let _ = match signature.slots.get(i) {
            Some(slot) if !positional => write!(out, "{sep}{}={x}", slot.name()),
            _ => write!(out, "{sep}{x}"),
        };
    }
    out
}

/// Layer and path, or nothing for a value without provenance.
fn comment(prov: &Prov) -> Option<String> {
    let path = if is_plain_path(&prov.path) {
        prov.path.to_string()
    } else {
        quote(&prov.path)
    };
    match (prov.layer, prov.path.is_empty()) {
        (None, true) => None,
        (None, false) => Some(path),
        (Some(l), true) => Some(format!("L{l}")),
        (Some(l), false) => Some(format!("L{l} {path}")),
    }
}

/// Whether a path can stand in a comment without quotes and is not taken for a layer.
pub(super) fn is_plain_path(path: &str) -> bool {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '/' | ':');
    !path.is_empty() && path.chars().all(ok) && layer(path).is_none()
}

/// The layer that `L<n>` stands for.
pub(super) fn layer(word: &str) -> Option<Option<u32>> {
    let digits = word.strip_prefix('L')?;
    let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    is_number.then(|| digits.parse().ok())
}

fn is_word(s: &str) -> bool {
    let mut bytes = s.bytes();
    bytes
        .next()
        .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
}
