//! Tests of configurations and of the graphs that they give.

use super::*;
use crate::ops::{Cast, Const, Table, X};
use crate::{NodeId, Op};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

/// Names of what lies in a folder of fixtures, sorted.
fn names_in(folder: &str) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(fixtures().join(folder))
        .expect(folder)
        .map(|e| e.expect("entry").file_name().into_string().expect("utf-8"))
        .collect();
    names.sort();
    names
}

/// The golden models: every family has one or more.
fn goldens() -> Vec<String> {
    names_in("golden")
}

fn golden(name: &str, file: &str) -> HfConfig {
    HfConfig::from_file(&fixtures().join("golden").join(name).join(file)).expect("golden config")
}

fn options(dtype: DType) -> ImportOptions {
    ImportOptions {
        dtype,
        max_seq_len: None,
    }
}

fn build(cfg: &HfConfig, dtype: DType) -> Model {
    import(cfg, &options(dtype)).expect("import")
}

/// The message of the error that a golden's configuration gives with some keys replaced.
fn refusal(name: &str, overrides: &[(&str, Value)]) -> String {
    let cfg = golden(name, "config.json")
        .with_overrides(overrides.iter().map(|(k, v)| (*k, v)))
        .and_then(|cfg| import(&cfg, &options(DType::F32)));
    cfg.expect_err("an error").to_string()
}

fn with(name: &str, overrides: &[(&str, Value)]) -> Model {
    let cfg = golden(name, "config.json")
        .with_overrides(overrides.iter().map(|(k, v)| (*k, v)))
        .expect("overrides");
    build(&cfg, DType::F32)
}

#[test]
fn every_family_has_a_golden_and_samples() {
    let of_goldens: BTreeSet<String> = goldens()
        .iter()
        .map(|name| build(&golden(name, "config.json"), DType::F32).arch.family)
        .collect();
    let known: Vec<&str> = families().iter().map(|f| f.model_type).collect();
    assert!(known.is_sorted(), "{known:?}");
    assert_eq!(Vec::from_iter(&of_goldens), known);
    let mut names = BTreeSet::new();
    for family in families() {
        assert!(!family.samples.is_empty(), "{}", family.model_type);
        for sample in family.samples {
            let cfg = HfConfig::from_str(sample.config).expect(sample.name);
            let model = build(&cfg, DType::BF16);
            assert_eq!(model.arch.family, family.model_type, "{}", sample.name);
            assert!(names.insert(sample.name), "{}", sample.name);
        }
    }
}

#[test]
fn both_spellings_give_the_same_model() {
    for name in &goldens() {
        for dtype in [DType::F32, DType::BF16] {
            let new = build(&golden(name, "config.json"), dtype);
            let old = build(&golden(name, "config.old.json"), dtype);
            assert!(new == old, "{name} in {dtype}");
            assert_eq!(new.arch.dtype, Some(DType::BF16), "{name}");
        }
    }
}

#[test]
fn importers_emit_primitives_and_casts_only_where_types_change() {
    for name in &goldens() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let g = build(&golden(name, "config.json"), dtype).graph;
            for node in g.nodes() {
                assert!(node.op.is_primitive(), "{name}: {}", node.op.name());
                if let Op::Cast(Cast(to)) = node.op {
                    assert_ne!(g.tensor(node.inputs[X]).expect("tensor").dtype, to);
                }
            }
            assert_eq!(g.without_dead().nodes().len(), g.nodes().len(), "{name}");
            // In f32 only the positions of rotary embeddings change their type.
            if dtype == DType::F32 {
                let rotary = usize::from(name != "gpt2") + usize::from(name == "gemma3");
                assert_eq!(g.count("cast"), rotary, "{name}");
            }
            let out = g
                .tensor(g.output("logits").expect("logits"))
                .expect("tensor");
            assert_eq!(out.dtype, dtype);
            assert_eq!(crate::shape::format_shape(&out.shape), "[B,S,256]");
        }
    }
}

#[test]
fn weights_are_those_of_the_checkpoint() {
    for name in &goldens() {
        let arch = build(&golden(name, "config.json"), DType::F32).arch;
        let bytes = std::fs::read(
            fixtures()
                .join("golden")
                .join(name)
                .join("model.safetensors"),
        )
        .expect("weights");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
        let mut found: Vec<(String, Vec<i64>)> = file
            .iter()
            .filter(|(n, _)| !arch.ignores(n))
            .map(|(n, t)| {
                let shape = t.shape().iter().map(|&d| d as i64).collect();
                (n.to_string(), shape)
            })
            .collect();
        let mut expected: Vec<(String, Vec<i64>)> = arch
            .weights
            .iter()
            .map(|w| (w.name.clone(), w.shape.clone()))
            .collect();
        found.sort();
        expected.sort();
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn every_node_of_a_layer_names_its_module() {
    let g = build(&golden("qwen3", "config.json"), DType::BF16).graph;
    let mut paths = BTreeSet::new();
    for node in g.nodes() {
        let path = &*node.prov.path;
        paths.insert(path.to_string());
        match path.strip_prefix("model.layers.") {
            Some(rest) => {
                let layer: u32 = rest
                    .split('.')
                    .next()
                    .and_then(|n| n.parse().ok())
                    .expect(path);
                assert_eq!(node.prov.layer, Some(layer), "{path}");
            }
            None => assert_eq!(node.prov.layer, None, "{path}"),
        }
    }
    for path in [
        "model",
        "model.embed_tokens",
        "model.causal_mask",
        "model.rotary_emb",
        "model.layers.1",
        "model.layers.1.input_layernorm",
        "model.layers.1.self_attn",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_norm",
        "model.layers.1.mlp",
        "model.layers.1.mlp.act_fn",
        "model.norm",
        "lm_head",
    ] {
        assert!(paths.contains(path), "{path}");
    }
}

#[test]
fn full_size_configurations_import_or_are_refused_by_name() {
    // (config, parameters); the published counts.
    let expected = [
        ("gemma-2-9b", 9_241_705_984),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("smollm2-135m", 134_515_008),
    ];
    let mut seen = Vec::new();
    for name in names_in("configs") {
        let cfg = HfConfig::from_file(&fixtures().join("configs").join(&name)).expect("config");
        match import(&cfg, &options(DType::BF16)) {
            Ok(m) => {
                assert_eq!(m.graph.count("softmax"), 0);
                seen.push((name, m.arch.parameters()));
            }
            Err(e) => {
                let e = e.to_string();
                let of_family = |f: &Family| cfg.get("model_type") == Some(&json!(f.model_type));
                let known = families().iter().any(of_family);
                assert!(!known, "{name}: {e}");
                assert!(e.contains("'model_type'") && e.contains("llama, "), "{e}");
            }
        }
    }
    let seen: Vec<(&str, u64)> = seen.iter().map(|(n, p)| (n.as_str(), *p)).collect();
    assert_eq!(seen, expected);
}

#[test]
fn windows_follow_the_layers() {
    // One mask with a window has one `gt`; a second mask without one has none.
    let masks = |m: &Model| (m.graph.count("where"), m.graph.count("gt"));
    assert_eq!(masks(&with("mistral-window", &[])), (1, 1));
    assert_eq!(
        masks(&with("mistral-window", &[("sliding_window", Value::Null)])),
        (1, 0)
    );
    let on = [
        ("use_sliding_window", json!(true)),
        ("sliding_window", json!(8)),
        ("max_window_layers", json!(1)),
    ];
    // layer_types of the file say full attention: they win.
    assert_eq!(masks(&with("qwen2", &on)), (1, 0));
    let mut derived = on.to_vec();
    derived.push(("layer_types", Value::Null));
    assert_eq!(masks(&with("qwen2", &derived)), (2, 1));
    let mut named = on.to_vec();
    named.push((
        "layer_types",
        json!(["sliding_attention", "full_attention"]),
    ));
    let m = with("qwen3", &named);
    assert_eq!(masks(&m), (2, 1));
    // The two layers add different masks to their scores.
    let mask_of = |layer: u32| -> NodeId {
        let path = format!("model.layers.{layer}.self_attn");
        let g = &m.graph;
        let of_mask = |id: &NodeId| &*g.node(*id).prov.path == "model.causal_mask";
        g.nodes()
            .iter()
            .filter(|n| *n.prov.path == *path)
            .find_map(|n| n.inputs.iter().copied().find(of_mask))
            .expect("a mask")
    };
    assert_ne!(mask_of(0), mask_of(1));
}

#[test]
fn options_that_change_the_computation_are_refused_by_name() {
    /// A golden, keys to replace, and parts of the message.
    type Case<'a> = (&'a str, &'a [(&'a str, Value)], &'a [&'a str]);
    let cases: &[Case] = &[
        (
            "qwen2",
            &[("model_type", json!("mamba"))],
            &["model_type", "mamba", "qwen3"],
        ),
        (
            "qwen2",
            &[("architectures", json!(["Qwen2ForSequenceClassification"]))],
            &["architectures", "Qwen2ForCausalLM"],
        ),
        (
            "qwen2",
            &[("hidden_act", json!("xielu"))],
            &["hidden_act", "xielu", "silu"],
        ),
        (
            "qwen2",
            &[("rope_scaling", json!({"type": "longrope", "factor": 2.0}))],
            &["rope_type", "longrope", "llama3"],
        ),
        (
            "qwen2",
            &[(
                "rope_scaling",
                json!({"rope_type": "default", "mrope_section": [1, 2]}),
            )],
            &["rope_parameters.mrope_section"],
        ),
        (
            "qwen2",
            &[("rope_scaling.rope_type", json!("linear"))],
            &["rope_parameters.factor"],
        ),
        (
            "qwen2",
            &[("partial_rotary_factor", json!(0.5))],
            &["partial_rotary_factor", "0.5"],
        ),
        (
            "llama-linear",
            &[("quantization_config", json!({"quant_method": "awq"}))],
            &["quantization_config", "awq"],
        ),
        (
            "llama-linear",
            &[("pretraining_tp", json!(2))],
            &["pretraining_tp", "2"],
        ),
        (
            "llama-linear",
            &[("hidden_size", json!("big"))],
            &["hidden_size", "big", "integer"],
        ),
        (
            "llama-linear",
            &[("vocab_size", Value::Null)],
            &["vocab_size", "missing"],
        ),
        (
            "llama-linear",
            &[("num_key_value_heads", json!(3))],
            &["num_key_value_heads", "divisor"],
        ),
        (
            "llama-linear",
            &[(
                "layer_types",
                json!(["full_attention", "sliding_attention"]),
            )],
            &["layer_types", "sliding_window"],
        ),
        (
            "mistral-window",
            &[(
                "layer_types",
                json!(["full_attention", "sliding_attention"]),
            )],
            &["layer_types", "same type"],
        ),
        (
            "qwen3",
            &[(
                "layer_types",
                json!(["linear_attention", "linear_attention"]),
            )],
            &["linear_attention"],
        ),
        (
            "qwen3",
            &[("layer_types", json!(["full_attention"]))],
            &["layer_types", "2 entries"],
        ),
        ("qwen3", &[("head_dim", json!(15))], &["head_dim", "even"]),
        (
            "llama-linear",
            &[(
                "rope_scaling",
                json!({
                    "rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64
                }),
            )],
            &["dynamic", "up to 64", "256"],
        ),
        ("falcon", &[("alibi", json!(true))], &["alibi", "false"]),
        (
            "gpt2",
            &[("scale_attn_weights", json!(false))],
            &["scale_attn_weights", "true"],
        ),
        (
            "phi",
            &[("qk_layernorm", json!(true))],
            &["qk_layernorm", "false"],
        ),
        (
            "gemma",
            &[("hidden_act", json!("gelu"))],
            &["hidden_act", "hidden_activation"],
        ),
        (
            "gemma2",
            &[("use_bidirectional_attention", json!(true))],
            &["use_bidirectional"],
        ),
        (
            "phi3",
            &[(
                "rope_scaling",
                json!({"type": "longrope", "short_factor": [1.0]}),
            )],
            &["longrope", "yarn"],
        ),
    ];
    for (name, overrides, parts) in cases {
        let message = refusal(name, overrides);
        assert!(message.contains("config.json"), "{message}");
        assert!(!message.contains('\n'), "{message}");
        for part in *parts {
            assert!(message.contains(part), "'{part}' is not in: {message}");
        }
    }
}

#[test]
fn malformed_configurations_are_refused() {
    let error = |text: &str| HfConfig::from_str(text).expect_err("an error").to_string();
    assert!(error("{").contains("config.json"));
    assert!(error("[1]").contains("JSON object"));
    let twice = error(r#"{"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}"#);
    assert!(twice.contains("'rope_theta' is 1.0"), "{twice}");
    let twice = error(r#"{"dtype": "float32", "torch_dtype": "bfloat16"}"#);
    assert!(twice.contains("'torch_dtype'"), "{twice}");
    assert!(error(r#"{"rope_scaling": 2}"#).contains("rope_scaling"));
    let e = HfConfig::from_file(Path::new("/no/such/folder")).expect_err("an error");
    assert!(e.to_string().contains("/no/such/folder"));
    let cfg = HfConfig::from_str("{}").expect("an object");
    let e = import(&cfg, &options(DType::F32)).expect_err("an error");
    assert!(e.to_string().contains("'model_type' is missing"), "{e}");
    let e = import(&golden("qwen2", "config.json"), &options(DType::I32)).expect_err("an error");
    assert!(e.to_string().contains("i32"), "{e}");
}

#[test]
fn fewer_layers_keep_the_first_layer_types() {
    for name in ["gemma2", "gemma3", "qwen2", "qwen3"] {
        let types = golden(name, "config.json").get("layer_types").cloned();
        let first = types.expect("layer_types")[0].clone();
        let cut = with(name, &[("num_hidden_layers", json!(1))]);
        let typed = [
            ("num_hidden_layers", json!(1)),
            ("layer_types", json!([first])),
        ];
        let said = with(name, &typed);
        assert_eq!(cut.graph, said.graph, "{name}");
    }
}

#[test]
fn overrides_reach_both_spellings() {
    let theta = |m: &Model| {
        m.graph.nodes().iter().find_map(|n| match &n.op {
            Op::Table(Table { data, .. }) => Some(data[1].get()),
            _ => None,
        })
    };
    let plain = with("llama-linear", &[]);
    for file in ["config.json", "config.old.json"] {
        let set = |key: &str, v: Value| {
            let cfg = golden("llama-linear", file)
                .with_overrides([(key, &v)])
                .expect("override");
            build(&cfg, DType::F32)
        };
        // D = 16: the second frequency is theta^(-1/8), halved by the linear scaling.
        let m = set("rope_theta", json!(256.0));
        assert_eq!(theta(&m), Some(0.25), "{file}");
        let m = set("rope_scaling.factor", json!(4.0));
        assert_eq!(theta(&m).map(|t| t * 2.0), theta(&plain), "{file}");
        let m = set("rope_scaling", Value::Null);
        assert_eq!(theta(&m), theta(&plain).map(|t| t * 2.0), "{file}");
        let m = set("rope_parameters", json!({"type": "linear", "factor": 1.0}));
        assert_eq!(theta(&m), theta(&plain).map(|t| t * 2.0), "{file}");
        let m = set("torch_dtype", json!("float16"));
        assert_eq!(m.arch.dtype, Some(DType::F16), "{file}");
        assert_eq!(set("num_hidden_layers", json!(5)).arch.layers, 5);
    }
}

/// Rotary frequencies relative to `theta^(-2i/D)`, and the factor of cos and sin.
fn rope_factors(overrides: &[(&str, Value)], theta: f64) -> (Vec<f64>, f64) {
    let g = with("llama-linear", overrides).graph;
    let table = g.nodes().iter().find_map(|n| match &n.op {
        Op::Table(Table { data, .. }) => Some(data.clone()),
        _ => None,
    });
    let table = table.expect("a table");
    let d = 2.0 * table.len() as f64;
    let ratio = |(i, f): (usize, &crate::Real)| f.get() * theta.powf(2.0 * i as f64 / d);
    let scaling = g.nodes().iter().find_map(|n| match n.op {
        Op::Const(Const { value, .. }) if &*n.prov.path == "model.rotary_emb" => Some(value.get()),
        _ => None,
    });
    let factors = table.iter().enumerate().map(ratio).collect();
    (factors, scaling.expect("a factor"))
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() <= 2e-6 * b.abs(), "{a} is not {b}");
}

#[test]
fn yarn_keeps_fast_pairs_and_divides_slow_ones() {
    // Qwen 2.5's published long-context setting: the ramp goes from pair 23 to pair 40, because
    // 128·ln(32768 / (32·2π)) / (2·ln 10⁶) = 23.6 and 128·ln(32768 / 2π) / (2·ln 10⁶) = 39.6.
    let yarn = |extra: Value| {
        let mut rope = json!({
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
        });
        for (k, v) in extra.as_object().expect("an object") {
            rope[k] = v.clone();
        }
        let size = json!(128);
        let overrides = [
            ("head_dim", size),
            ("rope_theta", json!(1e6)),
            ("rope_scaling", rope),
        ];
        rope_factors(&overrides, 1e6)
    };
    let (factors, scaling) = yarn(json!({}));
    assert_eq!(factors.len(), 64);
    for (i, &f) in factors.iter().enumerate() {
        let ramp = ((i as f64 - 23.0) / 17.0).clamp(0.0, 1.0);
        close(f, 1.0 - ramp + ramp / 4.0);
    }
    close(scaling, 0.1 * 4_f64.ln() + 1.0);
    assert_eq!(yarn(json!({"attention_factor": 1.5})).1, 1.5);
    let both = json!({"mscale": 1.0, "mscale_all_dim": 0.5});
    close(
        yarn(both).1,
        (0.1 * 4_f64.ln() + 1.0) / (0.05 * 4_f64.ln() + 1.0),
    );
}

#[test]
fn llama3_interpolates_between_wavelengths() {
    // Llama 3.1: pairs up to 28 have wavelengths below 8192 / 4, pairs from 35 on above 8192.
    let overrides = [
        ("head_dim", json!(128)),
        ("rope_theta", json!(500_000.0)),
        (
            "rope_scaling",
            json!({
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            }),
        ),
    ];
    let (factors, scaling) = rope_factors(&overrides, 500_000.0);
    assert_eq!(scaling, 1.0);
    for (i, &f) in factors.iter().enumerate() {
        let wavelength = std::f64::consts::TAU * 500_000_f64.powf(i as f64 / 64.0);
        let expected = match i {
            0..=28 => 1.0,
            29..=34 => {
                let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                assert!((0.0..=1.0).contains(&smooth));
                (1.0 - smooth) / 8.0 + smooth
            }
            _ => 1.0 / 8.0,
        };
        close(f, expected);
    }
}

#[test]
fn dynamic_rope_is_plain_within_the_original_length() {
    let dynamic = ("rope_scaling", json!({"type": "dynamic", "factor": 4.0}));
    let (factors, scaling) = rope_factors(&[dynamic], 10_000.0);
    factors.iter().for_each(|&f| close(f, 1.0));
    assert_eq!(scaling, 1.0);
}
