//! Random programs: small language models of the pieces that families are made of, right and wrong.

mod attention;
pub(crate) mod build;
mod mask;
mod mlp;
mod norm;
mod rope;

use crate::rng::Rng;
use attention::{Heads, attention};
use build::{Build, Built, b, s};
use lathe_ir::{BinaryFn, DType, Graph, NodeId, Prov};
use mlp::{loose, mlp};
use norm::norm;
use rope::waves;

/// Rows of the embedding.
const VOCAB: i64 = 7;

/// A random program from `tokens [B,S]` to `logits [B,S,V]`; none where its parts do not fit.
pub(crate) fn program(seed: u64) -> Option<Graph> {
    let mut g = Build::new(Rng::new(seed));
    let logits = model(&mut g)?;
    g.graph.set_output("logits", logits);
    Some(g.graph.without_dead())
}

fn model(g: &mut Build) -> Built {
    let hidden = g.rng.pick(&[4, 8, 16]);
    let hidden = g.usual(hidden, &[1, 2, 3]);
    let heads = Heads {
        kv: g.rng.pick(&[1, 2]),
        groups: g.rng.pick(&[1, 2, 3]),
        dim: g.rng.pick(&[2, 4, 8, 16, 16, 16]),
    };
    let heads = Heads {
        dim: g.usual(heads.dim, &[1, 3, 6]),
        ..heads
    };
    let ids = g.usual(DType::I64, &[DType::I32]);
    let tokens = g.input("tokens", ids, &[b(), s()])?;
    let table = g.weight(&[VOCAB, hidden])?;
    let mut x = g.embedding(table, tokens)?;
    let turning = match g.rng.one_in(3) {
        true => None,
        false => waves(g, heads.dim),
    };
    let layers = g.rng.pick(&[1, 1, 1, 2]);
    for layer in 0..layers {
        let number = g.usual(layer, &[0, 3]);
        g.prov = Prov::layer(number, &format!("model.layers.{number}"));
        for _ in 0..1 + g.rng.below(3) {
            x = block(g, x, heads, turning)?;
        }
    }
    g.prov = Prov::global("model.head");
    if g.rng.coin() {
        x = or_else(g, x, norm);
    }
    if g.rng.one_in(4) {
        let table = g.permute(table, &[1, 0])?;
        return g.matmul(x, table);
    }
    g.linear(x, VOCAB)
}

/// What a piece makes of x, or x where the piece does not fit.
fn or_else(g: &mut Build, x: NodeId, piece: impl FnOnce(&mut Build, NodeId) -> Built) -> NodeId {
    let ty = g.graph.tensor(x).cloned();
    match piece(g, x) {
        Some(y) if g.graph.tensor(y).cloned() == ty => y,
        _ => x,
    }
}

/// A piece with a norm before it and a residual around it, mostly.
fn block(g: &mut Build, x: NodeId, heads: Heads, turning: Option<rope::Waves>) -> Built {
    let normed = match g.rng.one_in(3) {
        true => x,
        false => or_else(g, x, norm),
    };
    let y = match g.rng.below(6) {
        0..=2 => or_else(g, normed, |g, x| attention(g, x, heads, turning)),
        3 | 4 => or_else(g, normed, mlp),
        _ => or_else(g, normed, loose),
    };
    match g.rng.one_in(4) {
        true => Some(y),
        false => g.either(BinaryFn::Add, x, y),
    }
}
