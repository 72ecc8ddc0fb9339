//! `generate`: completes prompts and streams the text.

use anyhow::Context;
use clap::Args;
use lathe_runtime::device::executor::Executor;
use lathe_runtime::device::load::LoadOptions;
use lathe_runtime::engine::{Request, complete};
use lathe_runtime::sampling::SamplingParams;
use lathe_runtime::text::{ChatMessage, ChatTemplate, Sandbox, TextTokenizer, eos_token_ids};
use std::io::Write;

use super::config_file::ConfigFile;
use super::throughput::weight_choice;
use crate::config::{Options, Run};
use crate::errors::usage_error;
use crate::global_options::GlobalOptions;
use crate::model::CompiledModel;

/// Complete a prompt.
#[derive(Debug, Args)]
pub struct Generate {
    #[command(flatten)]
    config: ConfigFile,
    /// What to complete or answer; several prompts make one batch, printed one after the other
    #[arg(long, short, required = true, value_name = "TEXT")]
    prompt: Vec<String>,
    /// Most new tokens
    #[arg(long = "max_tokens", default_value_t = 128, value_name = "N")]
    max_tokens: usize,
    /// 0 takes the most probable token
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Only the K most probable tokens; 0 means all
    #[arg(long = "top_k", default_value_t = 0, value_name = "K")]
    top_k: u32,
    /// Only the most probable tokens whose probabilities add up to P
    #[arg(long = "top_p", default_value_t = 1.0, value_name = "P")]
    top_p: f32,
    /// The same seed gives the same tokens
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Complete the text as it is, without the chat template
    #[arg(long)]
    raw: bool,
    /// Go on after a token that ends the text
    #[arg(long = "ignore_eos")]
    ignore_eos: bool,
}

impl Generate {
    /// Prints the completions.
    pub fn run(&self, global: &GlobalOptions) -> anyhow::Result<()> {
        let params = SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
        };
        params.validate().map_err(|e| usage_error(e.to_string()))?;
        let resolved = self.config.resolve(Options::default())?;
        let mut model = CompiledModel::compile(global, &resolved)?;
        for line in model.remarks(&resolved, Run::Generate) {
            tracing::warn!("{line}");
        }
        let tokenizer = TextTokenizer::load(&model.folder)?;
        let template = if self.raw {
            None
        } else {
            let sandbox = Sandbox::this_program().context("the program's own file")?;
            ChatTemplate::load(&model.folder, tokenizer.special(), &sandbox)?
        };
        let stop = if self.ignore_eos {
            Vec::new()
        } else {
            eos_token_ids(&model.folder)?
        };
        let mut requests = Vec::with_capacity(self.prompt.len());
        for (i, prompt) in self.prompt.iter().enumerate() {
            let ids = match &template {
                Some(t) => tokenizer
                    .encode(&t.render(&[ChatMessage::new("user", prompt)], true)?, false)?,
                None => tokenizer.encode(prompt, true)?,
            };
            if ids.is_empty() {
                return Err(usage_error(format!("prompt {} has no tokens", i + 1)));
            }
            requests.push(Request {
                id: i as u64,
                prompt: as_tokens(&ids),
                max_new: self.max_tokens,
                stop: as_tokens(&stop),
                params,
                arrival_ns: 0,
            });
        }
        let longest = requests
            .iter()
            .map(|r| r.prompt.len().saturating_add(r.max_new))
            .max()
            .unwrap_or(0);
        model.check_length(longest)?;
        if let Some(most) = resolved.max_seq_len.value
            && longest > most as usize
        {
            return Err(usage_error(format!(
                "prompt and output have {longest} tokens, max_seq_len is {most}; lower --max_tokens"
            )));
        }
        let prompts: usize = requests.iter().map(|r| r.prompt.len()).sum();
        let step = resolved.max_num_tokens.value.map_or(2048, |n| n as usize);
        let options = LoadOptions::contiguous(requests.len(), longest, prompts.min(step));
        let mut executor = model.load(weight_choice(&resolved), options)?;
        if requests.len() == 1 {
            self.stream(&mut *executor, &requests, &tokenizer)
        } else {
            self.batch(&mut *executor, &requests, &tokenizer)
        }
    }

    fn stream(
        &self,
        executor: &mut dyn Executor,
        requests: &[Request],
        tokenizer: &TextTokenizer,
    ) -> anyhow::Result<()> {
        let mut decoder = tokenizer.stream(true);
        let mut failed = None;
        let mut out = std::io::stdout();
        let (mut prefilled_ns, mut ended_ns) = (0, 0);
        let outputs = complete(executor, requests, |event| {
            if event.index == 0 {
                prefilled_ns = event.at_ns;
            }
            ended_ns = event.at_ns;
            // The engine hands out tokens of the vocabulary only.
            let text = decoder.push(event.token as u32);
            let written = text.map_err(anyhow::Error::from).and_then(|t| {
                out.write_all(t.as_bytes())?;
                Ok(out.flush()?)
            });
            if let Err(e) = written {
                failed.get_or_insert(e);
            }
        })?;
        if let Some(e) = failed {
            return Err(e);
        }
        out.write_all(decoder.finish()?.as_bytes())?;
        writeln!(out)?;
        let decoded = outputs[0].len().saturating_sub(1);
        let seconds = |ns: u64| ns as f64 * 1e-9;
        tracing::info!(
            "prefill {} tokens in {:.3} s; decode {} tokens, {:.1} tokens/s",
            requests[0].prompt.len(),
            seconds(prefilled_ns),
            decoded,
            decoded as f64 / seconds(ended_ns - prefilled_ns).max(1e-9)
        );
        Ok(())
    }

    fn batch(
        &self,
        executor: &mut dyn Executor,
        requests: &[Request],
        tokenizer: &TextTokenizer,
    ) -> anyhow::Result<()> {
        let outputs = complete(executor, requests, |_| {})?;
        let mut out = std::io::stdout().lock();
        for (i, ids) in outputs.iter().enumerate() {
            let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
            let text = tokenizer
                .decode(&ids, true)
                .context("decoding the output")?;
            writeln!(out, "--- {}\n{text}", i + 1)?;
        }
        Ok(())
    }
}

/// Token ids as the engine has them. One beyond `i32` is beyond every vocabulary, too; the engine refuses it.
pub(super) fn as_tokens(ids: &[u32]) -> Vec<i32> {
    let token = |&id: &u32| i32::try_from(id).unwrap_or(i32::MAX);
    ids.iter().map(token).collect()
}
