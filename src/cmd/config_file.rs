//! `--extra_llm_api_options`, by its other name `--config`.

use std::path::PathBuf;

use clap::Args;

use crate::config::{KEYS, Options, Resolved};
use crate::frontend;

/// The flag of the YAML file.
#[derive(Debug, Args)]
pub(super) struct ConfigFile {
    /// YAML file of options; wins over the command line (--help lists its keys)
    #[arg(
        long = "extra_llm_api_options",
        visible_alias = "config",
        value_name = "FILE",
        long_help = keys()
    )]
    extra_llm_api_options: Option<PathBuf>,
}

impl ConfigFile {
    /// The file, if one was named, over these options of the command line.
    ///
    /// # Errors
    /// It cannot be read or has unknown keys or bad values.
    pub(super) fn resolve(&self, flags: Options) -> anyhow::Result<Resolved> {
        frontend::resolve(flags, self.extra_llm_api_options.as_deref())
    }
}

/// The keys of the file, for `--help`.
fn keys() -> String {
    let mut text = String::from("YAML file of options; wins over the command line. Its keys:");
    for (key, values, what) in KEYS {
        text += &format!("\n  {key}: {values}\n      {what}");
    }
    text
}
