//! Programs lowered for every bucket that a loaded model may run in: once, before anything is on the
//! device. Their workspaces are a part of the memory plan, their kernels are what a warm-up compiles.

use super::CudaError;
use super::buckets::{self, DecodeBuckets};
use crate::device::load::LoadOptions;
use crate::device::step::StepBatch;
use lathe_codegen::cuda::{
    Choices, CudaOptions, CudaProgram, KernelSource, Sampling, Sizes, Workspace, lower_tuned,
};
use lathe_codegen::{Plan, Program, ProgramKind};
use lathe_ir::KernelLimits;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// Which program, for which sizes, with which sampling.
pub(crate) type Key = (ProgramKind, Sizes, Sampling);

/// Most rows of a step that may keep its logits to itself.
const FUSED_SAMPLING_ROWS: usize = KernelLimits::HOPPER.prologue_rows;

/// The key of a step; steps of more rows keep their logits whatever is asked for.
pub(crate) fn key(kind: ProgramKind, sizes: Sizes, sampling: Sampling) -> Key {
    let sampling = match sampling {
        Sampling::GreedyOnly if sizes.r > FUSED_SAMPLING_ROWS => Sampling::Greedy,
        s => s,
    };
    (kind, sizes, sampling)
}

/// How the tokens of a batch are chosen, and whether logits are wanted beside them.
pub(crate) fn sampling(batch: &StepBatch, logits: bool) -> Sampling {
    let greedy = batch.samplers.iter().all(|s| s.params.is_greedy());
    match (greedy, logits) {
        (false, _) => Sampling::Params,
        (true, true) => Sampling::Greedy,
        (true, false) => Sampling::GreedyOnly,
    }
}

/// Lowered programs that no step has used yet.
#[derive(Debug)]
pub(super) struct Programs {
    lowered: BTreeMap<Key, CudaProgram>,
    /// Sizes of decode steps.
    pub(super) decode: DecodeBuckets,
}

impl Programs {
    /// Lowers the plan for all buckets.
    ///
    /// # Errors
    /// A step has no kernel.
    pub(super) fn lower(
        plan: &Plan,
        options: &LoadOptions,
        kernels: CudaOptions,
        decode: DecodeBuckets,
        choices: &Choices,
    ) -> Result<Programs, CudaError> {
        let wanted: Vec<(&Program, Key)> = plan
            .programs
            .iter()
            .flat_map(|program| {
                let keys = keys(program.kind, options, &decode);
                keys.into_iter().map(move |key| (program, key))
            })
            .collect();
        let lowered = wanted
            .into_par_iter()
            .map(|(program, key)| {
                let (_, sizes, sampling) = key;
                let lowered = lower_tuned(plan, program, sizes, sampling, kernels, choices)?;
                Ok((key, lowered))
            })
            .collect::<Result<_, CudaError>>()?;
        Ok(Programs { lowered, decode })
    }

    /// The largest workspace of each name.
    pub(super) fn workspaces(&self) -> Vec<Workspace> {
        let mut all: BTreeMap<&str, Workspace> = BTreeMap::new();
        for w in self.lowered.values().flat_map(|p| &p.workspaces) {
            let entry = all.entry(&w.name).or_insert_with(|| w.clone());
            entry.bytes = entry.bytes.max(w.bytes).next_multiple_of(4);
        }
        all.into_values().collect()
    }

    /// The distinct kernels of all programs.
    pub(super) fn kernels(&self) -> Vec<KernelSource> {
        let mut known = BTreeSet::new();
        let all = self.lowered.values().flat_map(|p| &p.kernels);
        all.filter(|k| known.insert(k.code())).cloned().collect()
    }

    /// The program of a key: taken out, or lowered now if there was none.
    ///
    /// # Errors
    /// The plan has no such program, or a step has no kernel.
    pub(super) fn take(
        &mut self,
        plan: &Plan,
        key: Key,
        kernels: CudaOptions,
        choices: &Choices,
    ) -> Result<CudaProgram, CudaError> {
        if let Some(lowered) = self.lowered.remove(&key) {
            return Ok(lowered);
        }
        let program = plan.program(key.0).ok_or(CudaError::NoStepProgram)?;
        Ok(lower_tuned(plan, program, key.1, key.2, kernels, choices)?)
    }
}

/// What programs are lowered for: together they have every kernel and the largest workspaces of
/// steps that do not ask for logits.
pub(super) fn keys(
    kind: ProgramKind,
    options: &LoadOptions,
    decode: &DecodeBuckets,
) -> BTreeSet<Key> {
    let sizes = all_sizes(kind, options, decode);
    let most = sizes.iter().copied().max_by_key(|s| (s.r, s.t));
    let mut keys = BTreeSet::new();
    for s in sizes {
        keys.insert(key(kind, s, Sampling::GreedyOnly));
        // Where logits are kept anyway, only the sampling kernel differs.
        if s.r <= FUSED_SAMPLING_ROWS || Some(s) == most {
            keys.insert(key(kind, s, Sampling::Params));
        }
    }
    keys
}

/// The steps that a warm-up has kernels for, by sizes and sampling: every bucket that a program may run
/// in within the limits, as far as kernels differ.
pub fn steps(kind: ProgramKind, options: &LoadOptions) -> Vec<(Sizes, Sampling)> {
    let decode = DecodeBuckets::new(options.max_sequences, None);
    let keys = keys(kind, options, &decode).into_iter();
    keys.map(|(_, sizes, sampling)| (sizes, sampling)).collect()
}

/// Every bucket that a program may run in, as far as kernels differ.
fn all_sizes(kind: ProgramKind, options: &LoadOptions, decode: &DecodeBuckets) -> Vec<Sizes> {
    let rows = options.max_rows.max(options.max_sequences);
    match kind {
        ProgramKind::Decode => decode.all().into_iter().map(Sizes::decode).collect(),
        ProgramKind::General => {
            let mut sizes = buckets::all_general(options.max_tokens, options.max_sequences, rows);
            // Kernels change with the number of sampled rows too.
            let most = buckets::general(options.max_tokens, options.max_sequences, rows);
            let fewer = (0..usize::BITS).map(|i| 1 << i).take_while(|&r| r < most.r);
            sizes.extend(fewer.map(|r| Sizes { r, ..most }));
            sizes
        }
        ProgramKind::Full | ProgramKind::Once => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_plans::{kernel_options, plan};
    use super::*;
    use lathe_codegen::cuda::lower_program;
    use lathe_ir::DType;

    fn options() -> LoadOptions {
        LoadOptions {
            max_tokens: 700,
            max_rows: 24,
            max_sequences: 24,
            max_seq_len: 1024,
            page_size: 64,
            pages: 16,
        }
    }

    /// No step without logits meets a kernel or a workspace that the load did not know of.
    #[test]
    fn every_step_is_foreseen() {
        for (name, dtype, asked) in [
            ("configs/llama-3.2-1b", DType::BF16, None),
            ("golden/gemma2", DType::BF16, Some(&[3, 20][..])),
            ("golden/falcon", DType::F32, None),
        ] {
            let plan = plan(name, dtype);
            let (options, kernels) = (options(), kernel_options());
            let decode = DecodeBuckets::new(options.max_sequences, asked);
            let none = Choices::default();
            let programs = Programs::lower(&plan, &options, kernels, decode, &none).unwrap();
            let known: BTreeSet<String> = programs
                .kernels()
                .iter()
                .map(|k| k.code().to_owned())
                .collect();
            let spaces: BTreeMap<String, usize> = programs
                .workspaces()
                .into_iter()
                .map(|w| (w.name, w.bytes))
                .collect();
            let mut steps = BTreeSet::new();
            for sampling in [Sampling::GreedyOnly, Sampling::Params] {
                for b in 1..=options.max_sequences {
                    let sizes = Sizes::decode(programs.decode.of(b));
                    steps.insert(key(ProgramKind::Decode, sizes, sampling));
                    for t in (b..=options.max_tokens).step_by(61) {
                        for r in 0..=b {
                            let sizes = buckets::general(t, b, r);
                            steps.insert(key(ProgramKind::General, sizes, sampling));
                        }
                    }
                }
            }
            assert!(steps.len() > 100);
            for key in steps {
                let program = plan.program(key.0).unwrap();
                let lowered =
                    lower_tuned(&plan, program, key.1, key.2, kernels, &Choices::default())
                        .unwrap();
                for k in &lowered.kernels {
                    assert!(known.contains(k.code()), "{name}: {} of {key:?}", k.name);
                }
                for w in &lowered.workspaces {
                    assert!(spaces[&w.name] >= w.bytes, "{name}: {} of {key:?}", w.name);
                }
            }
        }
    }

    #[test]
    fn a_program_is_lowered_once_and_the_same_later() {
        let plan = plan("golden/qwen3", DType::BF16);
        let (options, kernels) = (options(), kernel_options());
        let decode = DecodeBuckets::new(options.max_sequences, None);
        let none = Choices::default();
        let mut programs = Programs::lower(&plan, &options, kernels, decode, &none).unwrap();
        let sizes = Sizes { t: 8, b: 8, r: 8 };
        let key = key(ProgramKind::Decode, sizes, Sampling::GreedyOnly);
        assert_eq!(key.2, Sampling::Greedy);
        let count = programs.lowered.len();
        let first = programs.take(&plan, key, kernels, &none).unwrap();
        assert_eq!(programs.lowered.len(), count - 1);
        assert_eq!(programs.take(&plan, key, kernels, &none).unwrap(), first);
    }

    /// Rows of one new token go to the decode kernel where a step may have many of them.
    #[test]
    fn mixed_steps_attend_in_two_kernels() {
        let plan = plan("configs/llama-3.1-8b", DType::BF16);
        let program = plan.program(ProgramKind::General).unwrap();
        for (b, two) in [(1, false), (8, false), (16, true), (64, true)] {
            let sizes = buckets::general(512, b, b);
            let options = kernel_options();
            let lowered =
                lower_program(&plan, program, sizes, Sampling::GreedyOnly, options).unwrap();
            let launches = |part: &str| {
                let of = |l: &&lathe_codegen::cuda::Launch| {
                    lowered.kernels[l.kernel].name.contains(part)
                };
                lowered.launches.iter().filter(of).count()
            };
            assert_eq!(launches("attn_prefill"), 32, "{b} sequences");
            assert_eq!(
                launches("_ragged"),
                if two { 32 } else { 0 },
                "{b} sequences"
            );
        }
    }
}
