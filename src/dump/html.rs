//! The page.
use crate::frontend::Imported;
use lathe_passes::pipeline::{Compiled, PassConfig};
/// The page.
pub fn html(_: &Imported, _: &Compiled, _: &PassConfig) -> anyhow::Result<String> {
    anyhow::bail!("--dump-format html: not available yet")
}
