//! Models of the Llama shape through all passes: what the programs must look like, that they do
//! not depend on how they were made, and what each switch does.

mod common;

use common::{
    LLAMA_CONFIGS, LLAMA_SHAPE, Session, Weights, config, distance, full_logits, graph_of,
    is_kernel, model, term_hashes,
};
use lathe_ir::interp::{Tensor, Value};
use lathe_ir::text::print;
use lathe_ir::{DType, Graph, Op, Type, WeightRef};
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{CompileError, Compiled, PassConfig, compile};
use lathe_passes::{Stage, rules};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

fn h100() -> PassConfig {
    PassConfig::new(DeviceModel::H100)
}

fn off(rule: &str) -> PassConfig {
    h100().disable(&[rule]).expect("a rule")
}

fn steps(c: &Compiled) -> [&Graph; 2] {
    match (&c.decode, &c.general) {
        (Some(d), Some(g)) => [d, g],
        _ => panic!("no step program: {:?}", c.no_step),
    }
}

fn layers(graph: &Graph) -> u32 {
    let layers = graph.nodes().iter().filter_map(|n| n.prov.layer);
    layers.max().map_or(0, |l| l + 1)
}

/// Names of operations that a program of the Llama shape must not have: the parts of what the
/// passes recognise, and what has no kernel in a step.
const PARTS: [&str; 22] = [
    "exp", "rsqrt", "sigmoid", "sin", "cos", "mean", "amax", "sum", "pow", "where", "neg", "matmul",
    "concat", "slice", "expand", "softmax", "rope", "angles", "repeat_kv", "sdpa", "attn", "win",
];

#[test]
fn imports_hold_only_primitives() {
    for name in LLAMA_SHAPE {
        for dtype in [DType::F32, DType::BF16] {
            for node in model(name, dtype).nodes() {
                assert!(node.op.is_primitive(), "{name}: {}", node.op.name());
            }
        }
    }
}

#[test]
fn programs_of_the_llama_shape() {
    for name in LLAMA_SHAPE {
        for dtype in [DType::F32, DType::BF16] {
            check_programs(&format!("{name} {dtype}"), &model(name, dtype));
        }
    }
    for name in LLAMA_CONFIGS {
        check_programs(name, &model(name, DType::BF16));
    }
}

fn check_programs(name: &str, model: &Graph) {
    let c = compile(model, &h100()).expect("compiles");
    let n = layers(model) as usize;
    for (program, g) in ["decode", "general"].iter().zip(steps(&c)) {
        let at = format!("{name} {program}");
        assert_eq!(lathe_ir::verify(g), Vec::new(), "{at}");
        for part in PARTS {
            assert_eq!(g.count(part), 0, "{at}: {part}\n{}", print(g));
        }
        for op in ["attn_qkv", "cache"] {
            assert_eq!(g.count(op), n, "{at}: {op}");
        }
        assert_eq!(g.count("attn_step"), 0, "{at}");
        let mut kernels = vec![0; n];
        let mut packs: Vec<BTreeMap<String, usize>> = vec![BTreeMap::new(); n];
        for node in g.nodes() {
            let Some(l) = node.prov.layer else { continue };
            if is_kernel(&node.op) {
                kernels[l as usize] += 1;
            }
            if let Op::Gemm(_) = node.op
                && let Op::Pack(kind) = &g.node(node.inputs[1]).op
            {
                let kind = format!("{kind:?}");
                let kind = kind.split(' ').next().expect("a name").to_string();
                *packs[l as usize].entry(kind).or_default() += 1;
            }
        }
        let most = if *program == "decode" { 6 } else { 8 };
        assert!(
            kernels.iter().all(|&k| (1..=most).contains(&k)),
            "{at}: {kernels:?} kernels a layer\n{}",
            print(g)
        );
        let expected = BTreeMap::from([("GateUp".to_string(), 1), ("Qkv".to_string(), 1)]);
        for p in packs {
            assert_eq!(p, expected, "{at}");
        }
        check_weights(&at, model, g);
        check_shapes(&at, g);
    }
    // Decode samples every row; the general step makes logits of the wanted rows only.
    assert_eq!(steps(&c)[0].count("select"), 0, "{name}");
    for node in steps(&c)[1].nodes() {
        let vocab = node.prov.layer.is_none()
            && node.ty.as_tensor().is_some_and(|t| {
                t.rank() == 2 && t.shape[0].is_sym(lathe_ir::Sym::T) && is_kernel(&node.op)
            });
        assert!(
            !(vocab && matches!(node.op, Op::Gemm(_) | Op::Linear)),
            "{name}: logits of all rows"
        );
    }
    for t in &c.templates {
        assert_eq!(t.stages.len(), Stage::ALL.len(), "{name}");
    }
}

/// Every weight of the import is read, each pack reads each weight once, and the two programs
/// agree on the layouts because no weight is read both packed and as it is.
fn check_weights(at: &str, model: &Graph, g: &Graph) {
    let names = |g: &Graph| -> BTreeSet<String> {
        g.nodes()
            .iter()
            .filter_map(|n| match &n.op {
                Op::Weight { weight, .. } => Some(weight.name.clone()),
                _ => None,
            })
            .collect()
    };
    assert_eq!(names(g), names(model), "{at}: weights");
    let users = g.users();
    for id in g.ids() {
        let node = g.node(id);
        if let Op::Weight { weight, .. } = &node.op {
            let packed = users[id.index()]
                .iter()
                .filter(|u| matches!(g.node(**u).op, Op::Pack(_)))
                .count();
            let tied = users[id.index()]
                .iter()
                .any(|u| g.node(*u).op == Op::Embedding);
            assert!(packed <= 1, "{at}: {} is packed twice", weight.name);
            let most = if tied { 2 } else { 1 };
            let uses = users[id.index()].len();
            assert!(uses <= most, "{at}: {} is used {uses} times", weight.name);
        }
    }
}

/// A step knows its rows, but neither sequences nor their count.
fn check_shapes(at: &str, g: &Graph) {
    for node in g.nodes() {
        if let Type::Tensor(t) = &node.ty {
            for d in &t.shape {
                let full = d.coef(lathe_ir::Sym::S) != 0 || d.coef(lathe_ir::Sym::B) != 0;
                assert!(!full, "{at}: {} of {d}", node.op.name());
            }
        }
    }
}

#[test]
fn templates_are_one_a_kind_of_layer() {
    let c = compile(&model("llama-3.1-8b", DType::BF16), &h100()).expect("compiles");
    let names: Vec<&str> = c.templates.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["0-embed", "1-layer", "2-layer", "3-head"]);
    // The first layer takes the embedding, the others the pair (residual, delta).
    assert_eq!(c.templates[1].layers, [0]);
    assert_eq!(c.templates[2].layers, (1..32).collect::<Vec<u32>>());
}

/// Twice the same bytes, and 80 layers in no more rewriting than 2.
#[test]
fn compilation_is_deterministic_and_bounded() {
    for name in ["llama-3.1-8b", "llama-3.1-70b", "qwen3-0.6b"] {
        let m = model(name, DType::BF16);
        let start = Instant::now();
        let a = compile(&m, &h100()).expect("compiles");
        let took = start.elapsed();
        assert!(took.as_secs() < 20, "{name} took {took:?}");
        let total: std::time::Duration = a.phases.values().sum();
        println!("{name}: {took:?}, {:?}", a.phases);
        assert!(total <= took && took - total < took / 2, "{name}: unattributed time");
        let b = compile(&m, &h100()).expect("compiles");
        for (x, y) in steps(&a).into_iter().zip(steps(&b)) {
            assert_eq!(x, y, "{name}");
            assert_eq!(print(x), print(y), "{name}");
        }
        assert_eq!(print(&a.full), print(&b.full), "{name}");
        for (x, y) in a.templates.iter().zip(&b.templates) {
            assert_eq!(x.log, y.log, "{name}");
            let nodes: usize = x.stages.iter().map(|s| s.nodes).max().unwrap_or(0);
            assert!(nodes < 2000, "{name} {}: {nodes} e-nodes", x.name);
        }
    }
}

/// The whole model as one region gives the same terms as one template a kind of layer.
#[test]
fn rolling_changes_nothing() {
    for name in LLAMA_SHAPE {
        let m = model(name, DType::BF16);
        let rolled = compile(&m, &h100()).expect("compiles");
        let whole = PassConfig {
            no_roll: true,
            ..h100()
        };
        let whole = compile(&m, &whole).expect("compiles");
        assert_eq!(whole.templates.len(), 1);
        for (a, b) in steps(&rolled).into_iter().zip(steps(&whole)) {
            let sorted = |g: &Graph| {
                let mut h = term_hashes(g);
                h.sort_unstable();
                h
            };
                assert_eq!(sorted(a), sorted(b), "{name}\n{}\n{}", print(a), print(b));
        }
        let w = Weights::golden(name);
        let weights = |r: &WeightRef| w.get(r);
        let d = distance(
            &Value::Float(run_general(steps(&rolled)[1], &weights)),
            &Value::Float(run_general(steps(&whole)[1], &weights)),
        );
        assert!(d <= 1e-12, "{name}: {d:.2e}");
    }
}

const PROMPTS: [&[i64]; 2] = [&[3, 141, 59, 26, 5], &[35, 89, 7]];

/// Logits of all rows of two prompts, in two steps.
fn run_general(g: &Graph, weights: &dyn Fn(&WeightRef) -> Result<Vec<f64>, String>) -> Tensor<f64> {
    let mut s = Session {
        graph: g,
        weights,
        caches: BTreeMap::new(),
    };
    let [a, b] = PROMPTS;
    let first = s.step(&[&a[..2], &b[..1]], &[0, 0], &[0, 1, 2]);
    let second = s.step(&[&a[2..], &b[1..]], &[2, 1], &[0, 1, 2, 3, 4]);
    let vocab = first.last();
    Tensor::new([8, vocab], [first.data, second.data].concat())
}

/// Logits of all rows of two prompts, a token a sequence and step.
fn run_decode(g: &Graph, weights: &dyn Fn(&WeightRef) -> Result<Vec<f64>, String>) -> Tensor<f64> {
    let mut s = Session {
        graph: g,
        weights,
        caches: BTreeMap::new(),
    };
    let [a, b] = PROMPTS;
    let mut data = Vec::new();
    for p in 0..3 {
        data.extend(s.step(&[&a[p..=p], &b[p..=p]], &[p, p], &[0, 1]).data);
    }
    Tensor::new([6, data.len() / 6], data)
}

/// A model in which a rule matters.
#[derive(Clone, Copy)]
struct Case {
    golden: &'static str,
    dtype: DType,
    rule: &'static str,
    /// Operations that come back in the decode, the general or the full program.
    back: &'static [(&'static str, &'static str)],
    /// What the reason says if there is no step program then.
    no_step: Option<&'static str>,
}

const fn case(
    golden: &'static str,
    dtype: DType,
    rule: &'static str,
    back: &'static [(&'static str, &'static str)],
    no_step: Option<&'static str>,
) -> Case {
    Case {
        golden,
        dtype,
        rule,
        back,
        no_step,
    }
}

const F32: DType = DType::F32;
const BF16: DType = DType::BF16;

/// Rules that no model of the Llama shape needs while all others are on: windows of the parts of
/// what the rules before them recognise, and spellings that the importer does not use.
const UNUSED: [&str; 0] = [];

const CASES: [Case; 0] = [];

#[test]
fn print_switches() {
    let mut base: BTreeMap<(&str, String), (Compiled, Tensor<f64>, Tensor<f64>)> = BTreeMap::new();
    for rule in rules::all() {
        for (golden, dtype) in [
            ("llama-mha-bias", F32),
            ("qwen3", BF16),
            ("mistral-window", F32),
        ] {
            let m = model(golden, dtype);
            let w = Weights::golden(golden);
            let weights = |r: &WeightRef| w.get(r);
            let (c0, g0, d0) = base.entry((golden, dtype.to_string())).or_insert_with(|| {
                let c = compile(&m, &h100()).expect("compiles");
                let g = run_general(c.general.as_ref().unwrap(), &weights);
                let d = run_decode(c.decode.as_ref().unwrap(), &weights);
                (c, g, d)
            });
            let c = compile(&m, &off(rule.name)).expect("compiles");
            let counts = |g: &Graph| {
                let mut m: BTreeMap<&str, usize> = BTreeMap::new();
                for n in g.nodes() {
                    if !n.op.is_leaf() {
                        *m.entry(n.op.name()).or_default() += 1;
                    }
                }
                m
            };
            let diff = |a: &Graph, b: &Graph| -> Vec<String> {
                let (a, b) = (counts(a), counts(b));
                b.iter()
                    .filter(|(k, v)| a.get(*k).copied().unwrap_or(0) < **v)
                    .map(|(k, v)| format!("{k}+{}", v - a.get(k).copied().unwrap_or(0)))
                    .collect()
            };
            println!("{:22} {golden:16} full {:?}", rule.name, diff(&c0.full, &c.full));
            match (&c.decode, &c.general) {
                (Some(d), Some(g)) => {
                    let dg = distance(
                        &Value::Float(run_general(g, &weights)),
                        &Value::Float(g0.clone()),
                    );
                    let dd = distance(
                        &Value::Float(run_decode(d, &weights)),
                        &Value::Float(d0.clone()),
                    );
                    println!(
                        "{:22} {golden:16} decode {:?} general {:?} {dd:.1e} {dg:.1e}",
                        "",
                        diff(c0.decode.as_ref().unwrap(), d),
                        diff(c0.general.as_ref().unwrap(), g)
                    );
                }
                _ => println!("{:22} {golden:16} NONE {}", "", c.no_step.as_ref().unwrap()),
            }
        }
    }
}
