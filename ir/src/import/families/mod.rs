//! One file a family: which keys it reads and how its blocks are put together.

pub(super) mod falcon;
pub(super) mod gemma;
pub(super) mod gemma2;
pub(super) mod gemma3;
pub(super) mod gpt2;
pub(super) mod gpt_neox;
pub(super) mod llama;
pub(super) mod mistral;
pub(super) mod phi;
pub(super) mod phi3;
pub(super) mod qwen2;
pub(super) mod qwen3;
