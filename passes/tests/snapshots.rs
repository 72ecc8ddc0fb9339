//! The layer of each golden model after every stage, for review. `make bless` accepts changes.

mod common;

use common::model;
use lathe_ir::text::print;
use lathe_ir::{DType, Graph};
use lathe_passes::chains::fuse_chains;
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{PassConfig, compile_with};
use std::fmt::Write;

/// Costs are exact integers in picoseconds: shown in microseconds.
fn micros(picoseconds: Option<u64>) -> String {
    let Some(picoseconds) = picoseconds else {
        return "none".to_string();
    };
    format!(
        "{}.{:06} us",
        picoseconds / 1_000_000,
        picoseconds % 1_000_000
    )
}

/// Compares one snapshot; insta prints how it differs. Returns whether it is as it was, so that a test
/// goes on and shows all that a change of a rule leads to.
fn snapshot(name: &str, header: &str, graph: Option<&Graph>) -> bool {
    let text = graph.map_or("no executable form yet\n".to_string(), print);
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../../snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    let compare = || settings.bind(|| insta::assert_snapshot!(name, format!("{header}{text}")));
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(compare)).is_ok()
}

fn check(name: &str) {
    let config = PassConfig::new(DeviceModel::H100);
    let c = compile_with(&model(name, DType::BF16), &config, true).expect("compiles");
    let layers = c.templates.iter().filter(|t| !t.layers.is_empty());
    let layer = layers.into_iter().next().expect("a layer");
    let header = format!("// {name}, layers {:?}, as imported\n", layer.layers);
    let mut changed = Vec::new();
    let mut snapshot = |file: String, header: &str, graph: Option<&Graph>| {
        if !snapshot(&file, header, graph) {
            changed.push(file);
        }
    };
    snapshot(format!("{name}-0-imported"), &header, Some(&layer.imported));
    for (i, s) in layer.stages.iter().enumerate() {
        let mut header = format!("// {name}, cheapest form after stage {}\n", s.stage.name());
        let _ = writeln!(
            header,
            "// {} e-nodes in {} classes after {} rounds",
            s.nodes, s.classes, s.iterations
        );
        let _ = writeln!(
            header,
            "// cost {} -> {}",
            micros(s.cost_before),
            micros(s.cost_after)
        );
        for (rule, n) in &s.matches {
            let _ = writeln!(header, "//   {rule}: {n}");
        }
        let file = format!("{name}-{}-{}", i + 1, s.stage.name());
        snapshot(file, &header, s.best.as_ref());
    }
    for (i, (program, graph)) in [("decode", &layer.decode), ("general", &layer.general)]
        .into_iter()
        .enumerate()
    {
        let header = format!("// {name}, {program} step of layers {:?}\n", layer.layers);
        let file = format!("{name}-{}-{program}", 6 + i);
        snapshot(file, &header, graph.as_ref());
    }
    assert!(
        changed.is_empty(),
        "changed: {} (`make bless` accepts)",
        changed.join(", ")
    );
}

/// The decode step of a layer whose operations no rule has fused all, after chains.
fn check_chains(name: &str) {
    let config = PassConfig::new(DeviceModel::H100);
    let c = compile_with(&model(name, DType::BF16), &config, true).expect("compiles");
    let layer = c.templates.iter().find(|t| !t.layers.is_empty());
    let layer = layer.expect("a layer");
    let decode = layer.decode.as_ref().expect("a decode program");
    let chained = fuse_chains(decode).expect("types are kept");
    let header = format!(
        "// {name}, decode step of layers {:?}, with chains\n",
        layer.layers
    );
    let file = format!("{name}-8-chains");
    assert!(snapshot(&file, &header, Some(&chained)), "changed: {file}");
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
