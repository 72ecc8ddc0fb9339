//! Chains against the interpreter, which evaluates their statements one by one in f64.

use half::bf16;
use lathe_codegen::chain::RowProgram;
use lathe_ir::ChainOp;
use lathe_ir::chain::{Access, Statement};
use lathe_ir::interp::{Interp, Tensor, Value, eval_op};
use lathe_ir::{
    BinaryFn, Chain, ChainArg, DType, Dim, Op, Real, ReduceFn, Sym, SymEnv, Type, UnaryFn,
    WeightRef,
};
use rand::Rng;
use rand::rngs::StdRng;

use super::super::chain::{Floats, FloatsMut, chain};
use super::super::pool;
use super::{each_isa, poisoned, random, rng};

/// Statements that keep values of moderate size: what a chain of them loses in f32 stays small.
fn random_chain(r: &mut StdRng) -> Chain {
    let mut statements: Vec<Statement> = Vec::new();
    // Operands 0, 1: full; 2: a value a row; 3: one a column; 4: one.
    let mut full: Vec<ChainArg> = vec![ChainArg::Operand(0), ChainArg::Operand(1)];
    let mut rows: Vec<ChainArg> = vec![ChainArg::Operand(2)];
    let constant = |value: f64| ChainArg::Const {
        value: Real::new(value),
        dtype: DType::F32,
    };
    for _ in 0..r.random_range(2..14) {
        let x = full[r.random_range(0..full.len())];
        let reduce = |f| ChainOp::Reduce { f, axis: 1 };
        let other = match r.random_range(0..5) {
            0 => rows[r.random_range(0..rows.len())],
            1 => ChainArg::Operand(3),
            2 => ChainArg::Operand(4),
            3 => constant(r.random_range(-2.0..2.0)),
            _ => full[r.random_range(0..full.len())],
        };
        let (op, args) = match r.random_range(0..18) {
            0 => (ChainOp::Unary(UnaryFn::Tanh), vec![x]),
            1 => (ChainOp::Unary(UnaryFn::Erf), vec![x]),
            2 => (ChainOp::Unary(UnaryFn::Sigmoid), vec![x]),
            3 => (ChainOp::Unary(UnaryFn::Abs), vec![x]),
            4 => (ChainOp::Unary(UnaryFn::Neg), vec![x]),
            5 => (ChainOp::Unary(UnaryFn::Sin), vec![x]),
            6 => (ChainOp::Silu, vec![x]),
            7 => (ChainOp::Binary(BinaryFn::Add), vec![x, other]),
            8 => (ChainOp::Binary(BinaryFn::Sub), vec![other, x]),
            9 => (ChainOp::Binary(BinaryFn::Minimum), vec![x, other]),
            10 => (ChainOp::Binary(BinaryFn::Maximum), vec![other, x]),
            11 => {
                let bounded = ChainArg::Value(statements.len() as u8);
                statements.push(Statement {
                    op: ChainOp::Unary(UnaryFn::Tanh),
                    args: vec![x],
                });
                (ChainOp::Binary(BinaryFn::Mul), vec![bounded, other])
            }
            12 => {
                let bounded = ChainArg::Value(statements.len() as u8);
                statements.push(Statement {
                    op: ChainOp::Unary(UnaryFn::Tanh),
                    args: vec![x],
                });
                (ChainOp::Binary(BinaryFn::Pow), vec![bounded, constant(3.0)])
            }
            13 => (reduce(ReduceFn::Mean), vec![x]),
            14 => (reduce(ReduceFn::Amax), vec![x]),
            15 => (
                ChainOp::RmsNorm {
                    eps: Real::new(0.1),
                },
                vec![x, ChainArg::Operand(3)],
            ),
            16 => (ChainOp::Softmax, vec![x]),
            _ => (ChainOp::Cast(DType::F32), vec![x]),
        };
        let row = matches!(op, ChainOp::Reduce { .. });
        statements.push(Statement { op, args });
        let value = ChainArg::Value(statements.len() as u8 - 1);
        if row {
            rows.push(value)
        } else {
            full.push(value)
        }
    }
    let last = |of: &[ChainArg]| match of.last() {
        Some(ChainArg::Value(i)) => Some(*i),
        _ => None,
    };
    let mut results: Vec<u8> = last(&full).into_iter().chain(last(&rows)).collect();
    if results.is_empty() {
        results.push(0);
    }
    // Casts of the stored results.
    let results = results
        .into_iter()
        .enumerate()
        .map(|(i, v)| {
            if i == 0 && r.random_bool(0.3) {
                statements.push(Statement {
                    op: ChainOp::Cast(DType::BF16),
                    args: vec![ChainArg::Value(v)],
                });
                return statements.len() as u8 - 1;
            }
            v
        })
        .collect();
    Chain {
        statements,
        results,
    }
}

#[test]
fn chains_equal_their_statements() {
    let mut r = rng(7);
    let env_of = |rows: usize| SymEnv::new(&[(Sym::T, rows as i64)]);
    for case in 0..300 {
        let width = [1, 2, 7, 16, 33, 128, 300, 1100][r.random_range(0..8)];
        let rows = [1, 2, 5, 40][r.random_range(0..4)];
        let random_chain = random_chain(&mut r);
        let (t, w, one) = (Dim::sym(Sym::T), Dim::from(width as usize), Dim::new(1));
        let shapes = [vec![t, w], vec![t, w], vec![t, one], vec![w], vec![]];
        let types: Vec<Type> = shapes
            .iter()
            .map(|s| Type::tensor(DType::F32, &s[..]))
            .collect();
        let refs: Vec<&Type> = types.iter().collect();
        let program =
            RowProgram::new(&random_chain, &refs).unwrap_or_else(|e| panic!("{random_chain}: {e}"));
        assert_eq!(program.row_count(&env_of(rows)), rows);
        let data: Vec<Vec<f32>> = program
            .operands
            .iter()
            .map(|(a, _)| {
                let n = match a {
                    Access::Full => rows * width as usize,
                    Access::Row => rows,
                    Access::Column => width as usize,
                    Access::Scalar => 1,
                };
                random::<f32>(&mut r, n)
            })
            .collect();
        // The oracle.
        let env = env_of(rows);
        let values: Vec<Value<f64>> = shapes
            .iter()
            .zip(&data)
            .map(|(s, d)| {
                let shape: Vec<usize> = s.iter().map(|d| d.eval(&env) as usize).collect();
                Value::Float(Tensor::new(
                    shape,
                    d.iter().map(|&x| f64::from(x)).collect(),
                ))
            })
            .collect();
        let no_weights = |_: &WeightRef| Err("none".to_string());
        let mut state = Interp::new(env, &no_weights);
        let ty = random_chain.ty(&refs).unwrap();
        let inputs: Vec<&Value<f64>> = values.iter().collect();
        let want =
            match eval_op(&Op::Chain(random_chain.clone()), &inputs, &ty, &mut state).unwrap() {
                Value::Tuple(vs) => vs,
                v => vec![v],
            };
        each_isa(|isa| {
            let operands: Vec<Floats<'_>> = data.iter().map(|d| Floats::F32(d)).collect();
            let mut f32s: Vec<Vec<f32>> = Vec::new();
            let mut bf16s: Vec<Vec<bf16>> = Vec::new();
            for (w, r) in want.iter().zip(&program.results) {
                let n = w.as_float().unwrap().data.len();
                let wide = r.dtype == DType::F32;
                f32s.push(poisoned(if wide { n } else { 0 }));
                bf16s.push(poisoned(if wide { 0 } else { n }));
            }
            let results = f32s
                .iter_mut()
                .zip(&mut bf16s)
                .zip(&program.results)
                .map(|((f, b), r)| match r.dtype {
                    DType::F32 => FloatsMut::F32(f),
                    _ => FloatsMut::Bf16(b),
                })
                .collect();
            chain(&program, rows, &operands, results).unwrap();
            for (i, (w, r)) in want.iter().zip(&program.results).enumerate() {
                let want = &w.as_float().unwrap().data;
                let got: Vec<f64> = match r.dtype {
                    DType::F32 => f32s[i].iter().map(|&x| f64::from(x)).collect(),
                    _ => bf16s[i].iter().map(|x| f64::from(x.to_f32())).collect(),
                };
                let unit = if r.dtype == DType::F32 {
                    0.0
                } else {
                    1.0 / 256.0
                };
                for (at, (g, w)) in got.iter().zip(want).enumerate() {
                    let error = (g - w).abs();
                    assert!(
                        error <= (3e-5 + unit) * (1.0 + w.abs()),
                        "case {case} on {isa:?}, result {i}, element {at}: {g} instead of {w}\n{random_chain}"
                    );
                }
            }
        });
    }
    assert!(pool::threads() > 0);
}

/// The bits of a row do not depend on the other rows.
#[test]
fn rows_do_not_depend_on_their_batch() {
    let text = "mean:1 a0; sub a0 t0; rmsnorm:1e-5 t1 a1; tanh t2 -> t3";
    let chain_of: Chain = text.parse().unwrap();
    let (rows, width) = (37, 1000);
    let x = Type::tensor(DType::F32, [Dim::sym(Sym::T), Dim::new(width as i64)]);
    let gamma = Type::tensor(DType::F32, [Dim::new(width as i64)]);
    let program = RowProgram::new(&chain_of, &[&x, &gamma]).unwrap();
    let mut r = rng(3);
    let (x, gamma) = (
        random::<f32>(&mut r, rows * width),
        random::<f32>(&mut r, width),
    );
    let run = |x: &[f32]| {
        let mut y = poisoned::<f32>(x.len());
        let operands = [Floats::F32(x), Floats::F32(&gamma)];
        chain(
            &program,
            x.len() / width,
            &operands,
            vec![FloatsMut::F32(&mut y)],
        )
        .unwrap();
        y
    };
    let all = run(&x);
    for (x, y) in x.chunks(width).zip(all.chunks(width)) {
        assert_eq!(run(x), y);
    }
    let short = [Floats::F32(&x[1..]), Floats::F32(&gamma)];
    let mut y = poisoned::<f32>(rows * width);
    assert!(chain(&program, rows, &short, vec![FloatsMut::F32(&mut y)]).is_err());
}

/// tanh and erf have a small relative error everywhere, near zero too.
#[test]
fn functions_are_accurate_near_zero() {
    for (text, f) in [
        ("tanh a0 -> t0", f64::tanh as fn(f64) -> f64),
        // erf by its Taylor series, which converges fast where it is tested.
        ("erf a0 -> t0", |x: f64| {
            let mut term = x;
            let mut sum = x;
            for n in 1..60 {
                term *= -x * x / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            sum * 2.0 / std::f64::consts::PI.sqrt()
        }),
    ] {
        let x: Vec<f32> = (0..4000)
            .map(|i| (i as f32 - 2000.0) * 1e-3 + 1e-7)
            .collect();
        let ty = Type::tensor(DType::F32, [Dim::new(1), Dim::from(x.len())]);
        let program = RowProgram::new(&text.parse().unwrap(), &[&ty]).unwrap();
        each_isa(|isa| {
            let mut y = poisoned::<f32>(x.len());
            chain(
                &program,
                1,
                &[Floats::F32(&x)],
                vec![FloatsMut::F32(&mut y)],
            )
            .unwrap();
            for (x, y) in x.iter().zip(&y) {
                let want = f(f64::from(*x));
                let error = (f64::from(*y) - want).abs();
                assert!(
                    error <= 6e-7 * want.abs(),
                    "{text} of {x} on {isa:?}: {y}, not {want}"
                );
            }
        });
    }
}
