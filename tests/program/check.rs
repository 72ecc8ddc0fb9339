//! `opt --check`: a program before and after its passes, on random inputs.

use super::compile::lathe;

/// A causal attention with scores of some size, and −1e4 where they are hidden.
fn attention(factor: &str) -> String {
    format!(
        "graph \"attention\" {{
  %s = input {{name=\"scores\"}} : f32[B,2,S,S]
  %v = input {{name=\"v\"}} : f32[B,2,S,4]
  %f = const {{value={factor}}} : f32[]
  %c = mul %s, %f : f32[B,2,S,S]
  %i = iota : i64[S]
  %q = reshape %i : i64[S,1]
  %k = reshape %i : i64[1,S]
  %seen = le %k, %q : bool[S,S]
  %zero = const {{value=0.0}} : f32[]
  %fill = const {{value=-1e4}} : f32[]
  %mask = where %seen, %zero, %fill : f32[S,S]
  %m = add %c, %mask : f32[B,2,S,S]
  %p = softmax %m : f32[B,2,S,S]
  %y = matmul %p, %v : f32[B,2,S,4]
  return y=%y
}}
"
    )
}

/// Runs the attention stage on a program of this factor.
fn checked(factor: &str) -> (Option<i32>, String, String) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), attention(factor)).unwrap();
    let path = file.path().to_str().unwrap();
    let out = lathe(&[
        "opt",
        path,
        "--passes",
        "attention",
        "--goal",
        "rewritten",
        "--check",
    ]);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(path, "FILE");
    (out.status.code(), text(out.stdout), text(out.stderr))
}

/// What the mask hides vanishes beside scores of about 1, and not beside scores of about 1e5.
#[test]
fn a_difference_is_named_and_fails() {
    let (code, program, said) = checked("1.5");
    assert_eq!(code, Some(0), "{said}");
    assert!(program.contains(" sdpa "), "{program}");
    assert_eq!(said, "equal on 4 random inputs, to 1e-9\n");
    let (code, program, said) = checked("1e5");
    assert_eq!(code, Some(1), "{said}");
    assert!(program.contains(" sdpa "), "{program}");
    let told = "FILE: the passes change its meaning: y[";
    assert!(
        said.contains(told) && said.trim_end().lines().count() == 1,
        "{said}"
    );
    assert!(
        said.contains(" before and ")
            && said.contains(" after; a rule assumes that no score exceeds 4948.0,"),
        "{said}"
    );
}
