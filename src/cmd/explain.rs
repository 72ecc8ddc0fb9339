//! `explain`: why this kernel.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::anyhow;
use clap::Args;
use lathe_codegen::cuda::{Fusions, StepFusion};
use lathe_ir::{Chain, ChainArg, Graph, Node, NodeId, Op, ProgramKind, text};
use lathe_passes::egraph::cost::{CostPoint, DeviceModel};
use lathe_passes::explain::{Form, OpStory, ProgramStory};
use lathe_passes::pipeline::{PassConfig, Recorded, RecordedTemplate, TemplateReport, record};
use lathe_passes::predict::kernel_name;
use lathe_passes::region::layer_name;

use super::config_file::ConfigFile;
use crate::config::{Options, nearest};
use crate::console::Task;
use crate::dump::{self, at};
use crate::errors::usage_error;
use crate::frontend::import_model;
use crate::global_options::GlobalOptions;
use crate::phases::{Phases, picoseconds};
use crate::target::Predicted;

/// Show how an operation of a step program came about
#[derive(Debug, Args)]
pub struct Explain {
    /// Program: decode (one token a sequence) or general (prefill and mixed steps)
    #[arg(long, value_enum, default_value_t, value_name = "NAME")]
    program: Which,
    /// Decoder layer; without it, what lies outside of the layers
    #[arg(long, value_name = "N")]
    layer: Option<u32>,
    /// Operation of the program (gemm, attn_qkv) or on the way there (softmax), node (%8) or part of a
    /// module path (o_proj); without it, a list
    #[arg(long, value_name = "NAME")]
    op: Option<String>,
    #[command(flatten)]
    config: ConfigFile,
    /// Device to compile for: h100, h200, cpu; by default the one that --device stands for
    #[arg(long, value_name = "NAME")]
    target: Option<String>,
}

/// `--program`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Which {
    /// One token a sequence.
    #[default]
    Decode,
    /// Prefill and mixed steps.
    General,
}

impl Which {
    fn kind(self) -> ProgramKind {
        match self {
            Which::Decode => ProgramKind::Decode,
            Which::General => ProgramKind::General,
        }
    }
}

impl Explain {
    /// Runs the command.
    pub fn run(&self, global: &GlobalOptions) -> anyhow::Result<()> {
        let mut phases = Phases::new();
        let task = Task::begin("compile");
        let config = self.config.resolve(Options::default())?;
        let device = Predicted::resolve(self.target.as_deref(), global.device)?;
        let imported = import_model(global, &config, &mut phases)?;
        let on_cpu = device.model == DeviceModel::CPU;
        let pass_config = config.pass_config(device.model);
        let recorded = record(&imported.model.graph, &pass_config)?;
        // Kernels are generated for GPUs alone.
        let fusions = match on_cpu {
            true => None,
            false => {
                let max_seq_len = config.max_seq_len.value;
                let options = dump::kernel_options(
                    config.attn_page_size.value,
                    max_seq_len.unwrap_or(imported.model.arch.max_position),
                    !config.compile_backend.value.fuses(),
                );
                let plan = imported.lower(&recorded.compiled)?;
                dump::program_fusions(&plan, self.program.kind(), &pass_config, options)?
            }
        };
        drop(task);
        let out = self.text(&recorded, &pass_config, fusions.as_ref())?;
        std::io::stdout().lock().write_all(out.as_bytes())?;
        Ok(())
    }

    /// What is printed: for `--op` what it names among the operations of the program, else among
    /// those that they stand for and that rules made on the way.
    fn text(
        &self,
        recorded: &Recorded,
        config: &PassConfig,
        fusions: Option<&Fusions>,
    ) -> anyhow::Result<String> {
        self.named(recorded, config, fusions, false)
            .or_else(|e| self.named(recorded, config, fusions, true).map_err(|_| e))
    }

    fn named(
        &self,
        recorded: &Recorded,
        config: &PassConfig,
        fusions: Option<&Fusions>,
        imported: bool,
    ) -> anyhow::Result<String> {
        let compiled = &recorded.compiled;
        if let (None, Some(reason)) = (&compiled.steps.decode, &compiled.no_step) {
            return Err(anyhow!("there is no step program to explain: {reason}"));
        }
        let mut out = String::new();
        let mut names: Vec<String> = Vec::new();
        let mut found = false;
        for (template, seen) in self.templates(recorded)? {
            let Some(view) = self.view(template, seen, config) else {
                continue;
            };
            for op in &view.story.ops {
                let node = view.graph.node(op.node);
                names.push(kernel_name(&node.op));
                names.push(node.op.name().to_string());
                match &self.op {
                    None => view.line(&mut out, op),
                    Some(name) if view.is(op, name) || imported && view.stands_for(op, name) => {
                        view.explain(&mut out, op);
                        view.kernels(&mut out, op, fusions);
                    }
                    Some(_) => continue,
                }
                found = true;
            }
        }
        if let Some(Some(program)) = compiled.steps.get(self.program.kind()) {
            for id in program.ids() {
                let node = program.node(id);
                let Op::Chain(chain) = &node.op else { continue };
                if node.prov.layer != self.layer {
                    continue;
                }
                names.extend([kernel_name(&node.op), "chain".to_string()]);
                let asked = self.op.as_deref().is_none_or(|name| {
                    name == "chain" || name == kernel_name(&node.op) || name == id.to_string()
                });
                if asked {
                    chain_lines(&mut out, program, id, chain, self.op.is_some());
                    found = true;
                }
            }
        }
        if found {
            return Ok(out);
        }
        names.sort();
        names.dedup();
        let name = self.op.as_deref().unwrap_or_default();
        let known: Vec<&str> = names.iter().map(String::as_str).collect();
        let hint = nearest(name, known.iter().copied())
            .map_or(String::new(), |n| format!("; did you mean '{n}'?"));
        let hint = if hint.is_empty() { ";" } else { &hint };
        Err(usage_error(format!(
            "no operation '{name}' here{hint} there are {}",
            known.join(", ")
        )))
    }

    /// The program of a template that is asked for.
    fn view<'a>(
        &self,
        template: &'a TemplateReport,
        seen: &'a RecordedTemplate,
        config: &'a PassConfig,
    ) -> Option<View<'a>> {
        let kind = self.program.kind();
        let story = seen.story.as_ref()?;
        Some(View {
            template,
            kind,
            graph: template.steps.get(kind)?.as_ref()?,
            story: match self.program {
                Which::Decode => &story.decode,
                Which::General => story.general.as_ref()?,
            },
            point: config.points.get(kind)?,
            layer: self.layer,
        })
    }

    /// The templates of the layer, with what was seen of them.
    fn templates<'a>(
        &self,
        recorded: &'a Recorded,
    ) -> anyhow::Result<Vec<(&'a TemplateReport, &'a RecordedTemplate)>> {
        let of_layer = |(t, _): &(&TemplateReport, _)| match self.layer {
            Some(l) => t.layers.contains(&l),
            None => t.layers.is_empty(),
        };
        let all = &recorded.compiled.templates;
        let templates: Vec<_> = all
            .iter()
            .zip(&recorded.templates)
            .filter(of_layer)
            .collect();
        if templates.is_empty() {
            let last = all.iter().flat_map(|t| &t.layers).max();
            return Err(usage_error(format!(
                "--layer {}: the last layer is {}",
                self.layer.unwrap_or_default(),
                last.copied().unwrap_or_default()
            )));
        }
        Ok(templates)
    }
}

/// A chain of the whole program: the operations above that became one kernel.
fn chain_lines(out: &mut String, program: &Graph, id: NodeId, chain: &Chain, all: bool) {
    let node = program.node(id);
    let _ = writeln!(
        out,
        "{:5} {:24} {:44} one generated kernel of {} operations",
        id.to_string(),
        kernel_name(&node.op),
        node.prov.path,
        chain.statements.len()
    );
    if !all {
        return;
    }
    for (i, o) in node.inputs.iter().enumerate() {
        let operand = program.node(*o);
        let _ = writeln!(out, "  a{i} = {}", text::print_node(*o, operand));
    }
    for (i, s) in chain.statements.iter().enumerate() {
        let args: Vec<String> = s.args.iter().map(ChainArg::to_string).collect();
        let mark = if chain.results.contains(&(i as u8)) {
            "*"
        } else {
            " "
        };
        let _ = writeln!(out, " {mark}t{i} = {} {}", s.op.name(), args.join(", "));
    }
    out.push('\n');
}

/// One template as a layer of the model.
struct View<'a> {
    template: &'a TemplateReport,
    kind: ProgramKind,
    graph: &'a Graph,
    story: &'a ProgramStory,
    /// Where the program was chosen.
    point: &'a CostPoint,
    layer: Option<u32>,
}

impl View<'_> {
    fn path(&self, node: &Node) -> String {
        match self.layer {
            Some(l) => layer_name(&node.prov.path, l),
            None => node.prov.path.to_string(),
        }
    }

    fn is(&self, op: &OpStory, name: &str) -> bool {
        let node = self.graph.node(op.node);
        name == node.op.name()
            || name == kernel_name(&node.op)
            || name == op.node.to_string()
            || (name.len() > 2 && self.path(node).contains(name))
            || self.operations(op).iter().any(|&id| {
                let path = self.path(self.template.imported.node(id));
                path.split('.').any(|part| part == name)
            })
    }

    fn stands_for(&self, op: &OpStory, name: &str) -> bool {
        let mut all = self.operations(op).into_iter();
        all.any(|id| self.template.imported.node(id).op.name() == name)
            || op.steps.iter().any(|s| s.op == name)
    }

    fn line(&self, out: &mut String, op: &OpStory) {
        let node = self.graph.node(op.node);
        let _ = writeln!(
            out,
            "{:5} {:24} {:44} {:3} imported operations, {:3} rule applications",
            op.node.to_string(),
            kernel_name(&node.op),
            self.path(node),
            self.operations(op).len(),
            op.steps.len()
        );
    }

    /// The imported nodes of an operation, without leaves.
    fn operations(&self, op: &OpStory) -> Vec<NodeId> {
        let is_op = |id: &&NodeId| !self.template.imported.node(**id).op.is_leaf();
        op.imported.iter().filter(is_op).copied().collect()
    }

    fn explain(&self, out: &mut String, op: &OpStory) {
        let node = self.graph.node(op.node);
        let layer = self
            .layer
            .map_or_else(|| "outside layers".to_string(), |l| format!("layer {l}"));
        let _ = writeln!(
            out,
            "{}, {layer}, {} program ({})\n  {}\n",
            kernel_name(&node.op),
            self.kind.name(),
            at(self.point),
            self.print(op.node, node)
        );
        let imported = self.operations(op);
        let _ = writeln!(out, "stands for {} imported operations", imported.len());
        for id in imported {
            let line = self.print(id, self.template.imported.node(id));
            let _ = writeln!(out, "  {line}");
        }
        let _ = writeln!(out, "\nrules, in the order in which they applied");
        for step in grouped(op) {
            let _ = writeln!(out, "  {step}");
        }
        let assumed: BTreeSet<String> = (op.steps.iter())
            .filter_map(|s| Some(format!("{}: {}", s.rule, s.assumes.as_ref()?)))
            .collect();
        for line in assumed {
            let _ = writeln!(out, "  assuming, by {}", self.named(&line));
        }
        let values = self.values(op);
        let _ = writeln!(
            out,
            "\nforms, with their own time and that of the whole layer"
        );
        for (at, value) in values {
            let Some(story) = self.story.values.get(&value) else {
                continue;
            };
            let _ = writeln!(out, "  value {at} : {}", story.ty);
            for form in &story.forms {
                let _ = writeln!(out, "{}", self.form(form));
            }
        }
        let apart = self.apart(op);
        if !apart.is_empty() {
            let _ = writeln!(
                out,
                "\nit stays apart from the kernel that reads it, which could also be"
            );
            for line in apart {
                let _ = writeln!(out, "  {line}");
            }
        } else if let Some(n) = &op.nearest {
            let _ = writeln!(
                out,
                "\nno rule lowered it; the nearest is {} ({} of {} operations match): {}",
                n.rule,
                n.matched.0,
                n.matched.1,
                self.named(&n.reason)
            );
        }
        out.push('\n');
    }

    /// The kernels that run an operation, and what they take over from their neighbours.
    fn kernels(&self, out: &mut String, op: &OpStory, fusions: Option<&Fusions>) {
        let (name, path) = self.step_name(op.node);
        let steps: Vec<&StepFusion> = fusions
            .iter()
            .flat_map(|f| &f.steps)
            .filter(|s| s.op == name && s.path == path)
            .collect();
        // Two operations may have one path: they are then told apart by their order.
        let alike: Vec<NodeId> = self
            .graph
            .ids()
            .filter(|id| self.step_name(*id) == (name, path.clone()))
            .collect();
        let its = match alike.iter().position(|id| *id == op.node) {
            Some(at) if alike.len() == steps.len() => &steps[at..=at],
            _ => &steps[..],
        };
        if its.is_empty() {
            return;
        }
        let _ = writeln!(
            out,
            "step and kernel, and what it does beside that where rows are greedy"
        );
        for step in its {
            let _ = write!(out, "{step}");
        }
        out.push('\n');
    }

    /// The operation and the path of the step that runs a node.
    fn step_name(&self, id: NodeId) -> (&'static str, String) {
        let node = self.graph.node(id);
        (node.op.name(), self.path(node))
    }

    /// For each reader of an operation, its cheapest form that would read the operation's operands
    /// instead: what was possible, and costs more or has no kernel at these sizes.
    fn apart(&self, op: &OpStory) -> Vec<String> {
        let value = self.story.nodes[op.node.index()];
        let inputs = &self.graph.node(op.node).inputs;
        let mut lines = Vec::new();
        for id in self.graph.ids() {
            let node = self.graph.node(id);
            let Some(story) = self.story.values.get(&self.story.nodes[id.index()]) else {
                continue;
            };
            if !node.inputs.contains(&op.node) {
                continue;
            }
            let takes_in = |f: &&Form| {
                let reads = |i: &NodeId| f.operands.contains(&self.story.nodes[i.index()]);
                !f.operands.contains(&value) && inputs.iter().any(reads)
            };
            let other = story.forms.iter().filter(takes_in);
            let other = other.min_by_key(|f| f.total.unwrap_or(u64::MAX));
            if let Some(form) = other {
                let none = match form.total {
                    Some(_) => "",
                    None => "  (no kernel at these sizes)",
                };
                lines.push(format!("{id}{}{none}", self.form(form)));
            }
        }
        lines
    }

    /// The values of an operation: its own, and those of its elements.
    fn values(&self, op: &OpStory) -> Vec<(NodeId, usize)> {
        let mut values = Vec::new();
        for id in self.graph.ids() {
            let node = self.graph.node(id);
            let element = matches!(node.op, Op::Get(_)) && node.inputs.only() == Some(op.node);
            if id == op.node || element {
                values.push((id, self.story.nodes[id.index()]));
            }
        }
        values
    }

    fn form(&self, form: &Form) -> String {
        let operands: Vec<String> = form.operands.iter().map(|v| self.operand(*v)).collect();
        let time = |t: Option<u64>| t.map_or_else(|| "-".to_string(), picoseconds);
        let mark = if form.chosen { "*" } else { " " };
        let by = if form.rules.is_empty() {
            String::new()
        } else {
            format!("  by {}", form.rules.join(", "))
        };
        format!(
            "  {mark} {:>9} {:>9}  {} {}{}{by}",
            time(form.own),
            time(form.total),
            form.op,
            operands.join(", "),
            if form.attrs.is_empty() {
                String::new()
            } else {
                format!(" {}", form.attrs)
            }
        )
    }

    /// A value as the program names it, else by its number.
    fn operand(&self, value: usize) -> String {
        match self.story.nodes.iter().position(|&v| v == value) {
            Some(i) => NodeId(i as u32).to_string(),
            None => format!("v{value}"),
        }
    }

    /// The line of a node, with the layer's number for the template's `*`.
    fn print(&self, id: NodeId, node: &Node) -> String {
        let mut node = node.clone();
        node.prov.path = self.path(&node).into();
        if node.prov.layer.is_some() {
            node.prov.layer = self.layer;
        }
        text::print_node(id, &node)
    }

    fn named(&self, text: &str) -> String {
        match self.layer {
            Some(l) => text.replace(".*.", &format!(".{l}.")),
            None => text.to_string(),
        }
    }
}

/// Consecutive applications of one rule in one line.
fn grouped(op: &OpStory) -> Vec<String> {
    let mut lines: Vec<(usize, String)> = Vec::new();
    for s in &op.steps {
        let line = format!("{:14} {:24} gives {}", s.stage.name(), s.rule, s.op);
        match lines.last_mut() {
            Some((n, last)) if *last == line => *n += 1,
            _ => lines.push((1, line)),
        }
    }
    lines
        .into_iter()
        .map(|(n, line)| if n > 1 { format!("{line} ×{n}") } else { line })
        .collect()
}
