//! Dumps of a program between passes: text that `opt` reads back, Graphviz, JSON, or one page.

mod buckets;
mod cuda;
mod html;
mod summary;

pub use buckets::emit_buckets;
pub use cuda::{emit_cuda, kernel_options, program_fusions, workspace_bytes};
pub use html::html;
pub use summary::{StageSummary, summaries};

use crate::config::nearest;
use crate::phases::{duration, picoseconds};
use anyhow::Context;
use lathe_ir::{Graph, text};
use lathe_passes::pipeline::{CompileError, PassConfig, Recorded};
use lathe_passes::{Stage, chains};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// `--dump-format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// SSA text, which `lathe opt` reads.
    #[default]
    Text,
    /// Graphviz.
    Dot,
    /// JSON.
    Json,
    /// One page with all stages.
    Html,
}

impl Format {
    fn extension(self) -> &'static str {
        match self {
            Format::Text => "txt",
            Format::Dot => "dot",
            Format::Json => "json",
            Format::Html => "html",
        }
    }
}

/// Names of dumps that are no stages: the naive graph, and the two step programs.
const EXTRA: [&str; 3] = ["import", "decode", "general"];

/// `--dump-ir`: after which passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Points {
    /// All of them.
    All,
    /// Those named: stages, `import`, `decode`, `general`. Chains are in both of the last.
    After(Vec<String>),
}

impl FromStr for Points {
    type Err = String;

    fn from_str(s: &str) -> Result<Points, String> {
        let known: Vec<&str> = std::iter::once(EXTRA[0])
            .chain(Stage::ALL.iter().map(|s| s.name()))
            .chain(EXTRA[1..].iter().copied())
            .chain([chains::NAME])
            .collect();
        if s == "after-all" {
            return Ok(Points::All);
        }
        let Some(names) = s.strip_prefix("after=") else {
            return Err(format!(
                "expected after-all or after=PASS,... with {}",
                known.join(", ")
            ));
        };
        let names: Vec<String> = names.split(',').map(|n| n.trim().to_string()).collect();
        for n in &names {
            if !known.contains(&n.as_str()) {
                let meant = match nearest(n, known.iter().copied()) {
                    Some(near) => format!("did you mean '{near}'? "),
                    None => String::new(),
                };
                return Err(format!(
                    "no pass '{n}'; {meant}passes: {}",
                    known.join(", ")
                ));
            }
        }
        let dumps = names.iter().flat_map(|n| match n.as_str() {
            chains::NAME => EXTRA[1..].to_vec(),
            n => vec![n],
        });
        Ok(Points::After(dumps.map(str::to_owned).collect()))
    }
}

impl Points {
    fn contains(&self, name: &str) -> bool {
        match self {
            Points::All => true,
            Points::After(names) => names.iter().any(|n| n == name),
        }
    }
}

/// One program to dump.
#[derive(Clone, Debug)]
pub struct Snapshot<'a> {
    /// Place in the order of dumps.
    pub number: usize,
    /// The stage's name, or `import`, `decode`, `general`.
    pub name: &'static str,
    /// What stands above the program: name and value.
    pub header: Vec<(&'static str, String)>,
    /// The program; `None` if there is none at this point.
    pub graph: Option<&'a Graph>,
}

/// All programs of a compilation in order: as imported, after each stage, and the two results.
///
/// # Errors
/// As [`Recorded::stages`].
pub fn snapshots<'a>(
    model: &'a Graph,
    recorded: &'a Recorded,
    config: &PassConfig,
) -> Result<Vec<Snapshot<'a>>, CompileError> {
    let mut all = vec![Snapshot {
        number: 0,
        name: "import",
        header: vec![
            ("pass", "import".to_string()),
            (
                "program",
                "full sequences, as transformers computes".to_string(),
            ),
        ],
        graph: Some(model),
    }];
    for (summary, program) in summaries(recorded, config).iter().zip(recorded.stages()?) {
        let mut header = stage_header(summary);
        let program_is = if program.step {
            format!(
                "a step, cheapest for decoding {}",
                at(&config.points.decode)
            )
        } else {
            format!(
                "full sequences, cheapest for {}",
                at(&config.points.general)
            )
        };
        header.insert(1, ("program", program_is));
        all.push(Snapshot {
            number: all.len(),
            name: summary.stage.name(),
            header,
            graph: program.graph.as_ref(),
        });
    }
    let steps = recorded.compiled.steps.as_ref().zip(config.points.as_ref());
    for (kind, (graph, point)) in steps.iter() {
        let name = kind.name();
        all.push(Snapshot {
            number: all.len(),
            name,
            header: vec![
                ("pass", format!("{name} (result)")),
                ("program", format!("a step, chosen for {}", at(point))),
            ],
            graph: graph.as_ref(),
        });
    }
    for s in &mut all {
        if let Some(g) = s.graph {
            let count = format!("{} of them leaves", leaves(g));
            s.header
                .push(("nodes", format!("{}, {count}", g.nodes().len())));
        }
    }
    Ok(all)
}

fn leaves(g: &Graph) -> usize {
    g.nodes().iter().filter(|n| n.op.is_leaf()).count()
}

/// Where a program is chosen, for readers.
pub fn at(point: &lathe_passes::egraph::cost::CostPoint) -> String {
    format!("{}, {}", sizes(point), point.device.name)
}

/// The sizes for which a program is chosen, for readers.
pub fn sizes(point: &lathe_passes::egraph::cost::CostPoint) -> String {
    use lathe_ir::Sym;
    let (b, t) = (point.env.get(Sym::B), point.env.get(Sym::T));
    if b == t {
        format!("batch {b}, context {}", point.context)
    } else {
        format!("{t} tokens")
    }
}

fn stage_header(s: &StageSummary) -> Vec<(&'static str, String)> {
    let matches: Vec<String> = s.matches.iter().map(|(r, n)| format!("{r} {n}")).collect();
    let matches = match (s.enabled, matches.is_empty()) {
        (false, _) => "the stage is switched off".to_string(),
        (true, true) => "none".to_string(),
        (true, false) => matches.join(", "),
    };
    let number = s.stage as usize + 1;
    let mut header = vec![
        (
            "pass",
            format!("{} ({number} of {})", s.stage.name(), Stage::ALL.len()),
        ),
        ("matches", matches),
    ];
    if !s.off.is_empty() {
        header.push(("off", s.off.join(", ")));
    }
    if !s.unmatched.is_empty() {
        header.push(("unmatched", s.unmatched.join(", ")));
    }
    header.push(("e-nodes", format!("{} in {} classes", s.nodes, s.classes)));
    header.push(("cost", cost_change(s)));
    header.push(("time", duration(s.time)));
    header
}

/// `12.3 ms → 4.1 ms`, with `none` where there is no executable program.
pub fn cost_change(s: &StageSummary) -> String {
    let show = |c: Option<u64>| c.map_or_else(|| "none".to_string(), picoseconds);
    let (before, after) = (show(s.cost_before), show(s.cost_after));
    if s.stage == Stage::KvCache {
        // Before it a whole sequence is computed, after it one step.
        format!("{before} (full) → {after} (step)")
    } else {
        format!("{before} → {after}")
    }
}

/// Writes the programs of a format other than HTML, one a file, `NNN_pass.ext`. With
/// `only_changed`, those equal to the one before are left out. Returns what was written and what
/// was not, with the reason.
///
/// # Errors
/// The folder or a file cannot be written.
pub fn write(
    dir: &Path,
    snapshots: &[Snapshot<'_>],
    points: &Points,
    format: Format,
    only_changed: bool,
) -> anyhow::Result<(Vec<PathBuf>, Vec<String>)> {
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let (mut written, mut skipped) = (Vec::new(), Vec::new());
    let mut last: Option<&Graph> = None;
    for s in snapshots {
        let Some(graph) = s.graph else {
            if points.contains(s.name) {
                skipped.push(format!("{}: no executable program at this point", s.name));
            }
            continue;
        };
        let same = last.is_some_and(|l| same(l, graph));
        last = Some(graph);
        if !points.contains(s.name) {
            continue;
        }
        if only_changed && same {
            skipped.push(format!("{}: unchanged", s.name));
            continue;
        }
        let path = dir.join(format!("{:03}_{}.{}", s.number, s.name, format.extension()));
        let content = content(s, graph, format)?;
        std::fs::write(&path, content).with_context(|| path.display().to_string())?;
        written.push(path);
    }
    Ok((written, skipped))
}

/// Whether two programs are the same but for their names.
fn same(a: &Graph, b: &Graph) -> bool {
    a.nodes() == b.nodes() && a.outputs() == b.outputs()
}

fn content(s: &Snapshot<'_>, graph: &Graph, format: Format) -> anyhow::Result<String> {
    let comment = |out: &mut String| {
        for (name, value) in &s.header {
            out.push_str(&format!("// {name}: {value}\n"));
        }
    };
    let mut out = String::new();
    match format {
        Format::Json => {
            let header: serde_json::Map<String, serde_json::Value> = s
                .header
                .iter()
                .map(|(k, v)| ((*k).to_string(), v.clone().into()))
                .collect();
            let value = json!({ "header": header, "graph": text::json(graph) });
            out = serde_json::to_string(&value)?;
            out.push('\n');
        }
        Format::Dot => {
            comment(&mut out);
            out.push_str(&text::dot(graph));
        }
        Format::Text | Format::Html => {
            comment(&mut out);
            out.push_str(&text::print(graph));
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points() {
        assert_eq!("after-all".parse(), Ok(Points::All));
        let some: Points = "after=attention,decode".parse().unwrap();
        assert!(some.contains("attention") && some.contains("decode") && !some.contains("fuse"));
        let e = "after=attentoin".parse::<Points>().unwrap_err();
        assert!(e.contains("attentoin") && e.contains("kv_cache"), "{e}");
        assert!("all".parse::<Points>().is_err());
    }
}
