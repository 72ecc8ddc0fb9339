//! The CPU's kernels against the interpreter in f64.

use super::cases::{Rng, each_vector, fill_cache};
use super::compare::{Reference, Tolerance, compare, numbers, rms, tolerance};
use super::twin::{Snapshot, Twin, load_twin};
use super::{Case, Outcome, Report, SelftestError, Subject, extents};
use crate::device::load::Loadable;
use crate::sampling::sample;
use lathe_codegen::plan::CacheSpec;
use lathe_codegen::{Operand, Program, Step};
use lathe_ir::interp::{CacheRef, Interp, KvRows, KvState, StepMeta, Tensor, Value, eval_op};
use lathe_ir::{DType, Op, Sym, SymEnv};
use lathe_ir::{StepInput, Type};

/// Compares every step of a subject's cases, of the families (names of operations) that contain
/// `filter`.
///
/// # Errors
/// The subject cannot be loaded, or the interpreter refuses a step.
pub fn check(
    subject: &Subject,
    seed: u64,
    filter: Option<&str>,
    report: &mut Report,
) -> Result<(), SelftestError> {
    let mut twin = load(subject)?;
    let weights: Vec<Vec<u8>> = (0..subject.plan.weights.len())
        .map(|i| twin.weight(i).to_vec())
        .collect();
    check_twin(subject, &mut *twin, &weights, seed, filter, report)
}

/// [`check`] with a loaded twin; the interpreter takes these weights.
fn check_twin(
    subject: &Subject,
    twin: &mut dyn Twin,
    weights: &[Vec<u8>],
    seed: u64,
    filter: Option<&str>,
    report: &mut Report,
) -> Result<(), SelftestError> {
    for (number, case) in subject.cases.iter().enumerate() {
        let mut rng = Rng::new(seed ^ number as u64);
        let mut before = Vec::new();
        for (i, spec) in subject.plan.caches.iter().enumerate() {
            let cache = fill_cache(spec, case, &subject.options, &mut rng);
            twin.set_cache(i, &cache);
            before.push(cache);
        }
        let Some(program) = subject.plan.program(case.kind) else {
            continue;
        };
        let oracle = Oracle {
            subject,
            program,
            case,
            weights,
            before: &before,
            env: batch_env(case),
        };
        twin.trace(case.kind, &case.batch, &mut |at, snapshot| {
            let step = &program.steps[at];
            let family = step.op.name();
            if filter.is_some_and(|f| !family.contains(f)) {
                return Ok(());
            }
            let outcome = oracle.judge(step, snapshot)?;
            let dtype = step_dtype(step, subject.plan.dtype);
            report.record(family, dtype, || place(subject, case, program, at), outcome);
            Ok(())
        })?;
    }
    Ok(())
}

/// Loads a subject's CPU twin.
pub(crate) fn load(subject: &Subject) -> Result<Box<dyn Twin>, SelftestError> {
    let model = Loadable {
        plan: &subject.plan,
        weights: &subject.weights,
        vocab: subject.vocab,
    };
    Ok(load_twin(model, subject.options)?)
}

/// The sizes of a batch.
pub(crate) fn batch_env(case: &Case) -> SymEnv {
    SymEnv::new(&[
        (Sym::T, case.batch.tokens_len() as i64),
        (Sym::B, case.batch.sequences() as i64),
        (Sym::R, case.batch.rows.len() as i64),
    ])
}

/// The element type of a step's row in the report: that of its first float operand, else of its result.
pub(crate) fn step_dtype(step: &Step, default: DType) -> DType {
    let mut operands = step.tensors().map(|(_, t)| t.dtype);
    let float = operands.find(|d| d.is_float());
    let result = || step.result_type(0).map(|t| t.dtype);
    float.or_else(result).unwrap_or(default)
}

/// Where a case is, for readers.
pub(crate) fn place(subject: &Subject, case: &Case, program: &Program, at: usize) -> String {
    let step = &program.steps[at];
    let (name, label) = (&subject.name, &case.label);
    format!(
        "{name}, {label}: step {at}, {} of {}",
        step.op.name(),
        step.prov.path
    )
}

struct Oracle<'a> {
    subject: &'a Subject,
    program: &'a Program,
    case: &'a Case,
    weights: &'a [Vec<u8>],
    /// The caches before the step's rows were appended.
    before: &'a [Vec<u8>],
    env: SymEnv,
}

impl Oracle<'_> {
    fn judge(&self, step: &Step, snapshot: &dyn Snapshot) -> Result<Outcome, SelftestError> {
        let fail = |e: String| SelftestError::Cpu(format!("{}: {e}", step.op.name()));
        let no_weights = |_: &lathe_ir::WeightRef| Err("weights are operands here".to_string());
        let mut state = Interp::<f64>::new(self.env, &no_weights);
        let b = &self.case.batch;
        state.step = Some(StepMeta {
            cu_seqlens: b.cu_seqlens.iter().map(|&n| n as usize).collect(),
            past: self.case.past(),
        });
        let pick = |i: usize, row: &[f64]| {
            let row: Vec<f32> = row.iter().map(|&v| v as f32).collect();
            let s = b.samplers.get(i).map(|s| (s.params, s.request, s.position));
            let (params, request, position) = s.unwrap_or_default();
            sample(&row, &params, request, position).map_or(-1, i64::from)
        };
        state.sampler = Some(&pick);
        let mut types = step.types.iter();
        let values = step.operands.try_map(|operand| {
            let ty = types.next().ok_or("an operand without a type")?;
            self.operand(operand, ty, snapshot, &mut state)
        });
        let values = values.map_err(fail)?;
        let size = match values.iter().next() {
            Some(Value::Float(t)) => rms(&t.data),
            _ => 0.0,
        };
        let refs = values.map(|v| v);
        let out = eval_op(&step.op, refs, &step.ty, &mut state).map_err(|e| fail(e.to_string()))?;
        let parts = match out {
            Value::Tuple(parts) => parts,
            one => vec![one],
        };
        let mut outcome = Outcome::default();
        for (i, part) in parts.iter().enumerate() {
            let (Some(Some(v)), Some(ty)) = (step.results.get(i), step.result_type(i)) else {
                continue;
            };
            let want = flat(part);
            let row = extents(ty, &self.env).last().copied().unwrap_or(1);
            let longest = self.case.longest();
            let mut tol = tolerance(step, ty.dtype, &self.env, longest, size, Reference::Exact);
            tol.relative += self.angle_error(&step.op);
            let found = compare(&want, snapshot.value(*v), ty.dtype, row, tol);
            outcome = outcome.and(found);
        }
        for operand in &step.operands {
            if let Operand::Cache(c) = operand {
                let found = self.judge_cache(step, *c, &snapshot.cache(*c), &state);
                outcome = outcome.and(found);
            }
        }
        Ok(outcome)
    }

    /// The appended rows, and that nothing else of the cache has changed.
    fn judge_cache(
        &self,
        step: &Step,
        cache: usize,
        after: &[u8],
        state: &Interp<'_, f64>,
    ) -> Outcome {
        let spec = &self.subject.plan.caches[cache];
        let Some(rows) = state.caches.get(&spec.layer) else {
            return Outcome::exact(Some("the interpreter has no cache".into()));
        };
        let past = self.case.past();
        let lens = &self.case.batch.kv_lens;
        let page_size = self.subject.options.page_size;
        let (d, size) = (spec.head_dim as usize, spec.dtype.size());
        let stride = spec.kv_heads as usize * d;
        let mut want = Vec::new();
        for (b, seq) in rows.seqs.iter().enumerate() {
            for p in past[b]..lens[b] as usize {
                want.extend_from_slice(&seq.k[p * stride..][..stride]);
                want.extend_from_slice(&seq.v[p * stride..][..stride]);
            }
        }
        let (mut found, mut rest) = (Vec::new(), after.to_vec());
        each_vector(
            spec,
            &self.case.batch,
            page_size,
            |b| past[b]..lens[b] as usize,
            |at| {
                let place = at * size..(at + d) * size;
                found.extend_from_slice(&after[place.clone()]);
                rest[place.clone()].copy_from_slice(&self.before[cache][place]);
            },
        );
        if rest != self.before[cache] {
            return Outcome::exact(Some("a cached row that is not of this step changed".into()));
        }
        let mut tol = append_tolerance(step, spec);
        tol.relative += self.angle_error(&step.op);
        compare(&want, &found, spec.dtype, d, tol)
    }

    /// Devices round the angle `position · frequency` to f32 as Hugging Face does, the interpreter does
    /// not: half a spacing of the largest angle, with room for queries and keys to add up.
    fn angle_error(&self, op: &Op) -> f64 {
        let rotates = match op {
            Op::Rope(_) => true,
            Op::AttnQkv(spec) => spec.rope.is_some(),
            _ => false,
        };
        match rotates {
            true => 4.0 * self.case.longest() as f64 / 16_777_216.0,
            false => 0.0,
        }
    }

    fn operand(
        &self,
        operand: &Operand,
        ty: &Type,
        snapshot: &dyn Snapshot,
        state: &mut Interp<'_, f64>,
    ) -> Result<Value<f64>, String> {
        if let Operand::Cache(c) = *operand {
            let spec = self.subject.plan.caches[c];
            state.caches.insert(spec.layer, self.history(c));
            return Ok(Value::Cache(CacheRef {
                layer: spec.layer,
                kv_heads: spec.kv_heads as usize,
                head_dim: spec.head_dim as usize,
            }));
        }
        let Some(ty) = ty.as_tensor() else {
            return Err("an operand is no tensor".to_string());
        };
        let shape = extents(ty, &self.env);
        let ints = |v: &[i32]| v.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let b = &self.case.batch;
        let data = match operand {
            Operand::Value(v) => numbers(snapshot.value(*v), ty.dtype),
            Operand::Weight(w) => numbers(&self.weights[*w], ty.dtype),
            Operand::Table(t) => {
                let data = self.subject.plan.tables[*t].data.iter();
                data.map(|x| f64::from(x.get() as f32)).collect()
            }
            Operand::Const { value, dtype } => vec![rounded(value.get(), *dtype)],
            Operand::Input(n) => match self.program.inputs[*n].0 {
                StepInput::Tokens => ints(&b.tokens),
                StepInput::Positions => ints(&b.positions),
                StepInput::Rows => ints(&b.rows),
            },
            Operand::Cache(_) => return Err("a cache is no tensor".to_string()),
        };
        Ok(match ty.dtype {
            DType::Bool => {
                let data = data.into_iter().map(|v| v != 0.0).collect();
                Value::Bool(Tensor::new(shape, data))
            }
            d if d.is_float() => Value::Float(Tensor::new(shape, data)),
            _ => {
                let data = data.into_iter().map(|v| v as i64).collect();
                Value::Int(Tensor::new(shape, data))
            }
        })
    }

    /// The cached rows of every sequence before the step.
    fn history(&self, cache: usize) -> KvState<f64> {
        let spec = &self.subject.plan.caches[cache];
        let (d, size) = (spec.head_dim as usize, spec.dtype.size());
        let past = self.case.past();
        let stride = spec.kv_heads as usize * d;
        let mut flat = Vec::new();
        each_vector(
            spec,
            &self.case.batch,
            self.subject.options.page_size,
            |b| 0..past[b],
            |at| {
                let bytes = &self.before[cache][at * size..][..d * size];
                flat.extend(numbers(bytes, spec.dtype));
            },
        );
        // Keys of all heads, then values of all heads, of each row.
        let mut rows = flat.chunks_exact(2 * stride);
        let seqs = past.iter().map(|&n| {
            let mut seq = KvRows::default();
            for row in rows.by_ref().take(n) {
                seq.k.extend_from_slice(&row[..stride]);
                seq.v.extend_from_slice(&row[stride..]);
            }
            seq
        });
        KvState {
            seqs: seqs.collect(),
        }
    }
}

/// The tolerance for rows that are appended to a cache: rotated, after a norm of a head if there is one.
pub(crate) fn append_tolerance(step: &Step, spec: &CacheSpec) -> Tolerance {
    let normed = matches!(&step.op, Op::AttnQkv(s) if s.head_norm.is_some());
    let length = if normed { spec.head_dim as usize } else { 2 };
    Tolerance {
        relative: super::compare::bound(1 + usize::from(normed), spec.dtype, length),
        floor: 0.0,
    }
}

fn rounded(v: f64, dtype: DType) -> f64 {
    use lathe_ir::interp::Float;
    match dtype {
        DType::F32 => f64::from(v as f32),
        d if d.is_float() => v.round_to(d),
        _ => v,
    }
}

fn flat(value: &Value<f64>) -> Vec<f64> {
    match value {
        Value::Float(t) => t.data.clone(),
        Value::Int(t) => t.data.iter().map(|&v| v as f64).collect(),
        Value::Bool(t) => t.data.iter().map(|&v| f64::from(u8::from(v))).collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::cases::{Shape, case};
    use super::*;
    use crate::device::load::{LoadOptions, expected_tensors};
    use crate::weights::RandomWeights;
    use lathe_codegen::{Programs, lower};
    use lathe_ir::import::{HfConfig, ImportOptions, import};
    use lathe_passes::egraph::cost::DeviceModel;
    use lathe_passes::pipeline::{PassConfig, compile};
    use std::path::Path;

    fn subject(shape: &Shape) -> Subject {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/qwen3");
        let options = ImportOptions {
            dtype: DType::F32,
            max_seq_len: None,
        };
        let model = import(&HfConfig::from_file(&folder).unwrap(), &options).unwrap();
        let compiled = compile(&model.graph, &PassConfig::new(DeviceModel::CPU)).unwrap();
        let programs = Programs {
            decode: compiled.steps.decode.as_ref(),
            general: compiled.steps.general.as_ref(),
            full: None,
        };
        let options = LoadOptions {
            max_tokens: 64,
            max_rows: 8,
            max_sequences: 8,
            max_seq_len: 64,
            page_size: 16,
            pages: 24,
        };
        let vocab = model.arch.vocab as usize;
        Subject {
            name: "qwen3".into(),
            plan: lower("qwen3", DType::F32, &programs).unwrap(),
            weights: RandomWeights::new(&expected_tensors(&model.arch.weights), 1),
            vocab,
            per_op: false,
            options,
            cases: vec![case(shape, false, true, vocab, &options, &mut Rng::new(2))],
        }
    }

    #[test]
    fn kernels_agree_with_the_interpreter() {
        for shape in [
            Shape::Decode(5),
            Shape::General(vec![(0, 9), (21, 3), (5, 1)]),
        ] {
            let mut report = Report::default();
            check(&subject(&shape), 3, None, &mut report).unwrap();
            assert_eq!(report.failures, []);
            assert!(report.covers("attn_qkv") && report.covers("gemm"));
        }
    }

    #[test]
    fn one_wrong_weight_in_a_matrix_is_caught_where_it_is_used() {
        let subject = subject(&Shape::Decode(5));
        let mut twin = load(&subject).unwrap();
        let mut weights: Vec<Vec<u8>> = (0..subject.plan.weights.len())
            .map(|i| twin.weight(i).to_vec())
            .collect();
        let program = subject
            .plan
            .program(lathe_codegen::ProgramKind::Decode)
            .unwrap();
        let gemm = program
            .steps
            .iter()
            .find(|s| matches!(s.op, Op::Gemm(_)))
            .unwrap();
        let Some(&Operand::Weight(w)) = gemm.get(lathe_ir::ops::gemm::W) else {
            panic!("the first GEMM reads a weight")
        };
        weights[w][..4].copy_from_slice(&0.5f32.to_le_bytes());
        let mut report = Report::default();
        check_twin(&subject, &mut *twin, &weights, 3, None, &mut report).unwrap();
        assert_eq!(report.totals().1, 1, "{:?}", report.failures);
        assert_eq!(report.failures[0].family, "gemm");
        assert!(report.failures[0].what.contains("element 0 of row"));
    }

    #[test]
    fn a_filter_leaves_only_its_family() {
        let mut report = Report::default();
        check(&subject(&Shape::Decode(2)), 3, Some("attn"), &mut report).unwrap();
        assert!(!report.rows.is_empty());
        assert!(report.rows.keys().all(|(name, _)| name.contains("attn")));
    }
}
