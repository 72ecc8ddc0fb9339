//! The models of `lathe selftest`: small, and between them with every kernel family of the devices.

use crate::frontend;
use anyhow::Context;
use lathe_codegen::Plan;
use lathe_ir::DType;
use lathe_ir::import::{HfConfig, ImportOptions, Sample, families, import};
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{PassConfig, compile};
use lathe_runtime::device::load::{LoadOptions, expected_tensors};
use lathe_runtime::selftest::cases::{Rng, case};
use lathe_runtime::selftest::{Case, Shape, Subject};
use lathe_runtime::weights::RandomWeights;

/// How much is tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Seconds: a few models and sizes.
    Quick,
    /// Everything.
    Full,
}

/// Longest sequence of all subjects.
const MAX_SEQ_LEN: usize = 768;

/// The sizes of a subject.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sizes {
    /// All odd sizes and page layouts.
    All,
    /// A few.
    Some,
    /// So few that the interpreter is through with them in a second.
    Few,
}

/// Features of a head beside those of the samples: between them no multiple of 8 or 16, and 16 times what is no power
/// of two.
const HEADS: [u32; 10] = [24, 40, 48, 72, 80, 96, 100, 112, 160, 192];

/// A model in one element type, with or without the stage `fuse`.
struct Variant {
    model: &'static Sample,
    /// Features of a head, if they are not the sample's.
    head: Option<u32>,
    dtype: DType,
    fused: bool,
    sizes: Sizes,
}

fn variants(slow: bool, effort: Effort) -> Vec<Variant> {
    let variant = |model, dtype, fused, sizes| Variant {
        model,
        head: None,
        dtype,
        fused,
        sizes,
    };
    let samples = families().iter().flat_map(|family| family.samples);
    let (f32, bf16) = (DType::F32, DType::BF16);
    let few = if slow { Sizes::Few } else { Sizes::Some };
    if effort == Effort::Quick {
        let quick = |model: &'static Sample| {
            Some(match model.name {
                "llama-d64" | "gemma2" => variant(model, bf16, true, few),
                "qwen3" => variant(model, f32, true, few),
                "gpt2" => variant(model, bf16, false, few),
                "qwen2" => variant(model, f32, false, few),
                _ => return None,
            })
        };
        return samples.filter_map(quick).collect();
    }
    let mut all = Vec::new();
    for model in samples {
        let core = matches!(model.name, "llama-d64" | "llama-d128");
        let most = if core && !slow { Sizes::All } else { few };
        all.push(variant(model, bf16, true, most));
        all.push(variant(model, f32, true, few));
        all.push(variant(model, bf16, false, few));
        all.push(variant(model, f32, false, Sizes::Few));
        // Rotated, with head norms, and with neither.
        if matches!(model.name, "llama-d64" | "qwen3" | "gpt2") {
            for head in HEADS {
                all.extend([bf16, f32].map(|dtype| Variant {
                    head: Some(head),
                    ..variant(model, dtype, true, Sizes::Few)
                }));
            }
        }
    }
    all
}

impl Variant {
    fn name(&self) -> String {
        let head = self.head.map(|d| format!(" d{d}")).unwrap_or_default();
        let fused = if self.fused { "" } else { " unfused" };
        format!("{}{head} {}{fused}", self.model.name, self.dtype)
    }

    fn config(&self) -> anyhow::Result<HfConfig> {
        let Sample { name, config } = self.model;
        let Some(head) = self.head else {
            return Ok(HfConfig::parse(name, config)?);
        };
        let mut keys: serde_json::Map<String, serde_json::Value> = serde_json::from_str(config)?;
        match keys.get("n_head").and_then(serde_json::Value::as_u64) {
            Some(heads) => keys.insert("n_embd".into(), (heads * u64::from(head)).into()),
            None => keys.insert("head_dim".into(), head.into()),
        };
        let text = serde_json::to_string(&keys)?;
        Ok(HfConfig::parse(name, &text)?)
    }
}

/// A page layout with its shapes: `(tokens a page, pages, shapes)`.
fn layouts(sizes: Sizes) -> Vec<(usize, usize, Vec<Shape>)> {
    let decode = |sizes: &[usize]| sizes.iter().map(|&n| Shape::Decode(n)).collect::<Vec<_>>();
    let general = |chunks: &[(usize, usize)]| Shape::General(chunks.to_vec());
    let ragged = general(&[(0, 1), (0, 7), (0, 33), (0, 64), (0, 129), (0, 2)]);
    let mixed = general(&[(37, 1), (0, 200), (64, 65), (5, 1), (130, 70), (700, 3)]);
    let tiny = general(&[(0, 3), (17, 2)]);
    // Many sequences with a single row each have a kernel of their own.
    let many: Vec<(usize, usize)> = (0..21)
        .map(|i| match i % 5 {
            3 => (11 * i, 1 + 6 * i),
            _ => (13 * i, 1),
        })
        .collect();
    let many = Shape::General(many);
    let with = |mut shapes: Vec<Shape>, more: &[&Shape]| {
        shapes.extend(more.iter().map(|s| (*s).clone()));
        shapes
    };
    match sizes {
        Sizes::All => vec![
            (
                64,
                300,
                with(
                    decode(&[1, 2, 3, 4, 5, 7, 13, 33, 64, 65, 100, 129, 200]),
                    &[
                        &general(&[(0, 8)]),
                        &general(&[(0, 700)]),
                        &ragged,
                        &mixed,
                        &tiny,
                        &many,
                    ],
                ),
            ),
            (16, 600, with(decode(&[3, 65]), &[&mixed, &tiny])),
            (MAX_SEQ_LEN, 8, with(decode(&[1, 7]), &[&mixed])),
        ],
        Sizes::Some => vec![(
            16,
            600,
            with(
                decode(&[1, 2, 3, 5, 33, 65, 129]),
                &[&ragged, &mixed, &tiny, &many],
            ),
        )],
        Sizes::Few => vec![(
            16,
            60,
            with(
                decode(&[1, 3, 7]),
                &[
                    &general(&[(0, 1), (0, 19), (0, 33)]),
                    &general(&[(5, 1), (0, 17), (40, 9)]),
                ],
            ),
        )],
    }
}

/// How often a step of so many rows is repeated with other kernels for its GEMMs, so that each of the skinny kernel's
/// forms and each tile has its turn in some of them.
fn gemm_rounds(rows: usize) -> Option<usize> {
    match rows {
        33 | 200 | 340 => Some(18),
        _ => None,
    }
}

fn plan(
    variant: &Variant,
    device: DeviceModel,
    seed: u64,
) -> anyhow::Result<(Plan, RandomWeights, usize)> {
    let (name, config) = (variant.model.name, variant.config()?);
    let options = ImportOptions {
        dtype: variant.dtype,
        max_seq_len: None,
    };
    let model = import(&config, &options)?;
    let mut passes = PassConfig::new(device);
    if !variant.fused {
        passes = passes.disable(&["fuse"])?;
    }
    let compiled = compile(&model.graph, &passes)?;
    let plan = frontend::plan(name, variant.dtype, &compiled)?;
    let weights = RandomWeights::new(&expected_tensors(&model.arch.weights), seed);
    Ok((plan, weights, model.arch.vocab as usize))
}

/// The subjects for a device; fewer and smaller ones where the reference is slow.
///
/// # Errors
/// A built-in model does not compile.
pub fn subjects(
    device: &DeviceModel,
    slow: bool,
    effort: Effort,
    seed: u64,
) -> anyhow::Result<Vec<Subject>> {
    let mut subjects = Vec::new();
    for variant in variants(slow, effort) {
        let name = variant.name();
        let (plan, weights, vocab) =
            plan(&variant, device.clone(), seed).with_context(|| name.clone())?;
        for (page_size, pages, shapes) in layouts(variant.sizes) {
            let options = LoadOptions {
                max_tokens: 1024,
                max_rows: 256,
                max_sequences: 256,
                max_seq_len: MAX_SEQ_LEN,
                page_size,
                pages,
            };
            let mut rng = Rng::new(seed ^ subjects.len() as u64);
            let mut cases: Vec<Case> = shapes
                .iter()
                .enumerate()
                .map(|(i, shape)| {
                    // Small greedy steps once with their logits; some draw their tokens.
                    let (draws, logits) = (i % 3 == 1 && !slow, i % 2 == 1);
                    case(shape, draws, logits, vocab, &options, &mut rng)
                })
                .collect();
            if matches!(variant.sizes, Sizes::All) && page_size == 64 {
                let more = cases.iter().filter_map(|c| {
                    let rounds = gemm_rounds(c.batch.tokens_len())?;
                    Some((0..rounds).map(|number| c.clone().with_gemms(number)))
                });
                let more: Vec<Case> = more.flatten().collect();
                cases.extend(more);
            }
            subjects.push(Subject {
                name: name.clone(),
                plan: plan.clone(),
                weights: weights.clone(),
                vocab,
                per_op: !variant.fused,
                options,
                cases,
            });
        }
    }
    Ok(subjects)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_codegen::cuda::{
        CudaOptions, FAMILIES, Sampling, Sizes as Bucket, Variant, gemm_keys, lower_tuned,
    };
    use std::collections::BTreeSet;

    /// Between them the models use every kernel family, so that a full run may insist on it, and every variant of
    /// the GEMMs. The kernel that hands tokens on is no step of a program.
    #[test]
    fn every_family_of_kernels_has_a_subject() {
        let subjects = subjects(&DeviceModel::H100, false, Effort::Full, 0);
        let subjects = subjects.unwrap_or_else(|e| panic!("{e:#}"));
        let (mut chosen, mut possible) = (BTreeSet::new(), BTreeSet::new());
        let mut missing: Vec<&str> = FAMILIES.into_iter().filter(|f| *f != "tokens").collect();
        for subject in &subjects {
            let options = CudaOptions {
                pdl: true,
                sms: 132,
                page_size: subject.options.page_size,
                max_pages: MAX_SEQ_LEN.div_ceil(subject.options.page_size),
                plain: false,
                per_op: subject.per_op,
            };
            for case in &subject.cases {
                let (t, b) = (case.batch.tokens_len(), case.batch.sequences());
                let sizes = Bucket {
                    t,
                    b,
                    r: case.batch.rows.len(),
                };
                let program = subject.plan.program(case.kind).unwrap();
                let sampling = Sampling::GreedyOnly;
                let choices = case
                    .choices(&subject.plan, sizes, sampling, options)
                    .unwrap();
                choices.iter().for_each(|(_, v)| {
                    chosen.insert(v.to_string());
                });
                let keys = gemm_keys(&subject.plan, program, sizes, sampling, options).unwrap();
                if case.gemms.is_none() {
                    let heuristics = keys.keys().map(|key| Variant::heuristic(key, 132));
                    chosen.extend(heuristics.map(|v| v.to_string()));
                }
                let all = keys.keys().flat_map(|key| Variant::all(key, 132));
                possible.extend(all.map(|v| v.to_string()));
                let lowered =
                    lower_tuned(&subject.plan, program, sizes, sampling, options, &choices)
                        .unwrap_or_else(|e| panic!("{}: {e}", subject.name));
                missing.retain(|f| lowered.kernels.iter().all(|k| k.family != *f));
            }
        }
        assert!(missing.is_empty(), "{missing:?}");
        let never: Vec<_> = possible.difference(&chosen).collect();
        assert!(
            never.is_empty() && chosen.len() > 60,
            "{never:?} of {}",
            chosen.len()
        );
    }
}
