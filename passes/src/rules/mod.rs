//! All rewrite rules, one file a topic.

mod attention;
mod canonical;
mod linear;
mod norm;
mod qkv;
mod rope;
mod select;
mod softmax;
mod swiglu;
mod win;
mod win_views;

pub use win::STEP;

use crate::rule::Rule;

/// Every rule, in the order of stages and topics.
pub fn all() -> Vec<&'static Rule> {
    let mut rules: Vec<&'static Rule> = [
        canonical::RULES,
        softmax::RULES,
        norm::RECOGNIZE,
        rope::RULES,
        swiglu::RECOGNIZE,
        attention::RULES,
        win::RULES,
        win_views::RULES,
        select::RULES,
        linear::RULES,
        norm::FUSE,
        swiglu::FUSE,
        qkv::RULES,
    ]
    .into_iter()
    .flatten()
    .collect();
    rules.sort_by_key(|r| r.stage);
    rules
}

/// The rule of a name.
pub fn by_name(name: &str) -> Option<&'static Rule> {
    all().into_iter().find(|r| r.name == name)
}
