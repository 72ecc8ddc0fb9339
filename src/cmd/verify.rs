//! `verify`: compares a model with reference logits and greedy tokens.

use anyhow::Context;
use clap::Args;
use lathe_ir::relative_error;
use lathe_runtime::device::executor::Executor;
use lathe_runtime::device::load::{LoadOptions, Loadable};
use lathe_runtime::device::step::StepBatch;
use lathe_runtime::engine::{Request, complete};
use lathe_runtime::sampling::SamplingParams;
use std::io::Write;
use std::path::PathBuf;

use super::config_file::ConfigFile;
use super::generate::as_tokens;
use crate::config::{Given, Options, Resolved, Run, Source, Switch};
use crate::console::say;
use crate::global_options::GlobalOptions;
use crate::golden::{Golden, MOST_ERROR};
use crate::model::{CompiledModel, WeightChoice};

/// Compare with reference logits and greedy tokens.
#[derive(Debug, Args)]
pub struct Verify {
    /// File with `input_ids` i64[B,T], `logits` f32[B,T,V], and optionally `generated` i64[B,T+N] and
    /// `logits_bf16`; golden.safetensors in the model's folder by default
    #[arg(long, value_name = "FILE")]
    golden: Option<PathBuf>,
    /// Largest relative error ‖out−ref‖/‖ref‖; by default 5e-6 in float32 on the CPU, 1e-4 on a GPU, and
    /// 1.5 times the reference's own bf16 error in bfloat16
    #[arg(long, value_name = "X", value_parser = tolerance)]
    rtol: Option<f64>,
    #[command(flatten)]
    config: ConfigFile,
    /// Rules or stages to switch off, e.g. kv_cache to recompute whole sequences
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    disable: Vec<String>,
    /// Tokens of one step; prompts are cut into chunks of at most as many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_num_tokens: Option<u32>,
    /// Tokens a page of the KV cache; one page a sequence by default
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    attn_page_size: Option<u32>,
}

/// A tolerance that means something.
fn tolerance(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    number
        .filter(|&x| x > 0.0 && x <= MOST_ERROR)
        .ok_or_else(|| format!("expected a number above 0, at most {MOST_ERROR}"))
}

impl Verify {
    /// Runs the comparison; an error past the tolerance fails the command.
    pub fn run(&self, global: &GlobalOptions) -> anyhow::Result<()> {
        let mut flags = Options {
            max_num_tokens: Given::flag("--max_num_tokens", self.max_num_tokens.map(Some)),
            attn_page_size: Given::flag("--attn_page_size", self.attn_page_size),
            ..Options::default()
        };
        for name in &self.disable {
            let enabled = false;
            let name = name.clone();
            flags
                .switches
                .extend(Given::flag("--disable", Some(Switch { name, enabled })));
        }
        let resolved = self.config.resolve(flags)?;
        let mut model = CompiledModel::compile(global, &resolved)?;
        for line in model.remarks(&resolved, Run::Verify) {
            tracing::warn!("{line}");
        }
        let path = self
            .golden
            .clone()
            .unwrap_or_else(|| model.folder.join("golden.safetensors"));
        let golden = Golden::read(&path)?;
        anyhow::ensure!(
            golden.vocab == model.info.vocab as usize,
            "{}: logits have {} columns, the model's vocabulary has {}",
            path.display(),
            golden.vocab,
            model.info.vocab
        );
        let (logits, generated) = if model.compiled.no_step.is_none() {
            stepped(&mut model, &golden, &resolved)?
        } else {
            recomputed(&model, &golden)?
        };
        report(self.rtol, &model, &golden, &logits, generated.as_deref())
    }
}

/// Through the step programs with their cache.
fn stepped(
    model: &mut CompiledModel,
    g: &Golden,
    resolved: &Resolved,
) -> anyhow::Result<(Vec<f32>, Option<Vec<u32>>)> {
    let total = g.generated.as_ref().map_or(g.len, |(_, n)| *n);
    let mut options = LoadOptions::contiguous(g.batch, total, g.batch * g.len);
    if let Some(most) = resolved.max_seq_len.value {
        anyhow::ensure!(
            total <= most as usize,
            "the reference has sequences of {total} tokens, max_seq_len is {most}"
        );
    }
    if resolved.attn_page_size.source != Source::Default {
        let page = resolved.attn_page_size.value as usize;
        options.page_size = page;
        options.pages = g.batch * total.div_ceil(page);
    }
    if let Some(n) = resolved.max_num_tokens.value {
        options.max_tokens = (n as usize).max(g.batch);
    }
    options.max_rows = options.max_tokens;
    let mut executor = model.load(WeightChoice::Checkpoint, options)?;
    let logits = all_logits(&mut *executor, g, &options)?;
    let generated = match &g.generated {
        None => None,
        Some((tokens, n)) => Some(greedy(&mut *executor, g, tokens, *n)?),
    };
    Ok((logits, generated))
}

fn greedy(
    executor: &mut dyn Executor,
    g: &Golden,
    tokens: &[u32],
    n: usize,
) -> anyhow::Result<Vec<u32>> {
    let prompt = |b: usize| &tokens[b * n..][..g.len];
    let requests: Vec<Request> = (0..g.batch)
        .map(|b| Request {
            id: b as u64,
            prompt: as_tokens(prompt(b)),
            max_new: n - g.len,
            stop: Vec::new(),
            params: SamplingParams::default(),
            arrival_ns: 0,
        })
        .collect();
    let outputs = complete(executor, &requests, |_| {})?;
    let mut all = Vec::with_capacity(g.batch * n);
    for (b, output) in outputs.iter().enumerate() {
        all.extend_from_slice(prompt(b));
        all.extend(output.iter().map(|&token| token as u32));
    }
    Ok(all)
}

/// Without a cache: whole sequences again for every token.
fn recomputed(model: &CompiledModel, g: &Golden) -> anyhow::Result<(Vec<f32>, Option<Vec<u32>>)> {
    if let Some(reason) = &model.compiled.no_step {
        say(&format!(
            "no KV cache, whole sequences are recomputed: {reason}"
        ));
    }
    let weights = model.weights(WeightChoice::Checkpoint)?;
    let loadable = Loadable {
        plan: &model.plan,
        weights: &*weights,
        vocab: g.vocab,
    };
    let run = |tokens: &[u32]| -> anyhow::Result<Vec<f32>> {
        let tokens: Vec<i32> = tokens.iter().map(|&t| t as i32).collect();
        Ok(model.device.run_full(loadable, &tokens, g.batch)?)
    };
    let logits = run(&g.input_ids)?;
    let Some((_, n)) = g.generated else {
        return Ok((logits, None));
    };
    let mut rows: Vec<Vec<u32>> = g.input_ids.chunks(g.len).map(<[u32]>::to_vec).collect();
    for len in g.len..n {
        let out = run(&rows.concat())?;
        for (b, row) in rows.iter_mut().enumerate() {
            let last = &out[(b * len + len - 1) * g.vocab..][..g.vocab];
            let best = lathe_runtime::sampling::argmax(last).context("no logit is a number")?;
            row.push(best);
        }
    }
    Ok((logits, Some(rows.concat())))
}

/// Logits of every row of the reference's inputs, in chunks of what fits a step.
fn all_logits(
    executor: &mut dyn Executor,
    g: &Golden,
    o: &LoadOptions,
) -> anyhow::Result<Vec<f32>> {
    let pages_each = g
        .generated
        .as_ref()
        .map_or(g.len, |(_, n)| *n)
        .div_ceil(o.page_size);
    let mut logits = vec![0.0; g.batch * g.len * g.vocab];
    let mut cached = vec![0; g.batch];
    while cached.iter().any(|&c| c < g.len) {
        let mut batch = StepBatch {
            max_pages: pages_each,
            ..StepBatch::default()
        };
        let mut rows = Vec::new();
        for (b, at) in cached.iter_mut().enumerate() {
            let end = g.len.min(*at + o.max_tokens - batch.tokens.len());
            if *at == end {
                continue;
            }
            let chunk: Vec<i32> = g.input_ids[b * g.len..][*at..end]
                .iter()
                .map(|&t| t as i32)
                .collect();
            let pages: Vec<i32> = (b * pages_each..(b + 1) * pages_each)
                .map(|p| p as i32)
                .collect();
            batch.push_sequence(&chunk, *at, &pages, None);
            rows.extend((*at..end).map(|p| b * g.len + p));
            *at = end;
        }
        batch.rows = (0..batch.tokens.len() as i32).collect();
        let out = executor.step(&batch, true)?;
        let got = out.logits.context("the device returned no logits")?;
        for (row, values) in rows.iter().zip(got.chunks(g.vocab)) {
            logits[row * g.vocab..][..g.vocab].copy_from_slice(values);
        }
    }
    Ok(logits)
}

fn report(
    rtol: Option<f64>,
    model: &CompiledModel,
    g: &Golden,
    logits: &[f32],
    generated: Option<&[u32]>,
) -> anyhow::Result<()> {
    let float32 = model.dtype == lathe_ir::DType::F32;
    let error = relative_error(logits, &g.logits);
    let own = g.bf16_error;
    let limit = rtol.unwrap_or_else(|| match float32 {
        true => model.device.capabilities().f32_error,
        false => own.map_or(0.05, |o| (1.5 * o).min(MOST_ERROR)),
    });
    let max_abs = logits
        .iter()
        .zip(&g.logits)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    let same_top = logits
        .chunks(g.vocab)
        .zip(g.logits.chunks(g.vocab))
        .filter(|(a, b)| lathe_runtime::sampling::argmax(a) == lathe_runtime::sampling::argmax(b))
        .count();
    let rows = g.batch * g.len;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "model               {} ({}, {})",
        model.name,
        model.dtype,
        model.device.name()
    )?;
    writeln!(out, "max abs error       {max_abs:.3e}")?;
    writeln!(out, "relative error      {error:.3e}  (limit {limit:.3e})")?;
    if let Some(own) = own {
        writeln!(
            out,
            "reference's bf16    {own:.3e}  (ours is {:.2} times that)",
            error / own
        )?;
    }
    writeln!(out, "top-1 agreement     {same_top} of {rows}")?;
    if same_top < rows {
        let gap = largest_missed_gap(logits, &g.logits, g.vocab);
        writeln!(
            out,
            "                    they differ where the reference's two best are at most {gap:.3} apart"
        )?;
    }
    let mut mismatch = None;
    if let (Some(ours), Some((theirs, n))) = (generated, &g.generated) {
        mismatch = ours.iter().zip(theirs).position(|(a, b)| a != b);
        match mismatch {
            None => writeln!(
                out,
                "greedy tokens       all {} equal",
                g.batch * (n - g.len)
            )?,
            Some(i) => writeln!(
                out,
                "greedy tokens       first mismatch in sequence {} at position {}: {} instead of {}",
                i / n,
                i % n,
                ours[i],
                theirs[i]
            )?,
        }
    }
    // Written so that a NaN on either side fails.
    let passes = error <= limit && limit.is_finite();
    if !passes {
        anyhow::bail!("relative error {error:.3e} is past the limit {limit:.3e}");
    }
    if float32 && mismatch.is_some() {
        anyhow::bail!("a greedy token differs in float32");
    }
    Ok(())
}

/// Of the rows whose best token differs, the largest gap between the reference's two best logits.
fn largest_missed_gap(ours: &[f32], reference: &[f32], vocab: usize) -> f32 {
    let mut largest = 0.0f32;
    for (a, b) in ours.chunks(vocab).zip(reference.chunks(vocab)) {
        if lathe_runtime::sampling::argmax(a) == lathe_runtime::sampling::argmax(b) {
            continue;
        }
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &x in b {
            if x > first {
                (first, second) = (x, first);
            } else if x > second {
                second = x;
            }
        }
        largest = largest.max(first - second);
    }
    largest
}
