//! `--emit cuda-buckets`: the kernels and launches of every bucket of sizes that a run may meet, and of every kernel
//! that a GEMM can choose. Two builds of lathe are compared by it (`scripts/same_programs.py`).

use anyhow::Context;
use indexmap::IndexMap;
use lathe_codegen::cuda::{
    Arg, Choices, CudaOptions, CudaProgram, KernelSource, MapArg, Ref, Sampling, Sizes, Variant,
    gemm_keys, lower_gemms, lower_program,
};
use lathe_codegen::{Plan, Program};
use lathe_runtime::device::cuda::steps;
use lathe_runtime::device::load::LoadOptions;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Writes `DIR/cuda/PROGRAM.txt` with the launches of all buckets within the limits, and each distinct kernel as
/// `DIR/cuda/NAME.N.cu`, where N counts the texts of a name.
///
/// # Errors
/// A step has no kernel, or a file cannot be written.
pub fn emit_buckets(
    dir: &Path,
    plan: &Plan,
    limits: &LoadOptions,
    options: CudaOptions,
) -> anyhow::Result<Vec<PathBuf>> {
    let dir = dir.join("cuda");
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    let mut texts = Texts::default();
    let mut files: Vec<(String, String)> = Vec::new();
    for program in &plan.programs {
        let mut out = String::new();
        for (sizes, sampling) in steps(program.kind, limits) {
            let mut samplings = vec![sampling];
            // Verification asks for the logits of greedy steps.
            if sampling == Sampling::GreedyOnly {
                samplings.push(Sampling::Greedy);
            }
            for sampling in samplings {
                let _ = writeln!(out, "\n{sizes:?} {sampling:?}");
                let cuda = lower_program(plan, program, sizes, sampling, options)?;
                launches(&mut out, &mut texts, &cuda);
            }
            gemms(&mut out, &mut texts, plan, program, sizes, options)?;
        }
        let plain = CudaOptions {
            plain: true,
            ..options
        };
        for (sizes, sampling) in steps(program.kind, limits).into_iter().take(4) {
            let _ = writeln!(out, "\nplain {sizes:?} {sampling:?}");
            let cuda = lower_program(plan, program, sizes, sampling, plain)?;
            launches(&mut out, &mut texts, &cuda);
        }
        files.push((format!("{}.txt", program.kind.name()), out));
    }
    if let Some(once) = &plan.once {
        let options = CudaOptions {
            pdl: false,
            ..options
        };
        let sizes = Sizes { t: 1, b: 1, r: 1 };
        let cuda = lower_program(plan, &once.program, sizes, Sampling::Params, options)?;
        let mut out = String::new();
        launches(&mut out, &mut texts, &cuda);
        files.push((format!("{}.txt", once.program.kind.name()), out));
    }
    for (name, texts) in texts.0 {
        let numbered = texts.into_iter().enumerate();
        files.extend(numbered.map(|(i, text)| (format!("{name}.{i}.cu"), text)));
    }
    let mut written = Vec::new();
    for (name, text) in files {
        let path = dir.join(name);
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
        written.push(path);
    }
    Ok(written)
}

/// Kernel texts by name, in the order in which they were met.
#[derive(Default)]
struct Texts(IndexMap<String, Vec<String>>);

impl Texts {
    /// The kernel's file without its extension. Of the comments that say where it comes from the first are kept.
    fn file(&mut self, kernel: &KernelSource) -> String {
        let known = self.0.entry(kernel.name.clone()).or_default();
        let code = kernel.code();
        let at = match known.iter().position(|text| text.ends_with(code)) {
            Some(at) => at,
            None => {
                known.push(kernel.text.clone());
                known.len() - 1
            }
        };
        format!("{}.{at}", kernel.name)
    }
}

/// The variants of every GEMM at these sizes: the heuristic's first, those worth timing, and their launches.
fn gemms(
    out: &mut String,
    texts: &mut Texts,
    plan: &Plan,
    program: &Program,
    sizes: Sizes,
    options: CudaOptions,
) -> anyhow::Result<()> {
    let sms = options.sms as usize;
    for (key, steps) in gemm_keys(plan, program, sizes, Sampling::Greedy, options)? {
        let mut candidates = Variant::candidates(&key, sms);
        if key.is_library_gemm() {
            candidates.push(Variant::CublasLt { algorithm: 0 });
        }
        let names: Vec<String> = candidates.iter().map(Variant::to_string).collect();
        let all = Variant::all(&key, sms);
        let _ = writeln!(out, "{key} of {}: {}", all.len(), names.join(" "));
        for variant in candidates {
            let mut choices = Choices::default();
            choices.insert(key, variant);
            let cuda = lower_gemms(plan, program, sizes, options, &choices, &steps[..1])?;
            launches(out, texts, &cuda);
        }
    }
    Ok(())
}

/// All there is to know of the launches of a program.
fn launches(out: &mut String, texts: &mut Texts, cuda: &CudaProgram) {
    for l in &cuda.launches {
        let file = texts.file(&cuda.kernels[l.kernel]);
        let args: Vec<String> = l.args.iter().map(|a| argument(cuda, a)).collect();
        let library = l.library.as_ref().map_or(String::new(), |g| {
            let [x, w, y] = [&g.x, &g.w, &g.y].map(|r| place(cuda, r));
            let residual = g.residual.as_ref().map(|r| place(cuda, r));
            let (m, n, k, algorithm) = (g.m, g.n, g.k, g.algorithm);
            format!("library {algorithm} {m} {n} {k} {x} {w} {residual:?} {y} ")
        });
        let _ = writeln!(
            out,
            "{:4} {file} grid {:?} block {} cluster {} shared {} pdl {} {:?} {:?} {} {library}({})",
            l.step,
            l.grid,
            l.block,
            l.cluster,
            l.shared,
            u8::from(l.pdl),
            l.work.class,
            l.work.shape,
            l.work.bytes,
            args.join(", ")
        );
    }
    for w in &cuda.workspaces {
        let _ = writeln!(out, "workspace {} {} {:?}", w.name, w.bytes, w.fill);
    }
    let _ = writeln!(out, "logits {:?}", cuda.logits);
}

/// Workspaces by name: their numbers follow from the order in which they were asked for.
fn place(cuda: &CudaProgram, r: &Ref) -> String {
    match r {
        Ref::Work(i) => cuda.workspaces[*i].name.clone(),
        Ref::Null => "-".to_owned(),
        r => format!("{r:?}"),
    }
}

fn argument(cuda: &CudaProgram, arg: &Arg) -> String {
    match arg {
        Arg::Ptr(r) => place(cuda, r),
        Arg::I32(n) => n.to_string(),
        Arg::F32(x) => format!("{x:?}"),
        Arg::Words(words) => format!("{words:?}"),
        Arg::Map(MapArg {
            base,
            dims,
            strides,
            block,
            swizzle,
        }) => format!(
            "map {} {dims:?} {strides:?} {block:?} {swizzle:?}",
            place(cuda, base)
        ),
    }
}
