//! The keys of the YAML file.

/// Every key with what it takes and what it does, in the order of listings.
pub const KEYS: &[(&str, &str, &str)] = &[
    (
        "compile_backend",
        "torch-simple | torch-compile | torch-cudagraph | torch-opt (also without torch-)",
        "unfused; fused; unfused with CUDA graphs; fused, autotuned, with CUDA graphs",
    ),
    (
        "runtime",
        "trtllm | demollm",
        "continuous batching over the paged cache; one static batch over a contiguous cache",
    ),
    (
        "free_mem_ratio",
        "a number from 0.0 to 1.0",
        "share of the free memory that the KV cache may take",
    ),
    (
        "skip_loading_weights",
        "true | false",
        "random weights, for benchmarks of an architecture",
    ),
    (
        "cuda_graph_batch_sizes",
        "a list of positive integers, or null",
        "batch sizes for which decode steps are captured",
    ),
    (
        "attn_backend",
        "flashinfer | torch",
        "generated paged attention kernels; unfused cached attention",
    ),
    (
        "max_batch_size",
        "a positive integer, or null",
        "most requests in flight",
    ),
    (
        "max_seq_len",
        "a positive integer, or null",
        "longest sequence, prompt and output together",
    ),
    (
        "max_num_tokens",
        "a positive integer, or null",
        "most token rows of one step",
    ),
    (
        "attn_page_size",
        "a positive integer",
        "tokens of one page of the KV cache",
    ),
    (
        "kv_cache_dtype",
        "auto | bfloat16 | float16 | float32",
        "element type of the KV cache; auto is that of the model",
    ),
    (
        "model_kwargs",
        "a mapping of config.json keys",
        "overrides of the model's configuration, such as num_hidden_layers",
    ),
    (
        "simple_shard_only",
        "true | false",
        "tensor parallelism gathers after every projection",
    ),
    (
        "transforms",
        "a mapping of stages and rules",
        "switches and parameters of passes, NAME: {enabled: false}",
    ),
    (
        "enable_chunked_prefill",
        "true | false",
        "prompts longer than a step are spread over several",
    ),
];

/// The known name that is closest to a misspelt one, if any is close.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = word.to_lowercase().replace('-', "_");
    known
        .into_iter()
        .map(|k| {
            let plain = k.to_lowercase().replace('-', "_");
            // A part of a longer name (`batch_size`) is closer than its letters tell.
            let part = lower.len() >= 4 && (plain.contains(&lower) || lower.contains(&plain));
            let d = distance(&lower, &plain);
            (if part { d.min(2) } else { d }, k)
        })
        .min_by_key(|(d, _)| *d)
        .filter(|(d, k)| *d <= 2.max(k.len() / 3))
        .map(|(_, k)| k)
}

/// Levenshtein distance with transpositions of neighbours.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    for (j, cell) in rows[0].iter_mut().enumerate() {
        *cell = j;
    }
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let substitute = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut d = substitute.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                d = d.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = d;
        }
    }
    rows[a.len()][b.len()]
}

/// A value that a key takes.
#[cfg(test)]
pub(super) fn example(key: &str) -> &'static str {
    match key {
        "compile_backend" => "opt",
        "runtime" => "trtllm",
        "free_mem_ratio" => "0.5",
        "cuda_graph_batch_sizes" => "[1]",
        "attn_backend" => "torch",
        "kv_cache_dtype" => "auto",
        "model_kwargs" | "transforms" => "{}",
        "max_batch_size" | "max_seq_len" | "max_num_tokens" | "attn_page_size" => "5",
        _ => "true",
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    #[test]
    fn every_documented_key_is_accepted() {
        for (key, ..) in KEYS {
            parse("c.yaml", &format!("{key}: {}", example(key))).unwrap();
        }
    }

    #[test]
    fn misspelt_keys() {
        let keys = || KEYS.iter().map(|k| k.0);
        assert_eq!(nearest("max_batchsize", keys()), Some("max_batch_size"));
        assert_eq!(nearest("attn-backend", keys()), Some("attn_backend"));
        assert_eq!(nearest("free_memory_ratio", keys()), Some("free_mem_ratio"));
        assert_eq!(
            nearest("batch_sizes", keys()),
            Some("cuda_graph_batch_sizes")
        );
        assert_eq!(nearest("zebra", keys()), None);
        assert_eq!(distance("ab", "ba"), 1);
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
