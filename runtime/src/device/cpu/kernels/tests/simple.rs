use half::bf16;

use super::super::rope::{RopeAppend, rope_append};
use super::super::{Activation, CacheShape, Elem, KernelError, StepMeta, norm, pointwise, rows};
use super::{assert_close, each_isa, epsilon, poisoned, random, rng, wide};

#[test]
fn norms_match_the_reference() {
    fn check<E: Elem>() {
        let mut rng = rng(10);
        for (m, k) in [(1, 1), (3, 33), (5, 64), (70, 576), (2, 4099)] {
            let (x, d) = (random::<E>(&mut rng, m * k), random::<E>(&mut rng, m * k));
            let (gamma, beta) = (random::<E>(&mut rng, k), random::<E>(&mut rng, k));
            let rms = |x: &[f64]| -> Vec<f64> {
                x.chunks(k)
                    .flat_map(|row| {
                        let rstd =
                            1.0 / (row.iter().map(|v| v * v).sum::<f64>() / k as f64 + 1e-5).sqrt();
                        row.iter()
                            .zip(&gamma)
                            .map(move |(v, g)| v * rstd * f64::from(g.to_f32()))
                    })
                    .collect()
            };
            let layer: Vec<f64> = wide(&x)
                .chunks(k)
                .flat_map(|row| {
                    let mean = row.iter().sum::<f64>() / k as f64;
                    let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / k as f64;
                    let row: Vec<f64> = row
                        .iter()
                        .map(|v| (v - mean) / (var + 1e-5).sqrt())
                        .collect();
                    row.iter()
                        .zip(gamma.iter().zip(&beta))
                        .map(|(v, (g, b))| v * f64::from(g.to_f32()) + f64::from(b.to_f32()))
                        .collect::<Vec<_>>()
                })
                .collect();
            each_isa(|isa| {
                let what = format!("{isa:?} {m}x{k}");
                // Two roundings.
                let relative = 2.5 * epsilon::<E>();
                let mut h = poisoned(m * k);
                norm::rms_norm(&x, Some(&gamma), 1e-5, k, &mut h).unwrap();
                assert_close(&what, &h, &rms(&wide(&x)), relative, 2e-6);
                let (mut sum, mut h) = (poisoned(m * k), poisoned(m * k));
                norm::add_rms_norm(&x, &d, &gamma, 1e-5, k, &mut sum, &mut h).unwrap();
                let exact: Vec<f64> = wide(&x).iter().zip(wide(&d)).map(|(a, b)| a + b).collect();
                assert_close(&what, &sum, &exact, epsilon::<E>(), 0.0);
                assert_close(&what, &h, &rms(&wide(&sum)), relative, 4e-6);
                let mut y = poisoned(m * k);
                norm::layer_norm(&x, &gamma, Some(&beta), 1e-5, k, &mut y).unwrap();
                assert_close(&what, &y, &layer, epsilon::<E>(), 4e-6);
            });
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn llama_norm_rounds_twice() {
    // x·rstd = 1 + 2^-9 rounds to 1 in bf16 before it meets gamma; a single rounding would give another product.
    let x: Vec<bf16> = [1.0, 1.0, 1.0, 1.0078125].map(bf16::from_f32).to_vec();
    let gamma = vec![bf16::from_f32(1.4921875); 4];
    let square = x.iter().map(|v| v.to_f32() * v.to_f32()).sum::<f32>() / 4.0;
    let rstd = 1.0 / square.sqrt();
    each_isa(|_| {
        let mut h = poisoned::<bf16>(4);
        norm::rms_norm(&x, Some(&gamma), 0.0, 4, &mut h).unwrap();
        for (h, x) in h.iter().zip(&x) {
            let want = bf16::from_f32(bf16::from_f32(x.to_f32() * rstd).to_f32() * 1.4921875);
            assert_eq!(*h, want);
        }
    });
}

#[test]
fn rope_append_matches_rotate_half() {
    fn check<E: Elem>() {
        let mut rng = rng(11);
        for (d, with_norm, with_bias) in [
            (16, false, false),
            (32, true, false),
            (64, false, true),
            (128, true, true),
        ] {
            let (hq, hkv, page_size, max_pos) = (4, 2, 5, 40);
            let heads = hq + 2 * hkv;
            // Two sequences: 3 rows at 7.., 1 row at 12; pages deliberately out of order.
            let positions = [7, 8, 9, 12];
            let (row_seq, cu, kv_lens) = ([0, 0, 0, 1], [0, 3, 4], [10, 13]);
            let table = [4, 1, -1, 0, 5, 2];
            let meta = StepMeta {
                positions: &positions,
                row_seq: &row_seq,
                cu_seqlens: &cu,
                kv_lens: &kv_lens,
                block_table: &table,
                max_pages: 3,
                page_size,
            };
            let qkv = random::<E>(&mut rng, 4 * heads * d);
            let bias = random::<E>(&mut rng, heads * d);
            let (q_norm, k_norm) = (random::<E>(&mut rng, d), random::<E>(&mut rng, d));
            let angles: Vec<f64> = (0..max_pos * d / 2)
                .map(|i| (i / (d / 2)) as f64 / 100f64.powf((i % (d / 2)) as f64 / (d / 2) as f64))
                .collect();
            let cos: Vec<f32> = angles.iter().map(|a| a.cos() as f32).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin() as f32).collect();

            // Reference in HF's order: natural[i] = packed[place(i)].
            let place = |i: usize| {
                if i < d / 2 {
                    i / 8 * 16 + i % 8
                } else {
                    (i - d / 2) / 8 * 16 + 8 + (i - d / 2) % 8
                }
            };
            let head = |row: usize, h: usize| -> Vec<f64> {
                let from = (row * heads + h) * d;
                let mut x = wide(&qkv[from..from + d]);
                if with_bias {
                    x.iter_mut()
                        .zip(&bias[h * d..])
                        .for_each(|(x, b)| *x += f64::from(b.to_f32()));
                }
                if h >= hq + hkv {
                    return x;
                }
                if with_norm {
                    let gamma = if h < hq { &q_norm } else { &k_norm };
                    let rstd =
                        1.0 / (x.iter().map(|v| v * v).sum::<f64>() / d as f64 + 1e-6).sqrt();
                    x.iter_mut()
                        .zip(gamma)
                        .for_each(|(x, g)| *x *= rstd * f64::from(g.to_f32()));
                }
                let natural: Vec<f64> = (0..d).map(|i| x[place(i)]).collect();
                let mut packed = vec![0.0; d];
                for i in 0..d {
                    let rotated = if i < d / 2 {
                        -natural[i + d / 2]
                    } else {
                        natural[i - d / 2]
                    };
                    let angle = angles[positions[row] as usize * d / 2 + i % (d / 2)];
                    packed[place(i)] = natural[i] * angle.cos() + rotated * angle.sin();
                }
                packed
            };
            each_isa(|isa| {
                let shape = CacheShape {
                    pages: 6,
                    kv_heads: hkv,
                    page_size,
                    head_dim: d,
                };
                let (mut q, mut cache) = (
                    poisoned::<E>(4 * hq * d),
                    vec![E::from_f32(9.0); 6 * shape.page_len()],
                );
                rope_append(RopeAppend {
                    q_heads: hq,
                    kv_heads: hkv,
                    head_dim: d,
                    qkv: &qkv,
                    bias: with_bias.then_some(&bias[..]),
                    q_norm: with_norm.then_some(&q_norm[..]),
                    k_norm: with_norm.then_some(&k_norm[..]),
                    eps: 1e-6,
                    tables: Some((&cos, &sin)),
                    meta,
                    q: &mut q,
                    cache: &mut cache,
                })
                .unwrap();
                let what = format!("{isa:?} D={d}");
                let mut want_cache = vec![9.0; cache.len()];
                for row in 0..4 {
                    for h in 0..hq {
                        let got = &q[(row * hq + h) * d..][..d];
                        assert_close(
                            &format!("{what} q"),
                            got,
                            &head(row, h),
                            epsilon::<E>(),
                            2e-6,
                        );
                    }
                    let (page, slot) = [(1, 2), (1, 3), (1, 4), (2, 2)][row];
                    for h in 0..2 * hkv {
                        let at = shape.offset(page, h >= hkv, h % hkv, slot);
                        want_cache[at..at + d].copy_from_slice(&head(row, hq + h));
                    }
                }
                assert_close(
                    &format!("{what} cache"),
                    &cache,
                    &want_cache,
                    epsilon::<E>(),
                    2e-6,
                );
            });
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn rope_append_refuses_what_lies_outside() {
    let positions = [3];
    let meta = StepMeta {
        positions: &positions,
        row_seq: &[0],
        cu_seqlens: &[0, 1],
        kv_lens: &[4],
        block_table: &[7],
        max_pages: 1,
        page_size: 4,
    };
    let table = [1.0f32; 4 * 8];
    let run = |pages: usize, table: &[f32], head_dim: usize| {
        let qkv = vec![0.0f32; 3 * head_dim];
        let (mut q, mut cache) = (
            vec![0.0f32; head_dim],
            vec![0.0f32; pages * 2 * 4 * head_dim],
        );
        rope_append(RopeAppend {
            q_heads: 1,
            kv_heads: 1,
            head_dim,
            qkv: &qkv,
            bias: None,
            q_norm: None,
            k_norm: None,
            eps: 0.0,
            tables: Some((table, table)),
            meta,
            q: &mut q,
            cache: &mut cache,
        })
    };
    assert_eq!(run(8, &table, 16), Ok(()));
    let error = run(7, &table, 16).unwrap_err();
    assert_eq!(
        error.to_string(),
        "rope_append: page of row 0 is 7, outside 0..7"
    );
    assert!(matches!(
        run(8, &table[..24], 16),
        Err(KernelError::Index {
            got: 3,
            limit: 3,
            ..
        })
    ));
    assert!(matches!(
        run(8, &table, 24),
        Err(KernelError::Unsupported { .. })
    ));
}

#[test]
fn embed_selects_scales_and_refuses() {
    let table: Vec<bf16> = (0..12).map(|i| bf16::from_f32(i as f32)).collect();
    let mut out = poisoned(6);
    rows::embed(&[3, 0], &table, 3, None, &mut out).unwrap();
    assert_close("rows", &out, &[9.0, 10.0, 11.0, 0.0, 1.0, 2.0], 0.0, 0.0);
    rows::embed(&[3, 0], &table, 3, Some(0.5), &mut out).unwrap();
    assert_close("scaled", &out, &[4.5, 5.0, 5.5, 0.0, 0.5, 1.0], 0.0, 0.0);
    for id in [4, -1] {
        let error = rows::embed(&[0, id], &table, 3, None, &mut out).unwrap_err();
        assert_eq!(
            error,
            KernelError::Index {
                kernel: "embed",
                index: "id",
                row: 1,
                got: i64::from(id),
                limit: 4
            }
        );
    }
}

#[test]
fn argmax_takes_the_first_largest() {
    let n = 1000;
    let mut x = random::<f32>(&mut rng(12), 3 * n);
    x[700] = 2.0;
    x[703] = 2.0;
    x[n + 999] = 5.0;
    x[n] = f32::NAN;
    x[2 * n..].fill(f32::NEG_INFINITY);
    let mut ids = [-1; 3];
    rows::argmax(&x, n, &mut ids).unwrap();
    assert_eq!(ids, [700, 999, 0]);
}

#[test]
fn pointwise_kernels_match_the_reference() {
    fn check<E: Elem>() {
        let mut rng = rng(13);
        let len = 16 * 1024 + 8 * 37;
        let scale =
            |x: Vec<E>| -> Vec<E> { x.iter().map(|v| E::from_f32(v.to_f32() * 12.0)).collect() };
        let (a, b) = (
            scale(random::<E>(&mut rng, len)),
            random::<E>(&mut rng, len),
        );
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let product: Vec<f64> = wide(&a)
            .iter()
            .zip(wide(&b))
            .map(|(&x, y)| silu(x) * y)
            .collect();
        each_isa(|_| {
            let mut out = poisoned(len);
            pointwise::silu_mul(&a, &b, &mut out).unwrap();
            assert_close("silu_mul", &out, &product, epsilon::<E>() * 2.0, 1e-6);
            let mut packed = vec![E::default(); 2 * len];
            for i in 0..len {
                packed[i / 8 * 16 + i % 8] = a[i];
                packed[i / 8 * 16 + 8 + i % 8] = b[i];
            }
            let mut from_packed = poisoned(len);
            pointwise::silu_mul_packed(&packed, 8, &mut from_packed).unwrap();
            assert_eq!(from_packed, out);
            pointwise::activation(Activation::Relu, &a[1..], &mut out[1..]).unwrap();
            assert!(
                a[1..]
                    .iter()
                    .zip(&out[1..])
                    .all(|(a, o)| o.to_f32() == a.to_f32().max(0.0))
            );
            pointwise::add(&a[3..], &b[3..], &mut out[3..]).unwrap();
            let sums: Vec<f64> = wide(&a).iter().zip(wide(&b)).map(|(x, y)| x + y).collect();
            assert_close("add", &out[3..], &sums[3..], epsilon::<E>(), 0.0);
        });
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn activations_saturate() {
    use super::super::activate;
    for act in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        assert_eq!(activate(act, 0.0), 0.0);
        assert_eq!(activate(act, 200.0), 200.0, "{act:?}");
        assert!(
            activate(act, -200.0).abs() < 1e-30,
            "{act:?} {}",
            activate(act, -200.0)
        );
    }
}
