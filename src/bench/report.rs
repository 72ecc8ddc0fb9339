//! The report of a benchmark: what it holds and how it is put together. `Report` serialises to
//! trtllm-bench's `--report_json` (keys, order and units), plus one section of our own; its text form is in
//! `report_text`, the files of single requests and iterations in `report_json`.

use lathe_runtime::device::executor::Execution;
use serde::Serialize;

use super::dataset::DatasetStats;
use super::metrics::{BenchStatistics, PercentileStats, RequestRecord, failures};

/// A whole report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Model and number formats.
    pub engine: Engine,
    /// The GPU; `None` on the CPU, as in trtllm-bench.
    pub machine: Option<Machine>,
    /// Sizes and limits of the run.
    pub world_info: WorldInfo,
    /// Requests as they turned out.
    pub request_info: RequestInfo,
    /// Throughput and latency.
    pub performance: Performance,
    /// Token timing; only with streaming.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub streaming_metrics: Option<StreamingMetrics>,
    /// The dataset's lengths.
    pub dataset: DatasetStats,
    /// What trtllm-bench does not report.
    pub lathe: LatheSection,
}

/// Model and number formats.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Engine {
    /// The model's name.
    pub model: String,
    /// The checkpoint folder.
    pub model_path: Option<String>,
    /// Always null: there are no engine files.
    pub engine_dir: Option<String>,
    /// Version of this program.
    pub version: String,
    /// `lathe`.
    pub backend: String,
    /// Data type of weights and activations.
    pub dtype: String,
    /// Data type of the KV cache.
    pub kv_cache_dtype: Option<String>,
    /// Quantisation scheme of the weights.
    pub quantization: Option<String>,
}

/// The GPU.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    /// The driver's name of it.
    pub name: String,
    /// Memory in GiB.
    #[serde(rename = "memory.total")]
    pub memory_gib: f64,
    /// Highest memory clock in GHz.
    #[serde(rename = "clocks.mem")]
    pub memory_clock_ghz: Option<f64>,
}

/// Sizes and limits of the run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct WorldInfo {
    /// Tensor parallelism.
    pub tp_size: u32,
    /// Pipeline parallelism, always 1.
    pub pp_size: u32,
    /// Expert parallelism.
    pub ep_size: u32,
    /// Devices.
    pub world_size: u32,
    /// Most sequences in a step.
    pub max_batch_size: usize,
    /// Most tokens in a step.
    pub max_num_tokens: usize,
    /// `guaranteed_no_evict`, `max_utilization` or `static`.
    pub scheduling_policy: String,
    /// Fraction of free memory given to the KV cache.
    pub kv_cache_percentage: Option<f64>,
    /// Requests a second while they were issued.
    pub issue_rate: f64,
}

/// Requests as they turned out.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RequestInfo {
    /// Finished requests.
    pub num_requests: usize,
    /// Mean number in flight.
    pub avg_num_concurrent_requests: f64,
    /// Mean prompt tokens.
    pub avg_input_length: f64,
    /// Mean generated tokens.
    pub avg_output_length: f64,
}

/// Throughput and latency. `tok_s` is tokens a second; output counts include the first token.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[allow(missing_docs)] // The keys of trtllm-bench say what they are; formulas are in `metrics`.
pub struct Performance {
    pub total_latency_ms: f64,
    pub avg_request_latency_ms: f64,
    pub request_throughput_req_s: f64,
    pub system_output_throughput_tok_s: f64,
    pub system_total_throughput_tok_s: f64,
    pub output_throughput_per_user_tok_s: f64,
    pub output_throughput_per_gpu_tok_s: f64,
    pub request_latency_percentiles_ms: PercentileStats,
}

/// Token timing, in milliseconds and tokens a second.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[allow(missing_docs)] // As above.
pub struct StreamingMetrics {
    pub token_output_speed_tok_s: f64,
    pub avg_ttft_ms: f64,
    pub avg_tpot_ms: f64,
    pub tpot_percentiles: PercentileStats,
    pub ttft_percentiles: PercentileStats,
    pub gen_tps_percentiles: PercentileStats,
}

/// What trtllm-bench does not report. Everything optional is left out where it was not measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LatheSection {
    /// The device that ran, in words.
    pub device: String,
    /// Set when the run did not reach its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub incomplete: Option<Incomplete>,
    /// Failed requests by error.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed_requests: Vec<FailedRequests>,
    /// Achieved part of what the roofline model allows, in per cent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub roofline_percent: Option<f64>,
    /// Where the time of a step goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_breakdown: Option<StepBreakdown>,
    /// How a decode step is executed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub execution: Option<ExecutionInfo>,
    /// How full the KV cache was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache: Option<KvOccupancy>,
    /// Sequences that lost their cache to others and were computed again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preemptions: Option<u64>,
    /// Time of each phase before the benchmark.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<Phase>,
    /// What the reader should know before believing the numbers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A run that was stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Incomplete {
    /// Why, such as `interrupted`.
    pub reason: String,
    /// Requests that finished.
    pub finished: usize,
    /// Requests that were to run.
    pub planned: usize,
}

/// Failed requests with the same error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FailedRequests {
    /// The error.
    pub error: String,
    /// How many.
    pub count: usize,
}

/// Mean time of a step by kind of work, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct StepBreakdown {
    /// Steps that were measured.
    pub steps: u64,
    /// All work of the device.
    pub device_ms: f64,
    /// Attention kernels; this and the next two are absent where kernels were not sampled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_ms: Option<f64>,
    /// Matrix multiplications.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gemm_ms: Option<f64>,
    /// All other kernels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub other_ms: Option<f64>,
    /// Steps that were profiled after the run: the device's time is divided by the shares of their kernels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampled_steps: Option<u64>,
    /// Time between steps in which the device waits for the host.
    pub host_gap_ms: f64,
}

/// How decode steps of the most frequent size are executed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct ExecutionInfo {
    /// Kernels of the step.
    pub launches_per_decode_step: usize,
    /// Kernels of one layer.
    pub kernels_per_layer: usize,
    /// Graphs that the host launches for the step; 0 if it launches the kernels one by one.
    pub graph_launches_per_decode_step: usize,
    /// Host time of submitting the step, the median in microseconds.
    pub submit_us: f64,
    /// GEMM shapes whose kernel was chosen by timing, a shape counted for each bucket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tuned_gemms: Option<usize>,
    /// Of these, shapes that do not have the heuristic's kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub changed_gemms: Option<usize>,
}

impl From<Execution> for ExecutionInfo {
    fn from(e: Execution) -> ExecutionInfo {
        ExecutionInfo {
            launches_per_decode_step: e.launches,
            kernels_per_layer: e.kernels_per_layer,
            graph_launches_per_decode_step: e.graph_launches,
            submit_us: e.submit_seconds * 1e6,
            tuned_gemms: e.tuned.map(|t| t.0),
            changed_gemms: e.tuned.map(|t| t.1),
        }
    }
}

/// How full the KV cache was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct KvOccupancy {
    /// Pages of the cache.
    pub num_pages: usize,
    /// Tokens a page.
    pub page_size: usize,
    /// Most pages in use.
    pub peak_pages: usize,
    /// Mean pages in use over steps, in per cent of all.
    pub average_percent: f64,
}

/// A phase before the benchmark.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Phase {
    /// Its name.
    pub name: String,
    /// Wall time.
    pub seconds: f64,
}

const MS: f64 = 1e-6;

impl Report {
    /// Puts a report together. The statistics are computed from `records`; failed requests go into our own
    /// section. `world.issue_rate` is overwritten.
    pub fn new(
        engine: Engine,
        machine: Option<Machine>,
        world: WorldInfo,
        records: &[RequestRecord],
        streaming: bool,
        dataset: DatasetStats,
        mut lathe: LatheSection,
    ) -> Self {
        let stats = BenchStatistics::of(records);
        lathe.failed_requests = failures(records)
            .into_iter()
            .map(|(error, count)| FailedRequests {
                error: error.into(),
                count,
            })
            .collect();
        let performance = Performance {
            total_latency_ms: stats.total_latency_ns * MS,
            avg_request_latency_ms: stats.latency_ns.average * MS,
            request_throughput_req_s: stats.request_throughput,
            system_output_throughput_tok_s: stats.output_throughput,
            system_total_throughput_tok_s: stats.total_throughput,
            output_throughput_per_user_tok_s: stats.output_throughput_per_user,
            output_throughput_per_gpu_tok_s: stats.output_throughput
                / f64::from(world.world_size.max(1)),
            request_latency_percentiles_ms: stats.latency_ns.scaled(MS),
        };
        let streaming_metrics = streaming.then(|| StreamingMetrics {
            token_output_speed_tok_s: stats.generation_rate.average,
            avg_ttft_ms: stats.ttft_ns.average * MS,
            avg_tpot_ms: stats.tpot_ns.average * MS,
            tpot_percentiles: stats.tpot_ns.scaled(MS),
            ttft_percentiles: stats.ttft_ns.scaled(MS),
            gen_tps_percentiles: stats.generation_rate,
        });
        let request_info = RequestInfo {
            num_requests: stats.num_requests,
            avg_num_concurrent_requests: stats.avg_concurrent_requests,
            avg_input_length: stats.avg_input_length(),
            avg_output_length: stats.avg_output_length(),
        };
        let world_info = WorldInfo {
            issue_rate: stats.issue_rate,
            ..world
        };
        Self {
            engine,
            machine,
            world_info,
            request_info,
            performance,
            streaming_metrics,
            dataset,
            lathe,
        }
    }

    /// trtllm-bench's closing error when requests failed, one line an error.
    pub fn failure_lines(&self) -> Vec<String> {
        let line = |failed: &FailedRequests| {
            format!(
                "Requests failed: {} ({} requests)",
                failed.error, failed.count
            )
        };
        self.lathe.failed_requests.iter().map(line).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::dataset::{Dataset, Request};
    use serde_json::Value;

    pub(crate) const S: u64 = 1_000_000_000;

    /// The two requests of `metrics::tests::streaming_by_hand`.
    pub(crate) fn records() -> Vec<RequestRecord> {
        let record = |id, isl, start, first, end, n_output| RequestRecord {
            id,
            isl,
            start_ns: start,
            first_token_ns: Some(first),
            end_ns: end,
            decode_iteration: n_output as u64 - 1,
            output_tokens: vec![7; n_output],
            error: None,
        };
        vec![
            record(0, 10, S, S + S / 2, 3 * S, 4),
            record(1, 20, 2 * S, 3 * S, 6 * S, 7),
        ]
    }

    pub(crate) fn example(streaming: bool, lathe: LatheSection) -> Report {
        let request = |isl, output_tokens| Request {
            task_id: 0,
            input_ids: vec![1; isl],
            output_tokens,
        };
        let dataset = Dataset {
            path: "d.jsonl".into(),
            requests: vec![request(10, 4), request(20, 7)],
        };
        let engine = Engine {
            model: "org/model".into(),
            model_path: Some("/models/m".into()),
            version: "0.1.0".into(),
            backend: "lathe".into(),
            dtype: "bfloat16".into(),
            ..Engine::default()
        };
        let machine = Machine {
            name: "NVIDIA H100".into(),
            memory_gib: 79.111,
            memory_clock_ghz: Some(2.619),
        };
        let world = WorldInfo {
            tp_size: 2,
            pp_size: 1,
            ep_size: 1,
            world_size: 2,
            max_batch_size: 64,
            max_num_tokens: 2048,
            scheduling_policy: "guaranteed_no_evict".into(),
            kv_cache_percentage: Some(0.9),
            issue_rate: 0.0,
        };
        Report::new(
            engine,
            Some(machine),
            world,
            &records(),
            streaming,
            dataset.stats(),
            lathe,
        )
    }

    pub(crate) fn full_section() -> LatheSection {
        LatheSection {
            device: "NVIDIA H100".into(),
            incomplete: Some(Incomplete {
                reason: "interrupted".into(),
                finished: 2,
                planned: 9,
            }),
            failed_requests: Vec::new(),
            roofline_percent: Some(71.5),
            step_breakdown: Some(StepBreakdown {
                steps: 12,
                device_ms: 4.0,
                attention_ms: Some(1.0),
                gemm_ms: Some(2.5),
                other_ms: Some(0.5),
                sampled_steps: Some(3),
                host_gap_ms: 0.0625,
            }),
            execution: Some(ExecutionInfo {
                launches_per_decode_step: 83,
                kernels_per_layer: 5,
                graph_launches_per_decode_step: 1,
                submit_us: 21.5,
                tuned_gemms: Some(216),
                changed_gemms: Some(70),
            }),
            kv_cache: Some(KvOccupancy {
                num_pages: 100,
                page_size: 64,
                peak_pages: 80,
                average_percent: 50.0,
            }),
            preemptions: Some(3),
            phases: vec![Phase {
                name: "compile".into(),
                seconds: 1.25,
            }],
            warnings: vec!["a warning".into()],
        }
    }

    fn keys(value: &Value, path: &str, out: &mut Vec<String>) {
        if let Value::Object(map) = value {
            for (key, value) in map {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}/{key}")
                };
                if !value.is_object() {
                    out.push(path.clone());
                }
                keys(value, &path, out);
            }
        }
    }

    /// Every key of trtllm-bench's report in its order, then ours; nothing else.
    #[test]
    fn strict_schema() {
        let percentiles = |path: &str| {
            ["p50", "p90", "p95", "p99", "minimum", "maximum", "average"]
                .map(|key| format!("{path}/{key}"))
                .to_vec()
        };
        let section = |name: &str, keys: &[&str]| {
            keys.iter()
                .map(|key| format!("{name}/{key}"))
                .collect::<Vec<_>>()
        };
        let expected = [
            section(
                "engine",
                &[
                    "model",
                    "model_path",
                    "engine_dir",
                    "version",
                    "backend",
                    "dtype",
                    "kv_cache_dtype",
                    "quantization",
                ],
            ),
            section("machine", &["name", "memory.total", "clocks.mem"]),
            section(
                "world_info",
                &[
                    "tp_size",
                    "pp_size",
                    "ep_size",
                    "world_size",
                    "max_batch_size",
                    "max_num_tokens",
                    "scheduling_policy",
                    "kv_cache_percentage",
                    "issue_rate",
                ],
            ),
            section(
                "request_info",
                &[
                    "num_requests",
                    "avg_num_concurrent_requests",
                    "avg_input_length",
                    "avg_output_length",
                ],
            ),
            section(
                "performance",
                &[
                    "total_latency_ms",
                    "avg_request_latency_ms",
                    "request_throughput_req_s",
                    "system_output_throughput_tok_s",
                    "system_total_throughput_tok_s",
                    "output_throughput_per_user_tok_s",
                    "output_throughput_per_gpu_tok_s",
                ],
            ),
            percentiles("performance/request_latency_percentiles_ms"),
            section(
                "streaming_metrics",
                &["token_output_speed_tok_s", "avg_ttft_ms", "avg_tpot_ms"],
            ),
            percentiles("streaming_metrics/tpot_percentiles"),
            percentiles("streaming_metrics/ttft_percentiles"),
            percentiles("streaming_metrics/gen_tps_percentiles"),
            percentiles("dataset/isl_stats"),
            percentiles("dataset/osl_stats"),
            percentiles("dataset/seq_len_stats"),
            section(
                "dataset",
                &[
                    "num_requests",
                    "dataset_path",
                    "max_isl",
                    "max_osl",
                    "max_sequence_length",
                    "avg_isl",
                    "avg_osl",
                    "avg_sequence_length",
                ],
            ),
            section("lathe", &["device"]),
            section("lathe/incomplete", &["reason", "finished", "planned"]),
            section("lathe", &["roofline_percent"]),
            section(
                "lathe/step_breakdown",
                &[
                    "steps",
                    "device_ms",
                    "attention_ms",
                    "gemm_ms",
                    "other_ms",
                    "sampled_steps",
                    "host_gap_ms",
                ],
            ),
            section(
                "lathe/execution",
                &[
                    "launches_per_decode_step",
                    "kernels_per_layer",
                    "graph_launches_per_decode_step",
                    "submit_us",
                    "tuned_gemms",
                    "changed_gemms",
                ],
            ),
            section(
                "lathe/kv_cache",
                &["num_pages", "page_size", "peak_pages", "average_percent"],
            ),
            section("lathe", &["preemptions", "phases", "warnings"]),
        ]
        .concat();
        let mut found = Vec::new();
        keys(
            &serde_json::to_value(example(true, full_section())).unwrap(),
            "",
            &mut found,
        );
        assert_eq!(found, expected);
        let plain = serde_json::to_value(example(false, LatheSection::default())).unwrap();
        assert!(plain.get("streaming_metrics").is_none());
        assert_eq!(
            plain["lathe"]
                .as_object()
                .unwrap()
                .keys()
                .collect::<Vec<_>>(),
            ["device"]
        );
    }

    #[test]
    fn values_in_the_units_of_the_keys() {
        let report = example(true, LatheSection::default());
        let performance = &report.performance;
        assert_eq!(performance.total_latency_ms, 5000.0);
        assert_eq!(performance.avg_request_latency_ms, 3000.0);
        assert_eq!(performance.output_throughput_per_gpu_tok_s, 1.1);
        assert_eq!(report.world_info.issue_rate, 2.0);
        let streaming = report.streaming_metrics.as_ref().unwrap();
        assert_eq!(
            (
                streaming.avg_ttft_ms,
                streaming.avg_tpot_ms,
                streaming.token_output_speed_tok_s
            ),
            (750.0, 500.0, 2.0)
        );
    }

    #[test]
    fn failures_are_reported_as_trtllm_bench_words_them() {
        let mut records = records();
        records[1].error = Some("the prompt is too long".into());
        let report = example(false, LatheSection::default());
        let report = Report::new(
            report.engine,
            None,
            report.world_info,
            &records,
            false,
            report.dataset,
            LatheSection::default(),
        );
        assert_eq!(
            report.failure_lines(),
            ["Requests failed: the prompt is too long (1 requests)"]
        );
        assert_eq!(report.request_info.num_requests, 1);
    }
}
