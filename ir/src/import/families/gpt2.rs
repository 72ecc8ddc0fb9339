//! GPT-2: learned positions, LayerNorms, `Conv1D` projections (`[K, N]` weights, q, k, v fused).

use crate::import::blocks::attention::{Attention, attend};
use crate::import::blocks::decoder::head_dim;
use crate::import::blocks::embed::{embedding, positions, tokens};
use crate::import::blocks::linear::{conv1d, conv1d_columns, lm_head};
use crate::import::blocks::mask::causal_mask;
use crate::import::blocks::mlp::{Activation, Mlp};
use crate::import::blocks::model::{Sizes, finish};
use crate::import::blocks::norm::layer_norm;
use crate::import::builder::{Builder, Built, seq};
use crate::import::{Family, HfConfig, ImportError, ImportOptions, Model, Sample};
use crate::{BinaryFn, Dim, NodeId};

pub(super) const FAMILY: Family = Family {
    model_type: "gpt2",
    architecture: "GPT2LMHeadModel",
    import,
    samples: &[Sample {
        name: "gpt2",
        config: r#"{
                "model_type": "gpt2", "vocab_size": 1000, "tie_word_embeddings": true, "n_embd": 256,
                "n_head": 4, "n_layer": 2, "n_positions": 1024, "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-05
            }"#,
    }],
};

const MLP: Mlp = Mlp::Conv1d {
    names: ["c_fc", "c_proj"],
};

struct Gpt2 {
    attention: Attention,
    intermediate: u32,
    activation: Activation,
    eps: f64,
}

fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    cfg.only("scale_attn_weights", &true.into())?;
    cfg.only("scale_attn_by_inverse_layer_idx", &false.into())?;
    cfg.only("reorder_and_upcast_attn", &false.into())?;
    cfg.only("add_cross_attention", &false.into())?;
    let hidden = cfg.size("n_embd")?;
    let heads = cfg.size("n_head")?;
    let layers = cfg.layers("n_layer")?;
    let sizes = Sizes {
        vocab: cfg.size("vocab_size")?,
        intermediate: cfg.opt_size("n_inner")?.unwrap_or(hidden.saturating_mul(4)),
        max_position: cfg.size("n_positions")?,
        tied: cfg.bool_or("tie_word_embeddings", true)?,
    };
    let m = Gpt2 {
        attention: Attention::plain(hidden, heads, heads, head_dim(cfg, None, hidden, heads)?),
        intermediate: sizes.intermediate,
        activation: Activation::read(cfg, "activation_function", Activation::GeluTanh)?,
        eps: cfg.opt_f64("layer_norm_epsilon")?.unwrap_or(1e-5),
    };

    let mut b = Builder::new(FAMILY.model_type, cfg.file(), opts.dtype);
    let table_shape = [sizes.vocab, hidden];
    let (table, h) = b.within("transformer", |b| {
        let ids = tokens(b)?;
        let (table, h) = embedding(b, "wte", ids, table_shape)?;
        let at = positions(b, &[Dim::new(1), seq()])?;
        let (_, p) = embedding(b, "wpe", at, [sizes.max_position, hidden])?;
        let mut h = b.binary(BinaryFn::Add, h, p)?;
        let mask = causal_mask(b, None)?;
        for i in 0..layers {
            h = b.in_layer(i, &format!("h.{i}"), |b| m.layer(b, h, mask))?;
        }
        Ok((table, layer_norm(b, "ln_f", h, hidden, m.eps)?))
    })?;
    let tied = sizes.tied.then_some(table);
    let logits = lm_head(&mut b, "lm_head", h, tied, table_shape, false)?;
    let mut model = finish(
        b,
        logits,
        FAMILY.model_type,
        cfg,
        &sizes,
        &m.attention,
        layers,
    )?;
    // The first published checkpoints leave the prefix out.
    for w in model.arch.weights.clone() {
        if let Some(short) = w.name.strip_prefix("transformer.") {
            model.alias(short, &w.name);
        }
    }
    if sizes.tied {
        model.alias("lm_head.weight", "transformer.wte.weight");
    }
    model.ignore(&[".attn.bias", ".attn.masked_bias"]);
    Ok(model)
}

impl Gpt2 {
    fn layer(&self, b: &mut Builder, h: NodeId, mask: NodeId) -> Built {
        let n = self.attention.hidden;
        let x = layer_norm(b, "ln_1", h, n, self.eps)?;
        let x = b.within("attn", |b| {
            let mut third =
                |i: u32| conv1d_columns(b, "c_attn", x, [n, 3 * n], [i * n, (i + 1) * n]);
            let qkv = [third(0)?, third(1)?, third(2)?];
            let o = attend(b, &self.attention, qkv, None, mask)?;
            conv1d(b, "c_proj", o, [n, n])
        })?;
        let h = b.binary(BinaryFn::Add, x, h)?;
        let x = layer_norm(b, "ln_2", h, n, self.eps)?;
        let x = MLP.build(b, x, [n, self.intermediate], self.activation)?;
        b.binary(BinaryFn::Add, h, x)
    }
}
