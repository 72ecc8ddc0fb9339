//! Attention in all its forms against a term-by-term reference, and steps against full sequences.

#[path = "common/values.rs"]
mod values;

use lathe_ir::interp::{Interp, KvRows, StepMeta, Value};
use lathe_ir::ops::{
    Attn, AttnQkv, AttnStep, Linear, Matmul, Pack, Permute, Proj, RepeatKv, Rope, Sdpa, Win,
    attn_qkv, proj,
};
use lathe_ir::*;
use values::*;

/// Attention of one query, term by term.
fn attend(q: &[f64], k: &[&[f64]], v: &[&[f64]], spec: &AttnSpec, pos: usize) -> Vec<f64> {
    let s: Vec<Option<f64>> = k
        .iter()
        .enumerate()
        .map(|(j, k)| {
            let mut s = spec.scale.get() * q.iter().zip(*k).map(|(a, b)| a * b).sum::<f64>();
            if let Some(c) = spec.softcap {
                s = c.get() * (s / c.get()).tanh();
            }
            spec.mask.visible(pos as i64, j as i64).then_some(s)
        })
        .collect();
    let sum: f64 = s.iter().flatten().map(|s| s.exp()).sum();
    (0..q.len())
        .map(|d| {
            s.iter()
                .zip(v)
                .map(|(s, v)| s.map_or(0.0, f64::exp) / sum * v[d])
                .sum()
        })
        .collect()
}

fn specs() -> Vec<AttnSpec> {
    let mut out = Vec::new();
    for mask in [
        Mask::CAUSAL,
        Mask {
            causal: true,
            window: Some(2),
        },
        Mask::ALL,
    ] {
        for softcap in [None, Some(Real::new(0.7))] {
            out.push(AttnSpec {
                scale: Real::new(0.5),
                softcap,
                mask,
                groups: 2,
                stage: SdpaStage::Closed,
            });
        }
    }
    out
}

#[test]
fn attention_full_and_open() {
    let (b, hkv, s, d) = (2, 2, 5, 3);
    let (q, k, v) = (
        rand(&[b, 4, s, d], 13),
        rand(&[b, hkv, s, d], 14),
        rand(&[b, hkv, s, d], 15),
    );
    for spec in specs() {
        let mut want = Vec::new();
        for r in 0..b * 4 * s {
            let (bh, pos) = (r / s, r % s);
            let base = (bh / 4 * hkv + bh % 4 / 2) * s;
            let row = |x: &'_ V, j: usize| data(x)[(base + j) * d..(base + j + 1) * d].to_vec();
            let ks: Vec<Vec<f64>> = (0..s).map(|j| row(&k, j)).collect();
            let vs: Vec<Vec<f64>> = (0..s).map(|j| row(&v, j)).collect();
            let ks: Vec<&[f64]> = ks.iter().map(Vec::as_slice).collect();
            let vs: Vec<&[f64]> = vs.iter().map(Vec::as_slice).collect();
            want.extend(attend(&data(&q)[r * d..(r + 1) * d], &ks, &vs, &spec, pos));
        }
        let want = f(&[b, 4, s, d], &want);
        close(&eval(Attn(spec), [&q, &k, &v]), &want);
        let rep = |x: &V| eval(RepeatKv { groups: 2 }, [x]);
        let kt = eval(Permute(vec![0, 1, 3, 2]), [&rep(&k)]);
        let scores = eval(Matmul, [&q, &kt]);
        let open = AttnSpec {
            groups: 1,
            stage: SdpaStage::Scale,
            ..spec
        };
        close(&eval(Sdpa(open), [&scores, &rep(&v)]), &want);
    }
}

fn step_state(step: StepMeta) -> Interp<'static, f64> {
    let mut state = Interp::new(
        SymEnv::new(&[
            (Sym::T, step.tokens() as i64),
            (Sym::B, step.batch() as i64),
        ]),
        &no_weights,
    );
    state.step = Some(step);
    state
}

#[test]
fn window_gathers_the_rows_of_the_step() {
    let step = StepMeta::new(&[1, 2], &[2, 0]);
    let mut state = step_state(step).with_input("x", rand(&[2, 3, 4, 2], 16));
    state.syms = state.syms.with(Sym::S, 4);
    let x = state.inputs["x"].clone();
    // Axes [B, 3, S, 2].
    let dims = vec![Dim::sym(Sym::B), Dim::new(3), Dim::sym(Sym::S), Dim::new(2)];
    let mut win = |x: &V, dims: &[Dim], batch, seq| {
        let op = Op::Win(Win { batch, seq });
        let ty = infer(&op, [&Type::tensor(DType::F32, dims)]).expect("well typed");
        interp::eval_op(&op, [x], &ty, &mut state).expect("evaluates")
    };
    let mut want = Vec::new();
    for (b, s) in [(0, 2), (1, 0), (1, 1)] {
        for h in 0..3 {
            for e in 0..2 {
                want.push(data(&x)[((b * 3 + h) * 4 + s) * 2 + e]);
            }
        }
    }
    assert_eq!(win(&x, &dims, Some(0), Some(2)), f(&[3, 3, 2], &want));
    let seq_only = f(&[4], &[0.0, 1.0, 2.0, 3.0]);
    assert_eq!(
        win(&seq_only, &[Dim::sym(Sym::S)], None, Some(0)),
        f(&[3], &[2.0, 0.0, 1.0])
    );
    let batch_only = f(&[1, 2], &[7.0, 8.0]);
    assert_eq!(
        win(&batch_only, &[Dim::new(1), Dim::sym(Sym::B)], Some(1), None),
        f(&[3, 1], &[7.0, 8.0, 8.0])
    );
}

/// Runs `[B,H,S,D]` attention in steps of the given row counts and compares every row.
#[test]
fn steps_agree_with_full_attention() {
    let (b, s, d) = (2, 6, 3);
    let (q, k, v) = (
        rand(&[b, 4, s, d], 17),
        rand(&[b, 2, s, d], 18),
        rand(&[b, 2, s, d], 19),
    );
    for spec in specs().into_iter().filter(|s| s.mask.causal) {
        let full = eval(Attn(spec), [&q, &k, &v]);
        let cache = Value::Cache(interp::CacheRef {
            layer: 3,
            kv_heads: 2,
            head_dim: d,
        });
        let mut caches = std::collections::BTreeMap::new();
        let mut past = vec![0, 0];
        for lens in [[2, 1], [1, 0], [3, 5]] {
            let mut state = step_state(StepMeta::new(&lens, &past));
            state.syms = state.syms.with(Sym::S, s as i64);
            state.caches = caches;
            let win = |state: &mut Interp<'_, f64>, x: &V, h: i64| {
                let dims = [
                    Dim::sym(Sym::B),
                    Dim::new(h),
                    Dim::sym(Sym::S),
                    Dim::new(d as i64),
                ];
                let op = Op::Win(Win {
                    batch: Some(0),
                    seq: Some(2),
                });
                let ty = infer(&op, [&Type::tensor(DType::F32, dims)]).expect("well typed");
                interp::eval_op(&op, [x], &ty, state).expect("evaluates")
            };
            let (wq, wk, wv) = (
                win(&mut state, &q, 4),
                win(&mut state, &k, 2),
                win(&mut state, &v, 2),
            );
            let y = eval_in(&mut state, AttnStep(spec), [&wq, &wk, &wv, &cache]);
            let Value::Tuple(y) = y else {
                panic!("a step returns a tuple")
            };
            close(&y[0], &win(&mut state, &full, 4));
            assert_eq!(y[1], cache);
            caches = state.caches;
            for (p, n) in past.iter_mut().zip(lens) {
                *p += n;
            }
        }
        assert_eq!(caches[&3].seqs[1].k.len(), 6 * 2 * d);
    }
}

#[test]
fn a_step_checks_what_the_cache_holds() {
    let mut state = step_state(StepMeta::new(&[1], &[2]));
    state.caches.entry(0).or_default().seqs = vec![KvRows {
        k: vec![0.0; 4],
        v: vec![0.0; 4],
    }];
    let cache = Value::Cache(interp::CacheRef {
        layer: 0,
        kv_heads: 1,
        head_dim: 4,
    });
    let x = rand(&[1, 1, 4], 20);
    let spec = AttnSpec {
        groups: 1,
        stage: SdpaStage::Closed,
        ..AttnSpec::open()
    };
    let ty = Type::Tuple(vec![type_of(&x), Type::Cache]);
    let e = interp::eval_op(
        &Op::AttnStep(AttnStep(spec)),
        [&x, &x, &x, &cache],
        &ty,
        &mut state,
    );
    assert!(
        e.unwrap_err()
            .reason
            .contains("holds 1 rows of sequence 0, the step expects 2")
    );
}

/// Packed attention equals projections into natural heads and a step on them.
#[test]
fn packed_attention_agrees_with_projections() {
    let (t, k, d) = (5, 12, 16);
    let x = rand(&[t, k], 27);
    let (wq, wk, wv) = (
        rand(&[4 * d, k], 28),
        rand(&[2 * d, k], 29),
        rand(&[2 * d, k], 30),
    );
    let (gq, gk) = (rand(&[d], 31), rand(&[d], 32));
    let freq = rand(&[d / 2], 33);
    let pos = ints(&[t], &[0, 1, 2, 0, 1]);
    let cache = Value::Cache(interp::CacheRef {
        layer: 0,
        kv_heads: 2,
        head_dim: d,
    });
    let attn = AttnSpec {
        scale: Real::new(0.3),
        ..specs()[0]
    };
    for rope in [
        None,
        Some(Rope {
            scaling: Real::new(1.5),
        }),
    ] {
        for head_norm in [None, Some(Real::new(0.01))] {
            let interleave = rope.is_some();
            let proj = |w: &V, g: &V, heads, roped: bool| {
                let spec = Proj {
                    heads,
                    head_dim: d as u32,
                    head_norm: head_norm.filter(|_| roped),
                    rope: rope.filter(|_| roped),
                };
                let operands = Operands::from([&x, w])
                    .with(proj::GAMMA, spec.head_norm.map(|_| g))
                    .with(proj::POSITIONS, spec.rope.map(|_| &pos))
                    .with(proj::INV_FREQ, spec.rope.map(|_| &freq));
                eval(spec, operands)
            };
            let (q, kk, v) = (
                proj(&wq, &gq, 4, true),
                proj(&wk, &gk, 2, true),
                proj(&wv, &gk, 2, false),
            );
            let meta = StepMeta::new(&[3, 2], &[0, 0]);
            let mut state = step_state(meta.clone());
            let Value::Tuple(want) = eval_in(&mut state, AttnStep(attn), [&q, &kk, &v, &cache])
            else {
                panic!("a step returns a tuple")
            };
            let kind = Pack::Qkv {
                head_dim: d as u32,
                interleave,
            };
            let packed = eval(kind, [&wq, &wk, &wv]);
            let qkv = eval(Linear, [&x, &packed]);
            let order = |g: &V| {
                if interleave {
                    eval(Pack::Head { head_dim: d as u32 }, [g])
                } else {
                    g.clone()
                }
            };
            let (pq, pk) = (order(&gq), order(&gk));
            let operands = Operands::from([&qkv, &cache])
                .with(attn_qkv::Q_NORM, head_norm.map(|_| &pq))
                .with(attn_qkv::K_NORM, head_norm.map(|_| &pk))
                .with(attn_qkv::POSITIONS, rope.map(|_| &pos))
                .with(attn_qkv::INV_FREQ, rope.map(|_| &freq));
            let spec = AttnQkv {
                attn,
                heads: 4,
                kv_heads: 2,
                head_dim: d as u32,
                head_norm,
                rope,
            };
            let mut packed_state = step_state(meta);
            let Value::Tuple(got) = eval_in(&mut packed_state, spec, operands) else {
                panic!("a step returns a tuple")
            };
            close(&got[0], &want[0]);
            assert_eq!(
                packed_state.caches[&0].seqs[0].v,
                state.caches[&0].seqs[0].v
            );
        }
    }
}
