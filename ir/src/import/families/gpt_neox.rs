//! GPT-NeoX and Pythia: q, k, v fused head by head, part of each head rotated, attention and MLP
//! side by side.

use crate::import::blocks::attention::{Attention, attend};
use crate::import::blocks::decoder::head_dim;
use crate::import::blocks::embed::{embedding, tokens};
use crate::import::blocks::linear::{Part, linear, linear_part, lm_head};
use crate::import::blocks::mask::causal_mask;
use crate::import::blocks::mlp::{Activation, Mlp};
use crate::import::blocks::model::{Sizes, finish};
use crate::import::blocks::norm::layer_norm;
use crate::import::blocks::rope::{CosSin, RopeDefaults, RopeTable, rotary_embedding};
use crate::import::builder::{Builder, Built};
use crate::import::{Family, HfConfig, ImportError, ImportOptions, Model, Sample};
use crate::{BinaryFn, NodeId};

pub(super) const FAMILY: Family = Family {
    model_type: "gpt_neox",
    architecture: "GPTNeoXForCausalLM",
    import,
    samples: &[Sample {
        name: "gpt-neox",
        config: r#"{
                "model_type": "gpt_neox", "hidden_size": 256, "intermediate_size": 384,
                "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 1000,
                "max_position_embeddings": 1024, "hidden_act": "gelu", "rope_theta": 10000.0,
                "tie_word_embeddings": false, "layer_norm_eps": 1e-05, "rotary_pct": 0.25,
                "use_parallel_residual": true
            }"#,
    }],
};

const MLP: Mlp = Mlp::Plain {
    names: ["dense_h_to_4h", "dense_4h_to_h"],
    bias: true,
};

struct NeoX {
    attention: Attention,
    intermediate: u32,
    activation: Activation,
    eps: f64,
    parallel: bool,
}

fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    let sizes = Sizes::read(cfg, false)?;
    let hidden = cfg.size("hidden_size")?;
    let heads = cfg.size("num_attention_heads")?;
    let layers = cfg.layers("num_hidden_layers")?;
    let head_dim = head_dim(cfg, None, hidden, heads)?;
    let bias = cfg.bool_or("attention_bias", true)?;
    let mut attention = Attention::plain(hidden, heads, heads, head_dim);
    attention.qkv_bias = bias;
    attention.o_bias = bias;
    let m = NeoX {
        attention,
        intermediate: sizes.intermediate,
        activation: Activation::read(cfg, "hidden_act", Activation::Gelu)?,
        eps: cfg.opt_f64("layer_norm_eps")?.unwrap_or(1e-5),
        parallel: cfg.bool_or("use_parallel_residual", true)?,
    };
    let rope_defaults = RopeDefaults {
        theta: 10_000.0,
        partial: Some(0.25),
    };
    let rope = RopeTable::read(cfg, "rope_parameters", head_dim, rope_defaults, opts)?;

    let mut b = Builder::new(FAMILY.model_type, cfg.file(), opts.dtype);
    let table_shape = [sizes.vocab, hidden];
    let (table, h) = b.within("gpt_neox", |b| {
        let ids = tokens(b)?;
        let (table, mut h) = embedding(b, "embed_in", ids, table_shape)?;
        let mask = causal_mask(b, None)?;
        let rope = rotary_embedding(b, "rotary_emb", &rope)?;
        for i in 0..layers {
            h = b.in_layer(i, &format!("layers.{i}"), |b| m.layer(b, h, rope, mask))?;
        }
        Ok((table, layer_norm(b, "final_layer_norm", h, hidden, m.eps)?))
    })?;
    let tied = sizes.tied.then_some(table);
    let logits = lm_head(&mut b, "embed_out", h, tied, table_shape, false)?;
    let mut model = finish(
        b,
        logits,
        FAMILY.model_type,
        cfg,
        &sizes,
        &m.attention,
        layers,
    )?;
    if sizes.tied {
        model.alias("embed_out.weight", "gpt_neox.embed_in.weight");
    }
    model.ignore(&[".attention.bias", ".attention.masked_bias"]);
    Ok(model)
}

impl NeoX {
    fn layer(&self, b: &mut Builder, h: NodeId, rope: CosSin, mask: NodeId) -> Built {
        let a = &self.attention;
        let (n, d) = (a.hidden, a.head_dim);
        let x = layer_norm(b, "input_layernorm", h, n, self.eps)?;
        let attn = b.within("attention", |b| {
            let mut part = |i: u32| {
                let part = Part {
                    groups: a.heads,
                    from: i * d,
                    to: (i + 1) * d,
                };
                let shape = [3 * a.q_width(), n];
                linear_part(b, "query_key_value", x, shape, a.qkv_bias, part)
            };
            let qkv = [part(0)?, part(1)?, part(2)?];
            let o = attend(b, a, qkv, Some(rope), mask)?;
            linear(b, "dense", o, [n, a.q_width()], a.o_bias)
        })?;
        let residual = if self.parallel {
            h
        } else {
            b.binary(BinaryFn::Add, attn, h)?
        };
        let x = layer_norm(b, "post_attention_layernorm", residual, n, self.eps)?;
        let mlp = MLP.build(b, x, [n, self.intermediate], self.activation)?;
        if self.parallel {
            let sum = b.binary(BinaryFn::Add, mlp, attn)?;
            b.binary(BinaryFn::Add, sum, h)
        } else {
            b.binary(BinaryFn::Add, mlp, residual)
        }
    }
}
