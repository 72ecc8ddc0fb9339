//! The page of `--dump-format html`: one file without references to others. The page's text is
//! page.html; here the data is made that it draws.

use super::{at, cost_change, summaries};
use crate::frontend::Imported;
use crate::phases::{duration, picoseconds};
use lathe_ir::{Graph, text};
use lathe_passes::Stage;
use lathe_passes::explain::{Form, OpStory, ProgramStory};
use lathe_passes::pipeline::{PassConfig, Recorded, RecordedTemplate, TemplateReport};
use lathe_passes::predict::{kernel_name, predict};
use serde_json::{Value, json};
use std::path::Path;

const PAGE: &str = include_str!("page.html");
/// Where the data goes.
const HOLE: &str = "/*DATA*/null";
/// Longest attribute that is shown; rotary frequencies are longer.
const LONGEST: usize = 160;

/// The page of a compilation.
///
/// # Errors
/// The data cannot be written as JSON.
pub fn html(
    imported: &Imported,
    recorded: &Recorded,
    config: &PassConfig,
) -> anyhow::Result<String> {
    let compiled = &recorded.compiled;
    let stages: Vec<Value> = summaries(recorded, config)
        .iter()
        .map(|s| {
            json!({
                "name": s.stage.name(),
                "enabled": s.enabled,
                "matches": s.total(),
                "unmatched": s.unmatched,
                "off": s.off,
                "nodes": s.nodes,
                "classes": s.classes,
                "cost": cost_change(s),
                "time": duration(s.time),
            })
        })
        .collect();
    let kernels = |g: &Option<Graph>, p| {
        g.as_ref().map(|g| {
            let p = predict(g, p);
            json!({ "kernels": p.total.kernels, "time": picoseconds(p.total.picoseconds) })
        })
    };
    let templates = compiled.templates.iter().zip(&recorded.templates);
    let data = json!({
        "model": short_name(&imported.name),
        "family": imported.model.arch.family,
        "layers": imported.model.arch.layers,
        "parameters": imported.model.arch.parameters(),
        "dtype": imported.dtype.to_string(),
        "decodeAt": at(&config.points.decode),
        "generalAt": at(&config.points.general),
        "decode": kernels(&compiled.steps.decode, &config.points.decode),
        "general": kernels(&compiled.steps.general, &config.points.general),
        "noStep": compiled.no_step.as_ref().map(ToString::to_string),
        "stages": stages,
        "templates": templates.map(|(t, seen)| template(t, seen)).collect::<Vec<_>>(),
    });
    // A closing tag inside of a string would end the script.
    let data = serde_json::to_string(&data)?.replace("</", "<\\/");
    Ok(PAGE.replacen(HOLE, &data, 1))
}

/// A hub id as it is, of a path the last part.
fn short_name(name: &str) -> &str {
    let path = Path::new(name);
    let last = path.file_name().and_then(|n| n.to_str()).unwrap_or(name);
    if path.is_dir() { last } else { name }
}

fn template(t: &TemplateReport, seen: &RecordedTemplate) -> Value {
    let story = seen.story.as_ref();
    let mut columns = vec![json!({
        "name": "import",
        "rules": [],
        "graph": graph(&t.imported, story.map(|s| &s.imported[..])),
    })];
    for (i, (report, seen)) in t.stages.iter().zip(&seen.stages).enumerate() {
        let last = i + 1 == t.stages.len();
        // What the last stage ends in is the program itself.
        let (best, values) = match (last, &t.steps.decode, story) {
            (true, Some(g), Some(s)) => (Some(g), Some(&s.decode.nodes[..])),
            _ => (
                seen.best.as_ref().map(|(g, _)| g),
                story.map(|s| &s.stages.decode[i][..]),
            ),
        };
        let mut column = json!({
            "name": report.stage.name(),
            "step": report.stage >= Stage::KvCache,
            "rules": report.matches,
            "cost": seen.best.as_ref().map(|(_, cost)| picoseconds(*cost)),
            "time": duration(report.saturate),
            "nodes": report.nodes,
            "graph": best.map(|g| graph(g, values)),
        });
        if let Some((g, cost)) = &seen.general {
            let told = story.and_then(|s| s.general.as_ref());
            let (g, values) = match (last, &t.steps.general, told) {
                (true, Some(g), Some(s)) => (g, Some(&s.nodes[..])),
                _ => (g, story.map(|s| &s.stages.general[i][..])),
            };
            column["general"] = json!({ "graph": graph(g, values), "cost": picoseconds(*cost) });
        }
        columns.push(column);
    }
    let general = story.and_then(|s| s.general.as_ref());
    json!({
        "name": t.name,
        "layers": t.layers,
        "columns": columns,
        "decode": story.zip(t.steps.decode.as_ref()).map(|(s, g)| program(&s.decode, g)),
        "general": general.zip(t.steps.general.as_ref()).map(|(s, g)| program(s, g)),
    })
}

/// The kernels of a program, and the forms of those of its values that have several.
fn program(story: &ProgramStory, graph: &Graph) -> Value {
    let values: serde_json::Map<String, Value> = story
        .values
        .iter()
        .filter(|(_, v)| v.forms.len() > 1)
        .map(|(n, v)| {
            let forms: Vec<Value> = v.forms.iter().map(form).collect();
            (n.to_string(), json!({ "type": v.ty, "forms": forms }))
        })
        .collect();
    json!({ "values": values, "ops": ops(story, graph) })
}

fn graph(g: &Graph, values: Option<&[usize]>) -> Value {
    let nodes: Vec<Value> = g
        .ids()
        .map(|id| {
            let n = g.node(id);
            let mut attrs: Vec<String> = Vec::new();
            for (name, value) in text::attrs(&n.op) {
                let text = format!("{name}={value}");
                attrs.push(if text.len() > LONGEST {
                    format!("{name}=…")
                } else {
                    text
                });
            }
            json!({
                "o": n.op.name(),
                "k": kernel_name(&n.op),
                "i": n.inputs.iter().map(|i| i.0).collect::<Vec<_>>(),
                "a": attrs.join(", "),
                "t": text::format_type(&n.ty),
                "p": &*n.prov.path,
                "l": n.op.is_leaf(),
                "v": values.and_then(|v| v.get(id.index())),
            })
        })
        .collect();
    let outputs: Vec<Value> = g.outputs().iter().map(|(n, id)| json!([n, id.0])).collect();
    json!({ "nodes": nodes, "outputs": outputs })
}

fn form(f: &Form) -> Value {
    json!({
        "op": f.op,
        "attrs": f.attrs,
        "operands": f.operands,
        "own": f.own.map(picoseconds),
        "total": f.total.map(picoseconds),
        "rules": f.rules,
        "chosen": f.chosen,
    })
}

fn ops(story: &ProgramStory, graph: &Graph) -> Vec<Value> {
    let op = |o: &OpStory| {
        let node = graph.node(o.node);
        let steps: Vec<Value> = o
            .steps
            .iter()
            .map(|s| json!([s.stage.name(), s.rule, s.op, s.value]))
            .collect();
        json!({
            "name": kernel_name(&node.op),
            "path": &*node.prov.path,
            "value": story.nodes[o.node.index()],
            "values": o.values,
            "imported": o.imported.len(),
            "steps": steps,
            "nearest": o.nearest.as_ref().map(|n| json!({
                "rule": n.rule,
                "matched": n.matched.0,
                "of": n.matched.1,
                "reason": n.reason,
            })),
        })
    };
    story.ops.iter().map(op).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_stands_alone() {
        assert_eq!(PAGE.matches(HOLE).count(), 1);
        for reference in ["src=", "href=", "@import", "url("] {
            assert!(!PAGE.contains(reference), "{reference}");
        }
    }
}
