//! Continuous batching over an [`Executor`](crate::device::executor::Executor): requests come and go between
//! steps, their keys and values live in pages of one cache, prompts are computed in chunks beside
//! the running sequences, and the next step is launched before the last one's tokens are read.
//!
//! A static batch is a policy of the same engine: [`complete`] runs one.
//!
//! Everything here is host bookkeeping; it knows no device, so that the tests of the CPU device and
//! of the simulated one ([`sim`]) test what a GPU runs under.

mod batcher;
mod complete;
mod config;
mod forecast;
mod groups;
mod null;
mod pages;
mod policy;
mod request;
mod sequence;
#[doc(hidden)]
pub mod sim;
mod stats;
mod step_loop;
#[cfg(test)]
mod tests;

pub use complete::{CompleteError, complete};
pub use config::{ConfigError, EngineConfig};
pub use groups::{StepGroup, StepGroups};
pub use null::NullDevice;
pub use pages::{PagePool, pages_for};
pub use policy::Policy;
pub use request::{FinishReason, Finished, Request, RequestError, TokenEvent};
pub use stats::{Clock, StepStats, Totals};
pub use step_loop::{Engine, EngineError, Progress};
