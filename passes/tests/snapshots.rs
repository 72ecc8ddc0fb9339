//! The layer of each golden model after every stage, for review: `snapshots/<model>/<n>-<stage>.snap`,
//! and beside it what the stage changed, where that is shorter. `make bless` accepts changes.

mod common;

use common::model;
use common::render::{difference, short};
use lathe_ir::{DType, Graph};
use lathe_passes::chains::fuse_chains;
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{PassConfig, RecordedTemplate, TemplateReport, record};
use std::fmt::Write;
use std::path::Path;

/// The snapshots of one model. All are compared before any fails, so that a test shows all that a
/// change of a rule leads to.
struct Snapshots {
    model: &'static str,
    /// The program that was compared last.
    before: Option<Graph>,
    changed: Vec<String>,
}

impl Snapshots {
    fn new(model: &'static str) -> Snapshots {
        Snapshots {
            model,
            before: None,
            changed: Vec::new(),
        }
    }

    /// Compares one text; insta prints how it differs.
    fn text(&mut self, name: &str, text: &str) {
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_path(format!("../../snapshots/{}", self.model));
        settings.set_prepend_module_to_snapshot(false);
        settings.set_omit_expression(true);
        let compare = || settings.bind(|| insta::assert_snapshot!(name, text));
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(compare)).is_err() {
            self.changed.push(name.to_string());
        }
    }

    /// Compares a program and its difference to the one before.
    fn program(&mut self, name: &str, header: &str, graph: Option<&Graph>) {
        let text = graph.map_or("no executable form yet\n".to_string(), short);
        self.text(name, &format!("{header}{text}"));
        let (before, after) = (self.before.take(), graph.cloned());
        let diff = before.zip(graph).and_then(|(b, a)| difference(&b, a));
        self.before = after;
        let name = format!("{name}.diff");
        match diff {
            Some(diff) => self.text(&name, &diff),
            None => self.absent(&name),
        }
    }

    /// A difference that is left out has no file.
    fn absent(&mut self, name: &str) {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../snapshots");
        let file = top.join(self.model).join(format!("{name}.snap"));
        if !file.exists() {
            return;
        }
        if std::env::var_os("INSTA_UPDATE").is_some_and(|v| v == "always") {
            std::fs::remove_file(file).expect("a file that can be removed");
        } else {
            self.changed.push(name.to_string());
        }
    }

    fn finish(self) {
        assert!(
            self.changed.is_empty(),
            "changed in snapshots/{}: {} (`make bless` accepts)",
            self.model,
            self.changed.join(", ")
        );
    }
}

/// Costs are exact integers in picoseconds: shown in microseconds.
fn micros(picoseconds: Option<u64>) -> String {
    let Some(picoseconds) = picoseconds else {
        return "none".to_string();
    };
    format!("{}.{:06}", picoseconds / 1_000_000, picoseconds % 1_000_000)
}

/// The first template of layers, and what was seen of it.
fn layer(name: &str) -> (TemplateReport, RecordedTemplate) {
    let config = PassConfig::new(DeviceModel::H100);
    let recorded = record(&model(name, DType::BF16), &config).expect("compiles");
    let templates = recorded.compiled.templates.into_iter();
    let mut layers = templates.zip(recorded.templates);
    layers.find(|(t, _)| !t.layers.is_empty()).expect("a layer")
}

fn check(name: &'static str) {
    let (layer, seen) = layer(name);
    let mut all = Snapshots::new(name);
    let header = format!("// layers {:?}, as imported\n", layer.layers);
    all.program("0-imported", &header, Some(&layer.imported));
    let mut sizes =
        String::from("stage          rounds  e-nodes  classes  us before    us after\n");
    for (i, s) in layer.stages.iter().enumerate() {
        let stage = s.stage.name();
        let mut header =
            format!("// cheapest form after {stage}; values to which a rule gave a form:\n");
        for (rule, n) in &s.matches {
            let _ = writeln!(header, "//   {rule}: {n}");
        }
        let best = seen.stages[i].best.as_ref().map(|(graph, _)| graph);
        all.program(&format!("{}-{stage}", i + 1), &header, best);
        let [before, after] = seen.costs(i).map(micros);
        let _ = writeln!(
            sizes,
            "{stage:14} {:6}  {:7}  {:7}  {before:>12} {after:>12}",
            s.iterations, s.nodes, s.classes
        );
    }
    // What nearly every change of a rule or a cost moves stands in one place.
    all.text("sizes-and-costs", &sizes);
    for (n, (kind, graph)) in (6..).zip(layer.steps.iter()) {
        let program = kind.name();
        let header = format!("// {program} step\n");
        all.program(&format!("{n}-{program}"), &header, graph.as_ref());
    }
    all.finish();
}

/// The decode step of a layer whose operations no rule has fused all, after chains.
fn check_chains(name: &'static str) {
    let (layer, _) = layer(name);
    let decode = layer.steps.decode.expect("a decode program");
    let chained = fuse_chains(&decode).expect("types are kept");
    let mut all = Snapshots::new(name);
    all.before = Some(decode);
    all.program("8-chains", "// decode step with chains\n", Some(&chained));
    all.finish();
}

#[test]
fn llama() {
    check("llama-rope3-tied");
}

#[test]
fn qwen2() {
    check("qwen2");
}

#[test]
fn qwen3() {
    check("qwen3");
}

#[test]
fn mistral_with_a_window() {
    check("mistral-window");
}

/// Norms with offsets, before and after attention and MLP, GELU, and a soft cap: much is left to chains.
#[test]
fn gemma2() {
    check("gemma2");
}

#[test]
fn gemma2_with_chains() {
    check_chains("gemma2");
}
