//! Attention, in full-sequence form and in steps on a KV cache.

use super::eval::{Call, Eval};
use super::rows::{rms_row, rope_row, rounded, softmax_row};
use super::value::CacheRef;
use super::{Float, Tensor, Value};
use crate::dtype::DType;
use crate::operands::Operands;
use crate::ops::{
    Attn, AttnQkv, AttnSpec, AttnStep, Mask, Sdpa, attn as attn_args, attn_qkv, attn_step,
    sdpa as sdpa_args,
};
use std::collections::BTreeMap;
use std::ops::Range;

/// Which rows a step computes: sequence `b` owns the token rows `cu_seqlens[b]..cu_seqlens[b+1]`,
/// and `past[b]` of its rows are in the caches already.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StepMeta {
    /// Row ranges of the sequences; `B + 1` ascending numbers from 0 to `T`.
    pub cu_seqlens: Vec<usize>,
    /// Cached rows of each sequence when the step starts; `B` numbers.
    pub past: Vec<usize>,
}

impl StepMeta {
    /// A step of `lens[b]` new rows of each sequence after `past[b]` cached ones.
    ///
    /// # Panics
    /// The two have different lengths.
    pub fn new(lens: &[usize], past: &[usize]) -> StepMeta {
        assert_eq!(lens.len(), past.len(), "one length for each sequence");
        let mut cu_seqlens = vec![0];
        for n in lens {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + n);
        }
        StepMeta {
            cu_seqlens,
            past: past.to_vec(),
        }
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.past.len()
    }

    /// Number of token rows.
    pub fn tokens(&self) -> usize {
        self.cu_seqlens.last().copied().unwrap_or(0)
    }

    /// Sequence and position of each token row, in order.
    pub fn rows(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.past.iter().enumerate().flat_map(|(b, &past)| {
            let n = self.cu_seqlens[b + 1] - self.cu_seqlens[b];
            (0..n).map(move |i| (b, past + i))
        })
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let ascending = self.cu_seqlens.windows(2).all(|w| w[0] <= w[1]);
        if self.cu_seqlens.len() != self.past.len() + 1 || self.cu_seqlens[0] != 0 || !ascending {
            return Err(format!(
                "cu_seqlens {:?} do not delimit {} sequences",
                self.cu_seqlens,
                self.past.len()
            ));
        }
        Ok(())
    }
}

/// The KV cache of one layer.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct KvState<F> {
    /// One entry a sequence.
    pub seqs: Vec<KvRows<F>>,
}

/// Cached rows of one sequence; each row is `[kv_heads, head_dim]`.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct KvRows<F> {
    /// Keys, as attention sees them (after norm and RoPE).
    pub k: Vec<F>,
    /// Values.
    pub v: Vec<F>,
}

/// The part of an attention that is the same for all rows.
struct Attend {
    scale: f64,
    softcap: Option<f64>,
    mask: Mask,
}

impl Attend {
    fn new(spec: &AttnSpec) -> Attend {
        Attend {
            scale: spec.scale.get(),
            softcap: spec.softcap.map(crate::Real::get),
            mask: spec.mask,
        }
    }

    /// Attends to the keys in view of position `pos` among `n`. Row `j` of k and v starts at
    /// `j·stride`.
    #[allow(clippy::too_many_arguments)]
    fn row<F: Float>(
        &self,
        q: &[F],
        (k, v): (&[F], &[F]),
        stride: usize,
        n: usize,
        pos: usize,
        scores: &mut Vec<F>,
        out: &mut [F],
    ) {
        let d = q.len();
        let view = view(self.mask, pos, n);
        let scale = F::from_f64(self.scale);
        scores.clear();
        scores.extend(view.clone().map(|j| {
            let s = F::dot(q, &k[j * stride..j * stride + d]) * scale;
            cap(s, self.softcap)
        }));
        softmax_row(scores);
        out.fill(F::ZERO);
        for (j, &p) in view.zip(scores.iter()) {
            for (o, &x) in out.iter_mut().zip(&v[j * stride..j * stride + d]) {
                *o += p * x;
            }
        }
    }
}

fn cap<F: Float>(s: F, softcap: Option<f64>) -> F {
    match softcap {
        Some(c) => {
            let c = F::from_f64(c);
            c * (s / c).tanh()
        }
        None => s,
    }
}

/// The keys of `0..n` that are visible to query position `pos`: always a range.
fn view(mask: Mask, pos: usize, n: usize) -> Range<usize> {
    let hi = if mask.causal { n.min(pos + 1) } else { n };
    let lo = mask
        .window
        .map_or(0, |w| (pos + 1).saturating_sub(w as usize));
    lo.min(hi)..hi
}

/// `(q [B,H,S,D], k, v [B,Hkv,S,D])`.
fn attn<F: Float>(
    spec: &AttnSpec,
    q: &Tensor<F>,
    k: &Tensor<F>,
    v: &Tensor<F>,
) -> Result<Tensor<F>, String> {
    let (&[b, h, s, d], &[kb, hkv, n, kd]) = (q.shape.as_slice(), k.shape.as_slice()) else {
        return Err("operands are not of rank 4".to_string());
    };
    let groups = spec.groups as usize;
    if k.shape != v.shape || kb != b || kd != d || hkv * groups != h {
        return Err(format!(
            "q {:?}, k {:?}, v {:?} with {groups} query heads a KV head",
            q.shape, k.shape, v.shape
        ));
    }
    let attend = Attend::new(spec);
    let mut out = Tensor::new(q.shape.clone(), vec![F::ZERO; q.data.len()]);
    let mut scores = Vec::new();
    for (r, (q, out)) in q
        .data
        .chunks_exact(d.max(1))
        .zip(out.data.chunks_exact_mut(d.max(1)))
        .enumerate()
    {
        let (head, pos) = (r / s, r % s);
        let base = (head / h * hkv + head % h / groups) * n * d;
        let kv = (&k.data[base..base + n * d], &v.data[base..base + n * d]);
        attend.row(q, kv, d, n, pos, &mut scores, out);
    }
    Ok(out)
}

/// Scores and values to the result: `softmax(mask(cap(scale·s)))·v`.
fn sdpa<F: Float>(spec: &AttnSpec, s: &Tensor<F>, v: &Tensor<F>) -> Result<Tensor<F>, String> {
    if s.rank() < 2 {
        return Err(format!("scores have rank {}", s.rank()));
    }
    if spec.groups != 1 {
        return Err("an open attention cannot share KV heads".to_string());
    }
    let attend = Attend::new(spec);
    let (rows, n) = (s.shape[s.rank() - 2], s.last());
    let mut p = s.clone();
    let scale = F::from_f64(attend.scale);
    for (r, row) in p.data.chunks_exact_mut(n.max(1)).enumerate() {
        let i = (r % rows) as i64;
        for (j, v) in row.iter_mut().enumerate() {
            *v = if spec.mask.visible(i, j as i64) {
                cap(*v * scale, attend.softcap)
            } else {
                F::NEG_INFINITY
            };
        }
        // A row that sees nothing is 0, as in `attn`.
        match (0..n as i64).any(|j| spec.mask.visible(i, j)) {
            true => softmax_row(row),
            false => row.fill(F::ZERO),
        }
    }
    super::linalg::matmul(&p, v)
}

type Caches<F> = BTreeMap<u32, KvState<F>>;

/// Appends rows `[T, kv_heads·head_dim]` to a cache and attends with q `[T, heads·head_dim]`.
#[allow(clippy::too_many_arguments)]
fn append_and_attend<F: Float>(
    spec: &AttnSpec,
    q: &[F],
    k: &[F],
    v: &[F],
    heads: usize,
    cache: CacheRef,
    step: &StepMeta,
    caches: &mut Caches<F>,
) -> Result<Vec<F>, String> {
    let (hkv, d) = (cache.kv_heads, cache.head_dim);
    let (row, groups) = (hkv * d, spec.groups as usize);
    let t = step.tokens();
    if k.len() != t * row || v.len() != t * row || q.len() != t * heads * d || hkv * groups != heads
    {
        return Err(format!(
            "{t} tokens with {heads} query heads do not fit a cache of {hkv} heads of {d} with \
             {groups} query heads a KV head"
        ));
    }
    let state = caches.entry(cache.layer).or_default();
    if state.seqs.is_empty() {
        state.seqs.resize_with(step.batch(), KvRows::default);
    }
    if state.seqs.len() != step.batch() {
        return Err(format!(
            "the cache of layer {} holds {} sequences, the step has {}",
            cache.layer,
            state.seqs.len(),
            step.batch()
        ));
    }
    let attend = Attend::new(spec);
    let mut out = vec![F::ZERO; q.len()];
    let mut scores = Vec::new();
    for (b, seq) in state.seqs.iter_mut().enumerate() {
        let past = step.past[b];
        if seq.k.len() != past * row {
            return Err(format!(
                "the cache of layer {} holds {} rows of sequence {b}, the step expects {past}",
                cache.layer,
                seq.k.len().checked_div(row).unwrap_or(0)
            ));
        }
        let (first, last) = (step.cu_seqlens[b], step.cu_seqlens[b + 1]);
        seq.k.extend_from_slice(&k[first * row..last * row]);
        seq.v.extend_from_slice(&v[first * row..last * row]);
        let n = past + last - first;
        for i in first..last {
            for h in 0..heads {
                let at = (i * heads + h) * d;
                let kv = h / groups * d;
                attend.row(
                    &q[at..at + d],
                    (&seq.k[kv..], &seq.v[kv..]),
                    row,
                    n,
                    past + i - first,
                    &mut scores,
                    &mut out[at..at + d],
                );
            }
        }
    }
    Ok(out)
}

type Out<F> = Result<Value<F>, String>;

impl Eval for Sdpa {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        let (scores, v) = (x.float(sdpa_args::SCORES)?, x.float(sdpa_args::V)?);
        sdpa(&self.0, scores, v).map(Value::Float)
    }
}

impl Eval for Attn {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, _: &mut Call<'_, '_, F>) -> Out<F> {
        let (q, k, v) = (
            x.float(attn_args::Q)?,
            x.float(attn_args::K)?,
            x.float(attn_args::V)?,
        );
        attn(&self.0, q, k, v).map(Value::Float)
    }
}

impl Eval for AttnStep {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, call: &mut Call<'_, '_, F>) -> Out<F> {
        let step = call.state.step()?.clone();
        let (q, k) = (x.float(attn_step::Q)?, x.float(attn_step::K)?);
        let cache = x.value(attn_step::CACHE)?.cache()?;
        step_of(
            &self.0,
            q,
            k,
            x.float(attn_step::V)?,
            cache,
            &step,
            &mut call.state.caches,
        )
    }
}

impl Eval for AttnQkv {
    fn eval<F: Float>(&self, x: &Operands<&Value<F>>, call: &mut Call<'_, '_, F>) -> Out<F> {
        let step = call.state.step()?.clone();
        packed_step(self, x, &step, &mut call.state.caches, call.round)
    }
}

/// Attention of a step on heads that come apart.
fn step_of<F: Float>(
    spec: &AttnSpec,
    q: &Tensor<F>,
    k: &Tensor<F>,
    v: &Tensor<F>,
    cache: CacheRef,
    step: &StepMeta,
    caches: &mut Caches<F>,
) -> Out<F> {
    if q.rank() != 3 || k.rank() != 3 || k.shape[1..] != [cache.kv_heads, cache.head_dim] {
        return Err(format!(
            "q {:?} and k {:?} do not fit a cache of {} heads of {}",
            q.shape, k.shape, cache.kv_heads, cache.head_dim
        ));
    }
    let heads = q.shape[1];
    let out = append_and_attend(spec, &q.data, &k.data, &v.data, heads, cache, step, caches)?;
    Ok(Value::Tuple(vec![
        Value::Float(Tensor::new(q.shape.clone(), out)),
        Value::Cache(cache),
    ]))
}

/// Attention of a step on packed rows. `round` applies to the rows that go into the cache.
fn packed_step<F: Float>(
    spec: &AttnQkv,
    x: &Operands<&Value<F>>,
    step: &StepMeta,
    caches: &mut Caches<F>,
    round: Option<DType>,
) -> Out<F> {
    let (qkv, cache) = (x.float(attn_qkv::QKV)?, x.value(attn_qkv::CACHE)?.cache()?);
    let (heads, hkv, d) = (
        spec.heads as usize,
        spec.kv_heads as usize,
        spec.head_dim as usize,
    );
    let width = (heads + 2 * hkv) * d;
    if qkv.rank() != 2 || qkv.shape[1] != width || d == 0 || width == 0 {
        return Err(format!(
            "rows {:?} for {heads} query and {hkv} KV heads of {d}",
            qkv.shape
        ));
    }
    if cache.kv_heads != hkv || cache.head_dim != d {
        return Err(format!(
            "{hkv} heads of {d} for a cache of {} heads of {}",
            cache.kv_heads, cache.head_dim
        ));
    }
    let t = qkv.shape[0];
    let norm = match spec.head_norm {
        Some(eps) => {
            let (gq, gk) = (x.float(attn_qkv::Q_NORM)?, x.float(attn_qkv::K_NORM)?);
            if gq.shape != [d] || gk.shape != [d] {
                return Err(format!("head norms {:?}, {:?}", gq.shape, gk.shape));
            }
            Some((eps.get(), gq, gk))
        }
        None => None,
    };
    let rope = match spec.rope {
        Some(r) => {
            let pos = x.value(attn_qkv::POSITIONS)?.to_float()?;
            let freq = x.float(attn_qkv::INV_FREQ)?;
            if pos.data.len() != t || freq.shape != [d / 2] || !d.is_multiple_of(16) {
                return Err(format!(
                    "positions {:?}, frequencies {:?} for {t} tokens and heads of {d}",
                    pos.shape, freq.shape
                ));
            }
            Some((r.scaling.get(), pos, freq))
        }
        None => None,
    };
    let mut q = Vec::with_capacity(t * heads * d);
    let mut k = Vec::with_capacity(t * hkv * d);
    let mut v = Vec::with_capacity(t * hkv * d);
    for (i, row) in qkv.data.chunks_exact(width).enumerate() {
        let mut row = row.to_vec();
        for (h, head) in row.chunks_exact_mut(d).take(heads + hkv).enumerate() {
            if let Some((eps, gq, gk)) = &norm {
                let gamma = if h < heads { gq } else { gk };
                rms_row(head, &gamma.data, *eps, None);
            }
            if let Some((scaling, pos, freq)) = &rope {
                rope_row(head, pos.data[i], &freq.data, *scaling, true);
            }
        }
        let (rq, rest) = row.split_at(heads * d);
        let (rk, rv) = rest.split_at(hkv * d);
        q.extend_from_slice(rq);
        k.extend(rk.iter().map(|&x| rounded(x, round)));
        v.extend(rv.iter().map(|&x| rounded(x, round)));
    }
    let out = append_and_attend(&spec.attn, &q, &k, &v, heads, cache, step, caches)?;
    Ok(Value::Tuple(vec![
        Value::Float(Tensor::new([t, heads, d], out)),
        Value::Cache(cache),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_view_is_what_the_mask_shows() {
        for causal in [false, true] {
            for window in [None, Some(1), Some(3), Some(100)] {
                let mask = Mask { causal, window };
                for n in 0..7 {
                    for pos in 0..7 {
                        let seen: Vec<usize> = (0..n)
                            .filter(|&j| mask.visible(pos as i64, j as i64))
                            .collect();
                        assert_eq!(view(mask, pos, n).collect::<Vec<_>>(), seen);
                    }
                }
            }
        }
    }
}
