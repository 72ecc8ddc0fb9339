//! A static batch: all prompts are prefilled, then all sequences decode together until the last
//! one ends. This is the whole of `runtime: demollm`, and of `generate` and `verify`.

use crate::device::executor::Executor;
use crate::device::step::{RowSampler, StepBatch, StepError};
use crate::sampling::SamplingParams;
use std::time::{Duration, Instant};

/// One sequence to complete.
#[derive(Clone, Debug, PartialEq)]
pub struct StaticRequest {
    /// Key of the request's random numbers.
    pub id: u64,
    /// Prompt, not empty.
    pub prompt: Vec<u32>,
    /// Most new tokens.
    pub max_new: usize,
    /// Tokens that end the sequence; the ending token is part of the output.
    pub stop: Vec<u32>,
    /// How tokens are chosen.
    pub params: SamplingParams,
}

/// A sequence of the batch is done or its token arrived.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenEvent {
    /// Index of the request in the batch.
    pub request: usize,
    /// The token.
    pub token: u32,
    /// Whether it is the last one.
    pub last: bool,
}

/// Times of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BatchTimes {
    /// Steps that held prompt rows.
    pub prefill: Duration,
    /// Steps of one row a sequence.
    pub decode: Duration,
    /// Number of decode steps.
    pub decode_steps: usize,
}

struct Sequence {
    pages: Vec<i32>,
    /// Tokens in the cache.
    cached: usize,
    output: Vec<u32>,
    done: bool,
}

/// Completes all requests in one static batch. Sequence `i` takes the `i`-th run of pages.
/// `on_token` is called for each token in the order in which they are known.
///
/// # Errors
/// A request does not fit the executor, or a step fails.
pub fn run_static(
    executor: &mut dyn Executor,
    requests: &[StaticRequest],
    mut on_token: impl FnMut(TokenEvent),
) -> Result<(Vec<Vec<u32>>, BatchTimes), StepError> {
    let capacity = executor.capacity();
    let longest = requests.iter().map(|r| r.prompt.len() + r.max_new).max();
    let longest = longest.unwrap_or(0);
    let pages_each = longest.div_ceil(capacity.page_size.max(1));
    if longest > capacity.max_seq_len
        || requests.len() > capacity.max_sequences
        || pages_each * requests.len() > capacity.pages
    {
        return Err(StepError::Batch(format!(
            "{} sequences of up to {longest} tokens; limits are {} sequences of {} tokens in {} pages",
            requests.len(),
            capacity.max_sequences,
            capacity.max_seq_len,
            capacity.pages
        )));
    }
    let mut sequences: Vec<Sequence> = (0..requests.len())
        .map(|i| Sequence {
            pages: (i * pages_each..(i + 1) * pages_each)
                .map(|p| p as i32)
                .collect(),
            cached: 0,
            output: Vec::new(),
            done: requests[i].prompt.is_empty() || requests[i].max_new == 0,
        })
        .collect();
    let mut times = BatchTimes::default();
    loop {
        let (batch, rows, prefill) = next_batch(requests, &mut sequences, &capacity, pages_each);
        if batch.tokens.is_empty() {
            break;
        }
        let start = Instant::now();
        let out = executor.step(&batch, false)?;
        if prefill {
            times.prefill += start.elapsed();
        } else {
            times.decode += start.elapsed();
            times.decode_steps += 1;
        }
        for (&i, &token) in rows.iter().zip(&out.next) {
            let (r, s) = (&requests[i], &mut sequences[i]);
            let token = token as u32;
            s.output.push(token);
            s.done = s.output.len() == r.max_new || r.stop.contains(&token);
            on_token(TokenEvent {
                request: i,
                token,
                last: s.done,
            });
        }
    }
    Ok((sequences.into_iter().map(|s| s.output).collect(), times))
}

/// Prompt rows first, as many as fit; without any, one row of each running sequence. Returns the
/// batch, the requests of its sampled rows and whether it holds prompt rows.
fn next_batch(
    requests: &[StaticRequest],
    sequences: &mut [Sequence],
    capacity: &crate::device::step::Capacity,
    max_pages: usize,
) -> (StepBatch, Vec<usize>, bool) {
    let mut batch = StepBatch {
        max_pages,
        ..StepBatch::default()
    };
    let mut rows = Vec::new();
    for (i, (r, s)) in requests.iter().zip(sequences.iter_mut()).enumerate() {
        let room = capacity.max_tokens - batch.tokens.len();
        if s.done || s.cached >= r.prompt.len() || room == 0 {
            continue;
        }
        let end = r.prompt.len().min(s.cached + room);
        let chunk: Vec<i32> = r.prompt[s.cached..end].iter().map(|&t| t as i32).collect();
        let last = end == r.prompt.len();
        let sampler = last.then(|| sampler(r, end));
        batch.push_sequence(&chunk, s.cached, &s.pages, sampler);
        s.cached = end;
        if last {
            rows.push(i);
        }
    }
    if !batch.tokens.is_empty() {
        return (batch, rows, true);
    }
    for (i, (r, s)) in requests.iter().zip(sequences.iter_mut()).enumerate() {
        if s.done {
            continue;
        }
        let Some(&token) = s.output.last() else {
            continue;
        };
        let position = s.cached;
        batch.push_sequence(
            &[token as i32],
            position,
            &s.pages,
            Some(sampler(r, position + 1)),
        );
        s.cached += 1;
        rows.push(i);
    }
    (batch, rows, false)
}

fn sampler(r: &StaticRequest, position: usize) -> RowSampler {
    RowSampler {
        params: r.params,
        request: r.id,
        position: position as u32,
    }
}
