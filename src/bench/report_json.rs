//! The report's files: `--report_json`, `--request_json`, `--output_json` and `--iteration_log`.

use std::path::Path;

use lathe_runtime::text::TextTokenizer;
use serde::Serialize;
use serde_json::{Map, Value};

use super::files::{write_atomically, write_json};
use super::metrics::RequestRecord;
use super::report::Report;

/// As in trtllm-bench's files.
const INDENT: &[u8] = b"    ";

/// `--report_json`: the report with trtllm-bench's keys.
pub fn write_report_json(path: &Path, report: &Report) -> anyhow::Result<()> {
    write_json(path, INDENT, report)
}

/// One element of `--request_json`. Times in nanoseconds, rates in tokens a nanosecond, as trtllm-bench
/// writes them.
#[derive(Serialize)]
struct RequestEntry {
    id: u64,
    num_input_tokens: usize,
    error_tokens: usize,
    start_timestamp: u64,
    /// -1 without streaming.
    first_token_timestamp: i64,
    end_timestamp: u64,
    decode_iteration: u64,
    num_total_output_tokens: usize,
    num_generated_tokens: usize,
    generation_time: f64,
    time_to_first_token: f64,
    intertoken_latency: f64,
    end_to_end_latency: f64,
    total_token_throughput: f64,
    generation_token_throughput: f64,
    /// Decoded text; null without a tokenizer.
    output: Option<String>,
    output_tokens: usize,
    /// Only for a failed request.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// `--request_json`: what was measured of each request. The decoded text is null without a tokenizer.
pub fn write_request_json(
    path: &Path,
    records: &[RequestRecord],
    tokenizer: Option<&TextTokenizer>,
) -> anyhow::Result<()> {
    let entries = records
        .iter()
        .map(|record| request_entry(record, tokenizer))
        .collect::<anyhow::Result<Vec<_>>>()?;
    write_json(path, INDENT, &entries)
}

fn request_entry(
    record: &RequestRecord,
    tokenizer: Option<&TextTokenizer>,
) -> anyhow::Result<RequestEntry> {
    Ok(RequestEntry {
        id: record.id,
        num_input_tokens: record.isl,
        error_tokens: usize::from(record.error.is_some()),
        start_timestamp: record.start_ns,
        first_token_timestamp: record
            .first_token_ns
            .and_then(|ns| i64::try_from(ns).ok())
            .unwrap_or(-1),
        end_timestamp: record.end_ns,
        decode_iteration: record.decode_iteration,
        num_total_output_tokens: record.n_output(),
        num_generated_tokens: record.n_output().saturating_sub(1),
        generation_time: record.generation_ns(),
        time_to_first_token: record.ttft_ns(),
        intertoken_latency: record.tpot_ns(),
        end_to_end_latency: record.latency_ns(),
        total_token_throughput: record.output_rate(),
        generation_token_throughput: record.generation_rate(),
        output: tokenizer
            .map(|tokenizer| tokenizer.decode(&record.output_tokens, false))
            .transpose()?,
        output_tokens: record.n_output(),
        error: record.error.clone(),
    })
}

/// `--output_json`: request id → generated text; without a tokenizer the token ids stand in its place.
pub fn write_output_json(
    path: &Path,
    records: &[RequestRecord],
    tokenizer: Option<&TextTokenizer>,
) -> anyhow::Result<()> {
    let mut sorted: Vec<&RequestRecord> = records.iter().collect();
    sorted.sort_by_key(|record| record.id);
    let mut outputs = Map::new();
    for record in sorted {
        let output = match tokenizer {
            Some(tokenizer) => Value::from(tokenizer.decode(&record.output_tokens, false)?),
            None => Value::from(record.output_tokens.clone()),
        };
        outputs.insert(record.id.to_string(), output);
    }
    write_json(path, INDENT, &outputs)
}

/// State of the engine after one iteration; the keys are those of TensorRT-LLM's iteration statistics.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IterationStats {
    /// Number of the iteration.
    pub iter: u64,
    /// Its wall time in milliseconds.
    #[serde(rename = "iterLatencyMS")]
    pub iter_latency_ms: f64,
    /// Requests admitted and not finished.
    pub num_active_requests: usize,
    /// Requests that wait for admission.
    pub num_queued_requests: usize,
    /// Requests that finished in this iteration.
    pub num_completed_requests: usize,
    /// The KV cache.
    pub kv_cache_stats: KvCacheStats,
    /// What the step computed.
    pub inflight_batching_stats: InflightBatchingStats,
    /// Time on the device in milliseconds; 0 when the device does not tell.
    #[serde(rename = "deviceMS")]
    pub device_ms: f64,
    /// Part of the wall time in which the device waited for the host, in milliseconds.
    #[serde(rename = "hostGapMS")]
    pub host_gap_ms: f64,
}

/// State of the KV cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KvCacheStats {
    /// Pages in all.
    pub max_num_blocks: usize,
    /// Pages in use.
    pub used_num_blocks: usize,
    /// Pages not in use.
    pub free_num_blocks: usize,
    /// Tokens a page.
    pub tokens_per_block: usize,
}

/// What a step computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InflightBatchingStats {
    /// Sequences in the step.
    pub num_scheduled_requests: usize,
    /// Of these, sequences still in their prompt.
    pub num_context_requests: usize,
    /// Of these, sequences that decode.
    pub num_gen_requests: usize,
    /// Prompt tokens in the step.
    pub num_ctx_tokens: usize,
    /// Sequences that were pre-empted.
    pub num_paused_requests: usize,
}

/// `--iteration_log`: one JSON object a line and iteration.
pub fn write_iteration_log(path: &Path, iterations: &[IterationStats]) -> anyhow::Result<()> {
    write_atomically(path, |sink| {
        for iteration in iterations {
            serde_json::to_writer(&mut *sink, iteration)?;
            sink.write_all(b"\n")?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::{S, example, full_section, records};
    use super::*;

    fn written(write: impl FnOnce(&Path) -> anyhow::Result<()>) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.json");
        write(&path).unwrap();
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn report_file_is_the_report() {
        let report = example(true, full_section());
        let text = written(|path| write_report_json(path, &report));
        let dense = |text: &str| text.split_whitespace().collect::<String>();
        assert_eq!(
            dense(&text),
            dense(&serde_json::to_string(&report).unwrap())
        );
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["machine"]["memory.total"], 79.111);
    }

    /// The totals of the report follow from the request file.
    #[test]
    fn totals_from_the_request_file() {
        let text = written(|path| write_request_json(path, &records(), None));
        let entries: Vec<Map<String, Value>> = serde_json::from_str(&text).unwrap();
        let number = |entry: &Map<String, Value>, key: &str| entry[key].as_f64().unwrap();
        let start = entries
            .iter()
            .map(|entry| number(entry, "start_timestamp"))
            .fold(f64::MAX, f64::min);
        let end = entries
            .iter()
            .map(|entry| number(entry, "end_timestamp"))
            .fold(0.0, f64::max);
        let tokens: f64 = entries
            .iter()
            .map(|entry| number(entry, "num_total_output_tokens"))
            .sum();
        let report = example(true, full_section());
        assert_eq!(
            report.performance.system_output_throughput_tok_s,
            tokens * 1e9 / (end - start)
        );
        assert_eq!(
            entries[0].keys().collect::<Vec<_>>(),
            [
                "id",
                "num_input_tokens",
                "error_tokens",
                "start_timestamp",
                "first_token_timestamp",
                "end_timestamp",
                "decode_iteration",
                "num_total_output_tokens",
                "num_generated_tokens",
                "generation_time",
                "time_to_first_token",
                "intertoken_latency",
                "end_to_end_latency",
                "total_token_throughput",
                "generation_token_throughput",
                "output",
                "output_tokens"
            ]
        );
        assert_eq!(entries[0]["intertoken_latency"], 0.5 * S as f64);
    }

    #[test]
    fn outputs_by_request() {
        let text = written(|path| write_output_json(path, &records(), None));
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["0"], serde_json::json!([7, 7, 7, 7]));
    }

    #[test]
    fn iteration_lines() {
        let iterations = [IterationStats {
            iter: 3,
            iter_latency_ms: 1.5,
            ..IterationStats::default()
        }; 1];
        let text = written(|path| write_iteration_log(path, &iterations));
        assert_eq!(
            text,
            "{\"iter\":3,\"iterLatencyMS\":1.5,\"numActiveRequests\":0,\"numQueuedRequests\":0,\
             \"numCompletedRequests\":0,\"kvCacheStats\":{\"maxNumBlocks\":0,\"usedNumBlocks\":0,\"freeNumBlocks\":0,\
             \"tokensPerBlock\":0},\"inflightBatchingStats\":{\"numScheduledRequests\":0,\"numContextRequests\":0,\
             \"numGenRequests\":0,\"numCtxTokens\":0,\"numPausedRequests\":0},\"deviceMS\":0.0,\"hostGapMS\":0.0}\n"
        );
    }
}
