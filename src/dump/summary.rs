//! What each stage did to the whole model: the templates' reports, each times the layers that use
//! it.

use indexmap::IndexMap;
use lathe_passes::pipeline::{PassConfig, Recorded};
use lathe_passes::{Stage, rules};
use std::time::Duration;

/// One stage over the whole model.
#[derive(Clone, Debug)]
pub struct StageSummary {
    /// The stage.
    pub stage: Stage,
    /// Whether it ran.
    pub enabled: bool,
    /// How often each rule gave a value a new form, over all layers; most often first.
    pub matches: IndexMap<&'static str, usize>,
    /// Rules of the stage that are switched off, if the stage as a whole is on.
    pub off: Vec<&'static str>,
    /// Rules that ran and found nothing.
    pub unmatched: Vec<&'static str>,
    /// E-nodes of all templates after the stage.
    pub nodes: usize,
    /// E-classes of all templates after the stage.
    pub classes: usize,
    /// Cost of the cheapest program before, in picoseconds; none where nothing executes it.
    pub cost_before: Option<u64>,
    /// Cost of the cheapest program after.
    pub cost_after: Option<u64>,
    /// Time of saturation and extraction.
    pub time: Duration,
}

impl StageSummary {
    /// All matches of all rules.
    pub fn total(&self) -> usize {
        self.matches.values().sum()
    }
}

/// The summaries of all stages, in order.
pub fn summaries(recorded: &Recorded, config: &PassConfig) -> Vec<StageSummary> {
    Stage::ALL
        .into_iter()
        .enumerate()
        .map(|(i, stage)| summary(recorded, config, i, stage))
        .collect()
}

fn summary(recorded: &Recorded, config: &PassConfig, index: usize, stage: Stage) -> StageSummary {
    let enabled = !config.disabled.contains(stage.name());
    let mut s = StageSummary {
        stage,
        enabled,
        matches: IndexMap::new(),
        off: Vec::new(),
        unmatched: Vec::new(),
        nodes: 0,
        classes: 0,
        cost_before: Some(0),
        cost_after: Some(0),
        time: Duration::ZERO,
    };
    for (t, seen) in recorded.compiled.templates.iter().zip(&recorded.templates) {
        // Embedding and head belong to no layer and stand once in the model.
        let uses = t.layers.len().max(1);
        let report = &t.stages[index];
        for (rule, n) in &report.matches {
            *s.matches.entry(rule).or_default() += n * uses;
        }
        s.nodes += report.nodes;
        s.classes += report.classes;
        s.time += report.saturate + seen.stages[index].time;
        let add = |sum: Option<u64>, c: Option<u64>| Some(sum?.saturating_add(c? * uses as u64));
        let [before, after] = seen.costs(index);
        s.cost_before = add(s.cost_before, before);
        s.cost_after = add(s.cost_after, after);
    }
    s.matches
        .sort_by(|a, n, b, m| m.cmp(n).then_with(|| a.cmp(b)));
    if enabled {
        for rule in rules::all().into_iter().filter(|r| r.stage == stage) {
            if config.disabled.contains(rule.name) {
                s.off.push(rule.name);
            } else if !s.matches.contains_key(rule.name) {
                s.unmatched.push(rule.name);
            }
        }
    }
    s
}
