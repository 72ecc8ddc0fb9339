//! Chains equal what they were made of, whatever they were made of; what must not join does not.

mod common;

use common::{Noise, Session, Weights, distance, model, random_input};
use lathe_ir::interp::{Interp, Value};
use lathe_ir::ops::{Const, Input, Linear, Reduce, Reshape, RmsNorm, Silu, Softmax, Weight, Where};
use lathe_ir::text::{parse, print};
use lathe_ir::{
    BinaryFn, DType, Dim, Graph, NodeId, Op, Prov, Real, ReduceFn, Sym, SymEnv, UnaryFn, WeightRef,
};
use lathe_passes::chains::{NAME, fuse_chains};
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{PassConfig, compile};
use std::collections::BTreeMap;

const T: Dim = Dim::sym(Sym::T);

struct Random {
    noise: Noise,
    graph: Graph,
    /// Values by shape: `[T,W]`, `[T,1]`, `[W]`, `[]`.
    values: [Vec<NodeId>; 4],
    width: i64,
}

impl Random {
    fn add(&mut self, op: impl Into<Op>, inputs: &[NodeId]) -> NodeId {
        self.graph
            .add(op, inputs, &Prov::global("random"))
            .expect("well typed")
    }

    fn input(&mut self, name: &str, shape: &[Dim]) -> NodeId {
        let op = Op::Input(Input {
            name: name.into(),
            dtype: DType::F32,
            shape: shape.to_vec(),
        });
        self.add(op, &[])
    }

    fn pick(&mut self, kind: usize) -> NodeId {
        let n = self.values[kind].len();
        self.values[kind][self.noise.below(n)]
    }

    /// One more operation, of those that join and of those that do not.
    fn grow(&mut self) {
        let w = self.width;
        let full = self.pick(0);
        let keep = |f| {
            Op::Reduce(Reduce {
                f,
                axis: 1,
                keepdim: true,
            })
        };
        let (kind, id) = match self.noise.below(16) {
            0..=2 => {
                let all = [
                    UnaryFn::Neg,
                    UnaryFn::Tanh,
                    UnaryFn::Relu,
                    UnaryFn::Erf,
                    UnaryFn::Sigmoid,
                    UnaryFn::Abs,
                ];
                let f = all[self.noise.below(all.len())];
                (0, self.add(f, &[full]))
            }
            3..=7 => {
                let all = [
                    BinaryFn::Add,
                    BinaryFn::Sub,
                    BinaryFn::Mul,
                    BinaryFn::Maximum,
                    BinaryFn::Minimum,
                ];
                let f = all[self.noise.below(all.len())];
                let kind = self.noise.below(4);
                let other = self.pick(kind);
                let (a, b) = if self.noise.below(2) == 0 {
                    (full, other)
                } else {
                    (other, full)
                };
                (0, self.add(f, &[a, b]))
            }
            8 => {
                let f = [ReduceFn::Sum, ReduceFn::Mean, ReduceFn::Amax][self.noise.below(3)];
                (1, self.add(keep(f), &[full]))
            }
            9 => {
                let (a, b) = (self.pick(1), self.pick(1));
                (1, self.add(BinaryFn::Add, &[a, b]))
            }
            10 => {
                let gamma = self.pick(2);
                (
                    0,
                    self.add(
                        RmsNorm {
                            eps: Real::new(1e-5),
                        },
                        &[full, gamma],
                    ),
                )
            }
            11 => (0, self.add(Softmax, &[full])),
            12 => (0, self.add(Silu, &[full])),
            // What does not join: a product, a cut, a comparison, a change of the domain.
            13 => {
                let name = format!("w{}", self.graph.nodes().len());
                let shape = vec![w, w];
                let weight = WeightRef { name, shape };
                let m = self.add(
                    Weight {
                        weight,
                        dtype: DType::F32,
                    },
                    &[],
                );
                (0, self.add(Linear, &[full, m]))
            }
            14 => {
                let (a, b) = (self.pick(0), self.pick(0));
                let c = self.add(BinaryFn::Lt, &[a, b]);
                (0, self.add(Where, &[c, a, b]))
            }
            _ => {
                let flat = self.add(Reshape(vec![T, Dim::new(1), Dim::new(w)]), &[full]);
                let y = self.add(UnaryFn::Neg, &[flat]);
                (0, self.add(Reshape(vec![T, Dim::new(w)]), &[y]))
            }
        };
        self.values[kind].push(id);
    }
}

fn random(seed: u64) -> Graph {
    let mut noise = Noise::new(seed, "chains");
    let width = [1, 3, 8, 17][noise.below(4)];
    let mut r = Random {
        noise,
        graph: Graph::new("random"),
        values: Default::default(),
        width,
    };
    let w = Dim::new(width);
    for (kind, shape) in [vec![T, w], vec![T, Dim::new(1)], vec![w]]
        .into_iter()
        .enumerate()
    {
        for i in 0..2 {
            let id = r.input(&format!("x{kind}{i}"), &shape);
            r.values[kind].push(id);
        }
    }
    for c in [0.5, 3.0] {
        let id = r.add(
            Const {
                value: Real::new(c),
                dtype: DType::F32,
            },
            &[],
        );
        r.values[3].push(id);
    }
    for _ in 0..10 + r.noise.below(40) {
        r.grow();
    }
    let mut graph = r.graph;
    for (i, kind) in [0, 0, 0, 1].into_iter().enumerate() {
        let n = r.values[kind].len();
        let id = match i {
            0 => r.values[0][n - 1],
            _ => r.values[kind][r.noise.below(n)],
        };
        graph.set_output(&format!("y{i}"), id);
    }
    graph.without_dead()
}

fn run(g: &Graph, seed: u64) -> Vec<(String, Value<f64>)> {
    let env = SymEnv::new(&[(Sym::T, 5)]);
    let weights = |w: &WeightRef| common::random_weight(seed, w);
    let mut interp = Interp::new(env, &weights);
    for node in g.nodes() {
        if let Op::Input(Input { name, dtype, shape }) = &node.op {
            interp = interp.with_input(name, random_input(seed, name, *dtype, shape, &env, 4));
        }
    }
    interp.run(g).expect("runs").into_iter().collect()
}

#[test]
fn random_programs_keep_their_results() {
    let (mut chains, mut tuples, mut reductions) = (0, 0, 0);
    for seed in 0..400 {
        let g = random(seed);
        let fused = fuse_chains(&g).expect("well typed");
        assert_eq!(lathe_ir::verify(&fused), [], "seed {seed}");
        assert_eq!(
            parse(&print(&fused)).expect("reads back"),
            fused,
            "seed {seed}"
        );
        assert_eq!(fuse_chains(&g).expect("well typed"), fused);
        for ((name, a), (_, b)) in run(&g, seed).iter().zip(run(&fused, seed)) {
            let d = distance(a, &b);
            assert!(
                d <= 1e-12,
                "seed {seed}: {name} differs by {d:.2e}\n{}\n{}",
                print(&g),
                print(&fused)
            );
        }
        for n in fused.nodes() {
            if let Op::Chain(c) = &n.op {
                chains += 1;
                tuples += usize::from(c.results.len() > 1);
                reductions += usize::from(c.reduces());
            }
        }
    }
    assert!(
        chains > 400 && tuples > 100 && reductions > 100,
        "{chains} {tuples} {reductions}"
    );
}

fn fused(text: &str) -> Vec<String> {
    let g = parse(text).expect("a program");
    let out = fuse_chains(&g).expect("well typed");
    let names = out.nodes().iter().filter(|n| !n.op.is_leaf());
    names.map(|n| n.op.name().to_string()).collect()
}

#[test]
fn near_misses_stay_apart() {
    let joins = r#"graph "joins" {
      %x = input {name="x"} : f32[T,8]
      %m = mean %x {axis=1, keepdim=true} : f32[T,1]
      %y = sub %x, %m : f32[T,8]
      return y=%y
    }"#;
    assert_eq!(fused(joins), ["chain"]);
    let apart = [
        // Something between the two needs the first and is needed by the second.
        (
            r#"graph "g" {
              %x = input {name="x"} : f32[T,8]
              %w = weight {name="w"} : f32[8,8]
              %a = neg %x : f32[T,8]
              %l = linear x=%a, w=%w : f32[T,8]
              %y = add %a, %l : f32[T,8]
              return y=%y
            }"#,
            vec!["neg", "linear", "add"],
        ),
        // A reduction of another axis.
        (
            r#"graph "g" {
              %x = input {name="x"} : f32[4,8]
              %a = neg %x : f32[4,8]
              %y = sum %a {axis=0, keepdim=true} : f32[1,8]
              return y=%y
            }"#,
            vec!["neg", "sum"],
        ),
        // Integers, and comparisons of floats.
        (
            r#"graph "g" {
              %x = input {name="x"} : i64[T,8]
              %z = input {name="z"} : f32[T,8]
              %a = add %x, %x : i64[T,8]
              %b = mul %a, %x : i64[T,8]
              %c = neg %z : f32[T,8]
              %d = lt %c, %z : bool[T,8]
              return b=%b, d=%d
            }"#,
            vec!["add", "mul", "neg", "lt"],
        ),
        // An operand that is broadcast in the middle.
        (
            r#"graph "g" {
              %x = input {name="x"} : f32[T,4,8]
              %c = input {name="c"} : f32[T,1,8]
              %a = neg %x : f32[T,4,8]
              %y = mul %a, %c : f32[T,4,8]
              return y=%y
            }"#,
            vec!["neg", "mul"],
        ),
        // Another domain: the same elements in rows of another length.
        (
            r#"graph "g" {
              %x = input {name="x"} : f32[T,32]
              %a = neg %x : f32[T,32]
              %r = reshape %a : f32[T,4,8]
              %y = tanh %r : f32[T,4,8]
              return y=%y
            }"#,
            vec!["neg", "reshape", "tanh"],
        ),
        // Weights alone are computed once, not in a step.
        (
            r#"graph "g" {
              %x = input {name="x"} : f32[T,8]
              %w = weight {name="w"} : bf16[8]
              %f = cast %w : f32[8]
              %one = const {value=1.0} : f32[]
              %g = add %one, %f : f32[8]
              %y = rmsnorm x=%x, gamma=%g {eps=1e-6} : f32[T,8]
              return y=%y
            }"#,
            vec!["cast", "add", "rmsnorm"],
        ),
        // A row longer than a block of threads reduces.
        (
            r#"graph "g" {
              %x = input {name="x"} : f32[T,20000]
              %a = neg %x : f32[T,20000]
              %y = softmax %a : f32[T,20000]
              return y=%y
            }"#,
            vec!["neg", "softmax"],
        ),
    ];
    for (text, want) in apart {
        assert_eq!(fused(text), want, "{text}");
    }
}

/// Two chains that each need the other could not run.
#[test]
fn chains_do_not_need_one_another() {
    let text = r#"graph "g" {
      %x = input {name="x"} : f32[T,8]
      %z = input {name="z"} : f32[T,4]
      %w = weight {name="w"} : f32[4,8]
      %v = weight {name="v"} : f32[8,4]
      %a = neg %x : f32[T,8]
      %b = neg %z : f32[T,4]
      %la = linear x=%a, w=%w : f32[T,4]
      %lb = linear x=%b, w=%v : f32[T,8]
      %c = add %b, %la : f32[T,4]
      %d = add %a, %lb : f32[T,8]
      return c=%c, d=%d
    }"#;
    let g = parse(text).expect("a program");
    let out = fuse_chains(&g).expect("well typed");
    // One of the two pairs is a chain; then the other cannot be.
    assert_eq!(out.count("chain"), 1, "{}", print(&out));
    for ((name, a), (_, b)) in run(&g, 1).iter().zip(run(&out, 1)) {
        assert!(distance(a, &b) <= 1e-12, "{name}");
    }
}

/// The families with pointwise operations that no kernel takes: chains change no result.
#[test]
fn models_keep_their_logits() {
    for golden in ["gemma2", "phi", "gpt2", "falcon"] {
        let m = model(golden, DType::F32);
        let on = compile(&m, &PassConfig::new(DeviceModel::H100)).expect("compiles");
        let off = PassConfig::new(DeviceModel::H100)
            .disable(&[NAME])
            .expect("a pass");
        let off = compile(&m, &off).expect("compiles");
        let weights = Weights::golden(golden);
        let weights = |w: &WeightRef| weights.get(w);
        for (a, b) in [
            (&on.steps.decode, &off.steps.decode),
            (&on.steps.general, &off.steps.general),
        ] {
            let (Some(a), Some(b)) = (a, b) else {
                panic!("{golden}: no step program")
            };
            assert!(a.count("chain") > 0 && b.count("chain") == 0, "{golden}");
            let logits = |g: &Graph| {
                let mut s = Session {
                    graph: g,
                    weights: &weights,
                    caches: BTreeMap::new(),
                };
                (0..3)
                    .flat_map(|p| s.step(&[&[7 + p as i64], &[11]], &[p, p], &[0, 1]).data)
                    .collect::<Vec<_>>()
            };
            let (x, y) = (logits(a), logits(b));
            let d = x
                .iter()
                .zip(&y)
                .map(|(x, y)| (x - y).abs())
                .fold(0.0, f64::max);
            assert!(d <= 1e-9, "{golden}: {d:.2e}");
        }
    }
    let fuse = PassConfig::new(DeviceModel::H100)
        .disable(&["fuse"])
        .expect("a stage");
    assert!(!fuse.makes_chains());
}
