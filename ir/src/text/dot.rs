//! Prints a program as a Graphviz graph, one cluster a decoder layer.

use super::attrs::attrs;
use super::quote::quote;
use crate::graph::{Graph, NodeId};
use crate::ops::Op;
use crate::ops::Table;
use crate::types::format_type;
use std::collections::BTreeMap;
use std::fmt::Write;

/// The program in Graphviz's dot language. Weights and other leaves are boxes; edges carry the
/// operand's position where there are several.
pub fn dot(graph: &Graph) -> String {
    let mut out = format!("digraph {} {{\n", label(&graph.name));
    out.push_str("  node [shape=ellipse, fontname=\"monospace\", fontsize=10];\n");
    let mut layers: BTreeMap<Option<u32>, Vec<NodeId>> = BTreeMap::new();
    for id in graph.ids() {
        layers
            .entry(graph.node(id).prov.layer)
            .or_default()
            .push(id);
    }
    for (layer, ids) in &layers {
        let indent = if let Some(l) = layer {
            let _ = writeln!(out, "  subgraph cluster_{l} {{\n    label=\"layer {l}\";");
            "    "
        } else {
            "  "
        };
        for &id in ids {
            let _ = writeln!(out, "{indent}{}", node(graph, id));
        }
        if layer.is_some() {
            out.push_str("  }\n");
        }
    }
    for id in graph.ids() {
        let inputs = &graph.node(id).inputs;
        for (pos, x) in inputs.iter().enumerate() {
            let _ = write!(out, "  n{} -> n{}", x.0, id.0);
            if inputs.len() > 1 {
                let _ = write!(out, " [headlabel=\"{pos}\"]");
            }
            out.push_str(";\n");
        }
    }
    for (i, (name, id)) in graph.outputs().iter().enumerate() {
        let _ = writeln!(
            out,
            "  out{i} [label={}, shape=box, style=bold];",
            label(name)
        );
        let _ = writeln!(out, "  n{} -> out{i};", id.0);
    }
    out.push_str("}\n");
    out
}

fn node(graph: &Graph, id: NodeId) -> String {
    let n = graph.node(id);
    let mut lines = vec![format!("{id} {}", n.op.name())];
    for (name, value) in attrs(&n.op) {
        // Long lists would hide everything else.
        lines.push(match &n.op {
            Op::Table(Table { data, .. }) if name == "data" => format!("{} numbers", data.len()),
            _ => format!("{name}={value}"),
        });
    }
    lines.push(format_type(&n.ty));
    let shape = if n.op.is_leaf() { ", shape=box" } else { "" };
    format!(
        "n{} [label={}{shape}, tooltip={}];",
        id.0,
        label(&lines.join("\n")),
        label(&n.prov.path)
    )
}

/// A quoted string in dot, where `\n` breaks the line and a backslash is doubled.
fn label(s: &str) -> String {
    quote(s)
}
