//! `compare`: report files side by side.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use lathe_ir::foreign::{self, Kind};

use crate::bench::comparison::{Leaves, table};
use crate::errors::printable;

/// Put report files side by side, with ratios to the first.
#[derive(Debug, Args)]
pub struct Compare {
    /// Report files written by --report_json; the first is the base of the ratios
    #[arg(required = true, num_args = 2.., value_name = "REPORT")]
    reports: Vec<PathBuf>,
}

impl Compare {
    /// Runs the command.
    pub fn run(&self) -> anyhow::Result<()> {
        let mut names = Vec::new();
        let mut reports = Vec::new();
        for path in &self.reports {
            let name = path.display().to_string();
            let text = foreign::read_text(path, Kind::Report).with_context(|| name.clone())?;
            reports.push(Leaves::parse(&text).with_context(|| name.clone())?);
            names.push(printable(&name));
        }
        let text = table(&names, &reports);
        std::io::stdout().lock().write_all(text.as_bytes())?;
        Ok(())
    }
}
