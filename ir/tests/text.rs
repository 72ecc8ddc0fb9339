//! The text form and its parser are inverse; wrong text is refused with its place.

mod common;

use lathe_ir::interp::{Interp, StepMeta, Tensor, Value};
use lathe_ir::ops::{Input, Slice, gemm};
use lathe_ir::text::{ParseError, dot, json, parse, print};
use lathe_ir::*;
use proptest::prelude::*;

/// Runs a random program on simple inputs, so that every operation it prints is executable.
fn run(g: &Graph) -> Result<(), interp::InterpError> {
    let weights = |w: &WeightRef| Ok(vec![0.5; w.shape.iter().product::<i64>() as usize]);
    let syms = SymEnv::new(&common::SYMS);
    let mut i = Interp::<f64>::new(syms, &weights);
    i.step = Some(StepMeta::new(&common::STEP_LENS, &[0, 0]));
    for n in g.nodes() {
        if let Op::Input(Input { name, dtype, shape }) = &n.op {
            let shape: Vec<usize> = shape.iter().map(|d| d.eval(&syms) as usize).collect();
            let len = shape.iter().product();
            let value = match dtype {
                DType::Bool => Value::Bool(Tensor::new(shape, vec![true; len])),
                DType::I32 | DType::I64 => Value::Int(Tensor::new(shape, vec![1; len])),
                _ => Value::Float(Tensor::new(shape, vec![0.25; len])),
            };
            i.inputs.insert(name.clone(), value);
        }
    }
    let mut all = g.clone();
    for id in g.ids() {
        all.set_output(&format!("all {id}"), id);
    }
    i.run(&all).map(|_| ())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn printing_and_parsing_are_inverse(seed: u64, size in 1_usize..40) {
        let g = common::graph(seed, size);
        prop_assert_eq!(verify(&g), vec![]);
        let text = print(&g);
        match parse(&text) {
            Ok(back) => {
                prop_assert_eq!(&back, &g, "{}", text);
                prop_assert_eq!(&print(&back), &text);
            }
            Err(e) => prop_assert!(false, "{e}\n{text}"),
        }
        // Every node has one line.
        prop_assert_eq!(text.lines().count(), g.nodes().len() + 3);
        let value = json(&g);
        prop_assert_eq!(value["nodes"].as_array().map(Vec::len), Some(g.nodes().len()));
        let arrows = g.nodes().iter().map(|n| n.inputs.len()).sum::<usize>() + g.outputs().len();
        prop_assert!(dot(&g).matches(" -> n").count() + g.outputs().len() >= arrows);
        prop_assert_eq!(run(&g), Ok(()));
    }

    /// Damaged text is refused or read, but never panics.
    #[test]
    fn damaged_text_does_not_panic(
        seed: u64,
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..20, any::<char>()), 1..6),
    ) {
        let mut text: Vec<char> = print(&common::graph(seed, 6)).chars().collect();
        for (at, what, c) in edits {
            let i = at.index(text.len());
            let piece = [
                "", "9", "99999999999999999999", "-", "[", "]", "(", "{", "}", "\"", "\\", "//",
                "%", "*", "S", "1e999", ",", "=", "\n",
            ];
            match piece.get(what) {
                Some(&"") => { text.remove(i); }
                Some(p) => { text.splice(i..i, p.chars()); }
                None => text[i] = c,
            }
        }
        let text: String = text.into_iter().collect();
        if let Ok(g) = parse(&text) {
            let _ = verify(&g);
            prop_assert_eq!(parse(&print(&g)), Ok(g));
        }
    }

    #[test]
    fn arbitrary_text_does_not_panic(text in "\\PC*") {
        let _ = parse(&text);
    }
}

#[test]
fn random_programs_cover_every_operation() {
    let mut missing: Vec<&str> = Op::names().collect();
    for seed in 0..400 {
        let g = common::graph(seed, 30);
        missing.retain(|n| g.count(n) == 0);
    }
    assert!(missing.is_empty(), "never generated: {missing:?}");
}

const SMALL: &str = r#"graph "llama/import" {
  %0 = input {name="tokens"} : i64[B,S]
  %1 = weight {name="embed.weight"} : bf16[32,64]
  %2 = embedding %1, %0 : bf16[B,S,64]                            // embed
  %3 = slice %2 {axis=2, start=0, end=32} : bf16[B,S,32]          // L0 layers.0.mlp
  %4 = sum %3 {axis=1, keepdim=false} : bf16[B,32]                // L0
  %5 = const {value=-1e-5} : f32[]                                // "a b"
  %6 = cast %5 : bf16[]
  %7 = where %8, %4, %6 : bf16[B,32]
  return logits=%4, "odd name"=%3
}
"#;

fn small() -> String {
    SMALL.replace("  %7 = where %8, %4, %6 : bf16[B,32]\n", "")
}

#[test]
fn the_text_is_as_documented() {
    let g = parse(&small()).expect("parses");
    assert_eq!(print(&g), small());
    assert_eq!(g.node(NodeId(3)).prov, Prov::layer(0, "layers.0.mlp"));
    assert_eq!(g.node(NodeId(5)).prov, Prov::global("a b"));
    assert_eq!(g.output("odd name"), Some(NodeId(3)));
}

#[test]
fn names_order_and_comments_are_free() {
    let g = parse(
        "// run: attention\n\ngraph \"g\" {\n  // leaves\n  %x = input {name=\"x\"} : f32[S+1,8]\n\n  \
         %y = slice %x {end=2, axis=1, start=0} : f32[S+1,2] // L3\n  return y=%y\n}\n// end\n",
    )
    .expect("parses");
    let slice = Op::Slice(Slice {
        axis: 1,
        start: 0,
        end: 2,
    });
    assert_eq!(g.node(NodeId(1)).op, slice);
    assert_eq!(g.node(NodeId(1)).prov, Prov::layer(3, ""));
}

fn error(text: &str) -> String {
    parse(text).expect_err("is refused").to_string()
}

#[test]
fn syntax_errors_name_place_and_expectation() {
    let cases = [
        (
            SMALL.to_string(),
            "9:14: expected a value that is defined above, found '%8'",
        ),
        (
            small().replace("bf16[B,32] ", "bf16[B,32 "),
            "6:66: expected ']', found a comment",
        ),
        (
            small().replace("bf16[32,64]", "bf17[32,64]"),
            "3:39: expected a type: bool, i32, i64, f16, bf16 or f32 with extents, or 'cache', found 'bf17'",
        ),
        (
            small().replace("axis=2, ", ""),
            "5:8: expected attribute 'axis', found none",
        ),
        (
            small().replace("axis=2", "axis=256"),
            "5:18: expected an integer of 8 bits in range, found 256",
        ),
        (
            small().replace("axis=2", "axes=2"),
            "5:8: expected attribute 'axis', found none",
        ),
        (
            small().replace("axis=2", "axis=2, step=1"),
            "5:26: expected an attribute of 'slice' that is not given yet, found 'step'",
        ),
        (
            small().replace("embedding", "embed"),
            "4:8: expected an operation, found 'embed'",
        ),
        (
            small().replace("%6 = ", "%5 = "),
            "8:3: expected a value that is not defined yet, found '%5'",
        ),
        (
            small().replace("-1e-5", "1e400"),
            "7:21: expected a number in range, found '1e400'",
        ),
        (
            small().replace("[B,S,64]", "[B,X,64]"),
            "4:34: expected one of the symbols B, S, T, R, found 'X'",
        ),
        (
            small().replace("// embed", "// embed it"),
            "4:67: expected a layer such as L0 and a module path as the comment of a node, found another text",
        ),
        (
            small().replace("\"tokens\"", "\"tokens"),
            "2:39: expected '\"', found the end of the line",
        ),
        (
            small().replace("}\n", ""),
            "10:1: expected '}', found the end of the text",
        ),
        (
            String::new(),
            "1:1: expected 'graph', found the end of the text",
        ),
    ];
    let wrong: Vec<String> = cases
        .into_iter()
        .map(|(text, want)| (error(&text), want))
        .filter(|(found, want)| found != want)
        .map(|(found, want)| format!("{found}\ninstead of\n{want}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn all_type_mismatches_are_reported() {
    let text = small()
        .replace("bf16[B,S,32]", "bf16[B,S,31]")
        .replace("%4 = sum %3 {axis=1", "%4 = sum %3 {axis=7");
    let Err(ParseError::Types(errors)) = parse(&text) else {
        panic!("types are wrong")
    };
    let lines: Vec<String> = errors.iter().map(|e| e.to_string()).collect();
    assert_eq!(
        lines,
        [
            "5:8: %3 (slice): type is written as bf16[B,S,31], but is bf16[B,S,32]",
            "6:8: %4 (sum): axis 7 of a value of rank 3",
        ]
    );
}

#[test]
fn hostile_numbers_are_refused() {
    let graph = |body: &str| format!("graph \"g\" {{\n{body}\n  return\n}}\n");
    for body in [
        "%0 = input {name=\"x\"} : f32[9999999999999]",
        "%0 = input {name=\"x\"} : f32[2097153*S]",
        "%0 = input {name=\"x\"} : f32[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]",
        "%0 = input {name=\"x\"} : ((f32[]))",
        "%0 = get %0 {index=0} : f32[]",
        "%0 = cache {layer=4294967296, kv_heads=1, head_dim=1} : cache",
        // Sizes that overflow when they are multiplied.
        "%0 = input {name=\"x\"} : f32[1099511627776,1099511627776,1099511627776]\n\
         %1 = reshape %0 : f32[1099511627776,1099511627775,1099511627776]",
        "%0 = weight {name=\"q\"} : f32[16,1]\n\
         %1 = pack %0, %0, %0 {kind=qkv, head_dim=0, interleave=true} : f32[48,1]",
        "%0 = input {name=\"x\"} : f32[T,1]\n%1 = cache {layer=0, kv_heads=1, head_dim=1} : cache\n\
         %2 = attn_qkv %0, %1 {heads=4294967295, kv_heads=4294967295, \
         head_dim=4294967295, scale=1.0, causal=true, groups=1, stage=closed} : (f32[T,1], cache)",
        "%0 = input {name=\"x\"} : f32[1,1099511627776,1,1]\n\
         %1 = repeat_kv %0 {groups=4294967295} : f32[1,1,1,1]",
        "%0 = input {name=\"x\"} : f32[1,2,3]\n%1 = input {name=\"k\"} : f32[1]\n\
         %2 = cache {layer=0, kv_heads=1, head_dim=1} : cache\n\
         %3 = attn_step %0, %1, %1, %2 {scale=1.0, causal=true, groups=1, stage=closed} : \
         (f32[1,2,3], cache)",
    ] {
        assert!(parse(&graph(body)).is_err(), "{body}");
    }
}

#[test]
fn dot_and_json_hold_the_program() {
    let g = parse(&small()).expect("parses");
    let dot = dot(&g);
    assert!(dot.contains("subgraph cluster_0 {"), "{dot}");
    assert!(dot.contains("n1 -> n2 [headlabel=\"0\"];"), "{dot}");
    assert!(dot.contains("n3 [label=\"%3 slice\\naxis=2\\nstart=0\\nend=32\\nbf16[B,S,32]\""));
    let json = json(&g);
    assert_eq!(json["nodes"][3]["attrs"]["end"], 32);
    assert_eq!(json["nodes"][3]["layer"], 0);
    assert_eq!(json["nodes"][5]["attrs"]["value"], -1e-5);
    assert_eq!(json["outputs"][1]["name"], "odd name");
}

/// Operands by name, among them graphs with absent operands in the middle.
#[test]
fn operands_are_given_by_name() {
    let text = r#"graph "g" {
  %0 = input {name="x"} : f32[T,4]
  %1 = input {name="w"} : f32[16,4]
  %2 = input {name="r"} : f32[T,16]
  %3 = input {name="g"} : f32[4]
  %4 = input {name="p"} : i32[T]
  %5 = input {name="f"} : f32[2]
  %6 = linear x=%0, w=%1 : f32[T,16]
  %7 = gemm x=%0, w=%1, residual=%2 {epilogue=residual} : f32[T,16]
  %8 = gemm x=%0, w=%1, gamma=%3 {prologue=rms, eps=0.5} : f32[T,16]
  %9 = gemm x=%0, w=%1 : f32[T,16]
  %10 = proj x=%0, w=%1, positions=%4, inv_freq=%5 {heads=4, head_dim=4, rope=1.0} : f32[T,4,4]
  %11 = add %6, %7 : f32[T,16]
  %12 = softmax %11 : f32[T,16]
  return y=%12
}
"#;
    let g = parse(text).expect("parses");
    assert_eq!(print(&g), text);
    let residual = g.node(NodeId(7));
    assert_eq!(residual.inputs.get(gemm::RESIDUAL), Some(NodeId(2)));
    assert_eq!(residual.inputs.get(gemm::BIAS), None);
    assert_eq!((residual.inputs.len(), residual.inputs.slots()), (3, 4));
    // Built by hand, it is the same program.
    let mut built = Graph::new("g");
    for n in g.nodes() {
        built
            .add(n.op.clone(), &n.inputs, &n.prov)
            .expect("well typed");
    }
    built.set_output("y", NodeId(12));
    assert_eq!(print(&built), text);
    // Positions come first, names are in any order, words for nothing may be written.
    for (from, to) in [
        ("linear x=%0, w=%1", "linear %0, %1"),
        ("linear x=%0, w=%1", "linear %0, w=%1"),
        ("linear x=%0, w=%1", "linear w=%1, x=%0"),
        ("gemm x=%0, w=%1, residual=%2", "gemm %0, residual=%2, w=%1"),
        (
            "gemm x=%0, w=%1 :",
            "gemm %0, %1 {prologue=none, epilogue=none} :",
        ),
        ("add %6, %7", "add %6, b=%7"),
        ("softmax %11", "softmax x=%11"),
    ] {
        assert!(text.contains(from), "{from}");
        assert_eq!(parse(&text.replace(from, to)), Ok(g.clone()), "{to}");
    }
}

#[test]
fn operands_that_are_not_there_or_given_twice_are_refused() {
    let graph = |line: &str| {
        format!(
            "graph \"g\" {{\n%0 = input {{name=\"x\"}} : f32[T,4]\n\
             %1 = input {{name=\"w\"}} : f32[4,4]\n{line} : f32[T,4]\nreturn\n}}\n"
        )
    };
    for (line, want) in [
        (
            "%2 = gemm x=%0, weight=%1",
            "4:17: expected an operand of 'gemm', found 'weight'",
        ),
        (
            "%2 = gemm x=%0, w=%1, x=%0",
            "4:23: expected an operand that is not given yet, found 'x'",
        ),
        (
            "%2 = gemm %0, %1, w=%1",
            "4:19: expected an operand that is not given yet, found 'w'",
        ),
        (
            "%2 = gemm x=%0, %1",
            "4:17: expected an operand's name, found '%1'",
        ),
        (
            "%2 = gemm x=%0, w=%2",
            "4:19: expected a value that is defined above, found '%2'",
        ),
        ("%2 = gemm x=%0, w %1", "4:19: expected '=', found '%1'"),
        (
            "%2 = gemm x=%0,",
            "4:17: expected an operand's name, found ':'",
        ),
        (
            "%2 = input x=%0",
            "4:12: expected an operand of 'input', found 'x'",
        ),
        (
            "%2 = pack x=%0 {kind=gate_up}",
            "4:11: expected an operand of 'pack', found 'x'",
        ),
        ("%2 = gem x=%0", "4:6: expected an operation, found 'gem'"),
        (
            "%2 = linear %0",
            "4:6: %2 (linear): expected 2 operands, found 1",
        ),
        (
            "%2 = linear w=%1",
            "4:6: %2 (linear): expected 2 operands, found 1",
        ),
        (
            "%2 = proj x=%0 {heads=1, head_dim=4}",
            "4:6: %2 (proj): expected 2 to 6 operands, found 1",
        ),
        (
            "%2 = gemm w=%1, residual=%0 {epilogue=residual}",
            "4:6: %2 (gemm): operand 'x' is absent",
        ),
        (
            "%2 = add %0, %0, %0",
            "4:6: %2 (add): expected 2 operands, found 3",
        ),
    ] {
        assert_eq!(error(&graph(line)), want, "{line}");
    }
}

/// Operands of head norms and RoPE come with their attribute.
#[test]
fn operands_come_with_their_attributes() {
    let graph = |line: &str| {
        format!(
            "graph \"g\" {{\n%x = input {{name=\"x\"}} : f32[T,4]\n\
             %w = input {{name=\"w\"}} : f32[8,4]\n%g = input {{name=\"g\"}} : f32[8]\n\
             %p = input {{name=\"p\"}} : i32[T]\n%f = input {{name=\"f\"}} : f32[4]\n\
             %r = input {{name=\"r\"}} : f32[T,24]\n\
             %c = cache {{layer=0, kv_heads=1, head_dim=8}} : cache\n{line}\nreturn\n}}\n"
        )
    };
    let proj = |operands: &str, attrs: &str| {
        graph(&format!(
            "%0 = proj x=%x, w=%w{operands} {{heads=1, head_dim=8{attrs}}} : f32[T,1,8]"
        ))
    };
    let attn = |operands: &str, attrs: &str| {
        graph(&format!(
            "%0 = attn_qkv qkv=%r, cache=%c{operands} {{heads=1, kv_heads=1, head_dim=8{attrs}, \
             scale=1.0, causal=true, groups=1, stage=closed}} : (f32[T,1,8], cache)"
        ))
    };
    let (rope, freq) = (", rope=1.0", ", positions=%p, inv_freq=%f");
    let norm = ", head_norm=1e-6";
    let (gamma, gammas) = (", gamma=%g", ", q_norm=%g, k_norm=%g");
    for text in [
        proj("", ""),
        proj(freq, rope),
        proj(gamma, norm),
        proj(&format!("{gamma}{freq}"), &format!("{norm}{rope}")),
        attn("", ""),
        attn(freq, rope),
        attn(gammas, norm),
        attn(&format!("{gammas}{freq}"), &format!("{norm}{rope}")),
    ] {
        assert!(parse(&text).is_ok(), "{}", error(&text));
    }
    let absent = |name: &str, by: &str| format!("operand '{name}' is absent, but '{by}' needs it");
    let idle = |name: &str, by: &str| format!("operand '{name}' without attribute '{by}'");
    for (text, want) in [
        (proj("", rope), absent("positions", "rope")),
        (proj(", positions=%p", rope), absent("inv_freq", "rope")),
        (proj(", inv_freq=%f", rope), absent("positions", "rope")),
        (proj(freq, ""), idle("positions", "rope")),
        (proj(", inv_freq=%f", ""), idle("inv_freq", "rope")),
        (proj("", norm), absent("gamma", "head_norm")),
        (proj(gamma, ""), idle("gamma", "head_norm")),
        (
            proj(", positions=%p, inv_freq=%g", rope),
            "8 frequencies for rows of 8 features".to_string(),
        ),
        (attn("", rope), absent("positions", "rope")),
        (attn(", positions=%p", rope), absent("inv_freq", "rope")),
        (attn(", inv_freq=%f", rope), absent("positions", "rope")),
        (attn(freq, ""), idle("positions", "rope")),
        (attn(", inv_freq=%f", ""), idle("inv_freq", "rope")),
        (attn("", norm), absent("q_norm", "head_norm")),
        (attn(", q_norm=%g", norm), absent("k_norm", "head_norm")),
        (attn(gammas, ""), idle("q_norm", "head_norm")),
        (attn(", k_norm=%g", ""), idle("k_norm", "head_norm")),
        (
            attn(", q_norm=%g, k_norm=%f", norm),
            "k_norm has shape [4], expected [8]".to_string(),
        ),
    ] {
        let found = error(&text);
        assert!(
            found.ends_with(&format!("): {want}")),
            "{found}\ninstead of\n{want}"
        );
    }
}
