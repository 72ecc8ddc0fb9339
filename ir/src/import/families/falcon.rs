//! Falcon with rotary embeddings, in both decoder forms: fused q, k, v of three layouts,
//! attention and MLP side by side or in sequence. ALiBi is refused.

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
    model_type: "falcon",
    architecture: "FalconForCausalLM",
    import,
    samples: &[Sample {
        name: "falcon",
        config: r#"{
                "model_type": "falcon", "hidden_size": 256, "num_attention_heads": 8,
                "num_hidden_layers": 2, "vocab_size": 1000, "max_position_embeddings": 1024,
                "rope_theta": 10000.0, "tie_word_embeddings": true, "num_kv_heads": 2, "alibi": false,
                "bias": false, "multi_query": true, "new_decoder_architecture": true, "parallel_attn": true,
                "num_ln_in_parallel_attn": 2, "ffn_hidden_size": 384, "activation": "gelu",
                "layer_norm_epsilon": 1e-05
            }"#,
    }],
};

struct Falcon {
    attention: Attention,
    intermediate: u32,
    activation: Activation,
    eps: f64,
    mlp: Mlp,
    /// `new_decoder_architecture`: grouped queries, one group after the other.
    new_form: bool,
    /// Attention and MLP side by side.
    parallel: bool,
    /// Norms of their own for the two.
    two_norms: bool,
}

fn import(cfg: &HfConfig, opts: &ImportOptions) -> Result<Model, ImportError> {
    cfg.only("alibi", &false.into())?;
    let hidden = cfg.size("hidden_size")?;
    let heads = cfg.size("num_attention_heads")?;
    let layers = cfg.layers("num_hidden_layers")?;
    let new_form = cfg.bool_or("new_decoder_architecture", false)?;
    let kv_heads = if new_form {
        let n = cfg.opt_size("num_kv_heads")?.unwrap_or(heads);
        if !heads.is_multiple_of(n) {
            return Err(cfg.invalid("num_kv_heads", &format!("a divisor of {heads}")));
        }
        n
    } else if cfg.bool_or("multi_query", true)? {
        1
    } else {
        heads
    };
    let norms = cfg.opt_u32("num_ln_in_parallel_attn")?;
    if !matches!(norms, None | Some(1 | 2)) {
        return Err(cfg.unsupported("num_ln_in_parallel_attn", "1, 2"));
    }
    let bias = cfg.bool_or("bias", false)?;
    let sizes = Sizes {
        vocab: cfg.size("vocab_size")?,
        intermediate: cfg
            .opt_size("ffn_hidden_size")?
            .unwrap_or(hidden.saturating_mul(4)),
        max_position: cfg.opt_size("max_position_embeddings")?.unwrap_or(2048),
        tied: cfg.bool_or("tie_word_embeddings", true)?,
    };
    let mut attention =
        Attention::plain(hidden, heads, kv_heads, head_dim(cfg, None, hidden, heads)?);
    attention.qkv_bias = bias;
    attention.o_bias = bias;
    let m = Falcon {
        intermediate: sizes.intermediate,
        activation: Activation::read(cfg, "activation", Activation::Gelu)?,
        eps: cfg.opt_f64("layer_norm_epsilon")?.unwrap_or(1e-5),
        mlp: Mlp::Plain {
            names: ["dense_h_to_4h", "dense_4h_to_h"],
            bias,
        },
        new_form,
        parallel: new_form || cfg.bool_or("parallel_attn", true)?,
        two_norms: new_form && norms != Some(1),
        attention,
    };
    let rope = RopeTable::read(
        cfg,
        "rope_parameters",
        m.attention.head_dim,
        RopeDefaults::PLAIN,
        opts,
    )?;

    let mut b = Builder::new(FAMILY.model_type, cfg.file(), opts.dtype);
    let table_shape = [sizes.vocab, hidden];
    let (table, h) = b.within("transformer", |b| {
        let ids = tokens(b)?;
        let (table, mut h) = embedding(b, "word_embeddings", ids, table_shape)?;
        let mask = causal_mask(b, None)?;
        let rope = rotary_embedding(b, "rotary_emb", &rope)?;
        for i in 0..layers {
            h = b.in_layer(i, &format!("h.{i}"), |b| m.layer(b, h, rope, mask))?;
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
    if sizes.tied {
        model.alias("lm_head.weight", "transformer.word_embeddings.weight");
    }
    Ok(model)
}

impl Falcon {
    fn layer(&self, b: &mut Builder, h: NodeId, rope: CosSin, mask: NodeId) -> Built {
        let n = self.attention.hidden;
        let norm = |b: &mut Builder, name, x| layer_norm(b, name, x, n, self.eps);
        let (for_attn, for_mlp) = if self.two_norms {
            (norm(b, "ln_attn", h)?, norm(b, "ln_mlp", h)?)
        } else {
            let x = norm(b, "input_layernorm", h)?;
            (x, x)
        };
        let attn = self.attend(b, for_attn, rope, mask)?;
        let mlp = |b: &mut Builder, x| {
            self.mlp
                .build(b, x, [n, self.intermediate], self.activation)
        };
        if self.parallel {
            let x = mlp(b, for_mlp)?;
            let x = b.binary(BinaryFn::Add, x, attn)?;
            b.binary(BinaryFn::Add, h, x)
        } else {
            let h = b.binary(BinaryFn::Add, h, attn)?;
            let x = norm(b, "post_attention_layernorm", h)?;
            let x = mlp(b, x)?;
            b.binary(BinaryFn::Add, h, x)
        }
    }

    /// The rows of `query_key_value`: new form, groups of query heads with their k and v head;
    /// multi-query, all q heads, k, v; otherwise q, k, v head by head.
    fn attend(&self, b: &mut Builder, x: NodeId, rope: CosSin, mask: NodeId) -> Built {
        let a = &self.attention;
        let (groups, q) = if self.new_form || a.kv_heads == a.heads {
            (a.kv_heads, a.heads / a.kv_heads * a.head_dim)
        } else {
            (1, a.q_width())
        };
        b.within("self_attention", |b| {
            let mut part = |from, to| {
                let part = Part { groups, from, to };
                let shape = [a.q_width() + 2 * a.kv_width(), a.hidden];
                linear_part(b, "query_key_value", x, shape, a.qkv_bias, part)
            };
            let d = a.head_dim;
            let qkv = [part(0, q)?, part(q, q + d)?, part(q + d, q + 2 * d)?];
            let o = attend(b, a, qkv, Some(rope), mask)?;
            linear(b, "dense", o, [a.hidden, a.q_width()], a.o_bias)
        })
    }
}
