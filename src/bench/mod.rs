//! The benchmark driver's parts that know no model: datasets, measurement and reports.

pub mod comparison;
pub mod dataset;
mod dataset_error;
pub mod files;
pub mod gpu_state;
pub mod kernels;
pub mod kv_size;
mod lines;
pub mod metrics;
pub mod prepare;
pub mod report;
pub mod report_json;
mod report_text;
pub mod run_plan;
pub mod schedule;
pub mod serve;
pub mod sizing;
pub mod step_shares;
pub(crate) mod table;
pub mod tuning;
pub mod warnings;
