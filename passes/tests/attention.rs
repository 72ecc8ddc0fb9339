//! Attention in every combination of modifiers and spellings of masks becomes one operation; with
//! one thing changed it does not, and the error says where matching stopped.

mod common;

use common::build::{Build, b, n, s};
use common::model;
use egg::Id;
use lathe_ir::ops::{Attn, Cast, Expand, Iota, Matmul, Where};
use lathe_ir::{BinaryFn, DType, Graph, Node, NodeId, Op, ReduceFn, UnaryFn};
use lathe_passes::egraph::convert::to_graph;
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::egraph::extract::{extract, node_cost};
use lathe_passes::pipeline::{CompileError, PassConfig, compile, terms_of};

const D: DType = DType::F32;
const HIDDEN: f64 = f32::MIN as f64;

/// Which keys a row sees.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Mask {
    All,
    Causal,
    Window,
}

/// How the mask is written.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Spelling {
    /// `scores + where(j <= i, 0, min)`.
    Where,
    /// `scores + where(i >= j, 0, min)`.
    Flipped,
    /// `where(j < i + 1, 0, -inf) + scores`.
    Next,
    /// `scores + (1 - seen) * min`.
    Inverted,
    /// `where(j > i, min, scores)`: masked_fill.
    Fill,
    /// `where(not (j > i), scores, min)`.
    Keep,
    /// Masks for causality and window are added one after the other.
    Twice,
}

const SPELLINGS: [Spelling; 7] = [
    Spelling::Where,
    Spelling::Flipped,
    Spelling::Next,
    Spelling::Inverted,
    Spelling::Fill,
    Spelling::Keep,
    Spelling::Twice,
];

/// One attention of a model.
#[derive(Clone, Copy, Debug)]
struct Attention {
    heads: i64,
    kv_heads: i64,
    mask: Mask,
    spelling: Spelling,
    softcap: bool,
    qk_norm: bool,
    /// What is wrong with it, if anything.
    edit: Edit,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Edit {
    Nothing,
    /// The mask is a tensor of the request.
    UnknownMask,
    /// The condition of masked_fill is a tensor of the request.
    UnknownFill,
    /// The mask shows key i + 1 to row i.
    Leaks,
    /// The two constants of the soft cap differ.
    Softcap,
    /// The scores are scaled by a weight.
    Scale,
    /// The scores are absolute values.
    Scores,
    /// The weights do not sum to 1.
    Softmax,
    /// KV heads are repeated in rounds.
    Rounds,
}

const PLAIN: Attention = Attention {
    heads: 4,
    kv_heads: 1,
    mask: Mask::Causal,
    spelling: Spelling::Where,
    softcap: false,
    qk_norm: false,
    edit: Edit::Nothing,
};

const HEAD: i64 = 16;
const WINDOW: f64 = 5.0;

fn masked(q: &mut Build, a: &Attention, scores: NodeId) -> NodeId {
    let i64 = DType::I64;
    let iota = q.op(
        Iota {
            len: s(),
            dtype: i64,
        },
        &[],
    );
    let i = q.reshape(iota, &[s(), n(1)]);
    let j = q.reshape(iota, &[n(1), s()]);
    let first = |q: &mut Build| {
        let w = q.konst(WINDOW, i64);
        q.bin(BinaryFn::Sub, i, w)
    };
    let min = q.konst(HIDDEN, D);
    let zero = q.konst(0.0, D);
    let add = |q: &mut Build, scores: NodeId, seen: NodeId| {
        let m = q.op(Where, &[seen, zero, min]);
        let m = q.reshape(m, &[n(1), n(1), s(), s()]);
        q.bin(BinaryFn::Add, scores, m)
    };
    match a.edit {
        Edit::UnknownMask => {
            let m = q.input("bias", D, &[b(), n(1), s(), s()]);
            return q.bin(BinaryFn::Add, scores, m);
        }
        Edit::UnknownFill => {
            let m = q.input("seen", DType::Bool, &[b(), n(1), s(), s()]);
            return q.op(Where, &[m, scores, min]);
        }
        _ => {}
    }
    if a.mask == Mask::All {
        return scores;
    }
    let windowed = a.mask == Mask::Window;
    if a.spelling == Spelling::Fill {
        let mut hidden = q.bin(BinaryFn::Gt, j, i);
        if windowed {
            let first = first(q);
            let old = q.bin(BinaryFn::Le, j, first);
            hidden = q.bin(BinaryFn::Or, hidden, old);
        }
        return q.op(Where, &[hidden, min, scores]);
    }
    let mut seen = match a.spelling {
        _ if a.edit == Edit::Leaks => {
            let one = q.konst(1.0, i64);
            let next = q.bin(BinaryFn::Add, i, one);
            q.bin(BinaryFn::Le, j, next)
        }
        Spelling::Flipped => q.bin(BinaryFn::Ge, i, j),
        Spelling::Next => {
            let one = q.konst(1.0, i64);
            let next = q.bin(BinaryFn::Add, i, one);
            q.bin(BinaryFn::Lt, j, next)
        }
        Spelling::Keep => {
            let later = q.bin(BinaryFn::Gt, j, i);
            q.un(UnaryFn::Not, later)
        }
        _ => q.bin(BinaryFn::Le, j, i),
    };
    let mut scores = scores;
    if windowed {
        let first = first(q);
        let recent = q.bin(BinaryFn::Gt, j, first);
        if a.spelling == Spelling::Twice {
            scores = add(q, scores, recent);
        } else {
            seen = q.bin(BinaryFn::And, seen, recent);
        }
    }
    match a.spelling {
        Spelling::Inverted => {
            let one = q.konst(1.0, D);
            let seen = q.op(Cast(D), &[seen]);
            let hidden = q.bin(BinaryFn::Sub, one, seen);
            let m = q.bin(BinaryFn::Mul, hidden, min);
            q.bin(BinaryFn::Add, scores, m)
        }
        Spelling::Keep => q.op(Where, &[seen, scores, min]),
        Spelling::Next => {
            let inf = q.konst(f64::NEG_INFINITY, D);
            let m = q.op(Where, &[seen, zero, inf]);
            q.bin(BinaryFn::Add, m, scores)
        }
        _ => add(q, scores, seen),
    }
}

/// The attention of a layer: x `[B,S,24]` to `[B,S,heads·16]`, in primitives.
fn attention(a: &Attention) -> Graph {
    let mut q = Build::new();
    let x = q.input("x", D, &[b(), s(), n(24)]);
    let heads = |q: &mut Build, name: &str, heads: i64, norm: bool| {
        let w = q.weight(&format!("{name}_proj"), D, &[heads * HEAD, 24]);
        let w = q.permute(w, &[1, 0]);
        let y = q.op(Matmul, &[x, w]);
        let mut y = q.reshape(y, &[b(), s(), n(heads), n(HEAD)]);
        if norm {
            let two = q.konst(2.0, D);
            let squares = q.bin(BinaryFn::Pow, y, two);
            let mean = q.reduce_last(ReduceFn::Mean, squares);
            let eps = q.konst(1e-6, D);
            let mean = q.bin(BinaryFn::Add, mean, eps);
            let r = q.un(UnaryFn::Rsqrt, mean);
            y = q.bin(BinaryFn::Mul, y, r);
            let gamma = q.weight(&format!("{name}_norm"), D, &[HEAD]);
            y = q.bin(BinaryFn::Mul, gamma, y);
        }
        q.permute(y, &[0, 2, 1, 3])
    };
    let query = heads(&mut q, "q", a.heads, a.qk_norm);
    let groups = a.heads / a.kv_heads;
    let repeat = |q: &mut Build, x: NodeId| {
        if groups == 1 {
            return x;
        }
        let axis = if a.edit == Edit::Rounds { 1 } else { 2 };
        let mut shape = vec![b(), n(a.kv_heads), s(), n(HEAD)];
        shape.insert(axis, n(1));
        let x = q.reshape(x, &shape);
        shape[axis] = n(groups);
        let x = q.op(Expand(shape), &[x]);
        q.reshape(x, &[b(), n(a.heads), s(), n(HEAD)])
    };
    let k = heads(&mut q, "k", a.kv_heads, a.qk_norm);
    let v = heads(&mut q, "v", a.kv_heads, false);
    let k = repeat(&mut q, k);
    let v = repeat(&mut q, v);
    let kt = q.permute(k, &[0, 1, 3, 2]);
    let mut y = q.op(Matmul, &[query, kt]);
    if a.edit == Edit::Scores {
        y = q.un(UnaryFn::Abs, y);
    }
    let scale = if a.edit == Edit::Scale {
        q.weight("scale", D, &[1])
    } else {
        q.konst(0.25, D)
    };
    y = q.bin(BinaryFn::Mul, y, scale);
    if a.softcap {
        let cap = q.konst(30.0, D);
        let outer = q.konst(if a.edit == Edit::Softcap { 20.0 } else { 30.0 }, D);
        y = q.bin(BinaryFn::Div, y, cap);
        y = q.un(UnaryFn::Tanh, y);
        y = q.bin(BinaryFn::Mul, y, outer);
    }
    y = masked(&mut q, a, y);
    let max = q.reduce_last(ReduceFn::Amax, y);
    let e = q.bin(BinaryFn::Sub, y, max);
    let e = q.un(UnaryFn::Exp, e);
    let mut sum = q.reduce_last(ReduceFn::Sum, e);
    if a.edit == Edit::Softmax {
        let one = q.konst(1.0, D);
        sum = q.bin(BinaryFn::Add, sum, one);
    }
    let p = q.bin(BinaryFn::Div, e, sum);
    let y = q.op(Matmul, &[p, v]);
    let y = q.permute(y, &[0, 2, 1, 3]);
    let y = q.reshape(y, &[b(), s(), n(a.heads * HEAD)]);
    q.done(&[y])
}

/// The cheapest full program and, if there is one, the cheapest step without and with fusion.
fn programs(graph: &Graph) -> (Graph, Option<Graph>, Option<Graph>) {
    let config = PassConfig::new(DeviceModel::H100);
    let terms = terms_of(graph, &config).expect("saturates");
    let ids: Vec<Id> = terms.full.iter().map(|r| r.1).collect();
    let full = extract(&terms.egraph, &ids, &|id, n| {
        node_cost(&terms.egraph, id, n, &config.points.general)
    });
    let full = full.expect("primitives have kernels");
    let full = to_graph(&terms.egraph, &full.choice, "full", &terms.full);
    let step = |config: &PassConfig| {
        let c = compile(graph, config).expect("compiles");
        c.templates.into_iter().find_map(|t| t.steps.decode)
    };
    let unfused = config.clone().disable(&["fuse"]).expect("a stage");
    (full, step(&unfused), step(&config))
}

#[test]
fn every_combination_becomes_one_attention() {
    for (heads, kv_heads) in [(4, 4), (8, 2), (4, 1)] {
        for mask in [Mask::All, Mask::Causal, Mask::Window] {
            for spelling in SPELLINGS {
                if mask == Mask::All && spelling != Spelling::Where {
                    continue;
                }
                for modifiers in 0..4 {
                    let a = Attention {
                        heads,
                        kv_heads,
                        mask,
                        spelling,
                        softcap: modifiers & 1 == 1,
                        qk_norm: modifiers & 2 == 2,
                        edit: Edit::Nothing,
                    };
                    check_fused(&a);
                }
            }
        }
    }
}

fn check_fused(a: &Attention) {
    let (full, unfused, step) = programs(&attention(a));
    assert_eq!(full.count("attn"), 1, "{a:?}");
    for part in [
        "softmax",
        "exp",
        "where",
        "sdpa",
        "tanh",
        "expand",
        "repeat_kv",
    ] {
        assert_eq!(full.count(part), 0, "{a:?}: {part}");
    }
    let spec = full.nodes().iter().find_map(|n| match &n.op {
        Op::Attn(Attn(spec)) => Some(*spec),
        _ => None,
    });
    let spec = spec.expect("an attention");
    assert_eq!(i64::from(spec.groups), a.heads / a.kv_heads, "{a:?}");
    assert_eq!(spec.mask.causal, a.mask != Mask::All, "{a:?}");
    let window = (a.mask == Mask::Window).then_some(WINDOW as u32);
    assert_eq!(spec.mask.window, window, "{a:?}");
    assert_eq!(
        spec.softcap.map(lathe_ir::Real::get),
        a.softcap.then_some(30.0),
        "{a:?}"
    );
    assert!((spec.scale.get() - 0.25).abs() < 1e-15, "{a:?}");
    if a.mask == Mask::All {
        assert!(
            step.is_none(),
            "{a:?}: rows that see later keys have no step"
        );
    } else {
        assert_eq!(unfused.expect("a step").count("attn_step"), 1, "{a:?}");
        let step = step.expect("a step");
        assert_eq!(step.count("attn_qkv"), 1, "{a:?}");
        for part in [
            "softmax",
            "win",
            "sdpa",
            "attn",
            "attn_step",
            "rmsnorm",
            "linear",
        ] {
            assert_eq!(step.count(part), 0, "{a:?}: {part}");
        }
    }
}

/// Why a graph has no step program: layer, path, detail and nearest rule.
fn refusal(graph: &Graph) -> (u32, String, String, String) {
    let c = compile(graph, &PassConfig::new(DeviceModel::H100)).expect("compiles");
    match c.no_step {
        Some(CompileError::Attention {
            layer,
            path,
            detail,
            rule,
        }) => (layer, path, detail, rule),
        other => panic!("{other:?}"),
    }
}

#[test]
fn near_misses_name_the_nearest_rule() {
    let cases = [
        (
            Edit::UnknownMask,
            "attention-mask",
            "what is added, input (sample), is no known mask",
        ),
        (
            Edit::UnknownFill,
            "attention-mask-fill",
            "its condition input (sample) is no known mask",
        ),
        (
            Edit::Leaks,
            "attention-mask",
            "is neither causal nor a window",
        ),
        (Edit::Softcap, "attention-softcap", "not cap·tanh(s / cap)"),
        (
            Edit::Scale,
            "attention-scale",
            "a factor, weight (sample), is no constant",
        ),
        (Edit::Scores, "attention-close", "its scores are abs"),
        (Edit::Softmax, "softmax", "its weights are div"),
    ];
    for (edit, rule, detail) in cases {
        let a = Attention {
            edit,
            softcap: edit == Edit::Softcap,
            ..PLAIN
        };
        let graph = attention(&a);
        let (full, ..) = programs(&graph);
        assert_eq!(full.count("attn"), 0, "{edit:?}: fused");
        let found = refusal(&graph);
        assert_eq!((found.0, found.1.as_str()), (0, "sample"), "{edit:?}");
        assert_eq!(found.3, rule, "{edit:?}: {}", found.2);
        assert!(found.2.contains(detail), "{edit:?}: {}", found.2);
    }
    let all = refusal(&attention(&Attention {
        mask: Mask::All,
        ..PLAIN
    }));
    assert_eq!(all.3, "insert-kv-cache");
    assert_eq!(all.2, "each row sees later keys: its mask is not causal");
}

/// Heads repeated in rounds are no grouped attention, but an attention with as many KV heads as
/// query heads all the same.
#[test]
fn rounds_of_heads_are_not_grouped() {
    let rounds = Attention {
        heads: 8,
        kv_heads: 2,
        edit: Edit::Rounds,
        ..PLAIN
    };
    let (full, unfused, step) = programs(&attention(&rounds));
    assert_eq!(full.count("attn"), 1);
    assert_eq!(unfused.expect("a step").count("attn_step"), 1);
    let step = step.expect("a step");
    assert_eq!((step.count("attn_qkv"), step.count("attn_step")), (0, 1));
}

/// The model with the operation of some nodes replaced.
fn edited(graph: &Graph, edit: impl Fn(&Node) -> Option<Op>) -> Graph {
    let mut out = Graph::new(&graph.name);
    for node in graph.nodes() {
        let op = edit(node).unwrap_or_else(|| node.op.clone());
        out.add(op, &node.inputs, &node.prov).expect("well typed");
    }
    for (name, id) in graph.outputs() {
        out.set_output(name, *id);
    }
    out
}

/// Edits of an imported model are found in their layer, and the message is one line.
#[test]
fn edited_models_name_their_layer() {
    let m = model("llama-rope3-tied", DType::BF16);
    let square = |n: &Node| {
        n.ty.as_tensor()
            .is_some_and(|t| t.rank() == 4 && t.shape[2] == s() && t.shape[3] == s())
    };
    let in_layer = |n: &Node| n.prov.layer == Some(1) && square(n);
    let add = Op::Binary(BinaryFn::Add);
    let mul = Op::Binary(BinaryFn::Mul);
    let cases = [
        (
            edited(&m, |n| {
                (in_layer(n) && n.op == add).then_some(Op::Binary(BinaryFn::Sub))
            }),
            (1, "attention-mask"),
        ),
        (
            edited(&m, |n| {
                (in_layer(n) && n.op == mul).then_some(Op::Binary(BinaryFn::Pow))
            }),
            (1, "attention-close"),
        ),
        (
            edited(&m, |n| {
                (in_layer(n) && n.op == Op::Unary(UnaryFn::Exp)).then_some(Op::Unary(UnaryFn::Abs))
            }),
            (1, "softmax"),
        ),
        (
            edited(&m, |n| {
                (n.op == Op::Binary(BinaryFn::Le)).then_some(Op::Binary(BinaryFn::Lt))
            }),
            (0, "attention-mask"),
        ),
    ];
    for (graph, (layer, rule)) in cases {
        let found = refusal(&graph);
        let path = format!("model.layers.{layer}.self_attn");
        assert_eq!(
            (found.0, found.1.as_str(), found.3.as_str()),
            (layer, path.as_str(), rule)
        );
        let c = compile(&graph, &PassConfig::new(DeviceModel::H100)).expect("compiles");
        let text = c.no_step.expect("a reason").to_string();
        println!("{text}");
        assert!(
            text.starts_with(&format!("layer {layer}: {path} is no attention")),
            "{text}"
        );
        assert!(!text.contains('\n') && !text.contains('*'), "{text}");
    }
}

/// A rule that is switched off is named as the reason.
#[test]
fn switched_off_rules_are_named() {
    let m = model("qwen3", DType::BF16);
    for rule in [
        "softmax",
        "softmax-upcast",
        "attention-open",
        "attention-mask",
        "attention-scale",
        "attention-close",
        "insert-kv-cache",
    ] {
        let config = PassConfig::new(DeviceModel::H100);
        let c = compile(&m, &config.disable(&[rule]).expect("a rule")).expect("compiles");
        let text = c.no_step.expect("a reason").to_string();
        assert!(text.contains("that rule is switched off"), "{rule}: {text}");
        assert!(
            text.ends_with(&format!("nearest rule {rule}")),
            "{rule}: {text}"
        );
    }
}
