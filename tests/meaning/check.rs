//! One program through every stage: compilation, random extraction, lowering, and the CPU device, each
//! held against the program as it was written.

use crate::device::{self, Stored};
use crate::oracle::{self, Arithmetic, Oracle};
use crate::rng::Rng;
use egg::Id;
use lathe_codegen::{Programs, lower};
use lathe_ir::{DType, Graph, text, verify};
use lathe_passes::egraph::convert::to_graph;
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::egraph::extract::extract;
use lathe_passes::opt::{Goal, is_full_sequence, run, windowed};
use lathe_passes::pipeline::{Compiled, PassConfig, compile, terms_of};
use lathe_passes::region::whole;
use lathe_passes::trial::Trial;
use lathe_passes::{Lang, Rule, Stage};
use std::cell::RefCell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A program that lathe gets wrong.
#[derive(Clone, Debug)]
pub(crate) struct Defect {
    /// Where it shows.
    pub(crate) stage: &'static str,
    /// What is wrong.
    pub(crate) what: String,
}

/// How far a program came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    /// It has step programs.
    pub(crate) steps: bool,
    /// They ran on the device.
    pub(crate) device: bool,
    /// The number of results that were compared.
    pub(crate) compared: usize,
}

/// What became of a program.
pub(crate) enum Verdict {
    /// It is no program: it does not verify, or has no value.
    Unfit,
    Passed(Reach),
    Defect(Defect),
}

thread_local! {
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Panics of this program's threads are kept for the report instead of being printed.
pub(crate) fn keep_panics() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let named = std::thread::current().name().map(str::to_owned);
        if named.is_some_and(|n| n.starts_with("fuzz")) {
            PANIC.with(|p| *p.borrow_mut() = info.to_string().replace('\n', " "));
        } else {
            default(info);
        }
    }));
}

/// Runs a stage: a refusal must be a line, and a panic is a defect.
fn stage<T, E: ToString>(
    name: &'static str,
    f: impl FnOnce() -> Result<T, E>,
) -> Result<Option<T>, Defect> {
    PANIC.with(|p| p.borrow_mut().clear());
    let defect = |what| Defect { stage: name, what };
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => Ok(Some(value)),
        Ok(Err(e)) => match e.to_string() {
            e if e.is_empty() || e.contains('\n') => Err(defect(format!("refused by {e:?}"))),
            e if e.contains("internal:") => Err(defect(e)),
            _ => Ok(None),
        },
        Err(payload) => {
            let kept = PANIC.with(|p| p.borrow().clone());
            let text = payload.downcast_ref::<String>().cloned();
            let text = text.or_else(|| payload.downcast_ref::<&str>().map(|s| s.to_string()));
            let what = if kept.is_empty() {
                text.unwrap_or_default()
            } else {
                kept
            };
            Err(defect(format!("panic: {what}")))
        }
    }
}

/// What a stage made must be evaluated and mean what the program means.
fn equal(
    oracle: &Oracle<'_>,
    name: &'static str,
    how: Arithmetic,
    found: Result<Vec<f64>, String>,
    reach: &mut Reach,
) -> Result<(), Defect> {
    let defect = |what| Defect { stage: name, what };
    let found = found.map_err(|e| defect(format!("cannot be evaluated: {e}")))?;
    reach.compared += 1;
    oracle.judge(&found, how).map_err(defect)
}

/// A model from `tokens` to `logits` through everything.
pub(crate) fn model(graph: &Graph, seed: u64, instead: &[&'static Rule]) -> Verdict {
    let mut rng = Rng::new(seed ^ 0x0063_6865_636b);
    if !verify(graph).is_empty() || !is_full_sequence(graph) {
        return Verdict::Unfit;
    }
    let (batch, len) = rng.pick(&[(2, 5), (2, 5), (2, 5), (1, 4), (1, 1), (3, 2)]);
    let trial = Trial {
        batch,
        len,
        ..Trial::new(graph, seed)
    };
    let Ok(oracle) = Oracle::new(trial, graph) else {
        return Verdict::Unfit;
    };
    let mut reach = Reach::default();
    match model_stages(graph, &oracle, &mut rng, instead, &mut reach) {
        Ok(()) => Verdict::Passed(reach),
        Err(defect) => Verdict::Defect(defect),
    }
}

fn model_stages(
    graph: &Graph,
    oracle: &Oracle<'_>,
    rng: &mut Rng,
    instead: &[&'static Rule],
    reach: &mut Reach,
) -> Result<(), Defect> {
    written_and_read(graph)?;
    let target = rng.pick(&[DeviceModel::CPU, DeviceModel::CPU, DeviceModel::H100]);
    let mut config = PassConfig::new(target);
    config.instead = instead.to_vec();
    config.no_roll = rng.one_in(3);
    let off = rng.pick(&["", "", "", "", "fuse", "chains", "attention", "recognize"]);
    if !off.is_empty() {
        config.disabled.insert(off.to_string());
    }
    let trial = oracle.trial;
    let weights = Stored::new(&trial);
    if rng.one_in(4) {
        let found = stage("lower naive", || lowered(graph, None))?;
        if let Some((plan, how)) = found
            && let Some(found) = stage("run naive", || device::whole(&trial, &plan, &weights))?
        {
            equal(oracle, "run naive", how, Ok(found), reach)?;
        }
    }
    if rng.one_in(3) {
        random_terms(graph, oracle, &config, rng, reach)?;
    }
    let Some(compiled) = stage("compile", || compile(graph, &config))? else {
        return Ok(());
    };
    if !oracle.allows(compiled.templates.iter().flat_map(|t| &t.log)) {
        return Ok(());
    }
    well_formed("compile: full", &compiled.full)?;
    let found = oracle::whole(&trial, &compiled.full);
    equal(oracle, "compile: full", Arithmetic::Real, found, reach)?;
    if rng.one_in(4) {
        let found = stage("lower full", || lowered(&compiled.full, None))?;
        if let Some((plan, how)) = found
            && let Some(found) = stage("run full", || device::whole(&trial, &plan, &weights))?
        {
            equal(oracle, "run full", how, Ok(found), reach)?;
        }
    }
    step_programs(oracle, &compiled, &weights, rng, reach)
}

/// The step programs, by the interpreter and on the device.
fn step_programs(
    oracle: &Oracle<'_>,
    compiled: &Compiled,
    weights: &Stored,
    rng: &mut Rng,
    reach: &mut Reach,
) -> Result<(), Defect> {
    if let Some(why) = &compiled.no_step
        && why.to_string().contains('\n')
    {
        let what = why.to_string();
        return Err(Defect {
            stage: "compile",
            what,
        });
    }
    let trial = oracle.trial;
    let (general, decode) = (&compiled.steps.general, &compiled.steps.decode);
    let (Some(general), Some(decode)) = (general, decode) else {
        return Ok(());
    };
    reach.steps = true;
    for (name, form, is_decode) in [
        ("compile: general", general, false),
        ("compile: decode", decode, true),
    ] {
        well_formed(name, form)?;
        let steps = oracle::steps(&trial, is_decode, rng);
        let found = oracle::stepped(&trial, form, &steps);
        equal(oracle, name, Arithmetic::Real, found, reach)?;
    }
    let Some((plan, how)) = stage("lower", || lowered(general, Some(decode)))? else {
        return Ok(());
    };
    for (name, is_decode) in [("run general", false), ("run decode", true)] {
        let steps = oracle::steps(&trial, is_decode, rng);
        let page_size = rng.pick(&[1, 2, 3, 8]);
        let found = stage(name, || {
            device::stepped(&trial, &plan, weights, &steps, page_size)
        })?;
        if let Some(found) = found {
            equal(oracle, name, how, Ok(found), reach)?;
            reach.device = true;
        }
    }
    Ok(())
}

/// A program of whole sequences, or a general and a decode program, as a plan for the CPU.
fn lowered(
    graph: &Graph,
    decode: Option<&Graph>,
) -> Result<(lathe_codegen::Plan, Arithmetic), lathe_codegen::LowerError> {
    let dtype = element_type(graph);
    let programs = match decode {
        Some(decode) => Programs {
            decode: Some(decode),
            general: Some(graph),
            full: None,
        },
        None => Programs {
            decode: None,
            general: None,
            full: Some(graph),
        },
    };
    let how = match dtype {
        DType::F32 => Arithmetic::Single,
        _ => Arithmetic::Half,
    };
    Ok((lower("fuzz", dtype, &programs)?, how))
}

/// The element type of the logits, which a model's plan has.
fn element_type(graph: &Graph) -> DType {
    let logits = graph.output("logits").and_then(|id| graph.tensor(id));
    logits.map_or(DType::F32, |t| t.dtype)
}

/// Random programs among all forms that the rules found.
fn random_terms(
    graph: &Graph,
    oracle: &Oracle<'_>,
    config: &PassConfig,
    rng: &mut Rng,
    reach: &mut Reach,
) -> Result<(), Defect> {
    let trial = oracle.trial;
    let template = whole(graph).templates.remove(0);
    let Some(terms) = stage("saturate", || terms_of(&template, config))? else {
        return Ok(());
    };
    if !oracle.allows(&terms.egraph.analysis.log) {
        return Ok(());
    }
    for (name, roots) in [
        ("any full form", &terms.full),
        ("any step form", &terms.step),
    ] {
        let roots: Vec<(String, Id)> = roots.iter().filter(|r| r.0 == "logits").cloned().collect();
        let ids: Vec<Id> = roots.iter().map(|r| r.1).collect();
        for _ in 0..2 {
            let seed = rng.next();
            let cost = |_: Id, node: &Lang| {
                let mut hasher = DefaultHasher::new();
                (seed, node).hash(&mut hasher);
                u64::from(node.name().is_some()) * (1 + hasher.finish() % 1000)
            };
            let found = stage(name, || extract(&terms.egraph, &ids, &cost))?;
            let Some(found) = found else { continue };
            let form = stage(name, || {
                Ok::<Graph, String>(to_graph(&terms.egraph, &found.choice, "any", &roots))
            })?;
            let Some(form) = form else { continue };
            let found = match name {
                "any full form" => oracle::whole(&trial, &form),
                _ => oracle::stepped(&trial, &form, &oracle::steps(&trial, false, rng)),
            };
            equal(oracle, name, Arithmetic::Real, found, reach)?;
        }
    }
    Ok(())
}

/// The text of a program is the program.
fn written_and_read(graph: &Graph) -> Result<(), Defect> {
    let written = text::print(graph);
    let read = stage("text", || text::parse(&written))?;
    match read {
        Some(read) if text::print(&read) == written => Ok(()),
        _ => Err(Defect {
            stage: "text",
            what: "the text of the program does not read back".to_string(),
        }),
    }
}

/// What the passes make verifies.
fn well_formed(stage: &'static str, graph: &Graph) -> Result<(), Defect> {
    match verify(graph).first() {
        None => Ok(()),
        Some(e) => Err(Defect {
            stage,
            what: format!("does not verify: {e}"),
        }),
    }
}

/// A piece with inputs of any kind through stages of rules, as `lathe opt` runs them.
pub(crate) fn piece(graph: &Graph, seed: u64) -> Verdict {
    let mut rng = Rng::new(seed ^ 0x0070_6965_6365);
    let open =
        |e: &lathe_ir::VerifyError| !matches!(e.kind, lathe_ir::verify::VerifyKind::OpenAttention);
    if verify(graph).iter().any(open) {
        return Verdict::Unfit;
    }
    let mut reach = Reach::default();
    match piece_stages(graph, seed, &mut rng, &mut reach) {
        Ok(true) => Verdict::Passed(reach),
        Ok(false) => Verdict::Unfit,
        Err(defect) => Verdict::Defect(defect),
    }
}

fn piece_stages(
    graph: &Graph,
    seed: u64,
    rng: &mut Rng,
    reach: &mut Reach,
) -> Result<bool, Defect> {
    let first = rng.below(Stage::ALL.len());
    let from = if rng.coin() { 0 } else { first };
    let to = from + rng.below(Stage::ALL.len() - from);
    let mut passes: Vec<&str> = Stage::ALL[from..=to].iter().map(|s| s.name()).collect();
    if rng.one_in(3) {
        passes.push("chains");
    }
    let goal = rng.pick(&[
        Goal::Rewritten,
        Goal::Size,
        Goal::Time(PassConfig::new(DeviceModel::H100).points.decode),
    ]);
    let steps = is_full_sequence(graph) && passes.contains(&Stage::KvCache.name());
    let reference = match steps {
        true => windowed(graph).ok(),
        false => Some(graph.clone()),
    };
    let Some(reference) = reference else {
        return Ok(false);
    };
    let trial = Trial::new(graph, seed);
    let Ok(oracle) = Oracle::new(trial, &reference) else {
        return Ok(false);
    };
    let found = stage("opt", || run(graph, &passes, &goal))?;
    let Some(report) = found else {
        return Ok(true);
    };
    if !oracle.allows_all(&report.assumptions) {
        return Ok(true);
    }
    // Of a step's outputs those that the program has.
    let mut form = Graph::new("form");
    for node in report.graph.nodes() {
        form.push_unchecked(node.clone());
    }
    for (name, _) in reference.outputs() {
        match report.graph.output(name) {
            Some(id) => form.set_output(name, id),
            None => {
                let what = format!("the result {name} is gone");
                return Err(Defect { stage: "opt", what });
            }
        }
    }
    equal(
        &oracle,
        "opt",
        Arithmetic::Real,
        oracle::whole(&trial, &form),
        reach,
    )?;
    Ok(true)
}
