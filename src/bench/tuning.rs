//! Default batch sizes from model, memory and dataset, by trtllm-bench's heuristic
//! (`tensorrt_llm/bench/build/tuning.py`).

/// What the heuristic needs to know. Sizes are those of the whole model; memory is of one device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TuningInput {
    /// Layers with a KV cache.
    pub layers: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Bytes of one cache element.
    pub kv_element_bytes: f64,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Memory of one device in bytes.
    pub device_bytes: u64,
    /// Devices that the model is sharded over.
    pub tp: usize,
    /// Fraction of the memory left after the weights that the cache may take.
    pub kv_fraction: f64,
    /// Input length to tune for.
    pub isl: f64,
    /// Output length to tune for.
    pub osl: f64,
    /// Longest prompt of the dataset.
    pub max_isl: usize,
    /// Whether long prompts are computed in chunks.
    pub chunked_prefill: bool,
}

/// The sizes to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuning {
    /// Most sequences in a step.
    pub max_batch_size: usize,
    /// Most tokens in a step.
    pub max_num_tokens: usize,
    /// Sequences of isl + osl tokens that the cache holds.
    pub cached_sequences: usize,
    /// What may keep the benchmark below the device's potential.
    pub warnings: Vec<String>,
}

/// A model that cannot be run on this memory.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TuningError {
    /// The weights alone are too large.
    #[error("the weights need {}, the memory has {}: {} are missing", size(*weights), size(*memory), size(weights.saturating_sub(*memory)))]
    WeightsDoNotFit {
        /// Bytes of the weights.
        weights: u64,
        /// Bytes of all devices.
        memory: u64,
    },
    /// Not one request fits into the cache.
    #[error("one request of {tokens:.0} tokens needs {} of KV cache, {} are left for it; raise free_mem_ratio (--kv_cache_free_gpu_mem_fraction) or shorten the requests", size(*needed), size(*cache))]
    RequestDoesNotFit {
        /// Tokens of a request.
        tokens: f64,
        /// Bytes that one request needs.
        needed: u64,
        /// Bytes left for the cache.
        cache: u64,
    },
}

fn size(bytes: u64) -> String {
    crate::phases::bytes(bytes as f64)
}

impl TuningInput {
    /// Bytes of cache that one token takes on all devices. KV heads below `tp` are replicated.
    pub fn kv_bytes_per_token(&self) -> f64 {
        2.0 * self.layers as f64
            * self.tp.max(self.kv_heads) as f64
            * self.head_dim as f64
            * self.kv_element_bytes
    }

    /// Runs the heuristic.
    pub fn tune(&self) -> Result<Tuning, TuningError> {
        /// Below so much cache on a GPU the batch stays small.
        const SMALL_CACHE: u64 = 10 << 30;
        const FEW_SEQUENCES: f64 = 32.0;
        let memory = self.device_bytes * self.tp as u64;
        let free = memory.checked_sub(self.weight_bytes);
        let Some(free) = free else {
            return Err(TuningError::WeightsDoNotFit {
                weights: self.weight_bytes,
                memory,
            });
        };
        let cache = free as f64 * self.kv_fraction;
        let tokens = self.isl + self.osl;
        let per_request = self.kv_bytes_per_token() * tokens;
        // A model without a cache (no attention layer) is limited by the constants below alone.
        let max_requests = if per_request > 0.0 {
            cache / per_request
        } else {
            f64::MAX
        };
        if max_requests < 1.0 {
            return Err(TuningError::RequestDoesNotFit {
                tokens,
                needed: per_request as u64,
                cache: cache as u64,
            });
        }
        let mut warnings = Vec::new();
        let cache_per_device = (cache / self.tp as f64) as u64;
        if cache_per_device < SMALL_CACHE {
            warnings.push(format!(
                "only {} a device are left for the KV cache",
                size(cache_per_device)
            ));
        }
        if max_requests < FEW_SEQUENCES {
            warnings.push(format!(
                "the KV cache holds only {max_requests:.0} requests of {tokens:.0} tokens"
            ));
        }
        let raw_batch = max_requests.min(4096.0);
        let prompt_share = if self.osl > 0.0 {
            self.isl / self.osl
        } else {
            self.isl
        };
        let raw_tokens = (raw_batch * (1.0 + prompt_share)).min(32_768.0);
        let (max_batch_size, mut max_num_tokens) = round_up_sizes(raw_batch, raw_tokens);
        if !self.chunked_prefill {
            max_num_tokens = max_num_tokens.max(self.max_isl + max_batch_size);
        }
        Ok(Tuning {
            max_batch_size,
            max_num_tokens,
            cached_sequences: max_requests.min(1e15) as usize,
            warnings,
        })
    }
}

/// Rounds up in steps that grow with the size: the batch to 32, 128 or 256 (64 at least), the tokens to 256,
/// 512 or 1024 (2048 at least).
fn round_up_sizes(batch: f64, tokens: f64) -> (usize, usize) {
    let up = |value: f64, step: usize| (value / step as f64).ceil() as usize * step;
    let batch = match batch {
        b if b < 256.0 => up(b, 32).max(64),
        b if b < 1024.0 => up(b, 128),
        b => up(b, 256),
    };
    let tokens = match tokens {
        t if t < 4096.0 => up(t, 256).max(2048),
        t if t < 8192.0 => up(t, 512),
        t => up(t, 1024),
    };
    (batch, tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama-3.1-8B in bf16 on 80 GiB.
    fn llama_8b() -> TuningInput {
        TuningInput {
            layers: 32,
            kv_heads: 8,
            head_dim: 128,
            kv_element_bytes: 2.0,
            weight_bytes: 16_060_522_496,
            device_bytes: 80 << 30,
            tp: 1,
            kv_fraction: 0.9,
            isl: 1000.0,
            osl: 1000.0,
            max_isl: 1000,
            chunked_prefill: true,
        }
    }

    #[test]
    fn llama_8b_by_hand() {
        // 2 * 32 * 8 * 128 * 2 = 131,072 bytes a token; (85,899,345,920 - 16,060,522,496) * 0.9 =
        // 62,854,941,081.6; / (131,072 * 2000) = 239.77 requests; up to 256. Tokens 479.5, so the least, 2048.
        let tuning = llama_8b().tune().unwrap();
        assert_eq!(llama_8b().kv_bytes_per_token(), 131_072.0);
        assert_eq!(
            (
                tuning.max_batch_size,
                tuning.max_num_tokens,
                tuning.cached_sequences
            ),
            (256, 2048, 239)
        );
        assert_eq!(tuning.warnings, Vec::<String>::new());
    }

    #[test]
    fn short_sequences_hit_the_caps() {
        let tuning = TuningInput {
            isl: 128.0,
            osl: 16.0,
            ..llama_8b()
        }
        .tune()
        .unwrap();
        // 3330.1 requests, up to 3328 + 256; tokens 3330.1 * 9 = 29,970.7, up to 30,720.
        assert_eq!(
            (tuning.max_batch_size, tuning.max_num_tokens),
            (3584, 30_720)
        );
        let tuning = TuningInput {
            isl: 8.0,
            osl: 1.0,
            ..llama_8b()
        }
        .tune()
        .unwrap();
        assert_eq!(
            (tuning.max_batch_size, tuning.max_num_tokens),
            (4096, 32_768)
        );
    }

    #[test]
    fn rounding_steps() {
        assert_eq!(round_up_sizes(1.0, 1.0), (64, 2048));
        assert_eq!(round_up_sizes(65.0, 2049.0), (96, 2304));
        assert_eq!(round_up_sizes(256.0, 4096.0), (256, 4096));
        assert_eq!(round_up_sizes(257.0, 4097.0), (384, 4608));
        assert_eq!(round_up_sizes(1025.0, 8193.0), (1280, 9216));
    }

    #[test]
    fn without_chunks_a_whole_prompt_must_fit_beside_the_batch() {
        let tuning = TuningInput {
            chunked_prefill: false,
            max_isl: 5000,
            ..llama_8b()
        }
        .tune()
        .unwrap();
        assert_eq!(tuning.max_num_tokens, 5256);
    }

    #[test]
    fn replicated_heads_cost_memory() {
        assert_eq!(
            TuningInput {
                tp: 16,
                ..llama_8b()
            }
            .kv_bytes_per_token(),
            262_144.0
        );
    }

    #[test]
    fn what_does_not_fit() {
        let error = TuningInput {
            device_bytes: 8 << 30,
            ..llama_8b()
        }
        .tune()
        .unwrap_err()
        .to_string();
        assert_eq!(
            error,
            "the weights need 14.96 GiB, the memory has 8.00 GiB: 6.96 GiB are missing"
        );
        let error = TuningInput {
            device_bytes: 15 << 30,
            ..llama_8b()
        }
        .tune()
        .unwrap_err()
        .to_string();
        assert!(
            error.starts_with("one request of 2000 tokens needs 250.00 MiB of KV cache, "),
            "{error}"
        );
        let tuning = TuningInput {
            device_bytes: 20 << 30,
            ..llama_8b()
        }
        .tune()
        .unwrap();
        assert_eq!(tuning.warnings.len(), 2);
        assert_eq!(
            tuning.warnings[1],
            "the KV cache holds only 19 requests of 2000 tokens"
        );
    }
}
