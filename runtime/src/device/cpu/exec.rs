//! Executing the steps of a program: dispatch from operations to kernels.

use super::chain;
use super::kernels::attention::{AttentionArgs, AttentionSpec, attention};
use super::kernels::linear::{Epilogue, LinearArgs, LinearSpec, Prologue, linear};
use super::kernels::norm::{add_rms_norm, rms_norm};
use super::kernels::rope::{RopeAppend, rope_append};
use super::kernels::rows::{argmax, embed};
use super::kernels::{Elem, KernelError, StepMeta};
use super::memory::padded_head;
use super::plain;
use super::run::{Run, is_elem};
use crate::device::step::{StepError, StepOutput};
use crate::sampling::sample;
use lathe_codegen::{Operand, Step};
use lathe_ir::ops::gemm;
use lathe_ir::ops::{AddRms, AttnQkv, AttnStep, Gemm, Linear, RmsNorm, Sample, Select};
use lathe_ir::ops::{X, addrms, attn_qkv, attn_step, embedding, rmsnorm, select};
use lathe_ir::{AttnSpec, Op};
use lathe_ir::{Output, Slot, StepInput};
use std::time::Instant;

impl<'a, E: Elem> Run<'a, E> {
    /// Runs all steps and reads the results. With `seconds`, the time of each step is added to it.
    pub(super) fn all(
        &mut self,
        logits: bool,
        mut seconds: Option<&mut Vec<f64>>,
    ) -> Result<StepOutput, StepError> {
        for step in &self.program.steps {
            let start = seconds.is_some().then(Instant::now);
            self.step(step).map_err(|e| {
                StepError::Device(format!("{} ({}): {e}", step.op.name(), step.prov.path))
            })?;
            if let (Some(all), Some(start)) = (seconds.as_deref_mut(), start) {
                all.push(start.elapsed().as_secs_f64());
            }
        }
        let mut out = StepOutput::default();
        for (name, operand, ty) in &self.program.outputs {
            let Operand::Value(v) = operand else { continue };
            match Output::by_name(name) {
                Some(Output::Next) => out.next = self.read::<i32>(*v, ty).to_vec(),
                Some(Output::Logits) if logits => {
                    out.logits = Some(self.read::<E>(*v, ty).iter().map(|x| x.to_f32()).collect());
                }
                _ => {}
            }
        }
        Ok(out)
    }

    pub(crate) fn step(&mut self, step: &Step) -> Result<(), String> {
        let fail = |e: KernelError| e.to_string();
        match &step.op {
            // The kernels take one element type; Gemma's norms are in f32 whatever the model is.
            Op::RmsNorm(_) | Op::AddRms(_) | Op::Linear(Linear) if !self.in_elem(step) => {
                plain::step(self, step)
            }
            Op::Embedding(_) if self.takes_tokens(step, embedding::IDS) => {
                let table = self.floats(step, embedding::TABLE)?;
                let k = self.last(step, embedding::TABLE);
                embed(&self.inputs.batch.tokens, table, k, None, self.out(step, 0)).map_err(fail)
            }
            Op::Select(Select) => {
                let ids = &self.inputs.batch.rows;
                let x = step.tensor(select::X).ok_or("no tensor")?;
                let k = self.len(x) / self.rows(step, select::X);
                embed(
                    ids,
                    self.floats(step, select::X)?,
                    k,
                    None,
                    self.out(step, 0),
                )
                .map_err(fail)
            }
            Op::RmsNorm(RmsNorm { eps }) => {
                let k = self.last(step, rmsnorm::X);
                let x = self.floats(step, rmsnorm::X)?;
                let gamma = self.floats(step, rmsnorm::GAMMA)?;
                rms_norm(x, Some(gamma), eps.get() as f32, k, self.out(step, 0)).map_err(fail)
            }
            Op::AddRms(AddRms { eps }) => {
                let k = self.last(step, addrms::X);
                let r = self.floats(step, addrms::X)?;
                let d = self.floats(step, addrms::DELTA)?;
                let gamma = self.floats(step, addrms::GAMMA)?;
                let eps = eps.get() as f32;
                match (step.results[0], step.results[1]) {
                    (Some(_), Some(_)) => {
                        let (sum, h) = (self.out(step, 0), self.out(step, 1));
                        add_rms_norm(r, d, gamma, eps, k, sum, h).map_err(fail)
                    }
                    _ => {
                        // One of the two is not read: it goes to scratch memory.
                        let mut spare = vec![E::default(); r.len()];
                        let (sum, h) = match step.results[0] {
                            Some(_) => (self.out(step, 0), &mut spare[..]),
                            None => (&mut spare[..], self.out(step, 1)),
                        };
                        add_rms_norm(r, d, gamma, eps, k, sum, h).map_err(fail)
                    }
                }
            }
            Op::Linear(Linear) => self.gemm(step, &Gemm::PLAIN),
            Op::Gemm(spec) => self.gemm(step, spec),
            Op::AttnQkv(spec) => self.attn_qkv(step, spec),
            Op::AttnStep(AttnStep(spec)) => self.attn_step(step, spec),
            Op::Sample(Sample) => self.sample(step),
            Op::Chain(_) => chain::step(self, step),
            _ => plain::step(self, step),
        }
    }

    fn gemm(&mut self, step: &Step, spec: &Gemm) -> Result<(), String> {
        let (k, n) = (self.last(step, gemm::W), self.rows(step, gemm::W));
        let x = self.floats(step, gemm::X)?;
        let m = x.len() / k.max(1);
        let (prologue, tuple) = match spec.prologue {
            lathe_ir::Prologue::None => (Prologue::None, false),
            lathe_ir::Prologue::Rms { eps } => {
                let eps = eps.get() as f32;
                (Prologue::RmsNorm { eps }, false)
            }
            lathe_ir::Prologue::AddRms { eps } => {
                let eps = eps.get() as f32;
                (Prologue::AddRmsNorm { eps }, true)
            }
        };
        let mut spare = Vec::new();
        let sum = match (tuple, step.results[0]) {
            (false, _) => None,
            (true, Some(_)) => Some(self.out(step, 0)),
            (true, None) => {
                spare.resize(x.len(), E::default());
                Some(&mut spare[..])
            }
        };
        let spec = LinearSpec {
            prologue,
            epilogue: match spec.epilogue {
                lathe_ir::Epilogue::None => Epilogue::None,
                lathe_ir::Epilogue::Residual => Epilogue::Residual,
                lathe_ir::Epilogue::SwiGlu => Epilogue::SwiGlu,
            },
        };
        let args = LinearArgs {
            delta: self.opt_floats(step, gemm::DELTA)?,
            sum,
            gamma: self.opt_floats(step, gemm::GAMMA)?,
            bias: self.opt_floats(step, gemm::BIAS)?,
            residual: self.opt_floats(step, gemm::RESIDUAL)?,
            ..LinearArgs::new(
                [m, n, k],
                x,
                self.floats(step, gemm::W)?,
                self.out(step, usize::from(tuple)),
            )
        };
        linear(&spec, args).map_err(|e| e.to_string())
    }

    fn meta(&self) -> StepMeta<'a> {
        let b = self.inputs.batch;
        StepMeta {
            positions: &b.positions,
            row_seq: &b.row_seq,
            cu_seqlens: &b.cu_seqlens,
            kv_lens: &b.kv_lens,
            block_table: &b.block_table,
            max_pages: b.max_pages,
            page_size: self.options.page_size,
        }
    }

    fn attn_qkv(&mut self, step: &Step, spec: &AttnQkv) -> Result<(), String> {
        let qkv = self.floats(step, attn_qkv::QKV)?;
        let tables = match (spec.rope, step.get(attn_qkv::INV_FREQ)) {
            (Some(rope), Some(Operand::Table(t))) => {
                let key = (*t, rope.scaling.get().to_bits());
                self.rope.get(&key).map(|(c, s)| (&c[..], &s[..]))
            }
            _ => None,
        };
        let q_norm = self.opt_floats(step, attn_qkv::Q_NORM)?;
        let k_norm = self.opt_floats(step, attn_qkv::K_NORM)?;
        let shape = Heads {
            heads: spec.heads as usize,
            kv_heads: spec.kv_heads as usize,
            head_dim: spec.head_dim as usize,
        };
        let eps = spec.head_norm.map_or(0.0, |e| e.get() as f32);
        self.append_and_attend(
            step,
            &spec.attn,
            shape,
            qkv,
            Extra {
                q_norm,
                k_norm,
                eps,
                tables,
            },
        )
    }

    /// Unfused cached attention: q, k and v come apart and are put side by side first.
    fn attn_step(&mut self, step: &Step, spec: &AttnSpec) -> Result<(), String> {
        let dims = |operand: Slot| -> Result<Vec<usize>, String> {
            let t = step.tensor(operand).ok_or("no tensor")?;
            Ok(t.shape.iter().map(|d| d.eval(&self.env) as usize).collect())
        };
        let (qd, kd) = (dims(attn_step::Q)?, dims(attn_step::K)?);
        let shape = Heads {
            heads: qd[1],
            kv_heads: kd[1],
            head_dim: qd[2],
        };
        let q = self.floats(step, attn_step::Q)?;
        let k = self.floats(step, attn_step::K)?;
        let v = self.floats(step, attn_step::V)?;
        let (nq, nk) = (qd[1] * qd[2], kd[1] * kd[2]);
        let mut qkv = Vec::with_capacity(q.len() + 2 * k.len());
        for t in 0..qd[0] {
            qkv.extend_from_slice(&q[t * nq..][..nq]);
            qkv.extend_from_slice(&k[t * nk..][..nk]);
            qkv.extend_from_slice(&v[t * nk..][..nk]);
        }
        let extra = Extra {
            q_norm: None,
            k_norm: None,
            eps: 0.0,
            tables: None,
        };
        self.append_and_attend(step, spec, shape, &qkv, extra)
    }

    fn append_and_attend(
        &mut self,
        step: &Step,
        spec: &AttnSpec,
        shape: Heads,
        qkv: &[E],
        extra: Extra<'_, E>,
    ) -> Result<(), String> {
        let cache = step
            .operands
            .iter()
            .find_map(|o| match o {
                Operand::Cache(c) => Some(*c),
                _ => None,
            })
            .ok_or("no cache operand")?;
        let meta = self.meta();
        let rows = meta.positions.len();
        let (narrow, shape) = (shape.head_dim, shape.padded());
        let widened;
        let qkv = if shape.head_dim == narrow {
            qkv
        } else if extra.q_norm.is_some() || extra.k_norm.is_some() || extra.tables.is_some() {
            // Rewrites pack norms and rotations into attention only where the head has whole blocks.
            return Err(format!(
                "a head of {narrow} with a norm or a rotation, not a multiple of 16"
            ));
        } else {
            widened = with_width(qkv, narrow, shape.head_dim);
            &widened
        };
        let width = shape.heads * shape.head_dim;
        let mut q = std::mem::take(self.scratch);
        q.resize(rows * width, E::default());
        let append = RopeAppend {
            q_heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            qkv,
            bias: None,
            q_norm: extra.q_norm,
            k_norm: extra.k_norm,
            eps: extra.eps,
            tables: extra.tables,
            meta,
            q: &mut q,
            cache: &mut self.caches[cache],
        };
        rope_append(append).map_err(|e| e.to_string())?;
        let attend = AttentionSpec {
            scale: spec.scale.get() as f32,
            causal: spec.mask.causal,
            window: spec.mask.window,
            softcap: spec.softcap.map(|c| c.get() as f32),
            groups: shape.heads / shape.kv_heads.max(1),
        };
        let run = |out: &mut [E]| {
            let args = AttentionArgs {
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                q: &q,
                cache: &self.caches[cache],
                meta: self.meta(),
                out,
            };
            attention(&attend, args).map_err(|e| e.to_string())
        };
        let result = if step.results[0].is_none() {
            Ok(())
        } else if shape.head_dim == narrow {
            run(self.out(step, 0))
        } else {
            let mut wide = vec![E::default(); q.len()];
            run(&mut wide).map(|()| {
                let out = with_width(&wide, shape.head_dim, narrow);
                self.out(step, 0).copy_from_slice(&out);
            })
        };
        *self.scratch = q;
        result
    }

    fn sample(&mut self, step: &Step) -> Result<(), String> {
        let logits = self.floats(step, X)?;
        let n = self.last(step, X);
        let v = step.results[0].ok_or("unread sample")?;
        let ty = step.result_type(0).ok_or("no result")?;
        let next = self.write::<i32>(v, ty);
        let samplers = &self.inputs.batch.samplers;
        if samplers.iter().all(|s| s.params.is_greedy()) {
            return argmax(logits, n, next).map_err(|e| e.to_string());
        }
        for (i, (row, out)) in logits.chunks_exact(n).zip(next).enumerate() {
            let row: Vec<f32> = row.iter().map(|x| x.to_f32()).collect();
            let s = samplers.get(i).ok_or("a sampled row without parameters")?;
            let token = sample(&row, &s.params, s.request, s.position);
            *out = token.ok_or("no logit is a number")? as i32;
        }
        Ok(())
    }

    /// Whether an operand is the run-time input of token ids, rather than of positions.
    fn takes_tokens(&self, step: &Step, operand: Slot) -> bool {
        let Some(&Operand::Input(n)) = step.get(operand) else {
            return false;
        };
        self.program.inputs[n].0 == StepInput::Tokens
    }

    /// Whether all operands have the plan's element type.
    fn in_elem(&self, step: &Step) -> bool {
        step.tensors().all(|(_, t)| is_elem::<E>(t.dtype))
    }
}

struct Heads {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Heads {
    /// With heads as wide as the kernels and the cache have them.
    fn padded(self) -> Heads {
        Heads {
            head_dim: padded_head(self.head_dim),
            ..self
        }
    }
}

/// Heads of `from` features as heads of `to`, cut off or filled up with zeros: these add nothing to a
/// score and give outputs that nobody reads.
fn with_width<E: Elem>(heads: &[E], from: usize, to: usize) -> Vec<E> {
    let kept = from.min(to);
    let mut out = vec![E::default(); heads.len() / from * to];
    for (head, out) in heads.chunks_exact(from).zip(out.chunks_exact_mut(to)) {
        out[..kept].copy_from_slice(&head[..kept]);
    }
    out
}

struct Extra<'a, E> {
    q_norm: Option<&'a [E]>,
    k_norm: Option<&'a [E]>,
    eps: f32,
    tables: Option<(&'a [f32], &'a [f32])>,
}
