//! How long the kernels of a step take on their own, and cuBLASLt beside the GEMMs.

use lathe_codegen::cuda::{Launch, Sampling, Sizes};
use lathe_codegen::work::WorkShape;
use lathe_codegen::{Operand, Program, ProgramKind};
use lathe_ir::DType;
use lathe_ir::ops::gemm;

use super::cublaslt::GemmShape;
use super::executor::{CudaExecutor, device_error};
use super::graph::Graph;
use super::prepare::Prepared;
use super::programs::key;
use super::timing::time_graph;
use super::yardstick::{Yardstick, in_turn};
use super::{CudaError, DevicePtr};
use crate::device::profile::{Group, ProfileOptions, StepProfile, grouped, median, spans};
use crate::device::step::{StepBatch, StepError, StepKind};

/// Launches that a graph of one kernel has at least, so that its own launch does not count.
const LAUNCHES: usize = 32;

impl CudaExecutor {
    /// Times every kernel of the program that would run `batch`: all its launches of a step back to back in a graph,
    /// so that each reads the weights of another layer.
    pub(super) fn profile_batch(
        &mut self,
        batch: &StepBatch,
        options: ProfileOptions,
    ) -> Result<StepProfile, StepError> {
        if !self.pending.is_empty() {
            return Err(StepError::Batch("submitted steps are not collected".into()));
        }
        let runs = options.runs.max(1);
        let key = self.launch_step(batch, false)?;
        self.finish()?;
        let mut whole = Vec::with_capacity(runs);
        for _ in 0..runs {
            self.launch_step(batch, false)?;
            whole.push(self.finish()?.time.device * 1e6);
        }
        let kind = key.0;
        let at = self.plan.position(kind);
        let at = at.ok_or_else(|| device_error(CudaError::NoStepProgram))?;
        let prepared = &self.prepared[&key];
        let graph = prepared.graph.is_some();
        let replay = replay(self, prepared, runs).map_err(device_error)?;
        let groups = groups(&self.plan.programs[at], prepared);
        let vendor = options.vendor.then(|| self.vendor(&groups));
        let spans = spans(batch);
        let mut kernels = Vec::with_capacity(groups.len());
        for group in &groups {
            // What a kernel reads is then what it reads in a step, whatever was timed before.
            self.launch_step(batch, false)?;
            self.finish()?;
            let prepared = &self.prepared[&key];
            let yardstick = vendor.as_ref().and_then(|v| v.as_ref().ok());
            let (micros, theirs) = self
                .time_group(prepared, at, group, yardstick, runs)
                .map_err(device_error)?;
            let mut time = group.timed(&spans, micros);
            time.vendor_micros = theirs;
            kernels.push(time);
        }
        Ok(StepProfile {
            kind: match kind {
                ProgramKind::Decode => StepKind::Decode,
                _ => StepKind::General,
            },
            kernels,
            step_micros: median(whole),
            replay_micros: Some(replay),
            graph,
            vendor_missing: vendor.and_then(Result::err),
        })
    }

    /// cuBLASLt with memory for the largest product, or why there is none.
    fn vendor(&self, groups: &[Group]) -> Result<Yardstick, String> {
        if self.plan.dtype != DType::BF16 {
            return Err(format!(
                "cuBLASLt is compared in bfloat16 only, not in {}",
                self.plan.dtype.name()
            ));
        }
        let (mut x, mut y) = (1, 1);
        for group in groups {
            if let WorkShape::Gemm { m, n, k } = group.work.shape {
                x = x.max(m * k);
                y = y.max(m * n);
            }
        }
        Yardstick::new(&self.stream, x, y).map_err(|e| e.to_string())
    }

    /// Microseconds of one launch of a group, ours and the vendor's.
    fn time_group(
        &self,
        prepared: &Prepared,
        program: usize,
        group: &Group,
        yardstick: Option<&Yardstick>,
        runs: usize,
    ) -> Result<(f64, Option<f64>), CudaError> {
        let stream = &self.stream;
        let count = group.members.len();
        let repeat = LAUNCHES.div_ceil(count);
        let ours = Graph::capture(stream, |stream| {
            (0..repeat).try_for_each(|_| {
                group
                    .members
                    .iter()
                    // SAFETY: resolved from the lowered program; `self` keeps the memory.
                    .try_for_each(|&i| unsafe { prepared.launches[i].submit(stream) })
            })
        })?;
        let theirs = match (yardstick, group.work.shape) {
            (Some(yardstick), WorkShape::Gemm { m, n, k }) => {
                let weights: Vec<DevicePtr> = group
                    .members
                    .iter()
                    .filter_map(|&i| self.weight(program, &prepared.lowered.launches[i]))
                    .collect();
                let shape = GemmShape { m, n, k };
                if weights.len() == count {
                    // SAFETY: the weights are those of a GEMM of this shape and `self` keeps them; x and y have the
                    // sizes of the largest product of the program.
                    match unsafe { yardstick.graphs(stream, shape, &weights, repeat) } {
                        Ok(graphs) => graphs,
                        Err(error) => {
                            stream.synchronize()?;
                            tracing::debug!("{}: {error}", group.name);
                            Vec::new()
                        }
                    }
                } else {
                    Vec::new()
                }
            }
            _ => Vec::new(),
        };
        let graphs: Vec<&Graph> = std::iter::once(&ours).chain(&theirs).collect();
        let times = in_turn(stream, &graphs, runs)?;
        let launches = (count * repeat) as f64;
        let best = times[1..].iter().copied().min_by(f64::total_cmp);
        Ok((times[0] / launches, best.map(|t| t / launches)))
    }

    /// Where the weight of a GEMM's launch is.
    fn weight(&self, program: usize, launch: &Launch) -> Option<DevicePtr> {
        let p = &self.plan.programs[program];
        match p.steps[launch.step].get(gemm::W)? {
            Operand::Weight(i) => Some(self.resident.addresses.weights[*i]),
            Operand::Value(v) => Some(self.resident.slots[program][p.slot(*v)]),
            _ => None,
        }
    }

    /// Launches of a decode step of `sequences` rows, and whether they are one graph.
    ///
    /// # Errors
    /// A kernel does not compile.
    pub fn decode_launches(&mut self, sequences: usize) -> Result<(usize, bool), CudaError> {
        let sizes = Sizes::decode(self.programs.decode.of(sequences));
        let key = key(ProgramKind::Decode, sizes, Sampling::GreedyOnly);
        self.ready(key)?;
        let p = &self.prepared[&key];
        Ok((p.launches.len(), p.graph.is_some()))
    }
}

fn groups(program: &Program, prepared: &Prepared) -> Vec<Group> {
    let lowered = &prepared.lowered;
    let launches = lowered.launches.iter().zip(&prepared.launches);
    grouped(launches.map(|(l, ready)| {
        let path = program.steps[l.step].prov.path.to_string();
        let name = match ready.is_library() {
            true => "cublaslt".to_owned(),
            false => lowered.kernels[l.kernel].name.clone(),
        };
        (name, path, l.work)
    }))
}

/// Microseconds of all launches of a step as one graph.
fn replay(executor: &CudaExecutor, prepared: &Prepared, runs: usize) -> Result<f64, CudaError> {
    let stream = &executor.stream;
    if let Some(graph) = &prepared.graph {
        return time_graph(stream, graph, runs, 4);
    }
    let graph = Graph::capture(stream, |stream| {
        prepared
            .launches
            .iter()
            // SAFETY: resolved from the lowered program; the executor keeps the memory.
            .try_for_each(|l| unsafe { l.submit(stream) })
    })?;
    time_graph(stream, &graph, runs, 2)
}
