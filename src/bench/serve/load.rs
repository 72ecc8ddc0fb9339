//! How requests are put on the engine.

use lathe_runtime::engine::Request;
use lathe_runtime::sampling::SamplingParams;

use crate::bench::dataset::Request as Line;

/// How requests are put on the engine.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    /// Most requests in flight; 0 or less is no limit.
    pub concurrency: i64,
    /// Requests, drawn from the dataset with replacement, that run before the measurement.
    pub warmup: usize,
    /// Whether the times of first tokens are recorded.
    pub streaming: bool,
    /// Tokens that end an output; none runs each request to its length.
    pub stop: Vec<i32>,
    /// How tokens are chosen.
    pub params: SamplingParams,
}

impl Default for Load {
    /// trtllm-bench's defaults.
    fn default() -> Self {
        Self {
            concurrency: -1,
            warmup: 2,
            streaming: false,
            stop: Vec::new(),
            params: SamplingParams::default(),
        }
    }
}

impl Load {
    /// That of `latency`: one request after the other, streaming.
    pub fn latency() -> Self {
        Self {
            concurrency: 1,
            streaming: true,
            ..Self::default()
        }
    }

    /// Most requests in flight.
    pub(super) fn slots(&self) -> usize {
        usize::try_from(self.concurrency)
            .ok()
            .filter(|&limit| limit > 0)
            .unwrap_or(usize::MAX)
    }
}

/// A line of the dataset as a request of the engine.
pub(super) fn prepared(id: u64, request: &Line, load: &Load) -> Request {
    // An id beyond i32 is beyond every vocabulary, too; the engine refuses it.
    let token = |&id: &u32| i32::try_from(id).unwrap_or(i32::MAX);
    Request {
        id,
        prompt: request.input_ids.iter().map(token).collect(),
        max_new: request.output_tokens as usize,
        stop: load.stop.clone(),
        params: load.params,
        arrival_ns: 0,
    }
}
