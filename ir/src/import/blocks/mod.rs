//! The modules that decoder families share, in the operations of Hugging Face's eager code.

pub(crate) mod attention;
pub(crate) mod decoder;
pub(crate) mod embed;
pub(crate) mod linear;
pub(crate) mod mask;
pub(crate) mod mlp;
pub(crate) mod model;
pub(crate) mod norm;
pub(crate) mod rope;
