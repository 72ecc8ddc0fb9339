//! One file a family: which keys it reads and how its blocks are put together.

pub(super) mod llama;
pub(super) mod mistral;
pub(super) mod qwen2;
pub(super) mod qwen3;
