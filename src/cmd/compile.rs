//! `compile`: compiles without weights and shows what happened.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use lathe_codegen::Plan;
use lathe_passes::egraph::cost::{CostPoint, DeviceModel};
use lathe_passes::pipeline::{Compiled, PassConfig, Recorded, record};
use lathe_passes::predict::{Prediction, kernels_by_layer, predict};
use lathe_runtime::device::cuda::DecodeBuckets;
use lathe_runtime::device::load::LoadOptions;

use super::config_file::ConfigFile;
use crate::config::{Given, Options, Resolved, Run, RuntimeKind};
use crate::console::Task;
use crate::dump::{self, Format, Points};
use crate::errors::usage_error;
use crate::frontend::{Imported, import_model};
use crate::global_options::GlobalOptions;
use crate::phases::{Phases, bytes, duration, picoseconds};
use crate::target::Predicted;

/// Compile a model and show what each pass did; needs no weights
#[derive(Debug, Args)]
pub struct Compile {
    #[command(flatten)]
    config: ConfigFile,
    /// Write the program: after-all, or after=PASS,... (stages, import, chains, decode, general)
    #[arg(long, value_name = "after-all|after=PASS,...")]
    dump_ir: Option<Points>,
    /// Folder of the dumps
    #[arg(long, value_name = "FOLDER")]
    dump_dir: Option<PathBuf>,
    /// Form of the dumps; html is one page with all stages
    #[arg(long, value_enum)]
    dump_format: Option<Format>,
    /// Leave out dumps that equal the one before
    #[arg(long)]
    only_changed: bool,
    /// Print the resolved configuration, the memory it needs and the predicted times
    #[arg(long)]
    dry_run: bool,
    /// Device to compile and predict for: h100, h200, cpu; by default the one that --device stands for
    #[arg(long, value_name = "NAME")]
    target: Option<String>,
    /// Optimise the whole model as one region instead of one template a kind of layer
    #[arg(long)]
    no_roll: bool,
    /// Write the generated sources and launches into the folder of the dumps
    #[arg(long, value_enum)]
    emit: Option<Emit>,
    /// Most requests in flight
    #[arg(long = "max_batch_size", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_batch_size: Option<u32>,
    /// Longest sequence, prompt and output together
    #[arg(long = "max_seq_len", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_seq_len: Option<u32>,
    /// Most token rows of one step
    #[arg(long = "max_num_tokens", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_num_tokens: Option<u32>,
}

/// `--emit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Emit {
    /// CUDA C of the sizes for which the programs were chosen
    Cuda,
    /// CUDA C of all sizes that a run may meet, and of all kernels that GEMMs can choose
    CudaBuckets,
}

/// What a run is limited to, for its buckets; where nobody says, by the default of a serving run.
fn limits(config: &Resolved, max_pages: usize) -> LoadOptions {
    let sequences = config.max_batch_size.value.map_or(256, |n| n as usize);
    let page_size = config.attn_page_size.value as usize;
    LoadOptions {
        max_tokens: config.max_num_tokens.value.map_or(2048, |n| n as usize),
        max_rows: sequences,
        max_sequences: sequences,
        max_seq_len: max_pages * page_size,
        page_size,
        pages: max_pages * sequences,
    }
}

/// Folder of dumps without `--dump-dir`.
const DUMP_DIR: &str = "lathe-dump";

impl Compile {
    /// Runs the command.
    pub fn run(&self, global: &GlobalOptions) -> anyhow::Result<()> {
        let mut phases = Phases::new();
        // The table of phases is on stdout: the bar leaves no line.
        let _task = Task::begin("compile");
        let config = self.config.resolve(self.flags())?;
        let target = Predicted::resolve(self.target.as_deref(), global.device)?;
        let imported = import_model(global, &config, &mut phases)?;

        let mut pass_config = config.pass_config(target.model);
        pass_config.no_roll = self.no_roll;
        let recorded = record(&imported.model.graph, &pass_config)?;
        let compiled = &recorded.compiled;
        phases.end_parts("passes", &compiled.phases);
        let plan = imported.lower(compiled)?;
        phases.end("lower");

        let mut out = String::new();
        if self.dry_run {
            title(&mut out, &imported, &pass_config, &target.why);
            dry_run(&mut out, &config, compiled, &pass_config);
        } else {
            title(&mut out, &imported, &pass_config, &target.why);
            passes(&mut out, &recorded, &pass_config, &config);
        }
        let _ = writeln!(out, "\nmemory");
        let max_seq_len = config.max_seq_len.value;
        let kernels = dump::kernel_options(
            config.attn_page_size.value,
            max_seq_len.unwrap_or(imported.model.arch.max_position),
            !config.compile_backend.value.fuses(),
        );
        let workspaces = match pass_config.points.decode.device == DeviceModel::CPU {
            true => None,
            false => Some(dump::workspace_bytes(&plan, &pass_config, kernels)?),
        };
        memory(&mut out, &config, &plan, &pass_config, workspaces);
        programs(&mut out, compiled, &pass_config);
        phases.end("report");
        self.dump(&mut out, &imported, &recorded, &pass_config, &mut phases)?;
        if let Some(emit) = self.emit {
            let dir = self.dump_dir();
            let written = match emit {
                Emit::Cuda => dump::emit_cuda(&dir, &plan, &pass_config, kernels)?,
                Emit::CudaBuckets => {
                    dump::emit_buckets(&dir, &plan, &limits(&config, kernels.max_pages), kernels)?
                }
            };
            let _ = writeln!(out);
            for path in written {
                let _ = writeln!(out, "emit {}", path.display());
            }
            phases.end("emit");
        }
        out.push('\n');
        out += &phases.table();
        std::io::stdout().lock().write_all(out.as_bytes())?;
        Ok(())
    }

    fn dump_dir(&self) -> PathBuf {
        self.dump_dir.clone().unwrap_or_else(|| DUMP_DIR.into())
    }

    fn flags(&self) -> Options {
        Options {
            max_batch_size: Given::flag("--max_batch_size", self.max_batch_size.map(Some)),
            max_seq_len: Given::flag("--max_seq_len", self.max_seq_len.map(Some)),
            max_num_tokens: Given::flag("--max_num_tokens", self.max_num_tokens.map(Some)),
            ..Options::default()
        }
    }

    fn dump(
        &self,
        out: &mut String,
        imported: &Imported,
        recorded: &Recorded,
        config: &PassConfig,
        phases: &mut Phases,
    ) -> anyhow::Result<()> {
        let format = self.dump_format.unwrap_or_default();
        let folder = self.dump_dir.is_some() && self.emit.is_none();
        let wanted = self.dump_ir.is_some() || folder || self.dump_format.is_some();
        if !wanted {
            if self.only_changed {
                return Err(usage_error("--only-changed needs --dump-ir"));
            }
            return Ok(());
        }
        let points = self.dump_ir.clone().unwrap_or(Points::All);
        let dir = self.dump_dir();
        let snapshots = dump::snapshots(&imported.model.graph, recorded, config)?;
        let _ = writeln!(out);
        if format == Format::Html {
            let page = dump::html(imported, recorded, config)?;
            std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
            let path = dir.join("lathe.html");
            std::fs::write(&path, &page).with_context(|| path.display().to_string())?;
            let _ = writeln!(
                out,
                "dump {} ({})",
                path.display(),
                bytes(page.len() as f64)
            );
        } else {
            let (written, skipped) =
                dump::write(&dir, &snapshots, &points, format, self.only_changed)?;
            for path in written {
                let _ = writeln!(out, "dump {}", path.display());
            }
            for reason in skipped {
                let _ = writeln!(out, "no dump of {reason}");
            }
        }
        phases.end("dump");
        Ok(())
    }
}

fn title(out: &mut String, imported: &Imported, config: &PassConfig, why: &str) {
    let arch = &imported.model.arch;
    let _ = writeln!(
        out,
        "model   {}: {}, {} layers, {:.2} B parameters, {}",
        imported.name,
        arch.family,
        arch.layers,
        arch.parameters() as f64 / 1e9,
        imported.dtype
    );
    let _ = writeln!(
        out,
        "target  {} ({why})\nsizes   decode for {}; general for {}\n",
        config.points.decode.device.name,
        dump::sizes(&config.points.decode),
        dump::sizes(&config.points.general)
    );
}

fn passes(out: &mut String, recorded: &Recorded, config: &PassConfig, resolved: &Resolved) {
    let disabled = resolved.disabled();
    for s in dump::summaries(recorded, config) {
        let name = s.stage.name();
        if !s.enabled {
            let why = disabled.get(name).map_or("", String::as_str);
            let _ = writeln!(
                out,
                "[stage={name}, pass={name}] enabled=false reason={why}"
            );
            continue;
        }
        let _ = writeln!(
            out,
            "[stage={name}, pass={name}] enabled=true matches={} enodes={} eclasses={} cost={} time={}",
            s.total(),
            s.nodes,
            s.classes,
            dump::cost_change(&s).replace(' ', ""),
            duration(s.time).replace(' ', "")
        );
        for (rule, n) in &s.matches {
            let _ = writeln!(out, "[stage={name}, rule={rule}] matches={n}");
        }
        for rule in &s.off {
            let why = disabled.get(rule).map_or("", String::as_str);
            let _ = writeln!(
                out,
                "[stage={name}, rule={rule}] enabled=false reason={why}"
            );
        }
        if !s.unmatched.is_empty() {
            let _ = writeln!(out, "[stage={name}] unmatched={}", s.unmatched.join(","));
        }
    }
}

/// The kernels of each kind of layer, for both programs.
fn programs(out: &mut String, compiled: &Compiled, config: &PassConfig) {
    let steps = compiled.steps.as_ref().zip(config.points.as_ref());
    for (kind, (graph, at)) in steps.iter() {
        let Some(graph) = graph else { continue };
        let name = kind.name();
        let p = predict(graph, at);
        let _ = writeln!(
            out,
            "\n{name} program ({}): {} kernels",
            dump::at(at),
            p.total.kernels
        );
        for (layers, kernels) in kernels_by_layer(graph, at) {
            let _ = writeln!(out, "  {:<16} {}", layer_range(&layers), kernels.join(", "));
        }
    }
    if let (None, Some(reason)) = (&compiled.steps.decode, &compiled.no_step) {
        let _ = writeln!(out, "\nno step program: {reason}");
    }
}

/// `layer 0`, `layers 1-31`, `outside layers`.
fn layer_range(layers: &[Option<u32>]) -> String {
    let mut parts: Vec<String> = Vec::new();
    let numbers: Vec<u32> = layers.iter().filter_map(|l| *l).collect();
    let mut i = 0;
    while i < numbers.len() {
        let start = i;
        while i + 1 < numbers.len() && numbers[i + 1] == numbers[i] + 1 {
            i += 1;
        }
        parts.push(if start == i {
            numbers[i].to_string()
        } else {
            format!("{}-{}", numbers[start], numbers[i])
        });
        i += 1;
    }
    match numbers.len() {
        0 => "outside layers".to_string(),
        1 => format!("layer {}", parts[0]),
        _ => format!("layers {}", parts.join(",")),
    }
}

fn dry_run(out: &mut String, resolved: &Resolved, compiled: &Compiled, config: &PassConfig) {
    let rows = resolved.rows();
    let width = |f: fn(&(String, String, String)) -> usize| rows.iter().map(f).max().unwrap_or(0);
    let (k, v) = (width(|r| r.0.len()), width(|r| r.1.chars().count()));
    let _ = writeln!(out, "configuration");
    for (key, value, source) in &rows {
        let _ = writeln!(out, "  {key:k$}  {value:v$}  {source}");
    }
    for (name, why) in resolved.disabled() {
        let _ = writeln!(out, "  off: {name}, by {why}");
    }
    let on_cpu = config.points.decode.device == DeviceModel::CPU;
    let run = match resolved.runtime.value {
        RuntimeKind::Trtllm => Run::Serving,
        RuntimeKind::Demollm => Run::StaticBatches,
    };
    for line in resolved.without_effect(run, on_cpu) {
        let _ = writeln!(out, "  note: {line}");
    }
    if let (true, Some(line)) = (on_cpu, resolved.backend_on_cpu()) {
        let _ = writeln!(out, "  note: {line}");
    }
    let _ = writeln!(out, "\ndecode steps\n  {}", graphs(resolved, on_cpu));
    for (name, graph, at) in [
        ("decode", &compiled.steps.decode, &config.points.decode),
        ("prefill", &compiled.steps.general, &config.points.general),
    ] {
        if let Some(graph) = graph {
            prediction(out, name, &predict(graph, at), at);
        }
    }
}

/// How decode steps are launched, and the sizes that they are padded to.
fn graphs(resolved: &Resolved, on_cpu: bool) -> String {
    /// Where nobody says how many sequences run: the table ends there.
    const MOST: usize = 256;
    if on_cpu {
        return "no CUDA graphs and no padding: the CPU runs each batch as it is".to_string();
    }
    let most = resolved.max_batch_size.value.map_or(MOST, |n| n as usize);
    let asked: Option<Vec<usize>> = resolved
        .cuda_graph_batch_sizes
        .value
        .as_ref()
        .map(|sizes| sizes.iter().map(|&n| n as usize).collect());
    let buckets = DecodeBuckets::new(most, asked.as_deref());
    let list = |captured: bool| {
        let of = |n: &usize| buckets.is_captured(*n) == captured;
        let sizes: Vec<String> = buckets
            .all()
            .iter()
            .filter(|n| of(n))
            .map(usize::to_string)
            .collect();
        sizes.join(", ")
    };
    if !resolved.compile_backend.value.cuda_graphs() {
        let sizes: Vec<String> = buckets.all().iter().map(usize::to_string).collect();
        return format!(
            "launched kernel by kernel, padded to {} rows",
            sizes.join(", ")
        );
    }
    let rest = list(false);
    let rest = match rest.is_empty() {
        true => String::new(),
        false => format!("; kernel by kernel, padded to {rest} rows"),
    };
    format!("one CUDA graph each, padded to {} rows{rest}", list(true))
}

/// Packed weights, cache, activations and workspaces, as the plan has them, and what a GPU of the
/// target's size has left for the cache.
fn memory(
    out: &mut String,
    resolved: &Resolved,
    plan: &Plan,
    config: &PassConfig,
    workspaces: Option<usize>,
) {
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "  {name:<12} {text}");
    };
    line(
        "weights",
        format!(
            "{} in {} buffers",
            bytes(plan.weight_bytes() as f64),
            plan.weights.len()
        ),
    );
    let token = plan.token_bytes() as u64;
    let dtype = plan.caches.first().map_or(plan.dtype, |c| c.dtype);
    if token > 0 {
        let page = resolved.attn_page_size.value;
        line(
            "KV cache",
            format!(
                "{} a token, {} a page of {page} tokens ({dtype})",
                bytes(token as f64),
                bytes(token as f64 * f64::from(page)),
            ),
        );
    }
    if let (Some(n), Some(len)) = (resolved.max_batch_size.value, resolved.max_seq_len.value) {
        let all = token as f64 * f64::from(n) * f64::from(len);
        let text = format!("{} for {n} sequences of {len} tokens", bytes(all));
        line("", text);
    }
    for p in &plan.programs {
        let at = config.points.get(p.kind).unwrap_or(&config.points.general);
        line(
            "activations",
            format!(
                "{} in {} slots: {} ({})",
                bytes(p.activation_bytes(&at.env) as f64),
                p.slots.len(),
                p.kind.name(),
                dump::at(at)
            ),
        );
    }
    let Some(workspaces) = workspaces else { return };
    line(
        "workspaces",
        format!("{} (split KV and the like)", bytes(workspaces as f64)),
    );
    let device = &config.points.decode.device;
    let Some(capacity) = capacity(device) else {
        return;
    };
    let taken =
        plan.weight_bytes() + plan.activation_bytes(&config.points.general.env) + workspaces;
    let left = capacity - taken as f64;
    let total = bytes(capacity);
    if left <= 0.0 {
        let text = format!(
            "{} are missing: a {} has {total}",
            bytes(-left),
            device.name
        );
        line("does not fit", text);
    } else if token > 0 {
        let ratio = resolved.free_mem_ratio.value;
        let text = format!(
            "{} of {total}; {ratio} of it holds {:.0} tokens of KV cache",
            bytes(left),
            (left * ratio / token as f64).floor()
        );
        line("left", text);
    }
}

/// Bytes of memory that a program can have on a device, as the driver counts them.
fn capacity(device: &DeviceModel) -> Option<f64> {
    const GIB: f64 = (1u64 << 30) as f64;
    match device.name {
        "h100" => Some(79.2 * GIB),
        "h200" => Some(139.8 * GIB),
        _ => None,
    }
}

fn prediction(out: &mut String, name: &str, p: &Prediction, at: &CostPoint) {
    let total = p.total.picoseconds;
    let tokens = at.env.get(lathe_ir::Sym::T) as f64;
    let _ = writeln!(
        out,
        "\nroofline of {name} ({}): {}, {:.0} tokens/s",
        dump::at(at),
        picoseconds(total),
        tokens / (total.max(1) as f64 / 1e12)
    );
    let _ = writeln!(
        out,
        "  {:<12} {:>8} {:>12} {:>12} {:>10} {:>7}",
        "", "kernels", "GFLOP", "memory", "time", "share"
    );
    let rows = p
        .by_class
        .iter()
        .map(|(c, s)| (c.name(), s))
        .chain(std::iter::once(("all", &p.total)));
    for (name, s) in rows {
        let _ = writeln!(
            out,
            "  {name:<12} {:>8} {:>12.2} {:>12} {:>10} {:>5.1} %",
            s.kernels,
            s.flops / 1e9,
            bytes(s.bytes),
            picoseconds(s.picoseconds),
            100.0 * s.picoseconds as f64 / total.max(1) as f64
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_in_words() {
        assert_eq!(layer_range(&[None]), "outside layers");
        assert_eq!(layer_range(&[Some(3)]), "layer 3");
        let some = [Some(0), Some(2), Some(3), Some(4)];
        assert_eq!(layer_range(&some), "layers 0,2-4");
    }
}
