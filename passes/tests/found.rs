//! Programs that fuzzing found to be compiled wrongly, or not at all: see `docs/fuzzing.md`.

use lathe_ir::{Graph, text, verify};
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{Compiled, PassConfig, compile};
use lathe_passes::trial::difference;

fn read(body: &str) -> Graph {
    let graph = text::parse(&format!("graph \"found\" {{\n{body}\n}}\n"));
    let graph = graph.unwrap_or_else(|e| panic!("{e}"));
    assert!(verify(&graph).is_empty(), "{:?}", verify(&graph));
    graph
}

/// The program compiled; both of its full forms mean the same.
fn compiled(graph: &Graph) -> Compiled {
    let config = PassConfig::new(DeviceModel::CPU);
    let compiled = compile(graph, &config).unwrap_or_else(|e| panic!("{e}"));
    let found = difference(graph, &compiled.full, 0, 1e-9);
    assert_eq!(found, Ok(None), "{}", text::print(&compiled.full));
    if let Some(general) = &compiled.steps.general {
        assert!(verify(general).is_empty(), "{:?}", verify(general));
    }
    compiled
}

fn refusal(graph: &Graph) -> String {
    let config = PassConfig::new(DeviceModel::CPU);
    compile(graph, &config).expect_err("is refused").to_string()
}

/// An attention of x `[B,S,8]` in a layer, in terms of its number and a prefix for its values.
fn attention(n: &str, x: &str, layer: u32) -> String {
    let lines = [
        format!("%{n}w = weight {{name=\"{n}w\"}} : f32[8,8]"),
        format!("%{n}a = matmul {x}, %{n}w : f32[B,S,8]"),
        format!("%{n}b = reshape %{n}a : f32[B,S,2,4]"),
        format!("%{n}q = permute %{n}b {{perm=[0, 2, 1, 3]}} : f32[B,2,S,4]"),
        format!("%{n}k = permute %{n}q {{perm=[0, 1, 3, 2]}} : f32[B,2,4,S]"),
        format!("%{n}s = matmul %{n}q, %{n}k : f32[B,2,S,S]"),
        format!("%{n}m = add %{n}s, %mask : f32[B,2,S,S]"),
        format!("%{n}x = amax %{n}m {{axis=3, keepdim=true}} : f32[B,2,S,1]"),
        format!("%{n}c = sub %{n}m, %{n}x : f32[B,2,S,S]"),
        format!("%{n}e = exp %{n}c : f32[B,2,S,S]"),
        format!("%{n}t = sum %{n}e {{axis=3, keepdim=true}} : f32[B,2,S,1]"),
        format!("%{n}p = div %{n}e, %{n}t : f32[B,2,S,S]"),
        format!("%{n}o = matmul %{n}p, %{n}q : f32[B,2,S,4]"),
        format!("%{n}r = permute %{n}o {{perm=[0, 2, 1, 3]}} : f32[B,S,2,4]"),
        format!("%{n}y = reshape %{n}r : f32[B,S,8]"),
    ];
    lines
        .map(|l| format!("  {l}  // L{layer} attn.{n}\n"))
        .concat()
}

const BEGIN: &str = "
  %tokens = input {name=\"tokens\"} : i64[B,S]
  %table = weight {name=\"table\"} : f32[7,8]
  %x = embedding %table, %tokens : f32[B,S,8]
  %i = iota : i64[S]
  %qi = reshape %i : i64[S,1]
  %ki = reshape %i : i64[1,S]
  %seen = le %ki, %qi : bool[S,S]
  %zero = const {value=0.0} : f32[]
  %fill = const {value=-1e9} : f32[]
  %mask = where %seen, %zero, %fill : f32[S,S]
";

fn head(x: &str) -> String {
    format!(
        "  %head = weight {{name=\"head\"}} : f32[8,7]\n  %y = matmul {x}, %head : f32[B,S,7]\n  return logits=%y"
    )
}

#[test]
fn two_attentions_of_a_layer_do_not_share_a_cache() {
    let both = |second: u32| {
        let body = [
            BEGIN.to_string(),
            attention("f", "%x", 0),
            attention("g", "%fy", second),
            head("%gy"),
        ];
        read(&body.concat())
    };
    let twice = compiled(&both(0));
    assert!(twice.steps.general.is_none());
    let why = twice.no_step.expect("a reason").to_string();
    assert!(
        why.contains("another attention of the layer has its KV cache"),
        "{why}"
    );
    // In layers of their own both have one.
    let apart = compiled(&both(1)).steps.general.expect("a step program");
    assert_eq!(apart.count("cache"), 2);
}

/// What reads layer 3 is not of an earlier layer, whatever it says.
#[test]
fn layers_may_stand_in_any_order() {
    let body = [
        BEGIN.to_string(),
        attention("f", "%x", 3),
        attention("g", "%fy", 1),
        attention("h", "%gy", u32::MAX),
        head("%hy"),
    ];
    compiled(&read(&body.concat()));
}

#[test]
fn a_model_of_constants_keeps_its_result() {
    let graph = read(
        "
  %w = weight {name=\"w\"} : f32[1,1,4]
  %x = expand %w : f32[1,S,4]
  %y = expand %x : f32[B,S,4]
  return logits=%y",
    );
    assert_eq!(compiled(&graph).full.outputs().len(), 1);
}

/// The layer takes a value whose sequence is its third axis from the embedding.
#[test]
fn regions_hand_on_values_of_any_axes() {
    let graph = read(
        "
  %tokens = input {name=\"tokens\"} : i64[B,S]
  %table = weight {name=\"table\"} : f32[7,8]
  %x = embedding %table, %tokens : f32[B,S,8]
  %h = reshape %x : f32[B,S,2,4]
  %p = permute %h {perm=[0, 2, 1, 3]} : f32[B,2,S,4]
  %e = exp %p : f32[B,2,S,4]  // L0 layer
  %r = permute %e {perm=[0, 2, 1, 3]} : f32[B,S,2,4]  // L0 layer
  %y = reshape %r : f32[B,S,8]
  return logits=%y",
    );
    assert!(compiled(&graph).steps.general.is_some());
}

/// Times one, a cosine is a form of itself; looking through such products came to no end.
#[test]
fn rope_looks_at_a_value_once() {
    let graph = read(
        "
  %tokens = input {name=\"tokens\"} : i64[B,S]
  %table = weight {name=\"table\"} : f32[7,8]
  %x = embedding %table, %tokens : f32[B,S,8]
  %one = const {value=1.0} : f32[]
  %c = exp %x : f32[B,S,8]
  %d = mul %c, %one : f32[B,S,8]
  %hi = slice %x {axis=2, start=4, end=8} : f32[B,S,4]
  %lo = slice %x {axis=2, start=0, end=4} : f32[B,S,4]
  %n = neg %hi : f32[B,S,4]
  %r = concat %n, %lo {axis=2} : f32[B,S,8]
  %a = mul %x, %d : f32[B,S,8]
  %b = mul %r, %d : f32[B,S,8]
  %y = add %a, %b : f32[B,S,8]
  return logits=%y",
    );
    compiled(&graph);
}

#[test]
fn names_that_the_passes_use_are_refused() {
    let graph = |input: &str, weight: &str| {
        read(&format!(
            "
  %x = input {{name=\"{input}\"}} : f32[B,S,4]
  %w = weight {{name=\"{weight}\"}} : f32[4]
  %y = mul %x, %w : f32[B,S,4]
  return logits=%y"
        ))
    };
    for (input, weight, named) in [
        ("residual", "w", "input 'residual'"),
        ("out1", "w", "input 'out1'"),
        ("step.x", "w", "input 'step.x'"),
        ("x", "layers.*.w", "weight 'layers.*.w'"),
    ] {
        let e = refusal(&graph(input, weight));
        assert!(e.starts_with(named) && e.ends_with("rename it"), "{e}");
    }
    // No step is given other positions than its own.
    let named = compiled(&graph("positions", "w"));
    assert!(named.steps.general.is_none());
    assert!(compiled(&graph("outer", "w")).steps.general.is_some());
}
