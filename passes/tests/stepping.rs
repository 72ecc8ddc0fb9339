//! Step programs with KV caches against the full-sequence graph: random ragged splits of random
//! sequences give the same logits.

mod common;

use common::{LLAMA_SHAPE, Session, Weights, config, full_logits, graph_of};
use lathe_ir::interp::Tensor;
use lathe_ir::{DType, Graph, WeightRef};
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{PassConfig, compile};
use proptest::prelude::*;
use proptest::test_runner::{FileFailurePersistence, RngAlgorithm, TestRng, TestRunner};
use std::collections::BTreeMap;

/// Relative to the largest logit of the row.
const TOLERANCE: f64 = 1e-9;

/// A model with its programs.
struct Steps {
    name: String,
    weights: Weights,
    full: Graph,
    recognised: Graph,
    decode: Graph,
    general: Graph,
}

impl Steps {
    fn new(name: &str, overrides: &[(&str, serde_json::Value)]) -> Steps {
        let config = config(name)
            .with_overrides(overrides.iter().map(|(k, v)| (*k, v)))
            .expect("overrides");
        let full = graph_of(&config, DType::F32);
        let passes = PassConfig::new(DeviceModel::CPU);
        let compiled = compile(&full, &passes).expect("compiles");
        let none = || panic!("{name}: {:?}", compiled.no_step);
        Steps {
            name: format!("{name} {overrides:?}"),
            weights: Weights::golden(name),
            decode: compiled.steps.decode.clone().unwrap_or_else(none),
            general: compiled.steps.general.clone().unwrap_or_else(none),
            recognised: compiled.full,
            full,
        }
    }
}

/// One request: its tokens, and how many of them each step takes (some steps may take none).
#[derive(Clone, Debug)]
struct Request {
    tokens: Vec<i64>,
    chunks: Vec<usize>,
}

fn request(longest: usize) -> impl Strategy<Value = Request> {
    (
        prop::collection::vec(0i64..256, 1..=longest),
        prop::collection::vec(0usize..5, 0..6),
    )
        .prop_map(|(tokens, mut chunks)| {
            let mut left = tokens.len();
            for c in &mut chunks {
                *c = (*c).min(left);
                left -= *c;
            }
            chunks.push(left);
            Request { tokens, chunks }
        })
}

fn check_row(name: &str, what: &str, found: &[f64], expected: &[f64]) -> Result<(), TestCaseError> {
    let scale = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let d = found
        .iter()
        .zip(expected)
        .fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
    prop_assert!(
        d <= TOLERANCE * scale && scale > 0.0,
        "{name}, {what}: {d:.2e} of {scale:.2e}"
    );
    Ok(())
}

/// Logits of all positions of each request, by the full graph on padded sequences. A causal
/// model's padding changes nothing before it.
fn expected(graph: &Graph, weights: &Weights, requests: &[Request]) -> Tensor<f64> {
    let longest = requests.iter().map(|r| r.tokens.len()).max().expect("some");
    let padded: Vec<Vec<i64>> = requests
        .iter()
        .map(|r| {
            let mut t = r.tokens.clone();
            t.resize(longest, 0);
            t
        })
        .collect();
    full_logits(graph, &|w: &WeightRef| weights.get(w), &padded)
}

fn row(full: &Tensor<f64>, b: usize, pos: usize) -> &[f64] {
    let (s, v) = (full.shape[1], full.shape[2]);
    let at = (b * s + pos) * v;
    &full.data[at..at + v]
}

/// The general program over the chunks; all rows are wanted, in an odd order.
fn check_general(m: &Steps, requests: &[Request]) -> Result<(), TestCaseError> {
    let full = expected(&m.full, &m.weights, requests);
    let weights = |w: &WeightRef| m.weights.get(w);
    let mut session = Session {
        graph: &m.general,
        weights: &weights,
        caches: BTreeMap::new(),
    };
    let steps = requests.iter().map(|r| r.chunks.len()).max().expect("some");
    let mut past = vec![0; requests.len()];
    for step in 0..steps {
        let new: Vec<&[i64]> = requests
            .iter()
            .zip(&past)
            .map(|(r, &p)| &r.tokens[p..p + r.chunks.get(step).copied().unwrap_or(0)])
            .collect();
        let places: Vec<(usize, usize)> = new
            .iter()
            .enumerate()
            .flat_map(|(b, t)| (0..t.len()).map(move |i| (b, i)))
            .map(|(b, i)| (b, past[b] + i))
            .collect();
        if places.is_empty() {
            continue;
        }
        let rows: Vec<usize> = (0..places.len()).rev().collect();
        let logits = session.step(&new, &past, &rows);
        let vocab = full.shape[2];
        prop_assert_eq!(&logits.shape, &vec![rows.len(), vocab]);
        for (row_of, found) in rows.iter().zip(logits.data.chunks(vocab)) {
            let (b, pos) = places[*row_of];
            let what = format!("general, sequence {b}, position {pos}");
            check_row(&m.name, &what, found, row(&full, b, pos))?;
        }
        for (p, t) in past.iter_mut().zip(&new) {
            *p += t.len();
        }
    }
    Ok(())
}

/// A prefill of the first tokens by the general program, then the decode program on its caches:
/// one token a sequence, as long as all sequences have one.
fn check_decode(m: &Steps, requests: &[Request]) -> Result<(), TestCaseError> {
    let full = expected(&m.full, &m.weights, requests);
    let weights = |w: &WeightRef| m.weights.get(w);
    let mut past: Vec<usize> = requests
        .iter()
        .map(|r| r.chunks[0].min(r.tokens.len() - 1))
        .collect();
    let mut session = Session {
        graph: &m.general,
        weights: &weights,
        caches: BTreeMap::new(),
    };
    let prefill: Vec<&[i64]> = requests
        .iter()
        .zip(&past)
        .map(|(r, &p)| &r.tokens[..p])
        .collect();
    if past.iter().any(|&p| p > 0) {
        session.step(&prefill, &vec![0; past.len()], &[0]);
    }
    let mut session = Session {
        graph: &m.decode,
        ..session
    };
    let rows: Vec<usize> = (0..requests.len()).collect();
    while requests.iter().zip(&past).all(|(r, &p)| p < r.tokens.len()) {
        let new: Vec<&[i64]> = requests
            .iter()
            .zip(&past)
            .map(|(r, &p)| &r.tokens[p..=p])
            .collect();
        let logits = session.step(&new, &past, &rows);
        for (b, found) in logits.data.chunks(full.shape[2]).enumerate() {
            let what = format!("decode, sequence {b}, position {}", past[b]);
            check_row(&m.name, &what, found, row(&full, b, past[b]))?;
        }
        for p in &mut past {
            *p += 1;
        }
    }
    Ok(())
}

/// The full program after recognition is the import under other names.
fn check_recognised(m: &Steps, requests: &[Request]) -> Result<(), TestCaseError> {
    let a = expected(&m.full, &m.weights, requests);
    let b = expected(&m.recognised, &m.weights, requests);
    for (found, expected) in b.data.chunks(b.last()).zip(a.data.chunks(a.last())) {
        check_row(&m.name, "full", found, expected)?;
    }
    Ok(())
}

fn check(name: &str, overrides: &[(&str, serde_json::Value)], longest: usize, cases: u32) {
    let m = Steps::new(name, overrides);
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/regressions/stepping.txt"
    );
    let config = ProptestConfig {
        cases,
        max_shrink_iters: 40,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
        ..ProptestConfig::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    TestRunner::new_with_rng(config, rng)
        .run(
            &prop::collection::vec(request(longest), 1..=3),
            |requests| {
                check_general(&m, &requests)?;
                check_decode(&m, &requests)?;
                check_recognised(&m, &requests)
            },
        )
        .unwrap_or_else(|e| panic!("{}: {e}", m.name));
}

#[test]
fn llama() {
    check("llama-rope3-tied", &[], 9, 6);
}

#[test]
fn llama_with_biases_and_one_kv_head_a_query_head() {
    check("llama-mha-bias", &[], 9, 6);
}

#[test]
fn qwen3_with_head_norms() {
    check("qwen3", &[], 9, 6);
}

/// The window is shorter than the sequences, and chunks cross its edge.
#[test]
fn mistral_with_a_window() {
    check("mistral-window", &[("sliding_window", 4.into())], 9, 6);
    check("mistral-window", &[], 17, 4);
}

/// The others once, with a fixed split.
#[test]
fn every_golden_of_the_llama_shape() {
    let requests = [
        Request {
            tokens: vec![17, 250, 3, 99, 4, 4, 120],
            chunks: vec![3, 0, 4],
        },
        Request {
            tokens: vec![200, 1, 77],
            chunks: vec![1, 2],
        },
    ];
    for name in LLAMA_SHAPE {
        let m = Steps::new(name, &[]);
        check_general(&m, &requests).expect("general");
        check_decode(&m, &requests).expect("decode");
        check_recognised(&m, &requests).expect("full");
    }
}
