//! Tests of passes as files: `tests/files/**/*.ir`.
//!
//! `common::case` describes their format. `LATHE_BLESS=1 make rules` writes the results.

mod common;

use common::case::Case;
use lathe_ir::interp::{Interp, StepMeta, Tensor, Value};
use lathe_ir::ops::Input;
use lathe_ir::{DType, Dim, Graph, Op, Sym, SymEnv, Type, WeightRef, text, verify};
use lathe_passes::opt::{is_full_sequence, run, windowed};
use std::path::Path;

/// Sequences and positions of the evaluation.
const BATCH: usize = 2;
const SEQ: usize = 5;

/// The program before and after the passes, or the message of the error.
fn result(case: &Case) -> Result<(Graph, Graph), String> {
    let before = text::parse(&case.program).map_err(|e| e.to_string())?;
    check(&before)?;
    let passes: Vec<&str> = case.passes.iter().map(String::as_str).collect();
    let after = run(&before, &passes, &case.goal)
        .map_err(|e| e.to_string())?
        .graph;
    check(&after)?;
    Ok((before, after))
}

fn check(graph: &Graph) -> Result<(), String> {
    let errors: Vec<String> = verify(graph).iter().map(ToString::to_string).collect();
    if errors.is_empty() {
        Ok(())
    } else {
        Err(errors.join("\n"))
    }
}

#[test]
fn every_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/files");
    let bless = std::env::var_os("LATHE_BLESS").is_some();
    let paths = common::programs();
    let failures: Vec<String> = paths
        .iter()
        .filter_map(|path| {
            let name = path.strip_prefix(&root).unwrap().display();
            let fault = test(path, bless).err()?;
            Some(format!("{name}: {fault}"))
        })
        .collect();
    assert!(
        failures.is_empty(),
        "{} of {} files failed (LATHE_BLESS=1 accepts changed results)\n\n{}",
        failures.len(),
        paths.len(),
        failures.join("\n\n")
    );
}

fn test(path: &Path, bless: bool) -> Result<(), String> {
    let content = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let case = Case::read(&content)?;
    let result = result(&case);
    if let Some(wanted) = &case.error {
        return match result {
            Err(e) if e.contains(wanted.as_str()) => Ok(()),
            Err(e) => Err(format!("expected the error '{wanted}', found\n{e}")),
            Ok(_) => Err(format!("expected the error '{wanted}', but it passes")),
        };
    }
    let (before, after) = result?;
    if case.interp {
        compare(&before, &after)?;
    }
    let found = text::print(&after);
    if found == case.expected {
        return Ok(());
    }
    if bless {
        let content = format!("{}\n---\n{found}", case.program.trim_end());
        return std::fs::write(path, content).map_err(|e| e.to_string());
    }
    Err(difference(&case.expected, &found))
}

/// The worked example in the description of the passes.
#[test]
fn the_example_of_the_readme() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(path).unwrap();
    let (_, rest) = readme.split_once("```text\n   //! run:").unwrap();
    let (block, _) = rest.split_once("   ```").unwrap();
    let content: String = format!("   //! run:{block}")
        .lines()
        .map(|l| format!("{}\n", l.strip_prefix("   ").unwrap_or(l)))
        .collect();
    let case = Case::read(&content).unwrap();
    let (before, after) = result(&case).unwrap();
    assert!(case.interp);
    compare(&before, &after).unwrap();
    assert_eq!(text::print(&after), case.expected);
}

/// The rule that the description shows is the one in the sources, up to what it leaves out.
#[test]
fn the_rule_of_the_readme() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let source = std::fs::read_to_string(root.join("src/rules/canonical.rs")).unwrap();
    let (_, rest) = readme.split_once("```rust\n").unwrap();
    let (block, _) = rest.split_once("```").unwrap();
    let whole = |l: &&str| !l.contains("..");
    let mut at = 0;
    for line in block.lines().filter(whole) {
        let found = source[at..].find(line);
        at += found.unwrap_or_else(|| panic!("not in canonical.rs, or not here:\n{line}"));
        at += line.len();
    }
    assert!(at > 0);
    let samples = root.join("samples/canonicalize/mul-one.ir");
    let samples = std::fs::read_to_string(samples).unwrap();
    assert!(readme.contains(&samples), "not in README.md:\n{samples}");
}

/// Lines only in the expectation with `-`, lines only in the result with `+`.
fn difference(expected: &str, found: &str) -> String {
    let (a, b): (Vec<&str>, Vec<&str>) = (expected.lines().collect(), found.lines().collect());
    let mut out = String::new();
    let same = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
    let tail = a[same..]
        .iter()
        .rev()
        .zip(b[same..].iter().rev())
        .take_while(|(x, y)| x == y)
        .count();
    for (mark, lines) in [
        ("-", &a[same..a.len() - tail]),
        ("+", &b[same..b.len() - tail]),
    ] {
        for line in lines {
            out += &format!("{mark}{line}\n");
        }
    }
    out
}

/// Evaluates both programs on the same random inputs, in f64.
fn compare(before: &Graph, after: &Graph) -> Result<(), String> {
    // The stage kv_cache makes a step program, which is held against windows of the whole.
    let steps = !is_full_sequence(after) && is_full_sequence(before);
    let reference = if steps {
        windowed(before).map_err(|e| e.to_string())?
    } else {
        before.clone()
    };
    let x = evaluate(&reference).map_err(|e| format!("before: {e}"))?;
    let y = evaluate(after).map_err(|e| format!("after: {e}"))?;
    for ((name, x), (_, y)) in x.iter().zip(&y) {
        let close = match (x, y) {
            (Value::Float(x), Value::Float(y)) => {
                let scale = x.data.iter().fold(1.0_f64, |m, v| m.max(v.abs()));
                let pairs = x.data.iter().zip(&y.data);
                x.shape == y.shape
                    && pairs
                        .into_iter()
                        .all(|(a, b)| (a - b).abs() <= 1e-9 * scale)
            }
            (x, y) => x == y,
        };
        if !close {
            return Err(format!("output {name} differs:\n{x:?}\n{y:?}"));
        }
    }
    Ok(())
}

fn evaluate(graph: &Graph) -> Result<Vec<(String, Value<f64>)>, String> {
    let rows = BATCH * SEQ;
    let syms = SymEnv::new(&[
        (Sym::B, BATCH as i64),
        (Sym::S, SEQ as i64),
        (Sym::T, rows as i64),
        (Sym::R, rows as i64),
    ]);
    let weights = |w: &WeightRef| {
        let n: i64 = w.shape.iter().product();
        Ok((0..n as u64).map(|i| unit(&w.name, i)).collect())
    };
    let mut interp = Interp::new(syms, &weights);
    interp.step = Some(StepMeta::new(&[SEQ; BATCH], &[0; BATCH]));
    for node in graph.nodes() {
        let Op::Input(Input { name, dtype, shape }) = &node.op else {
            continue;
        };
        let value = input(name, *dtype, shape, &syms);
        interp.inputs.insert(name.clone(), value);
    }
    let out = interp.run(graph).map_err(|e| e.to_string())?;
    Ok(out
        .into_iter()
        .filter(|(_, v)| !matches!(v, Value::Cache(_)))
        .collect())
}

/// The value of an input. A step's input `step.x` holds the rows of the input `x` in order, so
/// both read the same numbers.
fn input(name: &str, dtype: DType, shape: &[Dim], syms: &SymEnv) -> Value<f64> {
    let extents: Vec<usize> = shape.iter().map(|d| d.eval(syms) as usize).collect();
    let n = extents.iter().product::<usize>() as u64;
    let plain = name.strip_prefix("step.").unwrap_or(name);
    let ints =
        |f: &dyn Fn(u64) -> i64| Value::Int(Tensor::new(extents.clone(), (0..n).map(f).collect()));
    match (dtype, plain) {
        (DType::Bool, _) => Value::Bool(Tensor::new(
            extents,
            (0..n).map(|i| unit(plain, i) > 0.0).collect(),
        )),
        (DType::I32 | DType::I64, "positions") => ints(&|i| i as i64 % SEQ as i64),
        (DType::I32 | DType::I64, "rows") => ints(&|i| i as i64),
        (DType::I32 | DType::I64, _) => ints(&|i| (unit(plain, i).abs() * 7.0) as i64),
        _ => Value::Float(Tensor::new(
            extents,
            (0..n).map(|i| unit(plain, i)).collect(),
        )),
    }
}

/// A number in `[-1, 1)` from a name and an index.
fn unit(name: &str, index: u64) -> f64 {
    let mut z = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
        })
        .wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
}

#[test]
fn commands_are_words_of_a_grammar() {
    let read = |commands: &str| Case::read(&format!("{commands}graph \"g\" {{\n}}\n"));
    let case = read("// For readers.\n//! run: a, b\n//! goal: decode:4\n//! interp\n").unwrap();
    assert_eq!(case.passes, ["a", "b"]);
    assert!(case.interp && case.error.is_none());
    let cases = [
        (
            "//! run: a\n//! intrep\n",
            "line 2: unknown command 'intrep'",
        ),
        (
            "//! run: a\n//! interp: no\n",
            "line 2: unknown command 'interp: no'",
        ),
        ("//! run:\n", "line 1: 'run' needs a text"),
        ("//! run: a\n//! run: b\n", "line 2: 'run' stands twice"),
        (
            "//! run: a\n//! goal: small\n",
            "line 2: unknown goal 'small'",
        ),
        (
            "//! run: a\n\n//! interp\n",
            "line 3: commands stand above the program",
        ),
        ("// run: a\n", "neither 'run' nor 'error' is asked for"),
    ];
    for (commands, message) in cases {
        let e = read(commands).unwrap_err();
        assert!(e.starts_with(message), "{e}");
    }
}

#[test]
fn the_harness_sees_a_wrong_rewrite() {
    let program = |op: &str| {
        let text = format!(
            "graph \"g\" {{\n  %x = input {{name=\"x\"}} : f32[B,S]\n  %y = {op} %x : f32[B,S]\n  return y=%y\n}}\n"
        );
        text::parse(&text).unwrap()
    };
    assert!(compare(&program("exp"), &program("exp")).is_ok());
    let e = compare(&program("exp"), &program("sin")).unwrap_err();
    assert!(e.contains("output y differs"), "{e}");
    // The types of the values are part of what is compared.
    assert!(matches!(program("exp").nodes()[1].ty, Type::Tensor(_)));
    let d = difference("a\nb\nc\n", "a\nx\nc\n");
    assert_eq!(d, "-b\n+x\n");
}
