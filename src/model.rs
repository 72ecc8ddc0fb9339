//! From a checkpoint folder to a model on a device: what every command that runs a model shares.

use crate::config::{CompileBackend, GemmTuning, Resolved, Run};
use crate::console::Task;
use crate::errors::{printable, usage_error};
use crate::frontend::import_model;
use crate::global_options::GlobalOptions;
use crate::phases::{Phases, bytes};
use crate::target::{Target, cost_model};
use lathe_codegen::Plan;
use lathe_ir::DType;
use lathe_ir::import::ModelInfo;
use lathe_passes::pipeline::{Compiled, compile};
use lathe_runtime::device::Device;
use lathe_runtime::device::executor::Executor;
use lathe_runtime::device::load::{Backend, LoadOptions, Loadable, expected_tensors};
use lathe_runtime::weights::{Checkpoint, RandomWeights, WeightSource, check};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Where weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightChoice {
    /// The checkpoint's.
    Checkpoint,
    /// Random ones of this seed.
    Random(u64),
}

/// A compiled model.
#[derive(Debug)]
pub struct CompiledModel {
    /// The checkpoint folder.
    pub folder: PathBuf,
    /// What the report calls the model.
    pub name: String,
    /// Sizes and special tokens.
    pub info: ModelInfo,
    /// Element type of weights and activations.
    pub dtype: DType,
    /// The device that it was compiled for.
    pub device: Box<dyn Device>,
    /// The programs and how they came about.
    pub compiled: Compiled,
    /// What devices execute.
    pub plan: Plan,
    /// How kernels are made and launched.
    pub backend: CompileBackend,
    /// Rows of the decode steps that are captured; none: all.
    pub graph_sizes: Option<Vec<usize>>,
    /// How GEMM kernels are chosen.
    pub tuning: GemmTuning,
    /// The number of layers was overridden: the checkpoint may have more.
    pub is_cut: bool,
    /// Phases with their times, in order.
    pub phases: Vec<(&'static str, Duration)>,
}

impl CompiledModel {
    /// Reads the configuration and compiles it.
    ///
    /// # Errors
    /// The folder, the configuration or the architecture is not what it should be.
    pub fn compile(global: &GlobalOptions, run: &Resolved) -> anyhow::Result<CompiledModel> {
        if global.tp > 1 {
            return Err(usage_error(format!(
                "--tp {}: tensor parallelism is not implemented yet; use --tp 1",
                global.tp
            )));
        }
        let task = Task::begin("compile");
        let start = Instant::now();
        let imported = import_model(global, run, &mut Phases::new())?;
        let device = Target::resolve(global.device, global.kernel_cache())?.into_device();
        let read = start.elapsed();
        let compiled = compile(
            &imported.model.graph,
            &run.pass_config(cost_model(&*device)),
        )?;
        let optimised = start.elapsed();
        let plan = imported.lower(&compiled)?;
        let lowered = start.elapsed();
        task.end(&format!("{} for {}", imported.name, device.name()));
        Ok(CompiledModel {
            folder: imported.folder,
            name: imported.name,
            info: imported.model.arch,
            dtype: imported.dtype,
            device,
            compiled,
            plan,
            backend: run.compile_backend.value,
            graph_sizes: run
                .cuda_graph_batch_sizes
                .value
                .as_ref()
                .map(|sizes| sizes.iter().map(|&n| n as usize).collect()),
            tuning: run.tuning(),
            is_cut: run
                .overrides()
                .any(|(key, _)| matches!(key, "num_hidden_layers" | "n_layer")),
            phases: vec![
                ("import", read),
                ("passes", optimised - read),
                ("lower", lowered - optimised),
            ],
        })
    }

    /// Settings that were given and change nothing in this run, for readers.
    pub fn remarks(&self, settings: &Resolved, run: Run) -> Vec<String> {
        let on_cpu = !self.device.capabilities().compiles;
        let mut remarks = settings.without_effect(run, on_cpu);
        if on_cpu {
            remarks.extend(settings.backend_on_cpu());
        }
        remarks
    }

    /// Why there is no step program, as an error for commands that need one.
    ///
    /// # Errors
    /// There is none.
    pub fn require_cache(&self) -> anyhow::Result<()> {
        match &self.compiled.no_step {
            None => Ok(()),
            Some(reason) => {
                anyhow::bail!("the plan has no KV cache, which this command needs: {reason}")
            }
        }
    }

    /// Opens the weights and checks them against what the model expects.
    ///
    /// # Errors
    /// Missing, unexpected, mis-shaped or wrongly typed tensors, all at once.
    pub fn weights(&self, choice: WeightChoice) -> anyhow::Result<Box<dyn WeightSource>> {
        let expected = expected_tensors(&self.info.weights);
        Ok(match choice {
            WeightChoice::Random(seed) => Box::new(RandomWeights::new(&expected, seed)),
            WeightChoice::Checkpoint => {
                let checkpoint = Checkpoint::open(&self.folder)?;
                let cut_at = self.is_cut.then_some(self.info.layers);
                let checked = check(&checkpoint, &expected, cut_at)?;
                if !checked.cut.is_empty() {
                    tracing::info!(
                        "the first {} layers only: {} tensors of the checkpoint are left out",
                        self.info.layers,
                        checked.cut.len()
                    );
                }
                if !checked.ignored.is_empty() {
                    let names = printable(&checked.ignored.join(", "));
                    tracing::debug!("ignored tensors: {names}");
                }
                Box::new(checkpoint)
            }
        })
    }

    /// Puts the model on its device.
    ///
    /// # Errors
    /// The weights do not fit the model, or the model does not fit the device.
    pub fn load(
        &mut self,
        choice: WeightChoice,
        options: LoadOptions,
    ) -> anyhow::Result<Box<dyn Executor>> {
        self.require_cache()?;
        let task = Task::begin("load weights");
        let weights = self.weights(choice)?;
        let model = Loadable {
            plan: &self.plan,
            weights: &*weights,
            vocab: self.info.vocab as usize,
        };
        let backend = Backend {
            graphs: self.backend.cuda_graphs(),
            graph_sizes: self.graph_sizes.clone(),
            per_op: !self.backend.fuses(),
            autotune: self.tuning.timed,
            cublaslt: self.tuning.cublaslt,
        };
        let executor = self.device.load(model, options, &backend)?;
        let size = bytes(self.plan.weight_bytes() as f64);
        let what = match choice {
            WeightChoice::Checkpoint => size,
            WeightChoice::Random(_) => format!("{size}, random"),
        };
        self.phases.push(("load weights", task.end(&what)));
        Ok(executor)
    }

    /// Does what the first steps would otherwise wait for, before a clock starts.
    ///
    /// # Errors
    /// A kernel cannot be compiled.
    pub fn warm_up(&mut self, executor: &mut dyn Executor) -> anyhow::Result<()> {
        if self.device.capabilities().compiles {
            let task = Task::begin("compile kernels");
            executor.warm_up()?;
            self.phases.push(("compile kernels", task.end("")));
        }
        Ok(())
    }

    /// Checks that a sequence of `len` tokens lies within what the model was trained for.
    ///
    /// # Errors
    /// It is longer than `max_position_embeddings`: a usage error, as flags and options say how long it is.
    pub fn check_length(&self, len: usize) -> anyhow::Result<()> {
        let max = self.info.max_position as usize;
        if len <= max {
            return Ok(());
        }
        Err(usage_error(format!(
            "a sequence of {len} tokens is longer than the model's max_position_embeddings {max}"
        )))
    }
}
