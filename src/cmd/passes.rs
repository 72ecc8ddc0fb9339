//! `passes`: the list of stages and rules, and what one rule does.

use std::fmt::Write as _;
use std::io::Write as _;

use clap::Args;
use lathe_ir::text;
use lathe_passes::opt::{Goal, run};
use lathe_passes::sample::Samples;
use lathe_passes::{Exactness, Rule, Stage, chains, rules};

use crate::config::nearest;
use crate::errors::usage_error;

/// List passes and rewrite rules, or explain one
#[derive(Debug, Args)]
pub struct Passes {
    /// Print a rule's condition, patterns and an example
    #[arg(long, value_name = "RULE")]
    explain: Option<String>,
    /// List the rules of one stage only
    #[arg(long, value_name = "STAGE")]
    stage: Option<String>,
}

/// What each stage is for.
fn about(stage: Stage) -> &'static str {
    match stage {
        Stage::Canonicalize => "spellings of the same thing get one form",
        Stage::Recognize => "softmax, RMSNorm, RoPE, SiLU and the like from their parts",
        Stage::Attention => "attention with masks, scales, caps and grouped heads",
        Stage::KvCache => "values of whole sequences become values of one step with a KV cache",
        Stage::Fuse => "packed projections, norms into products, residuals and activations after",
    }
}

fn exactness(e: Exactness) -> String {
    match e {
        Exactness::Exact => "exact".to_string(),
        Exactness::Reassociates => "reassociates".to_string(),
        Exactness::Approximate(t) => format!("approximate ({t:e})"),
    }
}

impl Passes {
    /// Runs the command.
    pub fn run(&self) -> anyhow::Result<()> {
        let text = match &self.explain {
            Some(name) if name == chains::NAME => about_chains(),
            Some(name) => explain(rule(name)?)?,
            None => self.list()?,
        };
        std::io::stdout().lock().write_all(text.as_bytes())?;
        Ok(())
    }

    fn list(&self) -> anyhow::Result<String> {
        let stages: Vec<Stage> = match &self.stage {
            None => Stage::ALL.to_vec(),
            Some(name) => {
                let names = || Stage::ALL.iter().map(|s| s.name());
                let stage = Stage::ALL.into_iter().find(|s| s.name() == name);
                vec![stage.ok_or_else(|| {
                    let list: Vec<_> = names().collect();
                    usage_error(format!("no stage '{name}'; stages: {}", list.join(", ")))
                })?]
            }
        };
        let mut out = String::new();
        for stage in stages {
            let rules: Vec<&Rule> = rules::all()
                .into_iter()
                .filter(|r| r.stage == stage)
                .collect();
            let _ = writeln!(
                out,
                "{} ({} rules): {}",
                stage.name(),
                rules.len(),
                about(stage)
            );
            let width = rules.iter().map(|r| r.name.len()).max().unwrap_or(0);
            for r in rules {
                let _ = writeln!(
                    out,
                    "  {:width$}  {:12}  {}",
                    r.name,
                    exactness(r.exactness),
                    r.equation
                );
            }
        }
        if self.stage.is_none() {
            out += &about_chains();
        }
        Ok(out)
    }
}

/// Chains are no rule: nothing is chosen there.
fn about_chains() -> String {
    format!(
        "{} (after extraction; off with fuse): pointwise operations and row reductions that \
         read one another become one generated kernel\n",
        chains::NAME
    )
}

fn rule(name: &str) -> anyhow::Result<&'static Rule> {
    rules::by_name(name).ok_or_else(|| {
        if Stage::ALL.iter().any(|s| s.name() == name) {
            return usage_error(format!(
                "'{name}' is a stage; `lathe passes --stage {name}` lists its rules"
            ));
        }
        match nearest(name, rules::all().iter().map(|r| r.name)) {
            Some(near) => usage_error(format!("no rule '{name}'; did you mean '{near}'?")),
            None => usage_error(format!("no rule '{name}'; `lathe passes` lists them")),
        }
    })
}

/// The text of a sample without where its values come from, which is always the sample.
fn plain(graph: &lathe_ir::Graph) -> String {
    text::print(graph)
        .lines()
        .map(|l| format!("{}\n", l.split("  // ").next().unwrap_or(l).trim_end()))
        .collect()
}

fn explain(rule: &Rule) -> anyhow::Result<String> {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{}: stage {}, {}\n",
        rule.name,
        rule.stage.name(),
        exactness(rule.exactness)
    );
    let _ = writeln!(out, "  {}\n", rule.equation);
    let _ = writeln!(out, "{}\n", rule.doc);
    let _ = writeln!(out, "patterns (spellings of the left side)");
    for lhs in rule.lhs {
        let _ = writeln!(out, "  {lhs}");
    }
    let samples = Samples::of(rule)?;
    if !samples.near_misses.is_empty() {
        let _ = writeln!(out, "\ndoes not match if");
        // Several programs may stand for one reason.
        let mut reasons: Vec<&str> = samples
            .near_misses
            .iter()
            .map(|m| m.title.as_str())
            .collect();
        reasons.dedup();
        for why in reasons {
            let _ = writeln!(out, "  {why}");
        }
    }
    let before = samples.samples[0].graph(1)?;
    let after = run(&before, &[rule.name], &Goal::Rewritten)?;
    let _ = writeln!(out, "\nexample\n{}", plain(&before));
    let _ = writeln!(out, "becomes\n{}", plain(&after.graph).trim_end());
    Ok(out)
}
