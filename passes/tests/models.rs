//! Models of the Llama shape through all passes: what the programs must look like, that they do
//! not depend on how they were made, and what each switch does.

mod common;

use common::build::{Build, b, n, s};
use common::{
    LLAMA_CONFIGS, LLAMA_SHAPE, Session, Weights, distance, is_kernel, model, term_hashes,
};
use lathe_ir::interp::{Tensor, Value};
use lathe_ir::ops::{Embedding, Iota, Linear, Reduce, Select, Weight};
use lathe_ir::ops::{binary, gemm};
use lathe_ir::text::print;
use lathe_ir::{BinaryFn, DType, Graph, Op, Type, WeightRef};
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{CompileError, Compiled, PassConfig, compile};
use lathe_passes::{Stage, chains, rules};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

fn h100() -> PassConfig {
    // What is counted here are the operations that rules leave; chains have tests of their own.
    let config = PassConfig::new(DeviceModel::H100);
    config.disable(&[chains::NAME]).expect("a pass")
}

fn off(rule: &str) -> PassConfig {
    h100().disable(&[rule]).expect("a rule")
}

fn steps(c: &Compiled) -> [&Graph; 2] {
    match (&c.steps.decode, &c.steps.general) {
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
    "exp",
    "rsqrt",
    "sigmoid",
    "sin",
    "cos",
    "mean",
    "amax",
    "sum",
    "pow",
    "where",
    "neg",
    "matmul",
    "concat",
    "slice",
    "expand",
    "softmax",
    "rope",
    "angles",
    "repeat_kv",
    "sdpa",
    "attn",
    "win",
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
        let known = lathe_ir::Known::of_graph(g);
        for (node, known) in g.nodes().iter().zip(known) {
            let Some(l) = node.prov.layer else { continue };
            // The rows that are wanted are picked behind the last layer.
            if is_kernel(&node.op) && !known.before_steps() && node.op != Op::Select(Select) {
                kernels[l as usize] += 1;
            }
            let Op::Gemm(_) = node.op else { continue };
            // Behind a norm the packed weight has its gamma.
            let mut weight = g.node(node.inputs[gemm::W]);
            if weight.op == Op::Binary(BinaryFn::Mul) {
                weight = g.node(weight.inputs[binary::A]);
            }
            if let Op::Pack(kind) = &weight.op {
                let kind = format!("{kind:?}");
                let kind = kind.split(' ').next().expect("a name").to_string();
                *packs[l as usize].entry(kind).or_default() += 1;
            }
        }
        assert!(
            kernels.iter().all(|&k| k == 5),
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
            !(vocab && matches!(node.op, Op::Gemm(_) | Op::Linear(Linear))),
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
                Op::Weight(Weight { weight, .. }) => Some(weight.name.clone()),
                _ => None,
            })
            .collect()
    };
    assert_eq!(names(g), names(model), "{at}: weights");
    let users = g.users();
    for id in g.ids() {
        let node = g.node(id);
        if let Op::Weight(Weight { weight, .. }) = &node.op {
            let packed = users[id.index()]
                .iter()
                .filter(|u| matches!(g.node(**u).op, Op::Pack(_)))
                .count();
            let tied = users[id.index()]
                .iter()
                .any(|u| g.node(*u).op == Op::Embedding(Embedding));
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
    assert_eq!(names, ["0-embed", "1-layer", "2-head"]);
    assert_eq!(c.templates[1].layers, (0..32).collect::<Vec<u32>>());
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
        assert!(
            total <= took && took - total < took / 2,
            "{name}: unattributed time"
        );
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

/// What switching a rule off does to a model in which it matters.
struct Case {
    rule: &'static str,
    golden: &'static str,
    dtype: DType,
    /// `(program, operation)` that come back.
    back: &'static [(&'static str, &'static str)],
    /// Whether there is a step program still.
    steps: bool,
}

const fn case(
    rule: &'static str,
    golden: &'static str,
    dtype: DType,
    back: &'static [(&'static str, &'static str)],
) -> Case {
    Case {
        rule,
        golden,
        dtype,
        back,
        steps: true,
    }
}

/// A rule without which there is no step program.
const fn vital(
    rule: &'static str,
    dtype: DType,
    back: &'static [(&'static str, &'static str)],
) -> Case {
    Case {
        steps: false,
        ..case(rule, "qwen3", dtype, back)
    }
}

const F32: DType = DType::F32;
const BF16: DType = DType::BF16;
const BIAS: &str = "llama-mha-bias";
const SOFTMAX: &[(&str, &str)] = &[("full", "softmax"), ("full", "matmul"), ("full", "add")];

/// Rules that no model of the Llama shape needs while all others are on: spellings that the
/// importer does not use, and windows of the parts of what earlier rules recognise.
const UNUSED: [&str; 17] = [
    // Conv1D weights of GPT-2.
    "linear-stored",
    "mul-one",
    "scale-out-of-scores",
    "attention-mask-fill",
    "attention-softcap",
    "win-unary",
    "win-cast",
    "win-where",
    "win-reduce",
    "win-rowwise",
    "win-angles",
    "win-slice",
    "win-concat",
    "win-repeat-kv",
    "win-outer",
    // Norms read sums that the GEMM before them has made with its residual epilogue.
    "add-norm-into-gemm",
    "select-add",
];

const CASES: [Case; 44] = [
    case(
        "mul-weight-right",
        "qwen3",
        BF16,
        &[("decode", "rsqrt"), ("general", "pow")],
    ),
    case(
        "linear",
        "mistral-window",
        F32,
        &[("decode", "matmul"), ("general", "matmul")],
    ),
    vital(
        "softmax",
        BF16,
        &[("full", "exp"), ("full", "amax"), ("full", "sum")],
    ),
    vital("softmax-upcast", BF16, SOFTMAX),
    case(
        "rmsnorm",
        "mistral-window",
        F32,
        &[("decode", "rsqrt"), ("general", "mean")],
    ),
    case(
        "rmsnorm-upcast",
        "qwen3",
        BF16,
        &[("decode", "rsqrt"), ("general", "mean")],
    ),
    case(
        "rope-angles",
        "qwen3",
        BF16,
        &[("decode", "sin"), ("general", "cos")],
    ),
    case(
        "rope",
        "qwen3",
        BF16,
        &[("decode", "sin"), ("general", "neg")],
    ),
    case(
        "silu",
        BIAS,
        F32,
        &[("decode", "sigmoid"), ("general", "sigmoid")],
    ),
    case(
        "swiglu",
        "qwen3",
        BF16,
        &[("decode", "silu"), ("general", "silu")],
    ),
    case(
        "repeat-kv",
        "qwen3",
        BF16,
        &[("decode", "expand"), ("full", "expand")],
    ),
    vital("attention-open", BF16, SOFTMAX),
    vital("attention-mask", BF16, SOFTMAX),
    vital("attention-scale", BF16, SOFTMAX),
    vital("attention-close", BF16, SOFTMAX),
    case(
        "attention-gqa",
        "qwen3",
        BF16,
        &[("decode", "expand"), ("general", "expand")],
    ),
    case("reshape-reshape", "qwen3", BF16, &[("decode", "reshape")]),
    vital("win-input", BF16, &[]),
    vital("win-positions", BF16, &[]),
    vital("win-binary", BF16, &[]),
    vital("win-linear", BF16, &[]),
    vital("win-embedding", BF16, &[]),
    vital("win-reshape", BF16, &[]),
    vital("win-permute", BF16, &[]),
    vital("win-expand", BF16, &[]),
    vital("insert-kv-cache", BF16, &[]),
    case("win-rmsnorm", "qwen3", BF16, &[("decode", "rsqrt")]),
    case("win-swiglu", "qwen3", BF16, &[("decode", "silu")]),
    case("win-rope", "qwen3", BF16, &[("decode", "sin")]),
    case("select-linear", "qwen3", BF16, &[]),
    case("select-rmsnorm", "qwen3", BF16, &[]),
    case(
        "gemm",
        "qwen3",
        BF16,
        &[("decode", "linear"), ("general", "linear")],
    ),
    case(
        "gemm-bias",
        BIAS,
        F32,
        &[("decode", "add"), ("general", "add")],
    ),
    case("gemm-residual", "qwen3", BF16, &[]),
    case(
        "add-rmsnorm",
        "qwen3",
        BF16,
        &[("full", "add"), ("full", "rmsnorm")],
    ),
    case("norm-into-gemm", "qwen3", BF16, &[("decode", "rmsnorm")]),
    case(
        "gamma-into-weight",
        "qwen3",
        BF16,
        &[("general", "rmsnorm")],
    ),
    case(
        "gate-up-join",
        "qwen3",
        BF16,
        &[("decode", "swiglu"), ("general", "swiglu")],
    ),
    case("gate-up-join-bias", BIAS, F32, &[("decode", "swiglu")]),
    case(
        "proj",
        "qwen3",
        BF16,
        &[("decode", "attn_step"), ("general", "attn_step")],
    ),
    case("proj-bias", BIAS, F32, &[("decode", "attn_step")]),
    case(
        "proj-norm",
        "qwen3",
        BF16,
        &[("decode", "rmsnorm"), ("decode", "attn_step")],
    ),
    case(
        "proj-rope",
        "qwen3",
        BF16,
        &[("decode", "rope"), ("decode", "attn_step")],
    ),
    case(
        "qkv-join",
        "qwen3",
        BF16,
        &[("decode", "attn_step"), ("general", "attn_step")],
    ),
];

/// A compiled model with the results of its two programs.
struct Base {
    compiled: Compiled,
    general: Tensor<f64>,
    decode: Tensor<f64>,
}

#[test]
fn every_switch_keeps_the_results() {
    let mut bases: BTreeMap<(&str, bool), Base> = BTreeMap::new();
    let mut named = BTreeSet::new();
    for case in &CASES {
        let (rule, golden) = (case.rule, case.golden);
        assert!(named.insert(rule), "{rule} stands twice");
        let m = model(golden, case.dtype);
        let w = Weights::golden(golden);
        let weights = |r: &WeightRef| w.get(r);
        let base = bases.entry((golden, case.dtype == F32)).or_insert_with(|| {
            let compiled = compile(&m, &h100()).expect("compiles");
            let [d, g] = steps(&compiled);
            Base {
                general: run_general(g, &weights),
                decode: run_decode(d, &weights),
                compiled,
            }
        });
        let c = compile(&m, &off(rule)).unwrap_or_else(|e| panic!("{rule}: {e}"));
        for (program, op) in case.back {
            let pick = |c: &Compiled| match *program {
                "full" => c.full.count(op),
                "decode" => c.steps.decode.as_ref().map_or(0, |g| g.count(op)),
                _ => c.steps.general.as_ref().map_or(0, |g| g.count(op)),
            };
            let (before, after) = (pick(&base.compiled), pick(&c));
            assert!(
                after > before,
                "{rule} off: {before} -> {after} {op} in {program}"
            );
        }
        if case.steps {
            let [d, g] = steps(&c);
            let changed = *d != *steps(&base.compiled)[0]
                || *g != *steps(&base.compiled)[1]
                || c.full != base.compiled.full;
            assert!(changed, "{rule} off: nothing changed");
            for (what, found, expected) in [
                ("general", run_general(g, &weights), &base.general),
                ("decode", run_decode(d, &weights), &base.decode),
            ] {
                let d = distance(&Value::Float(found), &Value::Float(expected.clone()));
                assert!(d <= 1e-9, "{rule} off: {what} differs by {d:.2e}");
            }
        } else {
            assert!(
                c.steps.decode.is_none() && c.steps.general.is_none(),
                "{rule} off"
            );
            let reason = c.no_step.expect("a reason").to_string();
            assert!(reason.contains("model"), "{rule} off: {reason}");
            let in_a_layer = !matches!(
                rule,
                "win-input" | "win-positions" | "win-embedding" | "win-expand"
            );
            assert_eq!(
                in_a_layer,
                reason.contains("layer 0"),
                "{rule} off: {reason}"
            );
        }
    }
    for rule in UNUSED {
        assert!(named.insert(rule), "{rule} stands twice");
        for ((golden, f32), base) in &bases {
            let m = model(golden, if *f32 { F32 } else { BF16 });
            let c = compile(&m, &off(rule)).expect("compiles");
            let same = steps(&c) == steps(&base.compiled) && c.full == base.compiled.full;
            assert!(same, "{rule} matters in {golden}");
        }
    }
    let all: BTreeSet<&str> = rules::all().iter().map(|r| r.name).collect();
    assert_eq!(named, all, "every rule is in a case or unused");
}

#[test]
fn stages_are_switches_too() {
    let m = model("qwen3", BF16);
    for stage in Stage::ALL {
        let c = compile(&m, &off(stage.name())).expect("compiles");
        let program = c.steps.decode.is_some();
        // Without the first and the last stage there are steps, in primitives and composites.
        let optional = matches!(stage, Stage::Canonicalize | Stage::Fuse);
        assert_eq!(program, optional, "{}", stage.name());
        assert_eq!(program, c.no_step.is_none(), "{}", stage.name());
    }
    let c = compile(&m, &off("fuse")).expect("compiles");
    let d = c.steps.decode.expect("a program");
    assert_eq!(d.count("attn_step"), 2);
    assert_eq!(d.count("gemm") + d.count("pack"), 0);
    let unknown = h100().disable(&["attention-opne"]);
    assert!(matches!(unknown, Err(CompileError::UnknownRule(n)) if n == "attention-opne"));
}

/// A value that depends on the length of the sequences is no value of a step, even if it is the
/// same for all rows.
#[test]
fn what_depends_on_the_length_has_no_step() {
    let mut q = Build::new();
    let x = q.input("x", F32, &[b(), s(), n(3)]);
    let i = q.op(
        Iota {
            len: s(),
            dtype: F32,
        },
        &[],
    );
    let f = lathe_ir::ReduceFn::Sum;
    let sum = q.op(
        Reduce {
            f,
            axis: 0,
            keepdim: true,
        },
        &[i],
    );
    let y = q.bin(lathe_ir::BinaryFn::Mul, x, sum);
    let c = compile(&q.done(&[y]), &h100()).expect("compiles");
    let reason = c.no_step.expect("a reason").to_string();
    assert!(
        reason.contains("iota") && reason.ends_with("whole sequences, which a step does not have"),
        "{reason}"
    );
}
