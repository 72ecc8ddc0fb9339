//! The report as text: trtllm-bench's sections in its order, then our own.

use std::fmt::{self, Display, Write};

use super::metrics::PercentileStats;
use super::report::{LatheSection, Report};

const RULE: &str = "===========================================================";

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = String::new();
        self.write_text(&mut out)?;
        f.write_str(&out)
    }
}

fn banner(out: &mut String, title: &str) -> fmt::Result {
    writeln!(out, "{RULE}\n= {title}\n{RULE}")
}

fn none<T: Display>(value: Option<&T>) -> String {
    value.map_or_else(|| "None".into(), T::to_string)
}

/// One row a statistic, in the order that trtllm-bench gives the group.
fn percentile_rows(
    out: &mut String,
    tag: &str,
    stats: &PercentileStats,
    percentiles_first: bool,
) -> fmt::Result {
    let percentiles = [
        ("P50", stats.p50),
        ("P90", stats.p90),
        ("P95", stats.p95),
        ("P99", stats.p99),
    ];
    let extremes = [
        ("MINIMUM", stats.minimum),
        ("MAXIMUM", stats.maximum),
        ("AVERAGE", stats.average),
    ];
    let (first, second): (&[_], &[_]) = if percentiles_first {
        (&percentiles, &extremes)
    } else {
        (&extremes, &percentiles)
    };
    for (name, value) in first.iter().chain(second) {
        writeln!(out, "[{tag}] {name:<7}: {value:.4}")?;
    }
    Ok(())
}

impl Report {
    fn write_text(&self, out: &mut String) -> fmt::Result {
        out.push_str("\n\n");
        if let Some(incomplete) = &self.lathe.incomplete {
            writeln!(
                out,
                "INCOMPLETE ({}): {} of {} requests finished\n",
                incomplete.reason, incomplete.finished, incomplete.planned
            )?;
        }
        self.write_engine(out)?;
        self.write_world(out)?;
        self.write_performance(out)?;
        self.write_dataset(out)?;
        self.lathe.write_text(out)
    }

    fn write_engine(&self, out: &mut String) -> fmt::Result {
        let engine = &self.engine;
        banner(out, &format!("{} BACKEND", engine.backend.to_uppercase()))?;
        writeln!(out, "Model:\t\t\t{}", engine.model)?;
        writeln!(out, "Model Path:\t\t{}", none(engine.model_path.as_ref()))?;
        writeln!(out, "lathe Version:\t\t{}", engine.version)?;
        writeln!(out, "Dtype:\t\t\t{}", engine.dtype)?;
        writeln!(
            out,
            "KV Cache Dtype:\t\t{}",
            none(engine.kv_cache_dtype.as_ref())
        )?;
        writeln!(
            out,
            "Quantization:\t\t{}\n",
            none(engine.quantization.as_ref())
        )?;

        banner(out, "MACHINE DETAILS")?;
        match &self.machine {
            None => writeln!(out, "No GPU info available\n"),
            Some(machine) => {
                let clock = machine
                    .memory_clock_ghz
                    .map_or_else(|| "N/A".into(), |ghz| format!("{ghz:.2} GHz"));
                writeln!(
                    out,
                    "{}, memory {:.2} GB, {clock}\n",
                    machine.name, machine.memory_gib
                )
            }
        }
    }

    fn write_world(&self, out: &mut String) -> fmt::Result {
        let requests = &self.request_info;
        banner(out, "REQUEST DETAILS")?;
        writeln!(
            out,
            "Number of requests:             {}",
            requests.num_requests
        )?;
        writeln!(
            out,
            "Number of concurrent requests:  {:.4}",
            requests.avg_num_concurrent_requests
        )?;
        writeln!(
            out,
            "Average Input Length (tokens):  {:.4}",
            requests.avg_input_length
        )?;
        writeln!(
            out,
            "Average Output Length (tokens): {:.4}",
            requests.avg_output_length
        )?;

        let world = &self.world_info;
        let percentage = world
            .kv_cache_percentage
            .map(|fraction| format!("{:.2}%", fraction * 100.0));
        banner(out, "WORLD + RUNTIME INFORMATION")?;
        writeln!(out, "TP Size:                {}", world.tp_size)?;
        writeln!(out, "PP Size:                {}", world.pp_size)?;
        writeln!(out, "EP Size:                {}", world.ep_size)?;
        writeln!(out, "Max Runtime Batch Size: {}", world.max_batch_size)?;
        writeln!(out, "Max Runtime Tokens:     {}", world.max_num_tokens)?;
        writeln!(out, "Scheduling Policy:      {}", world.scheduling_policy)?;
        writeln!(out, "KV Memory Percentage:   {}", none(percentage.as_ref()))?;
        writeln!(
            out,
            "Issue Rate (req/sec):   {}\n",
            scientific(world.issue_rate)
        )
    }

    fn write_performance(&self, out: &mut String) -> fmt::Result {
        let performance = &self.performance;
        banner(out, "PERFORMANCE OVERVIEW")?;
        let mut row = |label: &str, value: f64| writeln!(out, "{label:<49} {value:.4}");
        row(
            "Request Throughput (req/sec):",
            performance.request_throughput_req_s,
        )?;
        row(
            "Total Output Throughput (tokens/sec):",
            performance.system_output_throughput_tok_s,
        )?;
        row(
            "Total Token Throughput (tokens/sec):",
            performance.system_total_throughput_tok_s,
        )?;
        row("Total Latency (ms):", performance.total_latency_ms)?;
        row(
            "Average request latency (ms):",
            performance.avg_request_latency_ms,
        )?;
        row(
            "Per User Output Throughput [w/ ctx] (tps/user):",
            performance.output_throughput_per_user_tok_s,
        )?;
        row(
            "Per GPU Output Throughput (tps/gpu):",
            performance.output_throughput_per_gpu_tok_s,
        )?;
        if let Some(streaming) = &self.streaming_metrics {
            row(
                "Average time-to-first-token [TTFT] (ms):",
                streaming.avg_ttft_ms,
            )?;
            row(
                "Average time-per-output-token [TPOT] (ms):",
                streaming.avg_tpot_ms,
            )?;
            row(
                "Per User Output Speed (tps/user):",
                streaming.token_output_speed_tok_s,
            )?;
            out.push_str("\n-- Per-Request Time-per-Output-Token [TPOT] Breakdown (ms)\n\n");
            percentile_rows(out, "TPOT", &streaming.tpot_percentiles, false)?;
            out.push_str("\n-- Per-Request Time-to-First-Token [TTFT] Breakdown (ms)\n\n");
            percentile_rows(out, "TTFT", &streaming.ttft_percentiles, false)?;
            out.push_str("\n-- Per-Request Generation Throughput [GTPS] Breakdown (tps/user)\n\n");
            percentile_rows(out, "GTPS", &streaming.gen_tps_percentiles, false)?;
        }
        out.push_str("\n-- Request Latency Breakdown (ms) -----------------------\n\n");
        percentile_rows(
            out,
            "Latency",
            &performance.request_latency_percentiles_ms,
            true,
        )?;
        out.push('\n');
        Ok(())
    }

    fn write_dataset(&self, out: &mut String) -> fmt::Result {
        let dataset = &self.dataset;
        banner(out, "DATASET DETAILS")?;
        writeln!(out, "Dataset Path:         {}", dataset.dataset_path)?;
        writeln!(out, "Number of Sequences:  {}\n", dataset.num_requests)?;
        writeln!(
            out,
            "-- Percentiles statistics ---------------------------------\n"
        )?;
        writeln!(
            out,
            "        {:>12} {:>12} {:>12}",
            "Input", "Output", "Seq. Length"
        )?;
        writeln!(out, "{}", "-".repeat(RULE.len()))?;
        type Statistic = fn(&PercentileStats) -> f64;
        let rows: [(&str, Statistic); 7] = [
            ("MIN", |s| s.minimum),
            ("MAX", |s| s.maximum),
            ("AVG", |s| s.average),
            ("P50", |s| s.p50),
            ("P90", |s| s.p90),
            ("P95", |s| s.p95),
            ("P99", |s| s.p99),
        ];
        for (name, of) in rows {
            let [isl, osl, sum] = [
                &dataset.isl_stats,
                &dataset.osl_stats,
                &dataset.seq_len_stats,
            ]
            .map(of);
            writeln!(out, "{name}:    {isl:>12.4} {osl:>12.4} {sum:>12.4}")?;
        }
        Ok(())
    }
}

impl LatheSection {
    fn write_text(&self, out: &mut String) -> fmt::Result {
        banner(out, "LATHE DETAILS")?;
        writeln!(out, "Device:               {}", self.device)?;
        for phase in &self.phases {
            writeln!(
                out,
                "{:<21} {:.3} s",
                format!("{}:", phase.name),
                phase.seconds
            )?;
        }
        if let Some(percent) = self.roofline_percent {
            writeln!(
                out,
                "Roofline:             {percent:.1} % of the predicted limit"
            )?;
        }
        if let Some(step) = &self.step_breakdown {
            let total = step.device_ms + step.host_gap_ms;
            writeln!(
                out,
                "Step time (ms):       {total:.4} mean of {} steps",
                step.steps
            )?;
            let rows = [
                ("device", Some(step.device_ms)),
                ("attention", step.attention_ms),
                ("GEMM", step.gemm_ms),
                ("other", step.other_ms),
                ("host gap", Some(step.host_gap_ms)),
            ];
            for (name, ms) in rows {
                let Some(ms) = ms else { continue };
                let percent = if total > 0.0 { ms / total * 100.0 } else { 0.0 };
                writeln!(out, "  {name:<19} {ms:.4} ({percent:.1} %)")?;
            }
            if let Some(sampled) = step.sampled_steps {
                writeln!(
                    out,
                    "  (the device's time by the kernels' shares in {sampled} steps sampled after the run)"
                )?;
            }
        }
        if let Some(e) = &self.execution {
            let how = match e.graph_launches_per_decode_step {
                0 => "one by one",
                _ => "as one graph",
            };
            writeln!(
                out,
                "Decode step:          {} kernels launched {how}, {} a layer, {:.1} µs of host time",
                e.launches_per_decode_step, e.kernels_per_layer, e.submit_us
            )?;
            if let (Some(tuned), Some(changed)) = (e.tuned_gemms, e.changed_gemms) {
                writeln!(
                    out,
                    "Autotune:             {changed} of {tuned} GEMM shapes do not have the heuristic's kernel"
                )?;
            }
        }
        if let Some(cache) = &self.kv_cache {
            let peak = cache.peak_pages as f64 / cache.num_pages.max(1) as f64 * 100.0;
            writeln!(
                out,
                "KV cache:             {} pages of {} tokens, peak {peak:.1} %, mean {:.1} %",
                cache.num_pages, cache.page_size, cache.average_percent
            )?;
        }
        if let Some(preemptions) = self.preemptions {
            writeln!(out, "Pre-emptions:         {preemptions}")?;
        }
        for failed in &self.failed_requests {
            writeln!(
                out,
                "Failed:               {} requests: {}",
                failed.count, failed.error
            )?;
        }
        for warning in &self.warnings {
            writeln!(out, "Warning:              {warning}")?;
        }
        writeln!(out, "{RULE}")
    }
}

/// C's `%.4E`: at least two digits of exponent, with sign.
fn scientific(value: f64) -> String {
    let text = format!("{value:.4E}");
    match text.split_once('E') {
        Some((mantissa, exponent)) => {
            let (sign, digits) = exponent
                .strip_prefix('-')
                .map_or(('+', exponent), |digits| ('-', digits));
            format!("{mantissa}E{sign}{digits:0>2}")
        }
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::{example, full_section};
    use super::*;

    #[test]
    fn issue_rate_is_written_as_c_does() {
        assert_eq!(scientific(20_345.0), "2.0345E+04");
        assert_eq!(scientific(0.0), "0.0000E+00");
        assert_eq!(scientific(2.5e-7), "2.5000E-07");
        assert_eq!(scientific(1e120), "1.0000E+120");
    }

    #[test]
    fn the_whole_text() {
        insta::with_settings!({snapshot_path => "../../snapshots/bench", prepend_module_to_snapshot => false}, {
            insta::assert_snapshot!("report_streaming_incomplete", example(true, full_section()).to_string());
            insta::assert_snapshot!("report_plain", example(false, LatheSection::default()).to_string());
        });
    }
}
