//! The names under `transforms:` and what they switch.

use lathe_passes::{Stage, chains, rules};

/// AutoDeploy's names of transforms, with the stages and rules that do the same here.
const THEIRS: &[(&str, &[&str])] = &[
    ("match_rmsnorm_pattern", &["rmsnorm", "rmsnorm-upcast"]),
    ("match_rope_pattern", &["rope-angles", "rope"]),
    ("match_repeat_kv", &["repeat-kv"]),
    ("match_eager_attention", &["attention"]),
    ("match_grouped_attention", &["attention-gqa"]),
    ("match_swiglu_pattern", &["swiglu"]),
    ("insert_cached_attention", &["kv_cache"]),
    (
        "fuse_gemms",
        &["qkv-join", "gate-up-join", "gate-up-join-bias"],
    ),
    ("fuse_add_rms_norm", &["add-rmsnorm"]),
    ("fuse_rmsnorm", &["norm-into-gemm", "add-norm-into-gemm"]),
    (
        "gather_logits_before_lm_head",
        &["select-linear", "select-rmsnorm", "select-add"],
    ),
];

/// Transforms of AutoDeploy that only carry parameters here: `(transform, parameter, key)`, where
/// the key is the one that the parameter is another spelling of.
pub(super) const PARAMETERS: &[(&str, &str, &str)] = &[
    ("compile_model", "backend", "compile_backend"),
    (
        "compile_model",
        "cuda_graph_batch_sizes",
        "cuda_graph_batch_sizes",
    ),
    ("insert_cached_attention", "backend", "attn_backend"),
    ("resize_kv_cache", "free_mem_ratio", "free_mem_ratio"),
    ("detect_sharding", "simple_shard_only", "simple_shard_only"),
];

/// Parameters of `extract`: where the two programs are chosen.
pub(super) const EXTRACT: &[&str] = &["decode_batch", "decode_context", "prefill_tokens"];

/// Parameters of `autotune`, both true or false: whether kernels are timed at all, and whether cuBLASLt's
/// may be chosen.
pub(super) const AUTOTUNE: &[&str] = &["enabled", "cublaslt"];

/// Every name that may stand under `transforms:`.
pub(super) fn names() -> Vec<&'static str> {
    let mut names: Vec<&str> = Stage::ALL.iter().map(|s| s.name()).collect();
    names.extend(rules::all().iter().map(|r| r.name));
    names.push(chains::NAME);
    names.extend(["extract", "autotune"]);
    names.extend(THEIRS.iter().map(|t| t.0));
    for (name, ..) in PARAMETERS {
        if !names.contains(name) {
            names.push(name);
        }
    }
    names
}

/// The stages and rules that a name switches.
pub(super) fn switches(name: &str) -> Vec<&'static str> {
    if let Some((_, names)) = THEIRS.iter().find(|t| t.0 == name) {
        return names.to_vec();
    }
    if let Some(stage) = Stage::ALL.into_iter().find(|s| s.name() == name) {
        return vec![stage.name()];
    }
    if name == chains::NAME {
        return vec![chains::NAME];
    }
    rules::by_name(name).map(|r| r.name).into_iter().collect()
}

/// The parameters of a name, beside `enabled`.
pub(super) fn parameters(name: &str) -> Vec<&'static str> {
    let mut names: Vec<&str> = PARAMETERS
        .iter()
        .filter(|p| p.0 == name)
        .map(|p| p.1)
        .collect();
    if name == "extract" {
        names.extend(EXTRACT);
    }
    if name == "autotune" {
        names.extend(AUTOTUNE);
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_switches_or_has_parameters() {
        for name in names() {
            let switched = switches(name);
            assert!(
                !switched.is_empty() || !parameters(name).is_empty(),
                "{name} does nothing"
            );
            for s in switched {
                let known = rules::by_name(s).is_some()
                    || s == chains::NAME
                    || Stage::ALL.iter().any(|x| x.name() == s);
                assert!(known, "{name}: no rule or stage {s}");
            }
        }
    }
}
