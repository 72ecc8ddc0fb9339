//! Every operation against hand-computed values or an independently written reference.

#[path = "common/values.rs"]
mod values;

use lathe_ir::interp::{Interp, Value};
use lathe_ir::ops::{
    AddRms, Angles, Cast, Concat, Const, Embedding, Expand, Gemm, Get, Input, Iota, Linear, Matmul,
    Pack, Permute, Proj, Reduce, RepeatKv, Reshape, RmsNorm, Rope, Sample, Select, Silu, Slice,
    Softmax, SwiGlu, Table, Weight, Where, gemm,
};
use lathe_ir::*;
use values::*;

#[test]
fn unary_functions() {
    let x = f(&[3], &[0.5, 1.0, 2.0]);
    type Reference = fn(f64) -> f64;
    let cases: [(UnaryFn, Reference); 11] = [
        (UnaryFn::Neg, |v| -v),
        (UnaryFn::Abs, f64::abs),
        (UnaryFn::Exp, f64::exp),
        (UnaryFn::Log, f64::ln),
        (UnaryFn::Sqrt, f64::sqrt),
        (UnaryFn::Rsqrt, |v| v.powf(-0.5)),
        (UnaryFn::Sin, f64::sin),
        (UnaryFn::Cos, f64::cos),
        (UnaryFn::Tanh, |v| 1.0 - 2.0 / ((2.0 * v).exp() + 1.0)),
        (UnaryFn::Sigmoid, |v| v.exp() / (1.0 + v.exp())),
        (UnaryFn::Relu, |v| if v > 0.0 { v } else { 0.0 }),
    ];
    for (name, reference) in cases {
        let want: Vec<f64> = data(&x).iter().map(|&v| reference(v)).collect();
        close(&eval(name, [&x]), &f(&[3], &want));
    }
    let y = eval(UnaryFn::Erf, [&x]);
    assert!((data(&y)[1] - 0.842_700_792_949_714_9).abs() < 1e-14);
    assert_eq!(
        eval(UnaryFn::Relu, [&ints(&[2], &[-3, 4])]),
        ints(&[2], &[0, 4])
    );
    assert_eq!(
        eval(UnaryFn::Not, [&bools(&[2], &[true, false])]),
        bools(&[2], &[false, true])
    );
}

#[test]
fn binary_functions_broadcast() {
    let a = f(&[2, 1, 2], &[1.0, 2.0, 3.0, 4.0]);
    let b = f(&[3, 1], &[10.0, 20.0, 30.0]);
    let sum = eval(BinaryFn::Add, [&a, &b]);
    let want = [
        11.0, 12.0, 21.0, 22.0, 31.0, 32.0, 13.0, 14.0, 23.0, 24.0, 33.0, 34.0,
    ];
    assert_eq!(sum, f(&[2, 3, 2], &want));
    let x = f(&[4], &[1.0, 5.0, -2.0, 3.0]);
    let y = f(&[4], &[2.0, 5.0, 3.0, 0.5]);
    let float = |op| data(&eval(op, [&x, &y])).to_vec();
    assert_eq!(float(BinaryFn::Sub), [-1.0, 0.0, -5.0, 2.5]);
    assert_eq!(float(BinaryFn::Mul), [2.0, 25.0, -6.0, 1.5]);
    assert_eq!(float(BinaryFn::Div), [0.5, 1.0, -2.0 / 3.0, 6.0]);
    assert_eq!(float(BinaryFn::Pow)[2], -8.0);
    assert_eq!(float(BinaryFn::Maximum), [2.0, 5.0, 3.0, 3.0]);
    assert_eq!(float(BinaryFn::Minimum), [1.0, 5.0, -2.0, 0.5]);
    let cmp = |op| eval(op, [&x, &y]);
    assert_eq!(cmp(BinaryFn::Eq), bools(&[4], &[false, true, false, false]));
    assert_eq!(cmp(BinaryFn::Ne), bools(&[4], &[true, false, true, true]));
    assert_eq!(cmp(BinaryFn::Lt), bools(&[4], &[true, false, true, false]));
    assert_eq!(cmp(BinaryFn::Le), bools(&[4], &[true, true, true, false]));
    assert_eq!(cmp(BinaryFn::Gt), bools(&[4], &[false, false, false, true]));
    assert_eq!(cmp(BinaryFn::Ge), bools(&[4], &[false, true, false, true]));
    let (p, q) = (bools(&[2], &[true, true]), bools(&[2], &[true, false]));
    assert_eq!(eval(BinaryFn::And, [&p, &q]), q);
    assert_eq!(eval(BinaryFn::Or, [&p, &q]), p);
    assert_eq!(
        eval(BinaryFn::Sub, [&ints(&[2], &[5, 6]), &ints(&[], &[1])]),
        ints(&[2], &[4, 5])
    );
}

#[test]
fn where_and_casts() {
    let c = bools(&[2, 1], &[true, false]);
    let y = eval(Where, [&c, &f(&[2], &[1.0, 2.0]), &f(&[], &[9.0])]);
    assert_eq!(y, f(&[2, 2], &[1.0, 2.0, 9.0, 9.0]));
    let x = f(&[3], &[-1.5, 0.0, 2.9]);
    assert_eq!(eval(Cast(DType::I64), [&x]), ints(&[3], &[-1, 0, 2]));
    assert_eq!(
        eval(Cast(DType::Bool), [&x]),
        bools(&[3], &[true, false, true])
    );
    assert_eq!(eval(Cast(DType::BF16), [&x]), x);
    assert_eq!(
        eval(Cast(DType::F32), [&bools(&[2], &[true, false])]),
        f(&[2], &[1.0, 0.0])
    );
    assert_eq!(
        eval(Cast(DType::I32), [&ints(&[1], &[(1 << 32) + 5])]),
        ints(&[1], &[5])
    );
}

#[test]
fn reductions() {
    let x = f(&[2, 3], &[1.0, 5.0, 5.0, 4.0, 0.0, -1.0]);
    let red = |f, axis, keepdim| eval(Reduce { f, axis, keepdim }, [&x]);
    assert_eq!(red(ReduceFn::Sum, 1, true), f(&[2, 1], &[11.0, 3.0]));
    assert_eq!(red(ReduceFn::Sum, 0, false), f(&[3], &[5.0, 5.0, 4.0]));
    assert_eq!(red(ReduceFn::Mean, 1, false), f(&[2], &[11.0 / 3.0, 1.0]));
    assert_eq!(red(ReduceFn::Mean, 0, true), f(&[1, 3], &[2.5, 2.5, 2.0]));
    assert_eq!(red(ReduceFn::Amax, 0, true), f(&[1, 3], &[4.0, 5.0, 5.0]));
    assert_eq!(red(ReduceFn::Argmax, 1, false), ints(&[2], &[1, 0]));
}

#[test]
fn matmul_broadcasts_leading_axes() {
    let (a, b) = (rand(&[2, 1, 3, 5], 1), rand(&[4, 5, 7], 2));
    let y = eval(Matmul, [&a, &b]);
    let mut want = Vec::new();
    for i in 0..2 {
        for j in 0..4 {
            for r in 0..3 {
                for c in 0..7 {
                    want.push(
                        (0..5)
                            .map(|k| data(&a)[(i * 3 + r) * 5 + k] * data(&b)[(j * 5 + k) * 7 + c])
                            .sum(),
                    );
                }
            }
        }
    }
    close(&y, &f(&[2, 4, 3, 7], &want));
}

#[test]
fn linear_is_matmul_with_the_transposed_weight() {
    let (x, w) = (rand(&[2, 37, 45], 3), rand(&[19, 45], 4));
    let wt = eval(Permute(vec![1, 0]), [&w]);
    close(&eval(Linear, [&x, &w]), &eval(Matmul, [&x, &wt]));
}

#[test]
fn movement() {
    let x = f(&[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let dims = |s: &[i64]| s.iter().map(|&n| Dim::new(n)).collect::<Vec<_>>();
    assert_eq!(
        eval(Permute(vec![1, 0]), [&x]),
        f(&[3, 2], &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0])
    );
    let y = f(&[1, 2, 1, 2], &[0.0, 1.0, 2.0, 3.0]);
    assert_eq!(
        eval(Permute(vec![3, 0, 2, 1]), [&y]),
        f(&[2, 1, 1, 2], &[0.0, 2.0, 1.0, 3.0])
    );
    assert_eq!(
        eval(Reshape(dims(&[3, 2])), [&x]),
        f(&[3, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    );
    assert_eq!(
        eval(Expand(dims(&[2, 2])), [&f(&[2, 1], &[7.0, 8.0])]),
        f(&[2, 2], &[7.0, 7.0, 8.0, 8.0])
    );
    let slice = |axis, start, end| eval(Slice { axis, start, end }, [&x]);
    assert_eq!(slice(1, 1, 3), f(&[2, 2], &[1.0, 2.0, 4.0, 5.0]));
    assert_eq!(slice(0, 1, 2), f(&[1, 3], &[3.0, 4.0, 5.0]));
    assert_eq!(
        eval(Concat { axis: 1 }, [&f(&[2, 1], &[8.0, 9.0]), &x]),
        f(&[2, 4], &[8.0, 0.0, 1.0, 2.0, 9.0, 3.0, 4.0, 5.0])
    );
    let rows = ints(&[2, 2], &[1, 0, 1, 1]);
    let taken = eval(Embedding, [&x, &rows]);
    assert_eq!(taken.shape(), Some(&[2, 2, 3][..]));
    assert_eq!(data(&taken)[..6], [3.0, 4.0, 5.0, 0.0, 1.0, 2.0]);
    assert_eq!(
        eval(Select, [&x, &ints(&[1], &[1])]),
        f(&[1, 3], &[3.0, 4.0, 5.0])
    );
    let heads = f(&[1, 2, 1, 2], &[1.0, 2.0, 3.0, 4.0]);
    assert_eq!(
        eval(RepeatKv { groups: 2 }, [&heads]),
        f(&[1, 4, 1, 2], &[1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0])
    );
    let mut state = Interp::new(SymEnv::default(), &no_weights);
    let bad = ints(&[1], &[2]);
    let ty = Type::tensor(DType::F32, dims(&[1, 3]));
    let e = interp::eval_op(&Op::Select(Select), [&x, &bad], &ty, &mut state).unwrap_err();
    assert!(e.to_string().contains("row 2"), "{e}");
}

#[test]
fn leaves() {
    let env = SymEnv::new(&[(Sym::S, 3)]);
    let weights = |w: &WeightRef| Ok(vec![0.5; w.shape.iter().product::<i64>() as usize]);
    let mut state = Interp::new(env, &weights).with_input("ids", ints(&[2], &[1, 2]));
    let mut leaf = |op: Op| {
        let ty = infer(&op, []).expect("well typed");
        interp::eval_op(&op, [], &ty, &mut state)
    };
    let iota = |dtype| {
        Op::Iota(Iota {
            len: Dim::sym(Sym::S),
            dtype,
        })
    };
    assert_eq!(leaf(iota(DType::I64)), Ok(ints(&[3], &[0, 1, 2])));
    assert_eq!(leaf(iota(DType::F32)), Ok(f(&[3], &[0.0, 1.0, 2.0])));
    let value = Real::new(2.5);
    assert_eq!(
        leaf(Op::Const(Const {
            value,
            dtype: DType::F32
        })),
        Ok(f(&[], &[2.5]))
    );
    let table = Op::Table(Table {
        name: "t".into(),
        data: vec![value, Real::new(1.0)],
    });
    assert_eq!(leaf(table), Ok(f(&[2], &[2.5, 1.0])));
    let input = |name: &str, n: i64| {
        Op::Input(Input {
            name: name.into(),
            dtype: DType::I64,
            shape: vec![Dim::new(n)],
        })
    };
    assert_eq!(leaf(input("ids", 2)), Ok(ints(&[2], &[1, 2])));
    assert!(
        leaf(input("ids", 3))
            .unwrap_err()
            .reason
            .contains("expected [3]")
    );
    assert!(
        leaf(input("absent", 3))
            .unwrap_err()
            .reason
            .contains("'absent'")
    );
    let weight = WeightRef {
        name: "w".into(),
        shape: vec![2, 2],
    };
    assert_eq!(
        leaf(Op::Weight(Weight {
            weight,
            dtype: DType::F32
        })),
        Ok(f(&[2, 2], &[0.5; 4]))
    );
}

fn silu(v: f64) -> f64 {
    v / (1.0 + (-v).exp())
}

#[test]
fn softmax_norms_and_gates() {
    let x = f(&[2, 2], &[0.0, 3_f64.ln(), 5.0, 5.0]);
    close(&eval(Softmax, [&x]), &f(&[2, 2], &[0.25, 0.75, 0.5, 0.5]));
    let eps = Real::new(0.5);
    let (x, d, g) = (rand(&[3, 5], 5), rand(&[3, 5], 6), rand(&[5], 7));
    let norm = |v: &V| {
        f(
            &[3, 5],
            &data(v)
                .chunks(5)
                .flat_map(|r| rms(r, data(&g), 0.5))
                .collect::<Vec<_>>(),
        )
    };
    close(&eval(RmsNorm { eps }, [&x, &g]), &norm(&x));
    let sum = eval(BinaryFn::Add, [&x, &d]);
    let Value::Tuple(both) = eval(AddRms { eps }, [&x, &d, &g]) else {
        panic!("addrms returns a tuple")
    };
    close(&both[0], &sum);
    close(&both[1], &norm(&sum));
    assert_eq!(eval(Get(1), [&Value::Tuple(both.clone())]), both[1]);
    let want: Vec<f64> = data(&x).iter().map(|&v| silu(v)).collect();
    close(&eval(Silu, [&x]), &f(&[3, 5], &want));
    let want: Vec<f64> = data(&x)
        .iter()
        .zip(data(&d))
        .map(|(&g, u)| silu(g) * u)
        .collect();
    close(&eval(SwiGlu, [&x, &d]), &f(&[3, 5], &want));
}

#[test]
fn rotary_embedding() {
    let freq = f(&[2], &[1.0, 0.1]);
    let pos = ints(&[3, 1], &[0, 4, 7]);
    close(
        &eval(Angles, [&ints(&[2], &[3, 5]), &freq]),
        &f(&[2, 2], &[3.0, 0.3, 5.0, 0.5]),
    );
    let x = rand(&[3, 2, 4], 8);
    let spec = Rope {
        scaling: Real::new(1.25),
    };
    let want: Vec<f64> = data(&x)
        .chunks(4)
        .enumerate()
        .flat_map(|(r, row)| hf_rope(row, [0.0, 4.0, 7.0][r / 2], data(&freq), 1.25))
        .collect();
    close(&eval(spec, [&x, &pos, &freq]), &f(&[3, 2, 4], &want));
}

#[test]
fn projection_into_heads() {
    let (x, w, b, g) = (
        rand(&[3, 6], 9),
        rand(&[8, 6], 10),
        rand(&[8], 11),
        rand(&[4], 12),
    );
    let freq = f(&[2], &[1.0, 0.3]);
    let spec = Proj {
        heads: 2,
        head_dim: 4,
        head_norm: Some(Real::new(0.25)),
        rope: Some(Rope {
            scaling: Real::new(1.0),
        }),
    };
    let y = eval(Linear, [&x, &w]);
    let y = eval(BinaryFn::Add, [&y, &b]);
    let want: Vec<f64> = data(&y)
        .chunks(4)
        .enumerate()
        .flat_map(|(r, row)| {
            hf_rope(
                &rms(row, data(&g), 0.25),
                [2.0, 3.0, 9.0][r / 2],
                data(&freq),
                1.0,
            )
        })
        .collect();
    let pos = ints(&[3], &[2, 3, 9]);
    let y = eval(spec, [&x, &w, &b, &g, &pos, &freq]);
    close(&y, &f(&[3, 2, 4], &want));
    let pos = ints(&[3, 1], &[2, 3, 9]);
    close(&eval(spec, [&x, &w, &b, &g, &pos, &freq]), &y);
    let plain = Proj {
        head_norm: None,
        rope: None,
        ..spec
    };
    let y = eval(plain, [&x, &w]);
    assert_eq!(data(&y), data(&eval(Linear, [&x, &w])));
}

#[test]
fn packing_orders_rows() {
    let gate = f(&[8, 1], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    let up = f(&[8, 1], &[10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.0]);
    let y = eval(Pack::GateUp, [&gate, &up]);
    assert_eq!(data(&y)[6..10], [6.0, 7.0, 10.0, 11.0]);
    let head = f(&[32], &(0..32).map(f64::from).collect::<Vec<_>>());
    let y = eval(Pack::Head { head_dim: 32 }, [&head]);
    assert_eq!(data(&y)[6..10], [6.0, 7.0, 16.0, 17.0]);
    assert_eq!(data(&y)[15..18], [23.0, 8.0, 9.0]);
}

#[test]
fn gemm_prologues_and_epilogues() {
    let (x, w, b) = (rand(&[3, 6], 21), rand(&[32, 6], 22), rand(&[32], 23));
    let (r, g, d) = (rand(&[3, 32], 24), rand(&[6], 25), rand(&[3, 6], 26));
    let xw = Operands::from([&x, &w]);
    let add = |a: &V, b: &V| eval(BinaryFn::Add, [a, b]);
    let plain = add(&eval(Linear, [&x, &w]), &b);
    let gemm = |prologue, epilogue, ins: Operands<&V>| eval(Gemm { prologue, epilogue }, ins);
    close(
        &gemm(
            Prologue::None,
            Epilogue::None,
            xw.clone().with(gemm::BIAS, &b),
        ),
        &plain,
    );
    close(
        &gemm(
            Prologue::None,
            Epilogue::Residual,
            xw.clone().with(gemm::BIAS, &b).with(gemm::RESIDUAL, &r),
        ),
        &add(&plain, &r),
    );
    let eps = Real::new(0.125);
    let h = eval(RmsNorm { eps }, [&x, &g]);
    let hw = eval(Linear, [&h, &w]);
    close(
        &gemm(
            Prologue::Rms { eps },
            Epilogue::None,
            xw.clone().with(gemm::GAMMA, &g),
        ),
        &hw,
    );
    // Without gamma the weight's columns are multiplied by it.
    let scaled = eval(BinaryFn::Mul, [&w, &g]);
    close(
        &gemm(
            Prologue::Rms { eps },
            Epilogue::None,
            Operands::from([&x, &scaled]),
        ),
        &hw,
    );
    // Feature 8b+j comes from packed rows 16b+j (gate) and 16b+8+j (up).
    let want: Vec<f64> = data(&hw)
        .chunks(32)
        .flat_map(|row| {
            (0..16).map(move |i| {
                let at = i / 8 * 16 + i % 8;
                silu(row[at]) * row[at + 8]
            })
        })
        .collect();
    close(
        &gemm(
            Prologue::Rms { eps },
            Epilogue::SwiGlu,
            xw.clone().with(gemm::GAMMA, &g),
        ),
        &f(&[3, 16], &want),
    );
    let sum = add(&x, &d);
    let h = eval(RmsNorm { eps }, [&sum, &g]);
    let Value::Tuple(y) = gemm(
        Prologue::AddRms { eps },
        Epilogue::None,
        xw.with(gemm::GAMMA, &g).with(gemm::DELTA, &d),
    ) else {
        panic!("the prologue's sum is a result")
    };
    close(&y[0], &sum);
    close(&y[1], &eval(Linear, [&h, &w]));
}

#[test]
fn sampling_takes_the_first_largest_or_asks() {
    let x = f(&[2, 3], &[1.0, 7.0, 7.0, 0.0, -1.0, -2.0]);
    assert_eq!(eval(Sample, [&x]), ints(&[2], &[1, 0]));
    let pick = |i: usize, row: &[f64]| (i + row.len()) as i64;
    let mut state = Interp::new(SymEnv::default(), &no_weights);
    state.sampler = Some(&pick);
    assert_eq!(eval_in(&mut state, Sample, [&x]), ints(&[2], &[3, 4]));
}

#[test]
fn rounding_follows_the_materialised_edges() {
    let mut state = Interp::new(SymEnv::default(), &no_weights);
    state.round = true;
    let ty = Type::tensor(DType::BF16, [Dim::new(2)]);
    let x = f(&[2], &[1.0, 3.0]);
    let g = f(&[2], &[1.007_812_5, 1.0]);
    let round = |v: f64| half::bf16::from_f64(v).to_f64();
    let y = interp::eval_op(
        &Op::RmsNorm(RmsNorm {
            eps: Real::new(0.0),
        }),
        [&x, &g],
        &ty,
        &mut state,
    )
    .expect("evaluates");
    let rms = 5_f64.sqrt();
    // x/rms is rounded before gamma, as in Hugging Face.
    assert_eq!(
        data(&y),
        [round(round(1.0 / rms) * 1.007_812_5), round(3.0 / rms)]
    );
    // The sum of addrms is materialised: its norm sees the rounded sum.
    let (r, d) = (f(&[2], &[1.0, 2.0]), f(&[2], &[0.003, 0.006]));
    let both = Type::Tuple(vec![ty.clone(), ty.clone()]);
    let add = Op::AddRms(AddRms {
        eps: Real::new(0.0),
    });
    let one = f(&[2], &[1.0, 1.0]);
    let y = interp::eval_op(&add, [&r, &d, &one], &both, &mut state).expect("evaluates");
    let Value::Tuple(y) = y else {
        panic!("addrms returns a tuple")
    };
    assert_eq!(data(&y[0]), [1.0, 2.0]);
    assert_eq!(data(&y[1]), [1.0, 2.0].map(|v| round(v / 2.5_f64.sqrt())));
    let third = f(&[2], &[1.0 / 3.0, 1e39]);
    let cast = |state: &mut Interp<'_, f64>| {
        interp::eval_op(&Op::Cast(Cast(DType::BF16)), [&third], &ty, state).expect("evaluates")
    };
    assert_eq!(data(&cast(&mut state)), [round(1.0 / 3.0), f64::INFINITY]);
    state.round = false;
    assert_eq!(data(&cast(&mut state)), [1.0 / 3.0, 1e39]);
}

#[test]
fn graphs_run_and_name_what_failed() {
    let mut g = Graph::new("t");
    let p = Prov::layer(0, "model.norm");
    let input = |name: &str| {
        Op::Input(Input {
            name: name.into(),
            dtype: DType::F32,
            shape: vec![Dim::sym(Sym::S)],
        })
    };
    let x = g.add(input("x"), [], &p).unwrap();
    let unused = g.add(input("unused"), [], &p).unwrap();
    g.add(UnaryFn::Neg, [unused], &p).unwrap();
    let flat = g
        .add(Reshape(vec![Dim::new(1), Dim::sym(Sym::S)]), [x], &p)
        .unwrap();
    let twice = g.add(BinaryFn::Add, [flat, flat], &p).unwrap();
    g.set_output("y", twice);
    g.set_output("flat", flat);
    let env = SymEnv::new(&[(Sym::S, 2)]);
    let mut interp = Interp::new(env, &no_weights).with_input("x", f(&[2], &[1.0, 2.0]));
    let out = interp.run(&g).expect("runs");
    assert_eq!(out["y"], f(&[1, 2], &[2.0, 4.0]));
    assert_eq!(out["flat"], f(&[1, 2], &[1.0, 2.0]));
    interp.inputs.clear();
    let e = interp.run(&g).unwrap_err();
    assert_eq!(
        e.to_string(),
        "%0 (model.norm): input: no value was given for input 'x'"
    );
}
