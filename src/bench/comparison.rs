//! Reports side by side. Reads reports of this program and of trtllm-bench alike: both are JSON objects of sections with
//! numbers.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use anyhow::{Context, bail};
use indexmap::{IndexMap, IndexSet};
use lathe_ir::printable;
use serde_json::Value;

/// A report as a flat list of leaves, `section.key` → value.
#[derive(Debug, Clone, PartialEq)]
pub struct Leaves(IndexMap<String, Value>);

/// Characters of a key that the numbers are aligned behind, at most.
const WIDEST: usize = 80;

/// Sections whose numbers are compared, in the order of the table.
const SECTIONS: [&str; 6] = [
    "performance",
    "streaming_metrics",
    "request_info",
    "world_info",
    "decoding_stats",
    "lathe",
];
/// What must agree for a comparison to mean something.
const CONDITIONS: [&str; 9] = [
    "engine.model",
    "engine.dtype",
    "engine.kv_cache_dtype",
    "engine.quantization",
    "machine.name",
    "world_info.world_size",
    "dataset.num_requests",
    "dataset.avg_isl",
    "dataset.avg_osl",
];

impl Leaves {
    /// Reads the text of a report.
    ///
    /// # Errors
    /// It is no JSON, or no report.
    pub fn parse(text: &str) -> anyhow::Result<Leaves> {
        let value: Value = serde_json::from_str(text).context("not valid JSON")?;
        if !value.get("performance").is_some_and(Value::is_object) {
            bail!("no section \"performance\"; expected a file written by --report_json");
        }
        let mut leaves = IndexMap::new();
        flatten(&value, "", &mut leaves);
        Ok(Leaves(leaves))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }
}

fn flatten(value: &Value, path: &str, leaves: &mut IndexMap<String, Value>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let key = printable(key);
                let path = if path.is_empty() {
                    key
                } else {
                    format!("{path}.{key}")
                };
                flatten(value, &path, leaves);
            }
        }
        leaf => {
            leaves.insert(path.to_owned(), leaf.clone());
        }
    }
}

/// The comparison as text: files, differing conditions, then one row a number.
pub fn table(names: &[String], reports: &[Leaves]) -> String {
    let mut out = String::new();
    for (index, (name, report)) in names.iter().zip(reports).enumerate() {
        let about = ["engine.model", "engine.backend", "engine.version"]
            .map(|key| text_of(report.get(key)));
        out += &format!("[{}] {name}: {}\n", index + 1, about.join(", "));
    }
    for key in CONDITIONS {
        let values: Vec<String> = reports
            .iter()
            .map(|report| text_of(report.get(key)))
            .collect();
        if values.iter().any(|value| Some(value) != values.first()) {
            out += &format!("note: {key} differs: {}\n", values.join(" | "));
        }
    }
    for (index, report) in reports.iter().enumerate() {
        if let Some(reason) = report.get("lathe.incomplete.reason") {
            out += &format!(
                "note: [{}] is incomplete ({})\n",
                index + 1,
                text_of(Some(reason))
            );
        }
    }
    let rows = rows(reports);
    let width = rows.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
    let width = width.min(WIDEST);
    out += &format!("\n{:width$}", "");
    for index in 1..=reports.len() {
        out += &format!(" {:>16}", format!("[{index}]"));
        if index > 1 {
            out += &format!(" {:>9}", format!("[{index}]/[1]"));
        }
    }
    out.push('\n');
    for (key, values) in rows {
        out += &format!("{key:width$}");
        for (index, value) in values.iter().enumerate() {
            out += &format!(" {:>16}", value.map_or_else(|| "-".into(), number));
            if index > 0 {
                let base = values.first().copied().flatten();
                let ratio = base
                    .zip(*value)
                    .filter(|(base, _)| *base != 0.0)
                    .map(|(base, value)| value / base);
                out += &format!(
                    " {:>9}",
                    ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.3}x"))
                );
            }
        }
        out.push('\n');
    }
    out
}

/// Every number of the compared sections with its value in each report.
fn rows(reports: &[Leaves]) -> Vec<(String, Vec<Option<f64>>)> {
    let mut rows = Vec::new();
    for section in SECTIONS {
        let mut keys: IndexSet<&String> = IndexSet::new();
        for report in reports {
            for (key, value) in &report.0 {
                let in_section = key
                    .strip_prefix(section)
                    .is_some_and(|rest| rest.starts_with('.'));
                if in_section && value.is_number() {
                    keys.insert(key);
                }
            }
        }
        for key in keys {
            let values = reports
                .iter()
                .map(|report| report.get(key).and_then(Value::as_f64))
                .collect();
            rows.push((key.clone(), values));
        }
    }
    rows
}

fn number(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        format!("{value:.0}")
    } else {
        format!("{value:.4}")
    }
}

fn text_of(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "none".into(),
        Some(Value::String(text)) => printable(text),
        Some(other) => printable(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves(text: &str) -> Leaves {
        Leaves::parse(text).unwrap()
    }

    #[test]
    fn ratios_and_differing_conditions() {
        let ours = leaves(
            r#"{"engine": {"model": "m", "backend": "lathe", "version": "1"},
                "performance": {"total_latency_ms": 50.5, "request_throughput_req_s": 3.0, "p": {"p50": 0.0}}}"#,
        );
        let theirs = leaves(
            r#"{"engine": {"model": "n", "backend": "Pytorch", "version": "1.1"},
                "performance": {"total_latency_ms": 101.0, "request_throughput_req_s": 1.5, "p": {"p50": 2.0}},
                "streaming_metrics": {"avg_ttft_ms": 7}}"#,
        );
        let text = table(&["a.json".into(), "b.json".into()], &[ours, theirs]);
        let expected = "\
[1] a.json: m, lathe, 1
[2] b.json: n, Pytorch, 1.1
note: engine.model differs: m | n

                                                  [1]              [2]   [2]/[1]
performance.total_latency_ms                  50.5000              101    2.000x
performance.request_throughput_req_s                3           1.5000    0.500x
performance.p.p50                                   0                2         -
streaming_metrics.avg_ttft_ms                       -                7         -
";
        assert_eq!(text, expected);
    }
}
