//! `--emit cuda`: the generated CUDA C with its launches, for reading.

use anyhow::Context;
use indexmap::IndexMap;
use lathe_codegen::cuda::{
    Choices, CudaOptions, CudaProgram, Fusions, Sampling, Sizes, fusions, lower_program,
};
use lathe_codegen::{Plan, ProgramKind};
use lathe_ir::{KernelLimits, Sym};
use lathe_passes::pipeline::PassConfig;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// How kernels are generated where there is no device.
pub fn kernel_options(page_size: u32, max_seq_len: u32, per_op: bool) -> CudaOptions {
    let page_size = page_size as usize;
    CudaOptions {
        pdl: true,
        sms: KernelLimits::HOPPER.units,
        page_size,
        max_pages: (max_seq_len as usize).div_ceil(page_size),
        plain: false,
        per_op,
    }
}

/// Bytes that the kernels of the two programs want beside weights, cache and activations, at the
/// sizes for which they were chosen.
///
/// # Errors
/// A step has no kernel.
pub fn workspace_bytes(
    plan: &Plan,
    config: &PassConfig,
    options: CudaOptions,
) -> anyhow::Result<usize> {
    let mut most: IndexMap<String, usize> = IndexMap::new();
    for program in &plan.programs {
        let Some(sizes) = sizes(program.kind, config) else {
            continue;
        };
        let cuda = lower_program(plan, program, sizes, Sampling::Greedy, options)?;
        for w in cuda.workspaces {
            let bytes = most.entry(w.name).or_default();
            *bytes = w.bytes.max(*bytes);
        }
    }
    Ok(most.values().sum())
}

/// The sizes for which a step program was chosen.
fn sizes(kind: ProgramKind, config: &PassConfig) -> Option<Sizes> {
    let at = config.points.get(kind)?;
    let size = |s: Sym| at.env.get(s).max(1) as usize;
    Some(Sizes {
        t: size(Sym::T),
        b: size(Sym::B),
        r: size(Sym::R),
    })
}

/// What the kernels of a program of greedy steps do beside their own step, at the sizes for which it was chosen;
/// `None` for a program that no step runs.
///
/// # Errors
/// A step has no kernel.
pub fn program_fusions(
    plan: &Plan,
    kind: ProgramKind,
    config: &PassConfig,
    options: CudaOptions,
) -> anyhow::Result<Option<Fusions>> {
    let (Some(program), Some(sizes)) = (plan.program(kind), sizes(kind, config)) else {
        return Ok(None);
    };
    let (sampling, none) = (Sampling::GreedyOnly, Choices::default());
    let fusions = fusions(plan, program, sizes, sampling, options, &none)?;
    Ok(Some(fusions))
}

/// Writes every kernel of the decode and general programs, at the sizes for which they were
/// chosen, as `DIR/cuda/NAME.cu`, and the launches of each program as `DIR/cuda/PROGRAM.txt`, with what its kernels do
/// beside their own step and why.
///
/// # Errors
/// A step has no kernel, or a file cannot be written.
pub fn emit_cuda(
    dir: &Path,
    plan: &Plan,
    config: &PassConfig,
    options: CudaOptions,
) -> anyhow::Result<Vec<PathBuf>> {
    let dir = dir.join("cuda");
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    let mut sources: IndexMap<String, String> = IndexMap::new();
    let mut written = Vec::new();
    for program in &plan.programs {
        let Some(sizes) = sizes(program.kind, config) else {
            continue;
        };
        let cuda = lower_program(plan, program, sizes, Sampling::Greedy, options)?;
        for k in &cuda.kernels {
            sources.insert(k.name.clone(), k.text.clone());
        }
        let path = dir.join(format!("{}.txt", program.kind.name()));
        let none = Choices::default();
        let fusions = fusions(plan, program, sizes, Sampling::Greedy, options, &none)?;
        let text = format!("{}\n{fusions}", launches(&cuda, plan));
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
        written.push(path);
    }
    for (name, text) in sources {
        let path = dir.join(format!("{name}.cu"));
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
        written.push(path);
    }
    Ok(written)
}

/// One line a launch: step, kernel, geometry, where it comes from.
fn launches(cuda: &CudaProgram, plan: &Plan) -> String {
    let mut out = format!(
        "{} program of {}: {} launches of {} kernels for T={} B={} R={}\n",
        cuda.kind.name(),
        plan.name,
        cuda.launches.len(),
        cuda.kernels.len(),
        cuda.sizes.t,
        cuda.sizes.b,
        cuda.sizes.r
    );
    let steps = plan.program(cuda.kind).map(|p| &p.steps[..]);
    for l in &cuda.launches {
        let path = steps
            .and_then(|s| s.get(l.step))
            .map_or("", |s| &*s.prov.path);
        let _ = writeln!(
            out,
            "{:4}  {:44} grid {:?} block {} cluster {} shared {}  {path}",
            l.step, cuda.kernels[l.kernel].name, l.grid, l.block, l.cluster, l.shared
        );
    }
    out
}
