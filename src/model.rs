//! From a checkpoint folder to a model on a device: what every command that runs a model shares.

use crate::cli::{DeviceChoice, GlobalOptions};
use crate::config::{CompileBackend, Resolved};
use crate::frontend::import_model;
use crate::phases::Phases;
use anyhow::Context;
use lathe_codegen::Plan;
use lathe_ir::DType;
use lathe_ir::import::ModelInfo;
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{Compiled, compile};
use lathe_runtime::cpu;
use lathe_runtime::cuda::{self, CudaLoad};
use lathe_runtime::load::{LoadOptions, Loadable, expected_tensors};
use lathe_runtime::step::Executor;
use lathe_runtime::weights::{Checkpoint, RandomWeights, WeightSource, check};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The device that a command runs on.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// The CPU.
    Cpu,
    /// A GPU by index, with its cost model.
    Cuda(u32, DeviceModel),
}

impl Target {
    /// Resolves `--device`: `auto` takes a usable GPU, else the CPU.
    ///
    /// # Errors
    /// A GPU was asked for and cannot be used.
    pub fn resolve(choice: DeviceChoice) -> anyhow::Result<Target> {
        match choice {
            DeviceChoice::Cpu => Ok(Target::Cpu),
            DeviceChoice::Cuda(i) => cuda_target(i),
            DeviceChoice::Auto => Ok(cuda_target(0).unwrap_or(Target::Cpu)),
        }
    }

    /// Rates for cost and prediction.
    pub fn cost_model(&self) -> DeviceModel {
        match self {
            Target::Cpu => DeviceModel::CPU,
            Target::Cuda(_, m) => m.clone(),
        }
    }

    /// The name in logs and reports.
    pub fn name(&self) -> String {
        match self {
            Target::Cpu => "cpu".into(),
            Target::Cuda(i, _) => format!("cuda:{i}"),
        }
    }
}

fn cuda_target(index: u32) -> anyhow::Result<Target> {
    let p = lathe_runtime::cuda::driver::properties(index as usize)?;
    let model = if p.name.contains("H200") {
        DeviceModel::H200
    } else {
        DeviceModel::H100
    };
    Ok(Target::Cuda(index, model))
}

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
    pub target: Target,
    /// The programs and how they came about.
    pub compiled: Compiled,
    /// What devices execute.
    pub plan: Plan,
    /// How kernels are made and launched.
    pub backend: CompileBackend,
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
            anyhow::bail!(
                "--tp {}: tensor parallelism is not implemented yet; use --tp 1",
                global.tp
            );
        }
        let start = Instant::now();
        let imported = import_model(global, run, &mut Phases::new())?;
        let target = Target::resolve(global.device)?;
        let read = start.elapsed();
        let compiled = compile(&imported.model.graph, &run.pass_config(target.cost_model()))?;
        let optimised = start.elapsed();
        let plan = imported.lower(&compiled)?;
        let lowered = start.elapsed();
        Ok(CompiledModel {
            folder: imported.folder,
            name: imported.name,
            info: imported.model.arch,
            dtype: imported.dtype,
            target,
            compiled,
            plan,
            backend: run.compile_backend.value,
            phases: vec![
                ("import", read),
                ("passes", optimised - read),
                ("lower", lowered - optimised),
            ],
        })
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
                let checked = check(&checkpoint, &expected)?;
                if !checked.ignored.is_empty() {
                    tracing::debug!("ignored tensors: {}", checked.ignored.join(", "));
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
        let start = Instant::now();
        let weights = self.weights(choice)?;
        let model = Loadable {
            plan: &self.plan,
            weights: &*weights,
            vocab: self.info.vocab as usize,
        };
        let executor = match &self.target {
            Target::Cpu => cpu::load(model, options).context("loading the model on the CPU")?,
            Target::Cuda(ordinal, _) => {
                let how = CudaLoad {
                    ordinal: *ordinal as usize,
                    graphs: self.backend.cuda_graphs(),
                    per_op: !self.backend.fuses(),
                    ..CudaLoad::default()
                };
                cuda::load(model, options, &how).context("loading the model on the GPU")?
            }
        };
        self.phases.push(("load weights", start.elapsed()));
        Ok(executor)
    }

    /// Checks that a sequence of `len` tokens lies within what the model was trained for.
    ///
    /// # Errors
    /// It is longer than `max_position_embeddings`.
    pub fn check_length(&self, len: usize) -> anyhow::Result<()> {
        let max = self.info.max_position as usize;
        anyhow::ensure!(
            len <= max,
            "a sequence of {len} tokens is longer than the model's max_position_embeddings {max}"
        );
        Ok(())
    }
}
