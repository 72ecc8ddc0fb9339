//! Phi-1, 1.5 and 2: one LayerNorm a layer, attention and MLP side by side, part of each head
//! rotated, biases everywhere.

use crate::BinaryFn;
use crate::import::blocks::attention::{Attention, self_attention};
use crate::import::blocks::decoder::{head_dim, kv_heads};
use crate::import::blocks::embed::{embedding, tokens};
use crate::import::blocks::linear::lm_head;
use crate::import::blocks::mask::causal_mask;
use crate::import::blocks::mlp::{Activation, Mlp};
use crate::import::blocks::model::{Sizes, finish};
use crate::import::blocks::norm::layer_norm;
use crate::import::blocks::rope::{RopeDefaults, RopeTable, rotary_embedding};
use crate::import::builder::Builder;
use crate::import::{Family, HfConfig, ImportError, ImportOptions, Model, Sample};

pub(super) const FAMILY: Family = Family {
    model_type: "phi",
    architecture: "PhiForCausalLM",
    import,
    samples: &[Sample {
        name: "phi",
        config: r#"{
                "model_type": "phi", "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4,
                "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 1000,
                "max_position_embeddings": 1024, "hidden_act": "gelu_new", "rope_theta": 10000.0,
                "tie_word_embeddings": false, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-05
            }"#,
    }],
};

const MLP: Mlp = Mlp::Plain {
    names: ["fc1", "fc2"],
    bias: true,
};

fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    cfg.only("qk_layernorm", &false.into())?;
    let sizes = Sizes::read(cfg, false)?;
    let hidden = cfg.size("hidden_size")?;
    let heads = cfg.size("num_attention_heads")?;
    let layers = cfg.layers("num_hidden_layers")?;
    let eps = cfg.opt_f64("layer_norm_eps")?.unwrap_or(1e-5);
    let act = Activation::read(cfg, "hidden_act", Activation::GeluTanh)?;
    let mut attention = Attention::plain(
        hidden,
        heads,
        kv_heads(cfg, heads, true)?,
        head_dim(cfg, None, hidden, heads)?,
    );
    attention.qkv_bias = true;
    attention.o_bias = true;
    let rope_defaults = RopeDefaults {
        theta: 10_000.0,
        partial: Some(0.5),
    };
    let rope = RopeTable::read(
        cfg,
        "rope_parameters",
        attention.head_dim,
        rope_defaults,
        opts,
    )?;

    let mut b = Builder::new(FAMILY.model_type, cfg.file(), opts.dtype);
    let table_shape = [sizes.vocab, hidden];
    let (table, h) = b.within("model", |b| {
        let ids = tokens(b)?;
        let (table, mut h) = embedding(b, "embed_tokens", ids, table_shape)?;
        let mask = causal_mask(b, None)?;
        let rope = rotary_embedding(b, "rotary_emb", &rope)?;
        for i in 0..layers {
            h = b.in_layer(i, &format!("layers.{i}"), |b| {
                let x = layer_norm(b, "input_layernorm", h, hidden, eps)?;
                let attn = self_attention(b, &attention, "dense", x, rope, mask)?;
                let shape = [hidden, sizes.intermediate];
                let mlp = MLP.build(b, x, shape, act)?;
                let sum = b.binary(BinaryFn::Add, attn, mlp)?;
                b.binary(BinaryFn::Add, sum, h)
            })?;
        }
        Ok((table, layer_norm(b, "final_layernorm", h, hidden, eps)?))
    })?;
    let tied = sizes.tied.then_some(table);
    let logits = lm_head(&mut b, "lm_head", h, tied, table_shape, true)?;
    let mut model = finish(
        b,
        logits,
        FAMILY.model_type,
        cfg,
        &sizes,
        &attention,
        layers,
    )?;
    if sizes.tied {
        model.alias("lm_head.weight", "model.embed_tokens.weight");
    }
    Ok(model)
}
