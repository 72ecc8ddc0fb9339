//! Why an attention was not recognised: the rule that came nearest, and the value it stopped at.

use crate::egraph::analysis::op_of;
use crate::egraph::mask::Fact;
use crate::egraph::{EGraph, Lang};
use egg::Id;
use lathe_ir::ops::X;
use lathe_ir::ops::{Attn, Sdpa};
use lathe_ir::{Op, Prov, SdpaStage, Sym};
use std::collections::{BTreeMap, BTreeSet};

/// An attention that has no form on a KV cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmatched {
    /// Where the attention is.
    pub prov: Prov,
    /// What was found, with the operation at which matching stopped.
    pub detail: String,
    /// The rule that would have gone on.
    pub rule: &'static str,
}

/// The first attention of a saturated e-graph that is not closed, or has no step. Rules that are
/// switched off are named as such.
pub fn unmatched_attention(egraph: &EGraph, disabled: &BTreeSet<String>) -> Option<Unmatched> {
    let d = Diagnosis { egraph };
    let mut ids: Vec<Id> = egraph.classes().map(|c| c.id).collect();
    ids.sort();
    let find = |f: &dyn Fn(Id) -> Option<Unmatched>| ids.iter().find_map(|&id| f(id));
    let mut found = find(&|id| d.without_step(id))
        .or_else(|| find(&|id| d.open(id)))
        .or_else(|| find(&|id| d.not_opened(id)))?;
    if disabled.contains(found.rule) {
        found.detail += ", and that rule is switched off";
    }
    Some(found)
}

const CAP: &str = "not cap·tanh(s / cap) with one constant cap, outside of all scales";

struct Diagnosis<'a> {
    egraph: &'a EGraph,
}

impl Diagnosis<'_> {
    fn forms(&self, id: Id, name: &str) -> Vec<&Lang> {
        self.egraph[id]
            .nodes
            .iter()
            .filter(|n| n.name() == Some(name))
            .collect()
    }

    fn has(&self, id: Id, name: &str) -> bool {
        !self.forms(id, name).is_empty()
    }

    fn prov(&self, id: Id) -> Option<&Prov> {
        self.egraph[id].data.value().origin()
    }

    fn unmatched(&self, id: Id, detail: String, rule: &'static str) -> Option<Unmatched> {
        let prov = self.prov(id)?.clone();
        Some(Unmatched { prov, detail, rule })
    }

    /// The operations of a class, for readers.
    fn names(&self, id: Id) -> String {
        let names: BTreeSet<&str> = self.egraph[id]
            .nodes
            .iter()
            .filter_map(Lang::name)
            .collect();
        names.into_iter().collect::<Vec<_>>().join(" or ")
    }

    /// A value with the module it comes from.
    fn described(&self, id: Id) -> String {
        match self.prov(id) {
            Some(p) if !p.path.is_empty() => format!("{} ({})", self.names(id), p.path),
            _ => self.names(id),
        }
    }

    /// The rows of an attention that no step can compute.
    fn without_step(&self, id: Id) -> Option<Unmatched> {
        let (inner, attn) = self.forms(id, "win").into_iter().find_map(|win| {
            let inner = self.egraph.find(win.place(X));
            let attn = self.forms(inner, "attn").into_iter().next()?;
            Some((inner, attn))
        })?;
        if self.has(id, "get") {
            return None;
        }
        let detail = match op_of(self.egraph, attn) {
            Op::Attn(Attn(spec)) if !spec.mask.causal => {
                "each row sees later keys: its mask is not causal".to_string()
            }
            _ if self.other_is_cached(id) => {
                "another attention of the layer has its KV cache".to_string()
            }
            _ => format!("no step computes the rows of {}", self.names(inner)),
        };
        self.unmatched(inner, detail, "insert-kv-cache")
    }

    /// Whether the KV cache of the layer belongs to the rows of another attention.
    fn other_is_cached(&self, rows: Id) -> bool {
        let layer = self.prov(rows).and_then(|p| p.layer);
        let cached = &self.egraph.analysis.cached;
        let of = layer.and_then(|l| cached.get(&l));
        of.is_some_and(|&of| self.egraph.find(of) != self.egraph.find(rows))
    }

    /// An attention whose scores could not be peeled down to `q·kᵀ`.
    fn open(&self, id: Id) -> Option<Unmatched> {
        if self.has(id, "attn") {
            return None;
        }
        // Scores of each open form; the innermost are those that no other form peels further.
        let mut scores: BTreeMap<Id, SdpaStage> = BTreeMap::new();
        for form in self.forms(id, "sdpa") {
            if let Op::Sdpa(Sdpa(spec)) = op_of(self.egraph, form) {
                scores.insert(self.egraph.find(form.place(X)), spec.stage);
            }
        }
        let peeled = |s: Id| {
            let nodes = self.egraph[s].nodes.iter();
            nodes
                .flat_map(Lang::places)
                .any(|&c| self.peels_to(c, &scores))
        };
        let (&s, &stage) = scores
            .iter()
            .find(|&(&s, _)| !peeled(s))
            .or_else(|| scores.iter().next())?;
        let (rule, what) = self.stopped_at(s, stage);
        let detail = format!("its scores are {}: {what}", self.described(s));
        self.unmatched(id, detail, rule)
    }

    /// Whether a class, or what a soft cap wraps in it, is among the scores.
    fn peels_to(&self, c: Id, scores: &BTreeMap<Id, SdpaStage>) -> bool {
        let c = self.egraph.find(c);
        let inside = |tanh: &Lang| {
            let arg = self.egraph.find(tanh.place(X));
            let nodes = self.egraph[arg].nodes.iter();
            nodes
                .flat_map(Lang::places)
                .any(|&c| scores.contains_key(&self.egraph.find(c)))
        };
        scores.contains_key(&c) || self.forms(c, "tanh").into_iter().any(inside)
    }

    /// The rule that came nearest for scores, and what it did not like.
    fn stopped_at(&self, s: Id, stage: SdpaStage) -> (&'static str, String) {
        if let Some(add) = self.forms(s, "add").into_iter().next() {
            return ("attention-mask", self.mask(add, stage));
        }
        for f in ["sub", "maximum", "minimum"] {
            if self.has(s, f) {
                return ("attention-mask", "masks are added".to_string());
            }
        }
        if let Some(f) = self.forms(s, "where").into_iter().next() {
            let c = self.egraph.find(f.place(X));
            let what = format!("its condition {} is no known mask", self.described(c));
            return ("attention-mask-fill", what);
        }
        let factors = ["mul", "div"]
            .into_iter()
            .find_map(|f| self.forms(s, f).into_iter().next());
        if let Some(f) = factors {
            let sides: Vec<Id> = f.places().iter().map(|&c| self.egraph.find(c)).collect();
            if sides.iter().any(|&c| self.has(c, "tanh")) {
                return ("attention-softcap", CAP.to_string());
            }
            let what = format!("a factor, {}, is no constant", self.described(sides[1]));
            return ("attention-scale", what);
        }
        if self.has(s, "tanh") {
            return ("attention-softcap", CAP.to_string());
        }
        let what = "not a product q·kᵀ with keys [B,H,S,D] like the values";
        ("attention-close", what.to_string())
    }

    fn mask(&self, add: &Lang, stage: SdpaStage) -> String {
        let sides: Vec<Id> = add.places().iter().map(|&c| self.egraph.find(c)).collect();
        for &side in &sides {
            let value = self.egraph[side].data.value();
            if let Some(Fact::Additive { band, .. }) = value.fact {
                return match band.as_mask() {
                    None => format!(
                        "the mask {} is neither causal nor a window",
                        self.described(side)
                    ),
                    Some(_) if stage != SdpaStage::Mask => {
                        "the mask lies under a scale or a soft cap".to_string()
                    }
                    Some(_) => "the mask widens the scores".to_string(),
                };
            }
        }
        // The side that is no product is the bias.
        let scores = |id: &Id| {
            ["matmul", "mul", "div"]
                .into_iter()
                .any(|n| self.has(*id, n))
        };
        let bias = sides
            .iter()
            .copied()
            .find(|s| !scores(s))
            .unwrap_or(sides[1]);
        format!("what is added, {}, is no known mask", self.described(bias))
    }

    /// A weighted sum of values whose weights look like a softmax.
    fn not_opened(&self, id: Id) -> Option<Unmatched> {
        if self.has(id, "sdpa") || self.has(id, "attn") {
            return None;
        }
        let product = self.forms(id, "matmul").into_iter().next()?;
        let p = self.egraph.find(product.place(X));
        // Weights are [B,H,S,S]: a row for each query, a column for each key.
        let shape = &self.egraph[p].data.value().ty.as_tensor()?.shape;
        if shape.len() != 4 || !shape[2..].iter().all(|d| d.is_sym(Sym::S)) {
            return None;
        }
        if self.has(p, "softmax") {
            let detail = "softmax·v is not of scores [B,H,S,S] and values [B,H,S,D]";
            return self.unmatched(id, detail.to_string(), "attention-open");
        }
        let cast = self.forms(p, "cast").into_iter().next();
        let inner = cast.map_or(p, |c| self.egraph.find(c.place(X)));
        if self.has(inner, "softmax") {
            let detail = "its softmax is converted to another type than that of the scores";
            return self.unmatched(id, detail.to_string(), "softmax-upcast");
        }
        let detail = format!(
            "its weights are {}: not exp(s - max(s)) / sum(exp(s - max(s))) over the keys",
            self.described(inner)
        );
        self.unmatched(id, detail, "softmax")
    }
}
