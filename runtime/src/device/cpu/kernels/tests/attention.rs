use half::bf16;
use proptest::prelude::*;
use rand::seq::SliceRandom;

use super::super::attention::{AttentionArgs, AttentionSpec, attention};
use super::super::{CacheShape, Elem, Isa, KernelError, StepMeta};
use super::{assert_close, bits, each_isa, epsilon, poisoned, random, rng, wide};

/// Keys and values of sequences, `[position][kv_head][D]` each, and queries `[position][head][D]`.
struct Sequence<E> {
    k: Vec<E>,
    v: Vec<E>,
    q: Vec<E>,
}

#[derive(Clone, Copy)]
struct Model {
    kv_heads: usize,
    d: usize,
    spec: AttentionSpec,
}

impl Model {
    fn sequence<E: Elem>(&self, seed: u64, len: usize) -> Sequence<E> {
        let mut rng = rng(seed);
        let kv = len * self.kv_heads * self.d;
        let (k, v) = (random(&mut rng, kv), random(&mut rng, kv));
        Sequence {
            k,
            v,
            q: random(&mut rng, kv * self.spec.groups),
        }
    }

    /// One row of the output, in f64.
    fn reference<E: Elem>(&self, s: &Sequence<E>, position: usize, kv_len: usize) -> Vec<f64> {
        let (d, spec) = (self.d, &self.spec);
        let (q, k, v) = (wide(&s.q), wide(&s.k), wide(&s.v));
        let heads = self.kv_heads * spec.groups;
        let mut out = Vec::new();
        for h in 0..heads {
            let kv = h / spec.groups;
            let sees = |p: usize| {
                !spec.causal
                    || (p <= position && spec.window.is_none_or(|w| p + w as usize > position))
            };
            let scores: Vec<f64> = (0..kv_len)
                .map(|p| {
                    let at = (p * self.kv_heads + kv) * d;
                    let qk: f64 = (0..d)
                        .map(|i| q[(position * heads + h) * d + i] * k[at + i])
                        .sum();
                    let s = qk * f64::from(spec.scale);
                    let s = spec
                        .softcap
                        .map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh());
                    if sees(p) { s } else { f64::NEG_INFINITY }
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for i in 0..d {
                let sum: f64 = scores
                    .iter()
                    .enumerate()
                    .map(|(p, s)| (s - max).exp() * v[(p * self.kv_heads + kv) * d + i])
                    .sum();
                out.push(sum / total);
            }
        }
        out
    }

    /// Runs one step: of each sequence the rows at the positions given, all its tokens up to the last row cached.
    /// Slots that no token has are NaN.
    fn step<E: Elem>(
        &self,
        page_size: usize,
        sequences: &[(&Sequence<E>, std::ops::Range<usize>, usize)],
    ) -> Vec<E> {
        let d = self.d;
        let max_pages = sequences
            .iter()
            .map(|s| s.2.div_ceil(page_size))
            .max()
            .unwrap();
        let pages = max_pages * sequences.len() + 3;
        let shape = CacheShape {
            pages,
            kv_heads: self.kv_heads,
            page_size,
            head_dim: d,
        };
        let mut cache = poisoned::<E>(pages * shape.page_len());
        let mut free: Vec<i32> = (0..pages as i32).collect();
        free.shuffle(&mut rng(page_size as u64));
        let (mut positions, mut row_seq, mut cu, mut kv_lens) = (vec![], vec![], vec![0], vec![]);
        let mut table = vec![-1; max_pages * sequences.len()];
        let mut q = Vec::new();
        let q_row = self.kv_heads * self.spec.groups * d;
        for (b, (s, rows, kv_len)) in sequences.iter().enumerate() {
            for p in 0..kv_len.div_ceil(page_size) {
                table[b * max_pages + p] = free.pop().unwrap();
            }
            for p in 0..*kv_len {
                let page = table[b * max_pages + p / page_size] as usize;
                for h in 0..self.kv_heads {
                    let from = (p * self.kv_heads + h) * d;
                    let k = shape.offset(page, false, h, p % page_size);
                    let v = shape.offset(page, true, h, p % page_size);
                    cache[k..k + d].copy_from_slice(&s.k[from..from + d]);
                    cache[v..v + d].copy_from_slice(&s.v[from..from + d]);
                }
            }
            for p in rows.clone() {
                positions.push(p as i32);
                row_seq.push(b as i32);
                q.extend_from_slice(&s.q[p * q_row..][..q_row]);
            }
            cu.push(positions.len() as i32);
            kv_lens.push(*kv_len as i32);
        }
        let meta = StepMeta {
            positions: &positions,
            row_seq: &row_seq,
            cu_seqlens: &cu,
            kv_lens: &kv_lens,
            block_table: &table,
            max_pages,
            page_size,
        };
        let mut out = poisoned(q.len());
        let args = AttentionArgs {
            kv_heads: self.kv_heads,
            head_dim: d,
            q: &q,
            cache: &cache,
            meta,
            out: &mut out,
        };
        attention(&self.spec, args).unwrap();
        out
    }
}

fn spec(d: usize, groups: usize) -> AttentionSpec {
    AttentionSpec {
        scale: 1.0 / (d as f32).sqrt(),
        causal: true,
        window: None,
        softcap: None,
        groups,
    }
}

#[test]
fn attention_matches_the_reference() {
    fn check<E: Elem>() {
        let cases = [
            (16, 1, 3, spec(16, 3), 37, 7),
            (
                32,
                2,
                2,
                AttentionSpec {
                    window: Some(9),
                    ..spec(32, 2)
                },
                50,
                16,
            ),
            (64, 3, 3, spec(64, 3), 70, 64),
            (
                64,
                1,
                4,
                AttentionSpec {
                    causal: false,
                    ..spec(64, 4)
                },
                45,
                32,
            ),
            (
                128,
                1,
                1,
                AttentionSpec {
                    softcap: Some(0.7),
                    ..spec(128, 1)
                },
                33,
                100,
            ),
            (
                80,
                2,
                1,
                AttentionSpec {
                    window: Some(40),
                    softcap: Some(2.0),
                    ..spec(80, 1)
                },
                75,
                3,
            ),
            (
                16,
                1,
                40,
                AttentionSpec {
                    scale: 3.0,
                    ..spec(16, 40)
                },
                40,
                8,
            ),
        ];
        for (i, (d, kv_heads, groups, spec, len, page_size)) in cases.into_iter().enumerate() {
            assert_eq!(groups, spec.groups);
            let model = Model { kv_heads, d, spec };
            let (a, b) = (
                model.sequence::<E>(20 + i as u64, len),
                model.sequence::<E>(40, 9),
            );
            // A prefill from the middle beside a decode row and an empty sequence.
            let (a_rows, b_rows) = (len / 3..len, 8..9);
            let mut want = Vec::new();
            a_rows
                .clone()
                .for_each(|p| want.extend(model.reference(&a, p, len)));
            b_rows
                .clone()
                .for_each(|p| want.extend(model.reference(&b, p, 9)));
            each_isa(|isa| {
                let out = model.step(
                    page_size,
                    &[
                        (&a, a_rows.clone(), len),
                        (&a, 0..0, 0),
                        (&b, b_rows.clone(), 9),
                    ],
                );
                assert_close(
                    &format!("{isa:?} case {i}"),
                    &out,
                    &want,
                    epsilon::<E>(),
                    2e-6,
                );
            });
        }
    }
    check::<f32>();
    check::<bf16>();
}

/// A context of several parts, which a decode step splits over tasks.
#[test]
fn long_contexts_match_the_reference() {
    let model = Model {
        kv_heads: 1,
        d: 32,
        spec: spec(32, 3),
    };
    let s = model.sequence::<bf16>(50, 1300);
    let windowed = Model {
        spec: AttentionSpec {
            window: Some(700),
            ..model.spec
        },
        ..model
    };
    each_isa(|isa| {
        for model in [model, windowed] {
            let out = model.step(64, &[(&s, 1299..1300, 1300)]);
            assert_close(
                &format!("{isa:?}"),
                &out,
                &model.reference(&s, 1299, 1300),
                epsilon::<bf16>(),
                2e-6,
            );
        }
    });
}

/// Whole prompt, chunks of a prompt, decode, with neighbours or alone, any page size: the same bits.
fn invariant<E: Elem>(model: Model, seed: u64, len: usize, chunk: usize, page_sizes: [usize; 2]) {
    let s = model.sequence::<E>(seed, len);
    let other = model.sequence::<E>(seed ^ 1, 21);
    let row = model.kv_heads * model.spec.groups * model.d;
    for isa in Isa::ALL {
        isa.with(|| {
            let whole = bits(&model.step(page_sizes[0], &[(&s, 0..len, len)]));
            for first in (0..len).step_by(chunk) {
                let rows = first..len.min(first + chunk);
                let end = rows.end;
                let out = bits(&model.step(
                    page_sizes[1],
                    &[(&other, 5..21, 21), (&s, rows.clone(), end)],
                ));
                assert_eq!(
                    out[16 * row..],
                    whole[first * row..end * row],
                    "{isa:?} rows {rows:?}"
                );
            }
            for p in [0, len / 2, len - 1] {
                let out = bits(&model.step(page_sizes[1], &[(&s, p..p + 1, p + 1)]));
                assert_eq!(out, whole[p * row..][..row], "{isa:?} decode at {p}");
            }
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn rows_do_not_depend_on_chunks_and_pages(
        seed: u64,
        len in 1usize..150,
        chunk in 1usize..60,
        pages in (1usize..70, 1usize..200),
        heads in (1usize..3, 1usize..5),
        d in prop::sample::select(vec![16usize, 48, 64, 128]),
        window in prop::option::of(1u32..80),
    ) {
        let spec = AttentionSpec { window, ..spec(d, heads.1) };
        let model = Model { kv_heads: heads.0, d, spec };
        invariant::<f32>(model, seed, len, chunk, [pages.0, pages.1]);
        invariant::<bf16>(model, seed, len, chunk, [pages.0, pages.1]);
    }
}

/// The same where contexts have several parts.
#[test]
fn long_rows_do_not_depend_on_chunks_and_pages() {
    let model = Model {
        kv_heads: 1,
        d: 16,
        spec: spec(16, 2),
    };
    invariant::<f32>(model, 60, 1100, 301, [64, 17]);
    let windowed = Model {
        spec: AttentionSpec {
            window: Some(515),
            ..model.spec
        },
        ..model
    };
    invariant::<bf16>(windowed, 61, 1100, 301, [1100, 64]);
}

#[test]
fn unsupported_specs_are_refused() {
    let meta = StepMeta {
        positions: &[],
        row_seq: &[],
        cu_seqlens: &[0],
        kv_lens: &[],
        block_table: &[],
        max_pages: 0,
        page_size: 4,
    };
    let run = |spec: AttentionSpec, head_dim: usize| {
        let cache = vec![0.0f32; 2 * 4 * head_dim];
        attention(
            &spec,
            AttentionArgs {
                kv_heads: 1,
                head_dim,
                q: &[],
                cache: &cache,
                meta,
                out: &mut [],
            },
        )
    };
    assert_eq!(run(spec(16, 1), 16), Ok(()));
    assert!(matches!(
        run(spec(24, 1), 24),
        Err(KernelError::Unsupported { .. })
    ));
    let error = run(
        AttentionSpec {
            causal: false,
            window: Some(3),
            ..spec(16, 1)
        },
        16,
    )
    .unwrap_err();
    assert_eq!(error.to_string(), "attention: a window without causality");
}
