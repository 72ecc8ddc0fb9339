//! A program as JSON, for other programs to read.

use super::attrs::{Attr, attrs};
use crate::graph::Graph;
use crate::types::format_type;
use serde_json::{Map, Value, json as object};

/// The program as a JSON object: `name`, `nodes` (each with `id`, `op`, `inputs`, `attrs`, `type`,
/// `layer`, `path`) and `outputs` (each with `name` and `id`). Types are written as in the text.
pub fn json(graph: &Graph) -> Value {
    let nodes: Vec<Value> = graph
        .ids()
        .map(|id| {
            let n = graph.node(id);
            let attrs: Map<String, Value> = attrs(&n.op)
                .into_iter()
                .map(|(name, v)| (name.to_string(), attr(v)))
                .collect();
            object!({
                "id": id.0,
                "op": n.op.name(),
                "inputs": n.inputs.iter().map(|i| i.0).collect::<Vec<u32>>(),
                "attrs": attrs,
                "type": format_type(&n.ty),
                "layer": n.prov.layer,
                "path": &*n.prov.path,
            })
        })
        .collect();
    let outputs: Vec<Value> = graph
        .outputs()
        .iter()
        .map(|(name, id)| object!({ "name": name, "id": id.0 }))
        .collect();
    object!({ "name": graph.name, "nodes": nodes, "outputs": outputs })
}

fn attr(v: Attr) -> Value {
    match v {
        Attr::Int(i) => i.into(),
        Attr::Real(r) => real(r.get()),
        Attr::Word(w) if w == "true" || w == "false" => Value::Bool(w == "true"),
        Attr::Word(s) | Attr::Text(s) => s.into(),
        Attr::Ints(v) => v.into(),
        Attr::Reals(v) => v.iter().map(|r| real(r.get())).collect(),
    }
}

/// JSON has no infinities: they become strings.
fn real(v: f64) -> Value {
    serde_json::Number::from_f64(v).map_or_else(|| v.to_string().into(), Value::Number)
}
