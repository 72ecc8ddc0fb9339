//! Text forms of a program: SSA text that reads back, Graphviz and JSON.
//!
//! ```text
//! graph "llama/import" {
//!   %0 = input {name="tokens"} : i64[B,S]
//!   %1 = weight {name="model.embed_tokens.weight"} : bf16[32000,64]
//!   %2 = embedding %1, %0 : bf16[B,S,64]                  // model.embed_tokens
//!   %3 = slice %2 {axis=2, start=0, end=32} : bf16[B,S,32]  // L0 model.layers.0.mlp
//!   return y=%3
//! }
//! ```
//!
//! One node a line: value, operation, operands, attributes, type, and as a comment the decoder
//! layer (`L0`) and the module path. Where the type is the operation's payload (`input`, `weight`,
//! `const`, `iota`, `cast`, `reshape`, `expand`), the payload is written as the type alone.
//! [`parse`] is the inverse of [`print()`]; it also takes named values (`%q`), attributes in any
//! order, blank lines and comment lines.

mod attrs;
mod dot;
mod json;
mod lexer;
mod parse;
mod print;
mod quote;

pub use crate::types::format_type;
pub use attrs::{Attr, attrs};
pub use dot::dot;
pub use json::json;
pub use lexer::Pos;
pub use parse::{ParseError, TypeMismatch, parse};
pub use print::{print, print_node};
