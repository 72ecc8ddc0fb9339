//! Tests of passes as files: `tests/files/**/*.ir`.
//!
//! `common::case` describes their format. `LATHE_BLESS=1 make rules` writes the results.

mod common;

use common::case::Case;
use lathe_ir::{Graph, Type, text, verify};
use lathe_passes::opt::run;
use lathe_passes::trial;
use std::path::Path;

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
    match trial::difference(before, after, 0, 1e-9)? {
        None => Ok(()),
        Some(d) => Err(format!("output {d}")),
    }
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
    assert!(e.starts_with("output y[0, 0] is "), "{e}");
    // The types of the values are part of what is compared.
    assert!(matches!(program("exp").nodes()[1].ty, Type::Tensor(_)));
    let d = difference("a\nb\nc\n", "a\nx\nc\n");
    assert_eq!(d, "-b\n+x\n");
}
