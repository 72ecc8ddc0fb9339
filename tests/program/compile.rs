//! `compile` and `passes` as a user runs them.

use std::path::Path;
use std::process::{Command, Output};

const MODEL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/fixtures/configs/llama-3.1-8b"
);

pub(crate) fn lathe(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lathe"))
        .args(args)
        .output()
        .unwrap()
}

fn compile(args: &[&str]) -> String {
    let mut all = vec!["--model", MODEL, "compile"];
    all.extend(args);
    // What is printed must not depend on the machine.
    if !args.contains(&"--target") {
        all.extend(["--target", "h100"]);
    }
    let output = lathe(&all);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert_eq!(stderr, "", "quiet without a terminal");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_line_for_each_pass_and_kernels_of_each_layer() {
    let out = compile(&["--target", "h100"]);
    for line in [
        "[stage=attention, pass=attention] enabled=true matches=160 ",
        "[stage=attention, rule=attention-close] matches=32",
        "[stage=recognize, rule=rmsnorm-upcast] matches=65",
        "[stage=attention] unmatched=attention-mask-fill,attention-softcap",
        "  layers 0-31      rmsnorm·gemm, attn_qkv, gemm·residual, rmsnorm·gemm·swiglu, gemm·residual",
    ] {
        assert!(out.contains(line), "no {line:?} in\n{out}");
    }
}

#[test]
fn phases_add_up_to_the_wall_time() {
    let out = compile(&[]);
    let table = out.split("time\n").last().unwrap();
    let share = |line: &str| -> f64 {
        let words: Vec<&str> = line.split_whitespace().collect();
        words[words.len() - 2].parse().unwrap()
    };
    let lines: Vec<&str> = table.lines().collect();
    let (wall, parts) = lines.split_last().unwrap();
    assert!(wall.contains("wall") && share(wall) == 100.0);
    let sum: f64 = parts.iter().map(|l| share(l)).sum();
    assert!((sum - 100.0).abs() < 1.0, "{table}");
    let rest = parts.last().unwrap();
    assert!(
        rest.contains("unattributed") && share(rest) <= 2.0,
        "{rest}"
    );
}

#[test]
fn what_is_switched_off_says_by_what() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("c.yaml");
    let text = "compile_backend: torch-simple\ntransforms: {rope: {enabled: false}}\n\
                model_kwargs: {num_hidden_layers: 2}\n";
    std::fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();
    let out = compile(&["--config", config]);
    let fuse = "[stage=fuse, pass=fuse] enabled=false reason=compile_backend: torch-simple (";
    let rope = "[stage=recognize, rule=rope] enabled=false reason=transforms.rope (";
    for line in [fuse, rope, ", 2 layers,"] {
        assert!(out.contains(line), "no {line:?} in\n{out}");
    }
    let dry = compile(&[
        "--extra_llm_api_options",
        config,
        "--dry-run",
        "--max_seq_len",
        "77",
    ]);
    for line in [
        &format!("torch-simple  {config}:1"),
        "77            command line, --max_seq_len",
        &format!("off: fuse, by compile_backend: torch-simple ({config}:1)"),
        "roofline of decode (batch 1, context 512, h100)",
    ] {
        assert!(dry.contains(line), "no {line:?} in\n{dry}");
    }
}

#[test]
fn a_dry_run_predicts_with_the_numbers_of_the_model() {
    let out = compile(&["--dry-run", "--target", "h200"]);
    // 2 (k, v) · 32 layers · 8 heads · 128 features · 2 bytes, and 8.03 B parameters of 2 bytes.
    assert!(
        out.contains("128.00 KiB a token, 8.00 MiB a page of 64 tokens"),
        "{out}"
    );
    assert!(out.contains("weights      14.96 GiB in "), "{out}");
    let left = out.lines().find(|l| l.starts_with("  left "));
    assert!(left.unwrap().contains(" of 139.80 GiB; "), "{out}");
    assert!(out.contains("  workspaces   "), "{out}");
    let gemm = out
        .lines()
        .find(|l| l.trim_start().starts_with("gemm"))
        .unwrap();
    assert!(gemm.contains("129"), "4 a layer and lm_head: {gemm}");
}

/// Without --target the device that would run is predicted, and the output says which.
#[test]
fn the_target_is_said() {
    let target = |args: &[&str]| {
        let output = lathe(&[&["-m", MODEL], args, &["compile"]].concat());
        let out = String::from_utf8(output.stdout).unwrap();
        let line = out.lines().find(|l| l.starts_with("target"));
        line.unwrap_or_else(|| panic!("{out}")).to_string()
    };
    assert_eq!(target(&["--device", "cpu"]), "target  cpu (by --device)");
    let here = target(&[]);
    let gpu = lathe_runtime::device::cuda::driver::properties(0).is_ok();
    let expected = match gpu {
        true => "target  h",
        false => "target  cpu (no usable GPU here; --target h100 or h200 needs none)",
    };
    assert!(here.starts_with(expected), "{here}");
    if !gpu {
        let output = lathe(&["-m", MODEL, "--device", "cuda", "compile"]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(
            error.contains("--target h100 or h200 needs no GPU"),
            "{error}"
        );
    }
}

#[test]
fn dumps_in_each_format_and_text_goes_back_into_opt() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    let dir = folder.path().to_str().unwrap();
    compile(&["--dump-ir", "after-all", "--dump-dir", dir]);
    for name in [
        "000_import",
        "001_canonicalize",
        "004_kv_cache",
        "005_fuse",
        "007_general",
    ] {
        let text = read(&format!("{name}.txt"));
        assert!(text.starts_with("// pass: "), "{name}");
        lathe_ir::text::parse(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    let header = read("003_attention.txt");
    for line in [
        "// pass: attention (3 of 5)",
        "attention-close 32",
        "// e-nodes: ",
        "// cost: ",
        "// time: ",
    ] {
        assert!(header.contains(line), "no {line:?}");
    }
    let path = folder.path().join("002_recognize.txt");
    let output = lathe(&[
        "opt",
        path.to_str().unwrap(),
        "--passes",
        "attention",
        "--verify",
    ]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    let result = String::from_utf8(output.stdout).unwrap();
    let graph = lathe_ir::text::parse(&result).unwrap();
    assert_eq!(graph.count("attn"), 32);

    for (format, name, inside) in [
        ("dot", "003_attention.dot", "digraph"),
        ("json", "003_attention.json", "\"nodes\""),
    ] {
        let args = [
            "--dump-ir",
            "after=attention",
            "--dump-dir",
            dir,
            "--dump-format",
            format,
        ];
        compile(&args);
        assert!(read(name).contains(inside), "{name}");
    }
    let json: serde_json::Value = serde_json::from_str(&read("003_attention.json")).unwrap();
    assert_eq!(json["header"]["pass"], "attention (3 of 5)");
}

#[test]
fn unchanged_programs_are_left_out_on_demand() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("d");
    let config = folder.path().join("c.yaml");
    std::fs::write(&config, "transforms: {attention: {enabled: false}}").unwrap();
    let args = [
        "--config",
        config.to_str().unwrap(),
        "--dump-ir",
        "after=recognize,attention",
        "--only-changed",
        "--dump-dir",
        dir.to_str().unwrap(),
    ];
    let out = compile(&args);
    assert!(out.contains("no dump of attention: unchanged"), "{out}");
    assert!(Path::new(&dir).join("002_recognize.txt").exists());
    assert!(!Path::new(&dir).join("003_attention.txt").exists());
}

#[test]
fn wrong_usage() {
    for (args, code, expected) in [
        (vec!["compile"], 2, "--model is missing"),
        (
            vec!["-m", MODEL, "compile", "--target", "a100"],
            2,
            "expected h100, h200 or cpu",
        ),
        (
            vec!["-m", MODEL, "compile", "--dump-ir", "after=fusee"],
            2,
            "no pass 'fusee'",
        ),
        (
            vec!["-m", MODEL, "compile", "--only-changed"],
            2,
            "needs --dump-ir",
        ),
        (
            vec!["-m", MODEL, "compile", "--config", "/no/such.yaml"],
            1,
            "/no/such.yaml: ",
        ),
        (
            vec!["passes", "--explain", "softmx"],
            2,
            "did you mean 'softmax'?",
        ),
    ] {
        let output = lathe(&args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(expected), "{args:?}: {stderr}");
    }
}

#[test]
fn rules_are_listed_and_explained_with_an_example() {
    let list = String::from_utf8(lathe(&["passes"]).stdout).unwrap();
    for rule in lathe_passes::rules::all() {
        assert!(list.contains(rule.name) && list.contains(rule.equation));
        let output = lathe(&["passes", "--explain", rule.name]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{}", rule.name);
        let (before, after) = text
            .split_once("\nexample\n")
            .and_then(|(_, t)| t.split_once("\nbecomes\n"))
            .unwrap();
        let before = lathe_ir::text::parse(before).unwrap();
        let after = lathe_ir::text::parse(after).unwrap();
        assert!(
            before.nodes() != after.nodes(),
            "{} changes nothing",
            rule.name
        );
    }
}

#[test]
fn an_operation_is_explained_from_the_import_on() {
    let explain = |args: &[&str]| {
        let mut all = vec!["-m", MODEL, "explain", "--target", "h100"];
        all.extend(args);
        let output = lathe(&all);
        let error = String::from_utf8(output.stderr).unwrap();
        (String::from_utf8(output.stdout).unwrap(), error)
    };
    let (list, _) = explain(&["--layer", "3"]);
    assert_eq!(list.lines().count(), 5, "{list}");
    let (attention, _) = explain(&["--layer", "3", "--op", "attn_qkv"]);
    for line in [
        "attn_qkv, layer 3, decode program",
        "// L3 model.layers.3.self_attn.q_proj",
        "canonicalize   linear                   gives linear ×3",
        "attention      attention-close          gives attn",
        "fuse           qkv-join                 gives attn_qkv",
        "  by qkv-join",
        "attn_step",
    ] {
        assert!(attention.contains(line), "no {line:?} in\n{attention}");
    }
    assert!(!attention.contains(".*."), "{attention}");
    let general = ["--program", "general", "--layer", "3"];
    let (list, error) = explain(&general);
    assert_eq!(list.lines().count(), 5, "{error}{list}");
    let (attention, _) = explain(&[&general[..], &["--op", "attn_qkv"]].concat());
    let head = "attn_qkv, layer 3, general program (2048 tokens, h100)";
    assert!(attention.starts_with(head), "{attention}");
    // Fusions across kernels are told with their reasons, of this operation alone.
    for line in [
        "step and kernel, and what it does beside that where rows are greedy",
        "attn_qkv of model.layers.3.self_attn: attn_prefill",
        "tiles        yes: step 2 has made the list of tiles",
    ] {
        assert!(attention.contains(line), "no {line:?} in\n{attention}");
    }
    // With gamma norms stay apart there for want of a kernel of so many rows, not because a rule failed.
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("c.yaml");
    let config = config.to_str().unwrap();
    std::fs::write(config, "transforms: {gamma-into-weight: {enabled: false}}").unwrap();
    let apart = ["--op", "rmsnorm", "--config", config];
    let (norm, _) = explain(&[&general[..], &apart].concat());
    assert!(
        norm.contains("it stays apart from the kernel that reads it"),
        "{norm}"
    );
    assert!(
        norm.contains("prologue=rms,") && !norm.contains("nearest"),
        "{norm}"
    );
    // An operation on the way leads to the kernel that stands for it.
    let (softmax, error) = explain(&["--layer", "3", "--op", "exp"]);
    assert!(
        softmax.starts_with("attn_qkv, layer 3, decode program"),
        "{error}"
    );
    let (o_proj, _) = explain(&["--layer", "3", "--op", "o_proj"]);
    assert!(o_proj.contains("gemm-residual"), "{o_proj}");
    assert!(o_proj.contains("gemm of model.layers.3: gemv"), "{o_proj}");
    assert_eq!(o_proj.matches("prefetch     yes").count(), 1, "{o_proj}");
    // Without the rule, the residual add stays and says why.
    std::fs::write(config, "transforms: {gemm-residual: {enabled: false}}").unwrap();
    let (add, error) = explain(&["--layer", "3", "--op", "add", "--config", config]);
    let reason = "no rule lowered it; the nearest is gemm-residual (2 of 2 operations match): \
                  it is switched off";
    assert!(add.contains(reason), "{error}{add}");
    let (_, error) = explain(&["--layer", "99"]);
    assert!(error.contains("the last layer is 31"), "{error}");
    let (_, error) = explain(&["--layer", "1", "--op", "gemmm"]);
    assert!(error.contains("did you mean 'gemm'?"), "{error}");
}

/// A rule of the stage kv_cache that is missing is named where the rows of a step end.
#[test]
fn without_a_step_program_the_nearest_rule_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("c.yaml");
    std::fs::write(&config, "transforms: {win-linear: {enabled: false}}").unwrap();
    let out = compile(&["--config", config.to_str().unwrap()]);
    let line = out.lines().find(|l| l.starts_with("no step program: "));
    let line = line.unwrap_or_else(|| panic!("{out}"));
    assert!(
        line.ends_with("; nearest rule win-linear: it is switched off"),
        "{line}"
    );
}

#[test]
fn the_page_is_one_small_file_with_every_stage_and_its_alternatives() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    let out = compile(&[
        "--dump-format",
        "html",
        "--dump-dir",
        dir,
        "--target",
        "h100",
    ]);
    assert!(out.contains("lathe.html ("), "{out}");
    let page = std::fs::read_to_string(folder.path().join("lathe.html")).unwrap();
    assert!(page.len() < 3 << 20, "{} bytes", page.len());
    let data = page
        .split_once("const DATA = ")
        .and_then(|(_, rest)| rest.split_once(";\nconst $"))
        .unwrap()
        .0;
    let data: serde_json::Value = serde_json::from_str(&data.replace("<\\/", "</")).unwrap();
    assert_eq!(data["layers"], 32);
    // One template for all layers: the page is folded.
    let layer = &data["templates"][1];
    assert_eq!(layer["layers"].as_array().unwrap().len(), 32);
    let names: Vec<&str> = layer["columns"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].as_str().unwrap())
        .collect();
    let stages = [
        "import",
        "canonicalize",
        "recognize",
        "attention",
        "kv_cache",
        "fuse",
    ];
    assert_eq!(names, stages);
    let chosen = |program: &str, op: &str| {
        layer[program]["values"]
            .as_object()
            .unwrap()
            .values()
            .flat_map(|v| v["forms"].as_array().unwrap())
            .filter(|f| f["chosen"] == true && f["op"] == op)
            .count()
    };
    assert_eq!(chosen("decode", "attn_qkv"), 1, "with its alternatives");
    assert_eq!(chosen("general", "attn_qkv"), 1);
    assert_eq!(layer["decode"]["ops"].as_array().unwrap().len(), 5);
    let general = layer["general"]["ops"].as_array().unwrap();
    assert_eq!(general.len(), 5, "{general:?}");
    let fuse = layer["columns"].as_array().unwrap().last().unwrap();
    let nodes = |column: &serde_json::Value| column["graph"]["nodes"].as_array().unwrap().len();
    assert!(nodes(&fuse["general"]) > 0 && fuse["general"] != fuse["graph"]);
}

#[test]
fn a_wrong_override_names_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("c.yaml");
    let text = "max_batch_size: 4\nmodel_kwargs: {num_hidden_layers: many}\n";
    std::fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();
    let output = lathe(&["-m", MODEL, "compile", "--config", config]);
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8(output.stderr).unwrap();
    let expected = format!(
        "error: {config}:2: model_kwargs over {MODEL}/config.json: 'num_hidden_layers' is \"many\", expected a positive integer\n"
    );
    assert_eq!(error, expected);
}

/// Chains are made in the two step programs after extraction, so these are what there is after chains.
#[test]
fn after_chains_are_the_step_programs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    compile(&["--dump-ir", "after=chains", "--dump-dir", path]);
    let files = std::fs::read_dir(path).unwrap();
    let mut names: Vec<_> = files.map(|f| f.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["006_decode.txt", "007_general.txt"]);
}

#[test]
fn misspelt_passes_are_recognised() {
    let program = "graph \"g\" {\n  %x = input {name=\"x\"} : f32[B,S,8]\n  return y=%x\n}\n";
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), program).unwrap();
    let path = file.path().to_str().unwrap();
    for (args, near) in [
        (["opt", path, "--passes", "recognise"], "recognize"),
        (["opt", path, "--passes", "chain"], "chains"),
        (
            ["-m", MODEL, "compile", "--dump-ir=after=attentoin"],
            "attention",
        ),
    ] {
        let error = String::from_utf8(lathe(&args).stderr).unwrap();
        assert!(
            error.contains(&format!("did you mean '{near}'?")),
            "{error}"
        );
    }
    let out = lathe(&["opt", path, "--passes", "recognize,chains"]);
    assert!(out.status.success(), "{out:?}");
    let out = lathe(&["passes", "--explain", "chains"]);
    assert!(
        String::from_utf8(out.stdout)
            .unwrap()
            .starts_with("chains (after extraction")
    );
}

#[test]
fn logs_as_json_on_demand() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("c.yaml");
    std::fs::write(&config, "model_kwargs: {num_hidden_layer: 2}").unwrap();
    let config = config.to_str().unwrap();
    let args = ["-m", MODEL, "compile", "--config", config];
    let plain = String::from_utf8(lathe(&args).stderr).unwrap();
    assert!(
        plain.contains("model_kwargs.num_hidden_layer is no key of"),
        "{plain}"
    );
    let mut json = args.to_vec();
    json.extend(["--log_format", "json", "--log_level", "debug"]);
    let lines = String::from_utf8(lathe(&json).stderr).unwrap();
    let lines: Vec<serde_json::Value> = lines
        .lines()
        .map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{l}: {e}")))
        .collect();
    let has = |f: &dyn Fn(&serde_json::Value) -> bool| lines.iter().any(f);
    assert!(has(&|l| l["level"] == "WARN"));
    assert!(has(&|l| l["phase"] == "import" && l["seconds"].is_number()));
    let mut quiet = args.to_vec();
    quiet.extend(["--log_level", "error"]);
    assert_eq!(lathe(&quiet).stderr, b"");
}

#[test]
fn generated_sources_are_written_on_demand() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    let out = compile(&["--emit", "cuda", "--dump-dir", dir, "--target", "h100"]);
    let files: Vec<&str> = out
        .lines()
        .filter_map(|l| l.strip_prefix("emit "))
        .collect();
    assert!(
        files.iter().any(|f| f.ends_with("cuda/decode.txt")),
        "{out}"
    );
    let kernels: Vec<_> = files.iter().filter(|f| f.ends_with(".cu")).collect();
    assert!(kernels.len() > 4, "{out}");
    for k in kernels {
        let text = std::fs::read_to_string(k).unwrap();
        assert!(text.contains("__global__"), "{k}");
    }
    let launches = std::fs::read_to_string(folder.path().join("cuda/decode.txt")).unwrap();
    assert!(launches.lines().count() > 160, "{launches}");
    assert!(launches.contains("model.layers.31.self_attn"), "{launches}");
    assert!(
        launches.contains("argmax       no: the logits are wanted"),
        "{launches}"
    );
}

#[test]
fn sources_of_all_buckets_are_written_on_demand() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    let emit = ["--emit", "cuda-buckets", "--dump-dir", dir];
    compile(&[&emit[..], &["--target", "h100", "--max_batch_size", "12"]].concat());
    let read = |name: &str| std::fs::read_to_string(folder.path().join("cuda").join(name)).unwrap();
    let decode = read("decode.txt");
    for rows in [1, 2, 4, 8, 16] {
        let sizes = format!("Sizes {{ t: {rows}, b: {rows}, r: {rows} }} GreedyOnly");
        assert_eq!(decode.contains(&sizes), rows <= 4, "{rows}");
        assert!(decode.contains(&sizes.replace("GreedyOnly", "Greedy")));
    }
    // GEMMs are there with every kernel that they can choose, each kernel with its text.
    assert!(decode.contains("m8_n4096_k4096_residual of "));
    let kernels = |line: &str| line.split_whitespace().nth(1).map(|k| format!("{k}.cu"));
    let launched: std::collections::BTreeSet<_> = decode
        .lines()
        .filter(|l| l.contains(" grid ["))
        .filter_map(kernels)
        .collect();
    assert!(launched.len() > 20, "{launched:?}");
    for kernel in launched {
        assert!(read(&kernel).contains("__global__"), "{kernel}");
    }
}
