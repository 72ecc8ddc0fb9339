//! Every rule against the interpreter: its sample must match and all forms must be equal; graphs
//! that look alike must not match.

mod common;

use common::{Noise, V, all_outputs, distance, random_input, random_weight};
use egg::{Id, Rewrite, Runner, SimpleScheduler, StopReason};
use indexmap::IndexMap;
use lathe_ir::interp::{Interp, KvState, StepMeta, Tensor, Value, eval_op};
use lathe_ir::ops::{Input, Win};
use lathe_ir::{Graph, Op, Sym, SymEnv, Type, WeightRef, infer};
use lathe_passes::egraph::convert::{Choice, add_graph, to_graph};
use lathe_passes::sample::{self, SampleError, Samples, Template};
use lathe_passes::{EGraph, Exactness, Lang, Rule, Stage, rules};
use proptest::test_runner::{
    Config, FileFailurePersistence, RngAlgorithm, TestCaseError, TestRng, TestRunner,
};
use std::collections::{BTreeMap, BTreeSet};

type Rewrites = Vec<Rewrite<Lang, lathe_passes::egraph::TensorAnalysis>>;

/// Rules that hold for all well-typed operands: nothing looks like them and is none.
const UNCONDITIONAL: [&str; 6] = [
    "win-unary",
    "win-cast",
    "win-swiglu",
    "win-angles",
    "win-rope",
    "win-permute",
];

/// Runs some rewrites on a graph until nothing changes; returns the class of each node.
fn saturate(graph: &Graph, rewrites: &Rewrites) -> (EGraph, Vec<Id>) {
    let mut egraph = EGraph::default();
    let ids = add_graph(&mut egraph, graph);
    egraph.rebuild();
    let runner = Runner::default()
        .with_egraph(egraph)
        .with_iter_limit(100)
        .with_scheduler(SimpleScheduler)
        .run(rewrites);
    assert!(
        matches!(runner.stop_reason, Some(StopReason::Saturated)),
        "{:?}",
        runner.stop_reason
    );
    (runner.egraph, ids)
}

fn samples(rule: &Rule) -> Samples {
    Samples::of(rule).unwrap_or_else(|e| panic!("{e}"))
}

fn fired(egraph: &EGraph, rule: &Rule) -> usize {
    let log = egraph.analysis.log.iter();
    log.filter(|a| a.rule == rule.name).count()
}

/// The smallest term of each class, with one class held to one form. `None` if a class under the
/// roots has no finite term then, because the form contains its own class.
fn smallest(egraph: &EGraph, forced: (Id, &Lang), roots: &[Id]) -> Option<Choice> {
    let mut ids: Vec<Id> = egraph.classes().map(|c| c.id).collect();
    ids.sort();
    let mut size: BTreeMap<Id, u64> = BTreeMap::new();
    let mut choice = Choice::new();
    loop {
        let mut changed = false;
        for &id in &ids {
            for node in &egraph[id].nodes {
                if id == forced.0 && node != forced.1 {
                    continue;
                }
                let operands = node.places().iter().map(|c| size.get(&egraph.find(*c)));
                let Some(sum) = operands.sum::<Option<u64>>() else {
                    continue;
                };
                let own = sum.saturating_add(1);
                if size.get(&id).is_none_or(|&s| own < s) {
                    size.insert(id, own);
                    choice.insert(id, node.clone());
                    changed = true;
                }
            }
        }
        if !changed {
            break;
        }
    }
    roots
        .iter()
        .all(|r| size.contains_key(&egraph.find(*r)))
        .then_some(choice)
}

/// New rows and cached rows of two sequences, step after step.
const STEPS: [([usize; 2], [usize; 2]); 2] = [([2, 0], [0, 0]), ([2, 3], [2, 0])];

/// What a sample's inputs and weights are, and its results in every step.
struct World<'a> {
    sample: &'a Graph,
    seed: u64,
}

impl World<'_> {
    fn env(lens: &[usize]) -> SymEnv {
        let t = lens.iter().sum::<usize>() as i64;
        SymEnv::new(&[(Sym::B, 2), (Sym::S, 5), (Sym::T, t), (Sym::R, 2)])
    }

    /// The value of an input in a step: `step.x` is the window of x.
    fn input(&self, name: &str, ty: &Type, lens: &[usize], step: &StepMeta) -> V {
        let env = Self::env(lens);
        // A step is given its positions, whatever an input of the sample is called.
        if name == "step.positions" {
            let p: Vec<i64> = step.rows().map(|(_, p)| p as i64).collect();
            return Value::Int(Tensor::new([p.len()], p));
        }
        let full = name.strip_prefix("step.").and_then(|full| {
            self.sample.ids().find(
                |&i| matches!(&self.sample.node(i).op, Op::Input(Input { name, .. }) if name == full),
            )
        });
        if let Some(full) = full {
            let node = self.sample.node(full);
            let shape = &node.ty.as_tensor().expect("inputs are tensors").shape;
            let axis = |sym| shape.iter().position(|d| d.is_sym(sym)).map(|i| i as u8);
            let win = Op::Win(Win {
                batch: axis(Sym::B),
                seq: axis(Sym::S),
            });
            let ty = infer(&win, [&node.ty]).expect("a window");
            let value = self.input(&name["step.".len()..], &node.ty, lens, step);
            let mut interp = Interp::new(env, &|_| Err("no weights".to_string()));
            interp.step = Some(step.clone());
            return eval_op(&win, [&value], &ty, &mut interp).expect("a window");
        }
        let t = ty.as_tensor().expect("inputs are tensors");
        let limit = match name {
            "rows" => lens.iter().sum(),
            "few" => 2,
            _ => 7,
        };
        random_input(self.seed, name, t.dtype, &t.shape, &env, limit)
    }

    /// The results of a graph in each step, with its caches kept between the steps.
    fn run(&self, graph: &Graph) -> Result<Vec<IndexMap<String, V>>, String> {
        let weights = |w: &WeightRef| random_weight(self.seed, w);
        let mut caches: BTreeMap<u32, KvState<f64>> = BTreeMap::new();
        let mut results = Vec::new();
        for (lens, past) in STEPS {
            let step = StepMeta::new(&lens, &past);
            let mut interp = Interp::new(Self::env(&lens), &weights);
            for node in graph.nodes() {
                if let Op::Input(Input { name, .. }) = &node.op {
                    let value = self.input(name, &node.ty, &lens, &step);
                    interp.inputs.insert(name.clone(), value);
                }
            }
            interp.step = Some(step);
            interp.caches = caches;
            results.push(interp.run(graph).map_err(|e| e.to_string())?);
            caches = interp.caches;
        }
        Ok(results)
    }
}

/// Checks that the rule matches its sample of this seed and that all forms of all values are
/// equal. Returns how many forms were compared.
fn check(rule: &Rule, rewrites: &Rewrites, samples: &Samples, seed: u64) -> Result<usize, String> {
    let sample = samples.sample(seed).map_err(|e| e.to_string())?;
    let (egraph, ids) = saturate(&sample, rewrites);
    if fired(&egraph, rule) == 0 {
        return Err(format!(
            "does not match\n{}",
            lathe_ir::text::print(&sample)
        ));
    }
    match compare_forms(&sample, &egraph, &ids, rule.exactness.tolerance(), seed)? {
        0 => Err("no other form".to_string()),
        compared => Ok(compared),
    }
}

/// Checks that all forms that a graph's values have in an e-graph are equal to them. Returns how
/// many forms were compared.
fn compare_forms(
    sample: &Graph,
    egraph: &EGraph,
    ids: &[Id],
    tolerance: f64,
    seed: u64,
) -> Result<usize, String> {
    let world = World { sample, seed };
    let expected = world.run(&all_outputs(sample))?;
    let roots: Vec<(String, Id)> = sample
        .ids()
        .filter(|&i| matches!(sample.node(i).ty, Type::Tensor(_)))
        .map(|i| (format!("n{}", i.index()), ids[i.index()]))
        .collect();
    let root_ids: Vec<Id> = roots.iter().map(|r| r.1).collect();
    let mut compared = 0;
    let mut classes: Vec<Id> = egraph.classes().map(|c| c.id).collect();
    classes.sort();
    for class in classes {
        if egraph[class].nodes.len() < 2 {
            continue;
        }
        for form in &egraph[class].nodes {
            let Some(choice) = smallest(egraph, (class, form), &root_ids) else {
                continue;
            };
            let graph = to_graph(egraph, &choice, "form", &roots);
            let text = || lathe_ir::text::print(&graph);
            let found = world.run(&graph).map_err(|e| format!("{e}\n{}", text()))?;
            for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
                for (name, value) in expected {
                    let d = distance(&found[name], value);
                    if d > tolerance {
                        return Err(format!(
                            "{name} differs by {d:.2e} in step {step}\n{}\n{}",
                            lathe_ir::text::print(sample),
                            text()
                        ));
                    }
                }
            }
            compared += 1;
        }
    }
    Ok(compared)
}

#[test]
fn samples_match_and_all_forms_are_equal() {
    let mut failures = Vec::new();
    for rule in rules::all() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/regressions/rules.txt");
        let config = Config {
            cases: 40,
            failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
            ..Config::default()
        };
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let (rewrites, samples) = (rule.rewrites(), samples(rule));
        let result =
            TestRunner::new_with_rng(config, rng).run(&proptest::arbitrary::any::<u64>(), |seed| {
                match check(rule, &rewrites, &samples, seed) {
                    Ok(_) => Ok(()),
                    Err(e) => Err(TestCaseError::fail(e)),
                }
            });
        if let Err(e) = result {
            failures.push(format!("{}: {e}", rule.name));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

/// A pattern that no sample reaches is an untested rule of its own.
#[test]
fn every_pattern_matches_some_sample() {
    let mut missed = Vec::new();
    for rule in rules::all() {
        for (i, rewrite) in rule.rewrites().into_iter().enumerate() {
            let one = vec![rewrite];
            let samples = samples(rule);
            let reached = (0..200).any(|seed| {
                let sample = samples.sample(seed).unwrap();
                fired(&saturate(&sample, &one).0, rule) > 0
            });
            if !reached {
                missed.push(format!("{}: {}", rule.name, rule.lhs[i]));
            }
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn near_misses_do_not_match() {
    let mut matched = Vec::new();
    for rule in rules::all() {
        let rewrites = rule.rewrites();
        for near_miss in samples(rule).near_misses {
            for seed in 0..16 {
                let graph = near_miss.graph(seed).unwrap();
                let (egraph, _) = saturate(&graph, &rewrites);
                if fired(&egraph, rule) > 0 {
                    matched.push(format!("{}: {} (seed {seed})", rule.name, near_miss.title));
                    break;
                }
            }
        }
    }
    assert!(matched.is_empty(), "{}", matched.join("\n"));
}

/// A near miss is one edit away from the left side, so it is a program like any other: with all
/// rules of its stage on, all forms of all its values are still equal.
#[test]
fn near_misses_keep_their_meaning() {
    let tolerance = Exactness::Reassociates.tolerance();
    let mut failures = Vec::new();
    for rule in rules::all() {
        let stage = rules::all().into_iter().filter(|r| r.stage == rule.stage);
        let rewrites: Rewrites = stage.flat_map(Rule::rewrites).collect();
        for near_miss in samples(rule).near_misses {
            for seed in 0..3 {
                let graph = near_miss.graph(seed).unwrap();
                let (egraph, ids) = saturate(&graph, &rewrites);
                if let Err(e) = well_formed(&graph)
                    .and_then(|()| compare_forms(&graph, &egraph, &ids, tolerance, seed))
                {
                    failures.push(format!("{} ({}): {e}", rule.name, near_miss.title));
                    break;
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

/// The graph has outputs and no errors but an attention that is still open.
fn well_formed(graph: &Graph) -> Result<(), String> {
    let open = lathe_ir::verify::VerifyKind::OpenAttention;
    let mut errors = lathe_ir::verify(graph);
    errors.retain(|e| e.kind != open);
    match errors.first() {
        Some(e) => Err(e.to_string()),
        None if graph.outputs().is_empty() => Err("no outputs".to_string()),
        None => Ok(()),
    }
}

#[test]
fn rules_are_complete() {
    let mut names = BTreeSet::new();
    let mut bare = BTreeSet::new();
    for rule in rules::all() {
        let name = rule.name;
        assert!(names.insert(name), "{name} stands twice");
        assert!(Stage::ALL.iter().all(|s| s.name() != name), "{name}");
        assert!(rule.equation.contains("=>"), "{name}: equation");
        assert!(
            rule.doc.len() >= 15 && rule.doc.ends_with('.'),
            "{name}: doc"
        );
        assert!(!rule.lhs.is_empty(), "{name}: no pattern");
        assert_eq!(rule.rewrites().len(), rule.lhs.len(), "{name}");
        if samples(rule).near_misses.is_empty() {
            bare.insert(name);
        }
        assert!(
            !matches!(rule.exactness, Exactness::Approximate(t) if t > 1e-6),
            "{name}: a tolerance that hides errors"
        );
        assert!(rules::by_name(name).is_some());
    }
    assert_eq!(bare, BTreeSet::from(UNCONDITIONAL));
}

/// Every program of every file is well typed whatever stands in its holes, and must match.
#[test]
fn every_sample_matches() {
    let mut missed = Vec::new();
    for rule in rules::all() {
        let rewrites = rule.rewrites();
        for (i, sample) in samples(rule).samples.iter().enumerate() {
            for seed in 0..8 {
                let graph = sample.graph(seed).unwrap();
                assert!(!graph.outputs().is_empty(), "{}: sample {i}", rule.name);
                if fired(&saturate(&graph, &rewrites).0, rule) == 0 {
                    missed.push(format!("{}: sample {i} (seed {seed})", rule.name));
                    break;
                }
            }
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn every_file_of_samples_is_of_a_rule() {
    let rules: BTreeSet<String> = rules::all().into_iter().map(sample::path).collect();
    let files: BTreeSet<String> = sample::files().into_iter().collect();
    assert_eq!(files, rules);
}

/// Reads a file of one sample with this header and body.
fn read(header: &str, body: &str) -> Result<Template, SampleError> {
    let program = format!("graph \"g\" {{\n  %x = {body}\n  return y=%x\n}}\n");
    let content = format!("// A comment.\n{header}--- sample\n{program}");
    Ok(Samples::parse("f.ir", &content)?.samples.remove(0))
}

#[test]
fn files_of_samples_are_strict() {
    let body = "input {name=\"x\"} : f32[$(2 * h + 1)]";
    let sample = read("//! let h = 3 | 4\n", body).unwrap();
    let texts: BTreeSet<String> = (0..20)
        .map(|seed| sample.graph(seed).unwrap())
        .map(|g| lathe_ir::text::print(&g))
        .collect();
    assert_eq!(texts.len(), 2);
    assert!(texts.iter().any(|t| t.contains("f32[7]")), "{texts:?}");

    let cases = [
        (
            "//! lot h = 3\n",
            body,
            "f.ir:2: unknown word 'lot'; known is 'let'",
        ),
        (
            "//! let h: 3\n",
            body,
            "f.ir:2: expected 'let NAME, .. = CHOICE | ..'",
        ),
        ("//! let H = 3\n", body, "f.ir:2: 'H' is no name of a hole"),
        ("//! let h, k = 3\n", body, "f.ir:2: no program uses 'k'"),
        (
            "--- samples\n",
            body,
            "f.ir:2: expected '--- sample' or '--- near miss: REASON'",
        ),
        (
            "--- near miss\n",
            body,
            "f.ir:2: a near miss without a reason",
        ),
        (
            "graph\n",
            body,
            "f.ir:2: expected '--- sample' above the first program",
        ),
    ];
    for (header, body, message) in cases {
        assert_eq!(read(header, body).unwrap_err().to_string(), message);
    }
    let cases = [
        ("", "input {name=\"x\"} : f32[$h]", "f.ir:4: no hole '$h'"),
        (
            "//! let h = a\n",
            body,
            "f.ir:5: '2 * h + 1' is no expression such as '2 * h + 1'",
        ),
        (
            "",
            "input {name=\"x\"} : f32[$(2]",
            "f.ir:4: expected ')' after '$('",
        ),
    ];
    for (header, body, message) in cases {
        let e = read(header, body).unwrap().graph(0).unwrap_err();
        assert_eq!(e.to_string(), message);
    }
    let e = read("", "exp %y : f32[]").unwrap().graph(0).unwrap_err();
    assert!(e.to_string().starts_with("f.ir:4: "), "{e}");
    assert!(Samples::parse("f.ir", "").is_err());
}

/// Elementwise rules have one pattern a function, in the order of the functions.
#[test]
fn elementwise_windows_name_their_functions() {
    let unary = rules::by_name("win-unary").expect("a rule");
    for (lhs, f) in unary.lhs.iter().zip(lathe_ir::UnaryFn::ALL) {
        assert_eq!(*lhs, format!("(win ?w ({} ?x))", f.name()));
    }
    let binary = rules::by_name("win-binary").expect("a rule");
    for (lhs, f) in binary.lhs.iter().zip(lathe_ir::BinaryFn::ALL) {
        assert_eq!(*lhs, format!("(win ?w ({} ?x ?y))", f.name()));
    }
    assert_eq!(unary.lhs.len(), lathe_ir::UnaryFn::ALL.len());
    assert_eq!(binary.lhs.len(), lathe_ir::BinaryFn::ALL.len());
}

/// The harness itself: a wrong rule is found.
#[test]
fn a_wrong_rule_is_found() {
    let wrong = Rule {
        name: "wrong",
        rhs: |a| {
            let (x, c) = (a.id("?x"), a.id("?c"));
            a.add(lathe_ir::BinaryFn::Add, [x, c])
        },
        ..*rules::by_name("mul-one").expect("a rule")
    };
    let samples = samples(rules::by_name("mul-one").expect("a rule"));
    let seed = Noise::new(1, "seed").next();
    let found = check(&wrong, &wrong.rewrites(), &samples, seed);
    assert!(found.is_err_and(|e| e.contains("differs by")));
}
