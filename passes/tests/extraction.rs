//! What the rules found is sound as a whole, and what extraction chooses is optimal: random terms
//! of saturated models equal the model, and costs equal the optimum of an integer program.

mod common;

use common::build::{Build, b, n, s};
use common::{Noise, V, config, distance, goldens, graph_of, model, random_input, random_weight};
use egg::Id;
use good_lp::{Expression, ProblemVariables, Solution, SolverModel, microlp, variable};
use indexmap::IndexMap;
use lathe_ir::interp::{Interp, KvState, StepMeta, Tensor, Value};
use lathe_ir::ops::{Gemm, Linear, RmsNorm, Silu};
use lathe_ir::text::print;
use lathe_ir::{BinaryFn, DType, Graph, Op, Sym, SymEnv, WeightRef};
use lathe_passes::egraph::convert::{Choice, to_graph};
use lathe_passes::egraph::cost::{CostPoint, DeviceModel, INFINITE};
use lathe_passes::egraph::extract::{extract, node_cost};
use lathe_passes::pipeline::{PassConfig, Terms, terms_of};
use lathe_passes::region::{cut, whole};
use lathe_passes::{EGraph, Lang};
use std::collections::BTreeMap;

/// A model of one layer with few features, of the kind of a golden model.
fn tiny(name: &str, window: Option<u32>, dtype: DType) -> Graph {
    let mut overrides: Vec<(&str, serde_json::Value)> = vec![
        ("hidden_size", 24.into()),
        ("num_hidden_layers", 1.into()),
        ("num_attention_heads", 4.into()),
        ("head_dim", 16.into()),
        ("intermediate_size", 16.into()),
        ("vocab_size", 11.into()),
    ];
    let kv = if name == "llama-mha-bias" { 4 } else { 2 };
    overrides.push(("num_key_value_heads", kv.into()));
    if name == "qwen3" {
        overrides.push(("layer_types", vec!["full_attention"].into()));
    }
    if let Some(w) = window {
        overrides.push(("sliding_window", w.into()));
    }
    if name != "mistral-window" && name != "qwen3" {
        overrides.push(("hidden_size", 64.into()));
    }
    let config = config(name)
        .with_overrides(overrides.iter().map(|(k, v)| (*k, v)))
        .expect("overrides");
    graph_of(&config, dtype)
}

/// A form for every class, at random, without cycles under the roots. Classes on a cycle are
/// drawn again.
fn random_choice(egraph: &EGraph, roots: &[Id], noise: &mut Noise) -> Choice {
    let mut choice = Choice::new();
    for class in egraph.classes() {
        let forms = &class.nodes;
        choice.insert(class.id, forms[noise.below(forms.len())].clone());
    }
    for _ in 0..100_000 {
        let Some(cycle) = find_cycle(egraph, &choice, roots) else {
            return choice;
        };
        let id = cycle[noise.below(cycle.len())];
        let forms = &egraph[id].nodes;
        choice.insert(id, forms[noise.below(forms.len())].clone());
    }
    panic!("no acyclic choice");
}

/// The classes of some cycle of a choice.
fn find_cycle(egraph: &EGraph, choice: &Choice, roots: &[Id]) -> Option<Vec<Id>> {
    fn visit(
        egraph: &EGraph,
        choice: &Choice,
        id: Id,
        path: &mut Vec<Id>,
        done: &mut BTreeMap<Id, bool>,
    ) -> Option<Vec<Id>> {
        let id = egraph.find(id);
        match done.get(&id) {
            Some(true) => return None,
            Some(false) => {
                let from = path.iter().position(|&p| p == id).expect("on the path");
                return Some(path[from..].to_vec());
            }
            None => {}
        }
        done.insert(id, false);
        path.push(id);
        for &c in choice[&id].places() {
            if let Some(cycle) = visit(egraph, choice, c, path, done) {
                return Some(cycle);
            }
        }
        path.pop();
        done.insert(id, true);
        None
    }
    let mut done = BTreeMap::new();
    roots
        .iter()
        .find_map(|&r| visit(egraph, choice, r, &mut Vec::new(), &mut done))
}

/// New rows and cached rows of two sequences of 5 tokens, step after step.
const STEPS: [([usize; 2], [usize; 2]); 2] = [([2, 1], [0, 0]), ([1, 3], [2, 1])];

/// The rows of the full logits `[2,5,V]` that [`run`] asks each step for: the last and the first.
fn wanted_rows(full: &V) -> Vec<V> {
    let full = full.as_float().expect("logits");
    let v = full.last();
    let wanted = |(lens, past): ([usize; 2], [usize; 2])| {
        let rows: Vec<(usize, usize)> = StepMeta::new(&lens, &past).rows().collect();
        let row = |(b, p): (usize, usize)| full.data[(b * 5 + p) * v..(b * 5 + p + 1) * v].to_vec();
        let both = [row(rows[rows.len() - 1]), row(rows[0])].concat();
        Value::Float(Tensor::new([2, v], both))
    };
    STEPS.map(wanted).to_vec()
}

/// Logits of a term in each of two ragged steps, with its caches kept between them.
fn run(graph: &Graph, seed: u64) -> Vec<V> {
    let weights = |w: &WeightRef| {
        let values = random_weight(seed, w)?;
        Ok(values.into_iter().map(|v| v * 0.3).collect::<Vec<f64>>())
    };
    let mut caches: BTreeMap<u32, KvState<f64>> = BTreeMap::new();
    let mut results = Vec::new();
    for (lens, past) in STEPS {
        let step = StepMeta::new(&lens, &past);
        let t = step.tokens();
        let env = SymEnv::new(&[(Sym::B, 2), (Sym::S, 5), (Sym::T, t as i64), (Sym::R, 2)]);
        let ints = |v: Vec<i64>| Value::Int(Tensor::new([v.len()], v));
        let dims = [Sym::B, Sym::S].map(lathe_ir::Dim::sym);
        let tokens: V = random_input(seed, "tokens", DType::I64, &dims, &env, 11);
        let all = &tokens.as_int().expect("integers").data;
        let new = step.rows().map(|(b, p)| all[b * 5 + p]).collect();
        let positions = step.rows().map(|(_, p)| p as i64).collect();
        let mut interp = Interp::new(env, &weights)
            .with_input("step.tokens", ints(new))
            .with_input("step.positions", ints(positions))
            .with_input("step.rows", ints(vec![t as i64 - 1, 0]))
            .with_input("tokens", tokens);
        interp.step = Some(step);
        interp.caches = caches;
        let out: IndexMap<String, V> = interp
            .run(graph)
            .unwrap_or_else(|e| panic!("{e}\n{}", print(graph)));
        results.push(out["logits"].clone());
        caches = interp.caches;
    }
    results
}

#[test]
fn random_terms_equal_the_model() {
    let h100 = PassConfig::new(DeviceModel::H100);
    for (name, window, dtype) in [
        ("llama-rope3-tied", None, DType::F32),
        ("llama-mha-bias", None, DType::BF16),
        ("qwen3", None, DType::F32),
        ("qwen3", None, DType::BF16),
        ("mistral-window", Some(2), DType::BF16),
    ] {
        let m = tiny(name, window, dtype);
        let terms = terms_of(&whole(&m).templates[0], &h100).expect("saturates");
        let mut distinct = std::collections::BTreeSet::new();
        for (what, roots) in [("full", &terms.full), ("step", &terms.step)] {
            let logits: Vec<_> = roots.iter().filter(|r| r.0 == "logits").cloned().collect();
            let ids: Vec<Id> = logits.iter().map(|r| r.1).collect();
            let full = run(&m, 7);
            let expected = if what == "full" {
                full
            } else {
                wanted_rows(&full[0])
            };
            for seed in 0..60 {
                let mut noise = Noise::new(seed, name);
                let choice = random_choice(&terms.egraph, &ids, &mut noise);
                let graph = to_graph(&terms.egraph, &choice, name, &logits);
                distinct.insert(print(&graph));
                for (found, expected) in run(&graph, 7).iter().zip(&expected) {
                    let d = distance(found, expected);
                    assert!(
                        d <= 1e-8,
                        "{name} {what}, seed {seed}: {d:.2e}\n{}",
                        print(&graph)
                    );
                }
            }
        }
        assert!(distinct.len() > 100, "{name}: {} terms", distinct.len());
    }
}

/// The least cost of a program for the roots, by an integer program: a variable for each form;
/// some form of each root is chosen, and some form of each operand of a chosen form. Cycles are
/// forbidden as they are found.
fn optimum(egraph: &EGraph, roots: &[Id], cost: &dyn Fn(Id, &Lang) -> u64) -> u64 {
    // Forms that can be executed at all, of the classes that the roots can reach through them.
    let mut forms: BTreeMap<Id, Vec<(u64, Vec<Id>)>> = BTreeMap::new();
    loop {
        let before = forms.values().map(Vec::len).sum::<usize>();
        let mut next: BTreeMap<Id, Vec<(u64, Vec<Id>)>> = BTreeMap::new();
        for class in egraph.classes() {
            for n in &class.nodes {
                let children: Vec<Id> = n.places().iter().map(|&c| egraph.find(c)).collect();
                let ready = children.iter().all(|c| forms.contains_key(c));
                let c = cost(class.id, n);
                if c < INFINITE && ready && !children.contains(&class.id) {
                    next.entry(class.id).or_default().push((c, children));
                }
            }
        }
        let after = next.values().map(Vec::len).sum::<usize>();
        forms = next;
        if after == before {
            break;
        }
    }
    let mut reached: Vec<Id> = roots.iter().map(|&r| egraph.find(r)).collect();
    let mut i = 0;
    while i < reached.len() {
        for (_, children) in &forms[&reached[i]] {
            for &c in children {
                if !reached.contains(&c) {
                    reached.push(c);
                }
            }
        }
        i += 1;
    }
    let mut cycles: Vec<Vec<(Id, usize)>> = Vec::new();
    loop {
        let mut vars = ProblemVariables::new();
        let x: BTreeMap<Id, Vec<_>> = reached
            .iter()
            .map(|&id| {
                let v = forms[&id].iter().map(|_| vars.add(variable().binary()));
                (id, v.collect())
            })
            .collect();
        let some = |id: Id| -> Expression { x[&id].iter().sum() };
        let mut objective = Expression::default();
        for &id in &reached {
            for (v, (c, _)) in x[&id].iter().zip(&forms[&id]) {
                // In nanoseconds, so that coefficients are of the order of 1 to 1000.
                objective += *c as f64 / 1e3 * *v;
            }
        }
        let mut problem = vars.minimise(objective).using(microlp);
        for &r in roots {
            problem = problem.with(some(egraph.find(r)).geq(1));
        }
        for &id in &reached {
            for (v, (_, children)) in x[&id].iter().zip(&forms[&id]) {
                for &c in children {
                    problem = problem.with((some(c) - *v).geq(0));
                }
            }
        }
        for cycle in &cycles {
            let on: Expression = cycle.iter().map(|(id, f)| x[id][*f]).sum();
            problem = problem.with(on.leq(cycle.len() as f64 - 1.0));
        }
        let solution = problem.solve().expect("feasible");
        let pick: BTreeMap<Id, usize> = reached
            .iter()
            .filter_map(|id| {
                let chosen = x[id].iter().position(|&v| solution.value(v) > 0.5);
                chosen.map(|f| (*id, f))
            })
            .collect();
        match pick_cycle(&forms, &pick, roots, egraph) {
            Some(cycle) => cycles.push(cycle),
            None => return pick_cost(&forms, &pick, roots, egraph),
        }
    }
}

type Forms = BTreeMap<Id, Vec<(u64, Vec<Id>)>>;

fn pick_cycle(
    forms: &Forms,
    pick: &BTreeMap<Id, usize>,
    roots: &[Id],
    egraph: &EGraph,
) -> Option<Vec<(Id, usize)>> {
    fn visit(
        forms: &Forms,
        pick: &BTreeMap<Id, usize>,
        id: Id,
        path: &mut Vec<Id>,
        done: &mut Vec<Id>,
    ) -> Option<Vec<(Id, usize)>> {
        if let Some(from) = path.iter().position(|&p| p == id) {
            return Some(path[from..].iter().map(|p| (*p, pick[p])).collect());
        }
        if done.contains(&id) {
            return None;
        }
        path.push(id);
        for &c in &forms[&id][pick[&id]].1 {
            if let Some(cycle) = visit(forms, pick, c, path, done) {
                return Some(cycle);
            }
        }
        path.pop();
        done.push(id);
        None
    }
    let mut done = Vec::new();
    roots
        .iter()
        .find_map(|&r| visit(forms, pick, egraph.find(r), &mut Vec::new(), &mut done))
}

fn pick_cost(forms: &Forms, pick: &BTreeMap<Id, usize>, roots: &[Id], egraph: &EGraph) -> u64 {
    let mut seen: Vec<Id> = roots.iter().map(|&r| egraph.find(r)).collect();
    seen.sort();
    seen.dedup();
    let (mut i, mut total) = (0, 0);
    while i < seen.len() {
        let (cost, children) = &forms[&seen[i]][pick[&seen[i]]];
        total += cost;
        for c in children {
            if !seen.contains(c) {
                seen.push(*c);
            }
        }
        i += 1;
    }
    total
}

/// Holds extraction against the optimum at a point, for one set of roots.
fn check_optimal(
    what: &str,
    terms: &Terms,
    roots: &[(String, Id)],
    cost: &dyn Fn(Id, &Lang) -> u64,
) {
    let roots: Vec<Id> = roots.iter().map(|r| r.1).collect();
    let found = extract(&terms.egraph, &roots, cost).unwrap_or_else(|e| panic!("{what}: {e}"));
    let best = optimum(&terms.egraph, &roots, cost);
    assert_eq!(found.cost, best, "{what}: extraction and optimum");
}

fn check_model(name: &str, dtype: DType, device: DeviceModel) {
    let passes = PassConfig::new(device.clone());
    for template in cut(&model(name, dtype)).expect("cuts").templates {
        let terms = terms_of(&template, &passes).expect("saturates");
        let what = format!("{name} {dtype} {} {}", device.name, template.name);
        let ids: Vec<Id> = terms.step.iter().map(|r| r.1).collect();
        for batch in [1, 8] {
            let at = CostPoint::decode(batch, 512, device.clone());
            let cost = |id: Id, n: &Lang| terms.step_cost(id, n, &at);
            let what = format!("{what}, decode at batch {batch}");
            check_optimal(&what, &terms, &terms.step, &cost);
            // The general program reads the weights as the decode program laid them out.
            let decode = extract(&terms.egraph, &ids, &cost).expect("a program");
            let layouts = terms.weight_operands(&decode.choice, &ids);
            let cost = |id: Id, n: &Lang| {
                if terms.reads_other_layout(id, n, &layouts) {
                    INFINITE
                } else {
                    terms.step_cost(id, n, &passes.points.general)
                }
            };
            let what = format!("{what}, general under its layouts");
            check_optimal(&what, &terms, &terms.step, &cost);
        }
        let cost = |id: Id, n: &Lang| node_cost(&terms.egraph, id, n, &passes.points.general);
        check_optimal(&format!("{what}, full"), &terms, &terms.full, &cost);
    }
}

#[test]
fn extraction_is_optimal_on_every_golden() {
    for name in goldens() {
        check_model(&name, DType::BF16, DeviceModel::H100);
    }
}

#[test]
fn extraction_is_optimal_on_other_devices_and_sizes() {
    check_model("qwen3", DType::F32, DeviceModel::CPU);
    check_model("llama-mha-bias", DType::F32, DeviceModel::CPU);
    check_model("llama-3.1-8b", DType::BF16, DeviceModel::H200);
    check_model("qwen3-8b", DType::BF16, DeviceModel::H100);
}

/// Residual adds that norms read and later adds read again: the sum may be an element of several
/// tuples, or come from the GEMM before it, which is cheaper but means to leave a tuple in two
/// places at once.
fn residual_chain(features: i64) -> Graph {
    let mut q = Build::new();
    let d = DType::BF16;
    let r = q.input("r", d, &[b(), s(), n(features)]);
    let delta = q.input("d", d, &[b(), s(), n(features)]);
    let mut x = q.bin(BinaryFn::Add, r, delta);
    for block in 0..3 {
        let g = q.weight(&format!("g{block}"), d, &[features]);
        let eps = lathe_ir::Real::new(1e-6);
        let h = q.op(RmsNorm { eps }, &[x, g]);
        let up = q.weight(&format!("u{block}"), d, &[2 * features, features]);
        let down = q.weight(&format!("o{block}"), d, &[features, 2 * features]);
        let y = q.op(Linear, &[h, up]);
        let y = q.op(Silu, &[y]);
        let y = q.op(Linear, &[y, down]);
        x = q.bin(BinaryFn::Add, x, y);
    }
    q.done(&[x])
}

#[test]
fn tuples_are_left_when_that_is_cheaper() {
    for features in [64, 128, 4096] {
        for device in [DeviceModel::H100, DeviceModel::CPU] {
            let passes = PassConfig::new(device.clone());
            let terms = terms_of(&residual_chain(features), &passes).expect("saturates");
            for batch in [1, 4, 64] {
                let at = CostPoint::decode(batch, 512, device.clone());
                let what = format!("{features} features on {} at batch {batch}", device.name);
                let cost = |id: Id, n: &Lang| terms.step_cost(id, n, &at);
                check_optimal(&what, &terms, &terms.step, &cost);
            }
        }
    }
}

/// The optimum itself: less than a choice that is not the best, and found around a cycle.
#[test]
fn the_integer_program_finds_the_optimum() {
    let passes = PassConfig::new(DeviceModel::H100);
    let terms = terms_of(&residual_chain(64), &passes).expect("saturates");
    let roots: Vec<Id> = terms.step.iter().map(|r| r.1).collect();
    let at = CostPoint::decode(1, 512, DeviceModel::H100);
    let cost = |id: Id, n: &Lang| terms.step_cost(id, n, &at);
    let best = optimum(&terms.egraph, &roots, &cost);
    // Without epilogues every other program costs more.
    let plain = |id: Id, n: &Lang| {
        let op = n
            .name()
            .map(|_| lathe_passes::egraph::analysis::op_of(&terms.egraph, n));
        match op {
            Some(Op::Gemm(spec)) if spec != Gemm::PLAIN => INFINITE,
            _ => cost(id, n),
        }
    };
    let worse = extract(&terms.egraph, &roots, &plain).expect("a program");
    assert!(worse.cost > best, "{} and {best}", worse.cost);
    assert_eq!(optimum(&terms.egraph, &roots, &plain), worse.cost);
}
