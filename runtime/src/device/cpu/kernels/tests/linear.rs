use half::bf16;
use proptest::prelude::*;

use super::super::linear::{Epilogue, LinearArgs, LinearSpec, Prologue, linear, lm_head_argmax};
use super::super::{Activation, Elem, Isa, KernelError, norm, rows};
use super::{assert_close, bits, each_isa, epsilon, poisoned, random, rng, wide};

const PLAIN: LinearSpec = LinearSpec {
    prologue: Prologue::None,
    epilogue: Epilogue::None,
};

fn product<E: Elem>(
    x: &[E],
    w: &[E],
    bias: Option<&[E]>,
    m: usize,
    n: usize,
    k: usize,
) -> Vec<f64> {
    let (x, w) = (wide(x), wide(w));
    let mut y = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            let dot: f64 = (0..k).map(|p| x[i * k + p] * w[j * k + p]).sum();
            y[i * n + j] = dot + bias.map_or(0.0, |b| f64::from(b[j].to_f32()));
        }
    }
    y
}

fn plain<E: Elem>(x: &[E], w: &[E], m: usize, n: usize, k: usize) -> Vec<E> {
    let mut y = poisoned(m * n);
    let args = LinearArgs::new([m, n, k], x, w, &mut y);
    linear(&PLAIN, args).unwrap();
    y
}

fn act64(act: Activation, x: f64) -> f64 {
    // Φ by Simpson's rule over the density: independent of the kernel's formula.
    let phi = |x: f64| {
        let (n, h) = (2000, x / 2000.0);
        let density = |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let sum: f64 = (0..=n)
            .map(|i| {
                density(f64::from(i) * h)
                    * if i == 0 || i == n {
                        1.0
                    } else if i % 2 == 1 {
                        4.0
                    } else {
                        2.0
                    }
            })
            .sum();
        0.5 + sum * h / 3.0
    };
    match act {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => x * phi(x),
        Activation::GeluTanh => {
            0.5 * x
                * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Relu2 => x.max(0.0).powi(2),
    }
}

fn shapes<E: Elem>() {
    let mut rng = rng(2);
    for (m, n, k) in [
        (1, 1, 1),
        (1, 16, 32),
        (1, 100, 33),
        (2, 37, 65),
        (3, 8, 96),
        (4, 20, 127),
        (5, 99, 31),
        (6, 4, 64),
        (7, 17, 200),
        (8, 33, 576),
        (9, 48, 100),
        (23, 50, 70),
        (200, 19, 40),
        // Several spans of K, packed and not, with a rest.
        (1, 21, 2075),
        (3, 20, 1600),
        (14, 9, 2600),
    ] {
        let (x, w, bias) = (
            random::<E>(&mut rng, m * k),
            random::<E>(&mut rng, n * k),
            random::<E>(&mut rng, n),
        );
        let residual = random::<E>(&mut rng, m * n);
        let want = product(&x, &w, Some(&bias), m, n, k);
        each_isa(|isa| {
            for epilogue in [
                Epilogue::None,
                Epilogue::Residual,
                Epilogue::Act(Activation::Silu),
                Epilogue::Act(Activation::Gelu),
                Epilogue::Act(Activation::GeluTanh),
                Epilogue::Act(Activation::Relu),
                Epilogue::Act(Activation::Relu2),
            ] {
                let mut y = poisoned(m * n);
                let args = LinearArgs {
                    bias: Some(&bias),
                    residual: Some(&residual),
                    ..LinearArgs::new([m, n, k], &x, &w, &mut y)
                };
                linear(&LinearSpec { epilogue, ..PLAIN }, args).unwrap();
                let want: Vec<f64> = want
                    .iter()
                    .zip(&residual)
                    .map(|(&v, r)| match epilogue {
                        Epilogue::Residual => v + f64::from(r.to_f32()),
                        Epilogue::Act(act) => act64(act, v),
                        _ => v,
                    })
                    .collect();
                let slack = 2e-6 * (k as f64).sqrt() * 10.0;
                assert_close(
                    &format!("{isa:?} {epilogue:?} {m}x{n}x{k}"),
                    &y,
                    &want,
                    epsilon::<E>(),
                    slack,
                );
            }
        });
    }
}

#[test]
fn linear_matches_the_reference_in_f32() {
    shapes::<f32>();
}

#[test]
fn linear_matches_the_reference_in_bf16() {
    shapes::<bf16>();
}

#[test]
fn swiglu_pairs_rows_eight_apart() {
    fn check<E: Elem>() {
        let mut rng = rng(3);
        for (m, n, k) in [(1, 16, 40), (3, 64, 33), (13, 96, 72)] {
            let (x, w) = (random::<E>(&mut rng, m * k), random::<E>(&mut rng, n * k));
            let c = product(&x, &w, None, m, n, k);
            let mut want = vec![0.0; m * n / 2];
            for i in 0..m {
                for f in 0..n / 2 {
                    let gate = c[i * n + f / 8 * 16 + f % 8];
                    let up = c[i * n + f / 8 * 16 + 8 + f % 8];
                    want[i * n / 2 + f] = act64(Activation::Silu, gate) * up;
                }
            }
            each_isa(|isa| {
                let mut y = poisoned(m * n / 2);
                let args = LinearArgs::new([m, n, k], &x, &w, &mut y);
                linear(
                    &LinearSpec {
                        epilogue: Epilogue::SwiGlu,
                        ..PLAIN
                    },
                    args,
                )
                .unwrap();
                assert_close(&format!("{isa:?}"), &y, &want, epsilon::<E>(), 1e-4);
            });
        }
    }
    check::<f32>();
    check::<bf16>();
}

/// A fused prologue gives the bits of the norm kernel followed by the plain product.
#[test]
fn prologues_equal_the_separate_kernels() {
    fn check<E: Elem>() {
        let mut rng = rng(4);
        for (m, n, k) in [(1, 32, 72), (5, 17, 33), (9, 40, 128)] {
            let (x, d) = (random::<E>(&mut rng, m * k), random::<E>(&mut rng, m * k));
            let (w, gamma) = (random::<E>(&mut rng, n * k), random::<E>(&mut rng, k));
            each_isa(|_| {
                let (mut sum, mut h) = (poisoned(m * k), poisoned(m * k));
                norm::add_rms_norm(&x, &d, &gamma, 1e-5, k, &mut sum, &mut h).unwrap();
                let (mut fused_sum, mut y) = (poisoned(m * k), poisoned(m * n));
                let prologue = Prologue::AddRmsNorm { eps: 1e-5 };
                let args = LinearArgs {
                    delta: Some(&d),
                    sum: Some(&mut fused_sum),
                    gamma: Some(&gamma),
                    ..LinearArgs::new([m, n, k], &x, &w, &mut y)
                };
                linear(&LinearSpec { prologue, ..PLAIN }, args).unwrap();
                assert_eq!(bits(&fused_sum), bits(&sum));
                assert_eq!(bits(&y), bits(&plain(&h, &w, m, n, k)));

                norm::rms_norm(&x, Some(&gamma), 1e-5, k, &mut h).unwrap();
                let args = LinearArgs {
                    gamma: Some(&gamma),
                    ..LinearArgs::new([m, n, k], &x, &w, &mut y)
                };
                let prologue = Prologue::RmsNorm { eps: 1e-5 };
                linear(&LinearSpec { prologue, ..PLAIN }, args).unwrap();
                assert_eq!(bits(&y), bits(&plain(&h, &w, m, n, k)));
            });
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn lm_head_argmax_equals_logits_then_argmax() {
    fn check<E: Elem>() {
        let mut rng = rng(5);
        let (m, n, k) = (7, 203, 40);
        let (x, mut w) = (random::<E>(&mut rng, m * k), random::<E>(&mut rng, n * k));
        // Equal rows: the first of them must win.
        let copy = w[3 * k..4 * k].to_vec();
        w[150 * k..151 * k].copy_from_slice(&copy);
        w[77 * k..78 * k].copy_from_slice(&copy);
        each_isa(|isa| {
            let (mut fused, mut separate) = (vec![-1; m], vec![-1; m]);
            lm_head_argmax(m, n, k, &x, &w, &mut fused).unwrap();
            rows::argmax(&plain(&x, &w, m, n, k), n, &mut separate).unwrap();
            assert_eq!(fused, separate, "{isa:?}");
        });
        // The copied row scores highest for itself.
        let mut id = [-1];
        lm_head_argmax(1, n, k, &copy, &w, &mut id).unwrap();
        assert_eq!(id, [3]);
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn misfitting_operands_are_refused() {
    let (x, w) = ([0.0f32; 8], [0.0f32; 12]);
    let run = |epilogue, k| {
        let mut y = [0.0f32; 6];
        let args = LinearArgs::new([2, 3, k], &x, &w, &mut y);
        linear(&LinearSpec { epilogue, ..PLAIN }, args).unwrap_err()
    };
    let error = run(Epilogue::None, 5);
    assert_eq!(
        error,
        KernelError::Length {
            kernel: "linear",
            operand: "x",
            got: 8,
            want: 10
        }
    );
    let error = run(Epilogue::Residual, 4);
    assert_eq!(
        error.to_string(),
        "linear: residual has 0 elements, its shape needs 6"
    );
}

/// y of each row alone, and of the rows in calls of `step` rows, has the bits of the one call.
fn invariant<E: Elem>(seed: u64, m: usize, n: usize, k: usize, step: usize) {
    let mut rng = rng(seed);
    let (x, w) = (random::<E>(&mut rng, m * k), random::<E>(&mut rng, n * k));
    for isa in Isa::ALL {
        isa.with(|| {
            let together = bits(&plain(&x, &w, m, n, k));
            for step in [1, step] {
                for first in (0..m).step_by(step) {
                    let rows = step.min(m - first);
                    let part = plain(&x[first * k..][..rows * k], &w, rows, n, k);
                    assert_eq!(
                        bits(&part),
                        &together[first * n..][..rows * n],
                        "{isa:?} rows {first}+{rows}"
                    );
                }
            }
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn rows_do_not_depend_on_their_batch_f32(seed: u64, m in 1usize..40, n in 1usize..70, k in 1usize..150, step in 2usize..20) {
        invariant::<f32>(seed, m, n, k, step);
    }

    #[test]
    fn rows_do_not_depend_on_their_batch_bf16(seed: u64, m in 1usize..40, n in 1usize..70, k in 1usize..150, step in 2usize..20) {
        invariant::<bf16>(seed, m, n, k, step);
    }
}

/// The same across the cache-sized chunks of a long batch.
#[test]
fn rows_do_not_depend_on_chunks() {
    invariant::<f32>(6, 451, 40, 300, 200);
    invariant::<bf16>(7, 451, 40, 300, 193);
}

/// The same where K has several spans, which several rows are packed by.
#[test]
fn rows_do_not_depend_on_spans() {
    invariant::<f32>(8, 25, 37, 1701, 8);
    invariant::<bf16>(9, 25, 37, 2209, 8);
    invariant::<bf16>(10, 230, 16, 4096, 100);
}
