//! Attention, from its parts to one operation, and what stands around it.

use super::checks::{
    linear_of, optional, same_dtype, same_type, want_cache, want_float, want_int, want_min_rank,
    want_rank,
};
use super::{Class, Fields, Level, Operation, Signature, X};
use crate::operands::{Operands, Slot};
use crate::shape::{Dim, broadcast, format_shape};
use crate::{Real, TensorType, Type};

type Rule = Result<Type, String>;

const fn attention(level: Level, slots: &'static [Slot]) -> Signature {
    Signature::new(level, Class::Attention, slots)
}

/// Which keys a query may see. Key `j` is visible to query `i` (positions in one sequence) iff
/// `(!causal || j <= i) && (window is none || j > i - window)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Mask {
    /// Later keys are hidden.
    pub causal: bool,
    /// Only the `window` most recent keys (itself included) are visible.
    pub window: Option<u32>,
}

impl Mask {
    /// Every key is visible.
    pub const ALL: Mask = Mask {
        causal: false,
        window: None,
    };
    /// Key `j` is visible to query `i` iff `j <= i`.
    pub const CAUSAL: Mask = Mask {
        causal: true,
        window: None,
    };

    /// Keys visible under both masks.
    pub fn and(self, o: Mask) -> Mask {
        Mask {
            causal: self.causal || o.causal,
            window: match (self.window, o.window) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
        }
    }

    /// Whether key position `j` is visible to query position `i`.
    pub fn visible(self, i: i64, j: i64) -> bool {
        (!self.causal || j <= i) && self.window.is_none_or(|w| j > i - i64::from(w))
    }
}

/// `softmax(cap(scale · q·kᵀ) + mask) · v`, with `cap(s) = softcap · tanh(s / softcap)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct AttnSpec {
    /// Factor of the scores.
    pub scale: Real,
    /// Soft cap of the scores (Gemma 2), applied after the scale.
    pub softcap: Option<Real>,
    /// Visible keys.
    pub mask: Mask,
    /// Query heads per KV head: query head `h` attends with KV head `h / groups`.
    pub groups: u32,
    /// How far a still open attention ([`Sdpa`]) has been peeled; `Closed` in
    /// [`Attn`].
    pub stage: SdpaStage,
}

impl Default for AttnSpec {
    fn default() -> AttnSpec {
        AttnSpec::open()
    }
}

impl AttnSpec {
    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.real("scale", &mut self.scale)?;
        v.opt_real("softcap", &mut self.softcap)?;
        v.flag("causal", &mut self.mask.causal)?;
        v.opt_int("window", &mut self.mask.window)?;
        v.int("groups", &mut self.groups)?;
        let stages = [
            ("mask", SdpaStage::Mask),
            ("cap", SdpaStage::Cap),
            ("scale", SdpaStage::Scale),
            ("closed", SdpaStage::Closed),
        ];
        v.word("stage", &mut self.stage, &stages)
    }

    /// An open attention whose scores have not been looked at yet.
    pub fn open() -> AttnSpec {
        AttnSpec {
            scale: Real::new(1.0),
            softcap: None,
            mask: Mask::ALL,
            groups: 1,
            stage: SdpaStage::Mask,
        }
    }
}

/// Modifiers are peeled from the scores from outside in: masks, then a soft cap, then scales.
/// An order that no kernel implements is never reached, because a stage only advances.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum SdpaStage {
    /// Nothing but masks has been peeled.
    Mask,
    /// A soft cap has been peeled.
    Cap,
    /// A scale has been peeled.
    Scale,
    /// The scores were `q·kᵀ`: the attention is closed.
    Closed,
}

/// `(scores [B,H,S,S], v [B,H,S,D]) -> [B,H,S,D]`: attention whose scores are still a term.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Sdpa(pub AttnSpec);

/// Operands of [`Sdpa`].
pub mod sdpa {
    use super::Slot;
    /// The scores of each query and key.
    pub const SCORES: Slot = Slot::value(0, "scores");
    /// The values of each key.
    pub const V: Slot = Slot::value(1, "v");
}

impl Operation for Sdpa {
    const NAMES: &'static [&'static str] = &["sdpa"];
    const SIGNATURE: Signature = attention(Level::Composite, &[sdpa::SCORES, sdpa::V]);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        self.0.fields(v)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        super::matrix::product(x.tensor(sdpa::SCORES)?, x.tensor(sdpa::V)?)
    }
}

/// `(q [B,H,S,D], k [B,Hkv,S,D], v [B,Hkv,S,D]) -> [B,H,S,D]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Attn(pub AttnSpec);

/// Operands of [`Attn`].
pub mod attn {
    use super::Slot;
    /// Queries.
    pub const Q: Slot = Slot::value(0, "q");
    /// Keys.
    pub const K: Slot = Slot::value(1, "k");
    /// Values.
    pub const V: Slot = Slot::value(2, "v");
}

impl Operation for Attn {
    const NAMES: &'static [&'static str] = &["attn"];
    const SIGNATURE: Signature = attention(Level::Composite, &[attn::Q, attn::K, attn::V]);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        self.0.fields(v)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let (q, k, v) = (x.tensor(attn::Q)?, x.tensor(attn::K)?, x.tensor(attn::V)?);
        same_dtype(q, k)?;
        same_type(k, v)?;
        want_rank(q, 4, "q")?;
        want_rank(k, 4, "k")?;
        let mut expected = k.shape.clone();
        expected[1] = expected[1] * i64::from(self.0.groups);
        fits_heads(&q.shape, &expected, &k.shape, self.0.groups)?;
        Ok(Type::Tensor(q.clone()))
    }
}

fn fits_heads(q: &[Dim], expected: &[Dim], k: &[Dim], groups: u32) -> Result<(), String> {
    if q == expected {
        return Ok(());
    }
    Err(format!(
        "q {} does not fit k {} with {groups} query heads a KV head",
        format_shape(q),
        format_shape(k)
    ))
}

/// `(q [T,H,D], k [T,Hkv,D], v [T,Hkv,D], cache) -> ([T,H,D], cache)`: appends k and v, then attends.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct AttnStep(pub AttnSpec);

/// Operands of [`AttnStep`].
pub mod attn_step {
    use super::Slot;
    /// Queries of the step's rows.
    pub const Q: Slot = Slot::value(0, "q");
    /// Their keys.
    pub const K: Slot = Slot::value(1, "k");
    /// Their values.
    pub const V: Slot = Slot::value(2, "v");
    /// The cache, with the rows before them.
    pub const CACHE: Slot = Slot::value(3, "cache");
}

impl Operation for AttnStep {
    const NAMES: &'static [&'static str] = &["attn_step"];
    const SIGNATURE: Signature = attention(
        Level::Composite,
        &[attn_step::Q, attn_step::K, attn_step::V, attn_step::CACHE],
    );

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        self.0.fields(v)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let (q, k) = (x.tensor(attn_step::Q)?, x.tensor(attn_step::K)?);
        want_rank(q, 3, "q")?;
        want_rank(k, 3, "k")?;
        same_dtype(q, k)?;
        same_type(k, x.tensor(attn_step::V)?)?;
        let groups = self.0.groups;
        let expected = [q.shape[0], k.shape[1] * i64::from(groups), k.shape[2]];
        fits_heads(&q.shape, &expected, &k.shape, groups)?;
        want_cache(x[attn_step::CACHE])?;
        Ok(Type::Tuple(vec![Type::Tensor(q.clone()), Type::Cache]))
    }
}

/// `(x [B,H,S,D]) -> [B,H·groups,S,D]`: each head `groups` times in a row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct RepeatKv {
    /// Copies of each head.
    pub groups: u32,
}

impl Operation for RepeatKv {
    const NAMES: &'static [&'static str] = &["repeat_kv"];
    const SIGNATURE: Signature = Signature::new(Level::Composite, Class::Movement, &[X]);

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.int("groups", &mut self.groups)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let x = x.tensor(X)?;
        want_rank(x, 4, "x")?;
        let mut shape = x.shape.clone();
        shape[1] = shape[1] * i64::from(self.groups);
        Ok(Type::tensor(x.dtype, shape))
    }
}

/// Rotary position embedding in the rotate-half form of Hugging Face: for `i < D/2`,
/// `y[i] = x[i]·c − x[i+D/2]·s` and `y[i+D/2] = x[i+D/2]·c + x[i]·s` with
/// `c, s = scaling · cos, sin(position · inv_freq[i])`.
/// `(x [..,D], positions, inv_freq [D/2])`: positions broadcast against x's leading axes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Rope {
    /// `attention_scaling` of yarn and longrope; 1 otherwise.
    pub scaling: Real,
}

/// Operands of [`Rope`].
pub mod rope {
    use super::Slot;
    /// The rows that are rotated.
    pub const X: Slot = Slot::value(0, "x");
    /// Their positions.
    pub const POSITIONS: Slot = Slot::value(1, "positions");
    /// A frequency for each pair of features.
    pub const INV_FREQ: Slot = Slot::value(2, "inv_freq");
}

impl Operation for Rope {
    const NAMES: &'static [&'static str] = &["rope"];
    const SIGNATURE: Signature = Signature::new(
        Level::Composite,
        Class::Elementwise,
        &[rope::X, rope::POSITIONS, rope::INV_FREQ],
    );

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.real("scaling", &mut self.scaling)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let (pos, freq) = (x.tensor(rope::POSITIONS)?, x.tensor(rope::INV_FREQ)?);
        let x = x.tensor(rope::X)?;
        want_float(x, "x")?;
        want_int(pos, "positions")?;
        want_min_rank(x, 1)?;
        let lead = &x.shape[..x.rank() - 1];
        if broadcast(&pos.shape, lead).as_deref() != Some(lead) {
            return Err(format!(
                "positions {} do not broadcast to {}",
                format_shape(&pos.shape),
                format_shape(lead)
            ));
        }
        fits_rows(freq, x.shape[x.rank() - 1])?;
        Ok(Type::Tensor(x.clone()))
    }
}

/// A frequency for each pair of features of a row.
fn fits_rows(freq: &TensorType, features: Dim) -> Result<(), String> {
    want_rank(freq, 1, "inv_freq")?;
    want_float(freq, "inv_freq")?;
    if freq.shape[0] * 2 == features {
        return Ok(());
    }
    Err(format!(
        "{} frequencies for rows of {features} features",
        freq.shape[0]
    ))
}

/// What happens to the heads of queries and keys before attention.
fn head_fields<V: Fields>(
    head_norm: &mut Option<Real>,
    rope: &mut Option<Rope>,
    v: &mut V,
) -> Result<(), V::Fault> {
    v.opt_real("head_norm", head_norm)?;
    let mut scaling = rope.map(|r| r.scaling);
    v.opt_real("rope", &mut scaling)?;
    *rope = scaling.map(|scaling| Rope { scaling });
    Ok(())
}

/// Checks the operands of the head norm and of RoPE: they stand there with their attribute and not
/// without it. `gammas` are the slots of the norm's factors.
fn head_operands(
    x: &Operands<&Type>,
    head_dim: u32,
    (head_norm, gammas): (Option<Real>, &[Slot]),
    (rope, positions, inv_freq): (Option<Rope>, Slot, Slot),
) -> Result<(), String> {
    for &slot in gammas {
        belongs(x, slot, "head_norm", head_norm.is_some())?;
        optional(x, slot, &[Dim::new(i64::from(head_dim))])?;
    }
    belongs(x, positions, "rope", rope.is_some())?;
    belongs(x, inv_freq, "rope", rope.is_some())?;
    if let Some(freq) = x.opt_tensor(inv_freq)? {
        fits_rows(freq, Dim::new(i64::from(head_dim)))?;
    }
    Ok(())
}

fn belongs(x: &Operands<&Type>, slot: Slot, attribute: &str, set: bool) -> Result<(), String> {
    let name = slot.name();
    match (set, x.get(slot)) {
        (true, None) => Err(format!(
            "operand '{name}' is absent, but '{attribute}' needs it"
        )),
        (false, Some(_)) => Err(format!("operand '{name}' without attribute '{attribute}'")),
        _ => Ok(()),
    }
}

/// One projection into heads: `rope(head_norm(reshape(x·wᵀ + bias, [T, heads, head_dim])))`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Proj {
    /// Number of heads.
    pub heads: u32,
    /// Features per head.
    pub head_dim: u32,
    /// RMSNorm over each head with this epsilon (Qwen 3).
    pub head_norm: Option<Real>,
    /// Rotary embedding after the norm.
    pub rope: Option<Rope>,
}

/// Operands of [`Proj`].
pub mod proj {
    use super::Slot;
    /// The rows.
    pub const X: Slot = Slot::value(0, "x");
    /// The weight, `[heads·head_dim, K]`.
    pub const W: Slot = Slot::weight(1, "w");
    /// Added to the features.
    pub const BIAS: Slot = Slot::weight(2, "bias").optional();
    /// Factors of the head norm, `[head_dim]`.
    pub const GAMMA: Slot = Slot::weight(3, "gamma").optional();
    /// Positions of the rows.
    pub const POSITIONS: Slot = Slot::value(4, "positions").optional();
    /// Frequencies of the rotary embedding.
    pub const INV_FREQ: Slot = Slot::value(5, "inv_freq").optional();
}

impl Operation for Proj {
    const NAMES: &'static [&'static str] = &["proj"];
    const SIGNATURE: Signature = Signature::new(
        Level::Composite,
        Class::Gemm,
        &[
            proj::X,
            proj::W,
            proj::BIAS,
            proj::GAMMA,
            proj::POSITIONS,
            proj::INV_FREQ,
        ],
    );

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.int("heads", &mut self.heads)?;
        v.int("head_dim", &mut self.head_dim)?;
        head_fields(&mut self.head_norm, &mut self.rope, v)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let w = x.tensor(proj::W)?;
        let mut y = linear_of(x.tensor(proj::X)?, w)?;
        let n = i64::from(self.heads).saturating_mul(i64::from(self.head_dim));
        if !y.shape.pop().is_some_and(|last| last.is(n)) {
            return Err(format!("weight has {} rows, expected {n}", w.shape[0]));
        }
        optional(x, proj::BIAS, &[Dim::new(n)])?;
        head_operands(
            x,
            self.head_dim,
            (self.head_norm, &[proj::GAMMA]),
            (self.rope, proj::POSITIONS, proj::INV_FREQ),
        )?;
        y.shape
            .extend([self.heads, self.head_dim].map(|n| Dim::new(i64::from(n))));
        Ok(Type::Tensor(y))
    }
}

/// Attention on a packed projection: splits `qkv`, applies head norms and RoPE, appends k and v
/// to the cache and attends. `(qkv [T,(H+2Hkv)·D], cache, ..) -> ([T,H,D], cache)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct AttnQkv {
    /// The attention proper.
    pub attn: AttnSpec,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Features per head.
    pub head_dim: u32,
    /// Epsilon of the RMSNorm of query and key heads.
    pub head_norm: Option<Real>,
    /// Rotary embedding of queries and keys.
    pub rope: Option<Rope>,
}

/// Operands of [`AttnQkv`].
pub mod attn_qkv {
    use super::Slot;
    /// The packed rows.
    pub const QKV: Slot = Slot::value(0, "qkv");
    /// The cache, with the rows before them.
    pub const CACHE: Slot = Slot::value(1, "cache");
    /// Factors of the norm of query heads.
    pub const Q_NORM: Slot = Slot::weight(2, "q_norm").optional();
    /// Factors of the norm of key heads.
    pub const K_NORM: Slot = Slot::weight(3, "k_norm").optional();
    /// Positions of the rows.
    pub const POSITIONS: Slot = Slot::value(4, "positions").optional();
    /// Frequencies of the rotary embedding.
    pub const INV_FREQ: Slot = Slot::value(5, "inv_freq").optional();
}

impl AttnQkv {
    /// Features of a packed row: `(heads + 2·kv_heads) · head_dim`.
    pub fn features(&self) -> u32 {
        (self.kv_heads.saturating_mul(2))
            .saturating_add(self.heads)
            .saturating_mul(self.head_dim)
    }
}

impl Operation for AttnQkv {
    const NAMES: &'static [&'static str] = &["attn_qkv"];
    const SIGNATURE: Signature = attention(
        Level::Lowered,
        &[
            attn_qkv::QKV,
            attn_qkv::CACHE,
            attn_qkv::Q_NORM,
            attn_qkv::K_NORM,
            attn_qkv::POSITIONS,
            attn_qkv::INV_FREQ,
        ],
    );

    fn fields<V: Fields>(&mut self, v: &mut V) -> Result<(), V::Fault> {
        v.int("heads", &mut self.heads)?;
        v.int("kv_heads", &mut self.kv_heads)?;
        v.int("head_dim", &mut self.head_dim)?;
        head_fields(&mut self.head_norm, &mut self.rope, v)?;
        self.attn.fields(v)
    }

    fn ty(&self, x: &Operands<&Type>) -> Rule {
        let qkv = x.tensor(attn_qkv::QKV)?;
        want_rank(qkv, 2, "qkv")?;
        let n = i64::from(self.features());
        if !qkv.shape[1].is(n) {
            return Err(format!(
                "packed rows have {} features, expected {n}",
                qkv.shape[1]
            ));
        }
        want_cache(x[attn_qkv::CACHE])?;
        head_operands(
            x,
            self.head_dim,
            (self.head_norm, &[attn_qkv::Q_NORM, attn_qkv::K_NORM]),
            (self.rope, attn_qkv::POSITIONS, attn_qkv::INV_FREQ),
        )?;
        let out = [
            qkv.shape[0],
            Dim::new(i64::from(self.heads)),
            Dim::new(i64::from(self.head_dim)),
        ];
        Ok(Type::Tuple(vec![Type::tensor(qkv.dtype, out), Type::Cache]))
    }
}
