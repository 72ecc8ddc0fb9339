//! Norms as factors: whatever the model, the rules, the sizes and the kernels that are chosen, a GEMM reads
//! the sums of squares of its own rows, all of them, and what adds to a buffer finds it clear; and a weight
//! has gamma in its columns exactly where the norm before it does without.

mod common;

use common::{UNFUSED, h100, models, plan};
use lathe_codegen::cuda::{
    Arg, Choices, CudaProgram, GemmKey, Ref, Sampling, Sizes, Variant, gemm_keys, lower_gemms,
    lower_tuned,
};
use lathe_codegen::{Operand, Plan, Program, ProgramKind, Programs, ValueId, lower};
use lathe_ir::Operands;
use lathe_ir::ops::gemm;
use lathe_ir::ops::{Embedding, Gemm, Input, Reshape, Weight};
use lathe_ir::{DType, Dim, Epilogue, Graph, NodeId, Op, Prologue, Prov, Real, Sym, WeightRef};
use std::collections::{BTreeMap, BTreeSet};

/// What a buffer holds.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Held {
    /// Sums of the rows of a value.
    Sums(Option<ValueId>, i32),
    /// Zeros for so many rows.
    Clear(i32),
}

/// Follows the buffers through a program's launches; `library`: launches that may use it do. Returns how
/// many launches read sums and how many add to them.
fn follow(program: &Program, p: &CudaProgram, library: bool) -> Result<(usize, usize), String> {
    let mut held: BTreeMap<usize, Held> = BTreeMap::new();
    let (mut reads, mut adds) = (0, 0);
    for l in &p.launches {
        let kernel = &p.kernels[l.kernel];
        let buffer = |i: usize| match &l.args[i] {
            Arg::Ptr(Ref::Work(i)) => Some(*i),
            _ => None,
        };
        let number = |i: usize| match l.args[i] {
            Arg::I32(n) => n,
            _ => panic!("{}: argument {i}", kernel.name),
        };
        let step = &program.steps[l.step];
        let x = match step.operands.iter().next() {
            Some(Operand::Value(v)) => Some(*v),
            _ => None,
        };
        // Where the kernels have their buffers and the number of rows: see their headers.
        let first = match kernel.family {
            "row_sums" => {
                held.insert(buffer(1).unwrap(), Held::Sums(x, number(3)));
                if let Some(clear) = buffer(2) {
                    held.insert(clear, Held::Clear(number(3)));
                }
                continue;
            }
            "skinny" => 7,
            "gemm" => 6,
            _ => continue,
        };
        if library && l.library.is_some() {
            continue;
        }
        let rows = number(first + 3);
        let here = || format!("{} of step {}", kernel.name, l.step);
        if let Some(read) = buffer(first) {
            reads += 1;
            let found = held.get(&read);
            if found != Some(&Held::Sums(x, rows)) {
                return Err(format!("{} reads {x:?} of {rows} rows: {found:?}", here()));
            }
        }
        if let Some(add) = buffer(first + 1) {
            adds += 1;
            let clear = buffer(first + 2).unwrap();
            let found = held.get(&add);
            if !matches!(found, Some(Held::Clear(n)) if *n >= rows) {
                return Err(format!("{} adds to {found:?}", here()));
            }
            if [Some(add), buffer(first)].contains(&Some(clear)) {
                return Err(format!("{} clears what it uses", here()));
            }
            held.insert(add, Held::Sums(step.results[0], rows));
            held.insert(clear, Held::Clear(rows));
        }
    }
    Ok((reads, adds))
}

/// Every choice that could be made by timing, some of them: the `turn`-th of each GEMM's kernels.
fn choices(keys: impl Iterator<Item = GemmKey>, turn: usize) -> Choices {
    let mut choices = Choices::default();
    for (i, key) in keys.enumerate() {
        let mut all = Variant::candidates(&key, 132);
        if key.is_library_gemm() {
            all.push(Variant::CublasLt { algorithm: 0 });
        }
        // A step of 7 meets all kernels of every GEMM, in many combinations.
        choices.insert(key, all[(turn * 7 + i) % all.len()]);
    }
    choices
}

fn sizes(kind: ProgramKind) -> Vec<Sizes> {
    match kind {
        ProgramKind::Decode => [1, 4, 8, 64, 129].map(Sizes::decode).to_vec(),
        _ => [(8, 1, 1), (96, 8, 8), (512, 16, 4), (2048, 64, 64)]
            .map(|(t, b, r)| Sizes { t, b, r })
            .to_vec(),
    }
}

/// The models of all families and sizes that have programs, without some rules.
fn each_plan(mut check: impl FnMut(&str, &[&str], &Plan)) {
    let without: [&[&str]; 5] = [
        &[],
        &["gamma-into-weight"],
        &["gemm-residual"],
        &["norm-into-gemm"],
        UNFUSED,
    ];
    for name in models("golden") {
        for off in without {
            check(&name, off, &plan(&name, DType::BF16, off));
        }
    }
    for name in ["llama-3.2-1b", "qwen2.5-7b", "smollm2-135m"] {
        let name = format!("configs/{name}");
        check(&name, &[], &plan(&name, DType::BF16, &[]));
    }
}

#[test]
fn sums_are_those_of_the_rows_that_are_read() {
    let (mut reads, mut adds) = (0, 0);
    each_plan(|name, off, plan| {
        for program in &plan.programs {
            for sizes in sizes(program.kind) {
                let keys = gemm_keys(plan, program, sizes, Sampling::Greedy, h100()).unwrap();
                for turn in 0..8 {
                    let chosen = match turn {
                        0 => Choices::default(),
                        _ => choices(keys.keys().copied(), turn),
                    };
                    let lowered =
                        lower_tuned(plan, program, sizes, Sampling::GreedyOnly, h100(), &chosen);
                    let check = |p: &CudaProgram, library: bool| {
                        follow(program, p, library).unwrap_or_else(|e| {
                            panic!("{name} without {off:?}, {sizes:?}, choices {turn}: {e}")
                        })
                    };
                    let lowered = lowered.unwrap();
                    for library in [false, true] {
                        let (r, a) = check(&lowered, library);
                        (reads, adds) = (reads + r, adds + a);
                    }
                    // As they are timed: steps without those between them.
                    for steps in keys.values() {
                        let alone = lower_gemms(plan, program, sizes, h100(), &chosen, steps);
                        check(&alone.unwrap(), false);
                    }
                }
            }
        }
    });
    assert!(reads > 1000 && adds > 1000, "{reads} {adds}");
}

#[test]
fn gamma_is_in_a_weight_or_in_the_norm() {
    let mut scaled = 0;
    each_plan(|name, off, plan| {
        let mut readers: BTreeMap<usize, BTreeSet<bool>> = BTreeMap::new();
        for step in plan.programs.iter().flat_map(|p| &p.steps) {
            for (i, operand) in step.operands.enumerate() {
                let Operand::Weight(w) = operand else {
                    continue;
                };
                let bare = matches!(&step.op, Op::Gemm(spec)
                    if matches!(spec.prologue, Prologue::Rms { .. })
                        && step.get(gemm::GAMMA).is_none());
                readers
                    .entry(*w)
                    .or_default()
                    .insert(bare && i == gemm::W.index());
            }
        }
        for (w, bare) in readers {
            let weight = &plan.weights[w];
            let expected = BTreeSet::from([weight.scaled_by.is_some()]);
            assert_eq!(bare, expected, "{name} without {off:?}: weight {w}");
            if let Some(by) = weight.scaled_by {
                scaled += 1;
                let factors = &plan.weights[by];
                assert_eq!(factors.scaled_by, None);
                assert_eq!(factors.ty.dtype, weight.ty.dtype);
                assert_eq!(
                    factors.recipe.rows * factors.recipe.cols,
                    weight.recipe.cols
                );
            }
        }
        // In its place: no weight lies in memory twice.
        let mut tensors: BTreeMap<(&str, usize, usize), usize> = BTreeMap::new();
        for (w, weight) in plan.weights.iter().enumerate() {
            for s in weight
                .recipe
                .segments
                .iter()
                .filter(|_| weight.recipe.cols > 1)
            {
                let at = (s.tensor.as_str(), s.src_rows.start, s.src_cols.start);
                if let Some(other) = tensors.insert(at, w) {
                    panic!("{name} without {off:?}: {at:?} is in weights {other} and {w}");
                }
            }
        }
    });
    assert!(scaled > 100, "{scaled}");
}

/// Of more rows than the GEMV takes, norms are factors of the tensor-core GEMMs: five kernels a layer.
#[test]
fn no_kernel_is_left_for_a_norm() {
    let plan = plan("configs/llama-3.1-8b", DType::BF16, &[]);
    let program = plan.program(ProgramKind::Decode).unwrap();
    for rows in [8, 64, 512] {
        let sizes = Sizes::decode(rows);
        let none = Choices::default();
        let p = lower_tuned(&plan, program, sizes, Sampling::GreedyOnly, h100(), &none);
        let p = p.unwrap();
        // Embedding, its sums, head and sampling besides.
        assert_eq!(p.launches.len(), 32 * 5 + 4, "{rows} rows");
        // Two norms a layer and the head's; the embedding adds nothing, the head has the last sums.
        assert_eq!(follow(program, &p, false), Ok((65, 64)), "{rows} rows");
    }
}

/// GEMMs one after the other, and the `eps` of their norms.
struct Gemms(Graph, f64);

impl Gemms {
    fn new() -> (Gemms, NodeId) {
        let mut g = Gemms(Graph::new("several readers"), 1e-6);
        let tokens = Input {
            name: "step.tokens".into(),
            dtype: DType::I32,
            shape: vec![Dim::from(Sym::T)],
        };
        let tokens = g.add(tokens, []);
        let table = g.weight(64, 64);
        let x = g.add(Embedding, [table, tokens]);
        (g, x)
    }

    fn add(&mut self, op: impl Into<Op>, inputs: impl Into<Operands<NodeId>>) -> NodeId {
        let at = Prov::global(&format!("n{}", self.0.nodes().len()));
        self.0.add(op, inputs, &at).unwrap()
    }

    fn weight(&mut self, n: i64, k: i64) -> NodeId {
        let weight = WeightRef {
            name: format!("w{}", self.0.nodes().len()),
            shape: vec![n, k],
        };
        let dtype = DType::BF16;
        self.add(Weight { weight, dtype }, [])
    }

    /// `norm(x) w`, the norm as factors.
    fn norm(&mut self, x: NodeId, n: i64, k: i64) -> NodeId {
        let w = self.weight(n, k);
        let spec = Gemm {
            prologue: Prologue::Rms {
                eps: Real::new(self.1),
            },
            epilogue: Epilogue::None,
        };
        self.add(spec, [x, w])
    }

    /// `x w + residual`.
    fn residual(&mut self, x: NodeId, residual: NodeId) -> NodeId {
        let w = self.weight(64, 64);
        let spec = Gemm {
            prologue: Prologue::None,
            epilogue: Epilogue::Residual,
        };
        self.add(spec, Operands::from([x, w]).with(gemm::RESIDUAL, residual))
    }

    /// Reads and additions of a decode step of 8 rows, and its kernels of sums.
    fn followed(mut self, results: &[NodeId]) -> (usize, usize, usize) {
        for (i, &id) in results.iter().enumerate() {
            self.0.set_output(&format!("y{i}"), id);
        }
        let graphs = Programs {
            decode: Some(&self.0),
            general: None,
            full: None,
        };
        let plan = lower("several readers", DType::BF16, &graphs).unwrap();
        let (program, none) = (&plan.programs[0], Choices::default());
        let sizes = Sizes::decode(8);
        let p = lower_tuned(&plan, program, sizes, Sampling::Greedy, h100(), &none).unwrap();
        let (reads, adds) = follow(program, &p, false).unwrap();
        let own = |l: &&lathe_codegen::cuda::Launch| p.kernels[l.kernel].family == "row_sums";
        (reads, adds, p.launches.iter().filter(own).count())
    }
}

/// Sums stay as long as somebody may read them, also where another value gets sums between.
#[test]
fn a_value_may_have_several_readers() {
    let (mut g, x) = Gemms::new();
    let q = g.norm(x, 64, 64);
    let o = g.residual(q, x);
    let late = g.norm(x, 64, 64);
    let p = g.norm(o, 64, 64);
    // The sums of `o` cannot be added up: those of `x` are still to be read.
    assert_eq!(g.followed(&[late, p]), (3, 0, 2));

    let (mut g, x) = Gemms::new();
    let q = g.norm(x, 64, 64);
    let o = g.residual(q, x);
    let p = g.norm(o, 64, 64);
    let late = g.norm(x, 64, 64);
    let last = g.residual(p, late);
    let y = g.norm(last, 64, 64);
    // And are made in a third buffer while they wait; `last` has both of its own.
    assert_eq!(g.followed(&[y]), (4, 1, 2));
}

/// A view with other rows has other sums.
#[test]
fn sums_are_of_rows_and_not_of_a_value() {
    let (mut g, x) = Gemms::new();
    let q = g.norm(x, 128, 64);
    let halves = vec![Dim::from(Sym::T), Dim::new(2), Dim::new(64)];
    let wide = g.norm(q, 64, 128);
    let halves = g.add(Reshape(halves), [q]);
    let narrow = g.norm(halves, 64, 64);
    assert_eq!(g.followed(&[wide, narrow]), (3, 0, 3));
}

/// Fixed-point sums are too coarse for a tiny `eps`: the norm is then a kernel, and nothing is added up for it.
#[test]
fn a_tiny_eps_is_left_to_the_norm() {
    for (eps, expected) in [(1e-6, (2, 1, 1)), (1e-8, (0, 0, 0))] {
        let (mut g, x) = Gemms::new();
        g.1 = eps;
        let q = g.norm(x, 64, 64);
        let o = g.residual(q, x);
        let y = g.norm(o, 64, 64);
        assert_eq!(g.followed(&[y]), expected, "{eps}");
    }
}
