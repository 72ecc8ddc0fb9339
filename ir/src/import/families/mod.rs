//! One file a family: its names, which keys it reads, how its blocks are put together, and small
//! configurations of it.

mod falcon;
mod gemma;
mod gemma2;
mod gemma3;
mod gpt2;
mod gpt_neox;
mod llama;
mod mistral;
mod phi;
mod phi3;
mod qwen2;
mod qwen3;

use super::Family;

/// All families, sorted by `model_type`.
pub(super) const ALL: &[Family] = &[
    falcon::FAMILY,
    gemma::FAMILY,
    gemma2::FAMILY,
    gemma3::FAMILY,
    gpt2::FAMILY,
    gpt_neox::FAMILY,
    llama::FAMILY,
    mistral::FAMILY,
    phi::FAMILY,
    phi3::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
];
