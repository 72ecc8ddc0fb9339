//! Weights that are a hash of the tensor's name and the element's index, for benchmarks without a checkpoint.
//!
//! Every element can be computed alone, so any slice, shard or packed layout of the same model holds the same
//! values on every device; the CUDA kernel `random_weights.cu` repeats this formula exactly.
//!
//! With `h` = [`name_hash`]`(name, seed)`, `k0` and `k1` its lower and upper 32 bits, `i` the row-major index of
//! the element in the checkpoint tensor, and all integer arithmetic modulo 2^32:
//!
//! ```text
//! x = lo32(i) * 0x9E3779B1 ^ hi32(i) * 0x85EBCA77 ^ k0
//! x ^= x >> 16;  x *= 0x7FEB352D;  x ^= k1
//! x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16
//! u = f32(x >> 8) * 2^-23 - 1          exact, uniform on [-1, 1)
//! value = round_bf16(mean + a * u)     product and sum each rounded to f32, no fused multiply-add
//! ```
//!
//! (The two multipliers of the mix are those of C. Wellons' `lowbias32`; k1 between them keeps tensors from being
//! shifted copies of each other.) Rounding to bf16, the dtype of the checkpoints that this stands for, makes a
//! float32 run use the very weights of the bf16 run. Mean and amplitude `a` are the tensor's [`RandomLaw`].

use std::collections::BTreeMap;

use half::bf16;
use safetensors::Dtype;

use super::{TensorData, TensorInfo, WeightSource};

/// Mean and amplitude of a tensor's values, uniform on `[mean - amplitude, mean + amplitude)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RandomLaw {
    /// Mean of the values.
    pub mean: f32,
    /// Largest distance from the mean; sqrt(3) times the standard deviation.
    pub amplitude: f32,
}

impl RandomLaw {
    /// The law for a tensor, by its name and shape, chosen so that activations stay O(1) at any depth:
    /// - a matrix has standard deviation 1/sqrt(K) with K its fan-in, so that a projection of unit inputs has unit
    ///   outputs; embedding tables likewise, which gives a tied lm_head logits of O(1), is what families that
    ///   multiply embeddings by sqrt(hidden) expect, and is undone by the first norm in all others;
    /// - other vectors are biases (±0.03) or else scales of norms (1 ± 0.05).
    pub fn of(name: &str, shape: &[usize]) -> RandomLaw {
        // Conv1D weights of GPT-2 are stored [K, N].
        const CONV1D: [&str; 3] = ["c_attn.weight", "c_proj.weight", "c_fc.weight"];
        match shape {
            [] | [_] if name.contains("bias") => RandomLaw {
                mean: 0.0,
                amplitude: 0.03,
            },
            [] | [_] => RandomLaw {
                mean: 1.0,
                amplitude: 0.05,
            },
            [first, .., last] => {
                let fan_in = if CONV1D.iter().any(|c| name.ends_with(c)) {
                    first
                } else {
                    last
                };
                RandomLaw {
                    mean: 0.0,
                    amplitude: (3.0 / (*fan_in).max(1) as f64).sqrt() as f32,
                }
            }
        }
    }
}

/// The 64-bit key of a tensor: FNV-1a of its name, combined with the seed by the finaliser of splitmix64.
pub fn name_hash(name: &str, seed: u64) -> u64 {
    let fnv = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01B3);
    let mut x = name.bytes().fold(0xCBF2_9CE4_8422_2325, fnv);
    x = x.wrapping_add(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The values of one random tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RandomTensor {
    /// The tensor's [`name_hash`].
    pub hash: u64,
    /// Mean and amplitude.
    pub law: RandomLaw,
}

impl RandomTensor {
    /// The element with row-major index `index`; a bf16 value.
    #[inline]
    pub fn value(&self, index: u64) -> bf16 {
        bf16::from_f32(self.law.mean + self.law.amplitude * self.uniform(index))
    }

    #[inline]
    fn uniform(&self, index: u64) -> f32 {
        let (k0, k1) = (self.hash as u32, (self.hash >> 32) as u32);
        let (lo, hi) = (index as u32, (index >> 32) as u32);
        let mut x = lo.wrapping_mul(0x9E37_79B1) ^ hi.wrapping_mul(0x85EB_CA77) ^ k0;
        x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D) ^ k1;
        x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
        x ^= x >> 16;
        (x >> 8) as f32 * (1.0 / 8_388_608.0) - 1.0
    }
}

/// A source of random tensors with given names and shapes.
#[derive(Debug, Clone)]
pub struct RandomWeights {
    tensors: BTreeMap<String, (TensorInfo, RandomTensor)>,
}

impl RandomWeights {
    /// Tensors with these names and shapes; the same seed gives the same values.
    pub fn new(expected: &[(String, Vec<usize>)], seed: u64) -> Self {
        let tensor = |(name, shape): &(String, Vec<usize>)| {
            let values = RandomTensor {
                hash: name_hash(name, seed),
                law: RandomLaw::of(name, shape),
            };
            (
                name.clone(),
                (
                    TensorInfo {
                        dtype: Dtype::BF16,
                        shape: shape.clone(),
                    },
                    values,
                ),
            )
        };
        RandomWeights {
            tensors: expected.iter().map(tensor).collect(),
        }
    }
}

impl WeightSource for RandomWeights {
    fn describe(&self) -> String {
        "random weights".into()
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    fn data(&self, name: &str) -> Option<TensorData<'_>> {
        self.tensors
            .get(name)
            .map(|(_, values)| TensorData::Random(*values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[usize]) -> RandomTensor {
        RandomTensor {
            hash: name_hash(name, 0),
            law: RandomLaw::of(name, shape),
        }
    }

    fn moments(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
        let n = values.clone().count() as f64;
        let mean = values.clone().sum::<f64>() / n;
        (
            mean,
            (values.map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt(),
        )
    }

    #[test]
    fn values_have_the_law() {
        let k = 1024;
        let w = tensor("model.layers.0.self_attn.o_proj.weight", &[512, k]);
        let (mean, std) = moments((0..512 * k as u64).map(|i| w.value(i).to_f64()));
        assert!(
            mean.abs() < 2e-4 && (std * 32.0 - 1.0).abs() < 5e-3,
            "{mean} {std}"
        );
        let norm = tensor("model.norm.weight", &[k]);
        let (mean, std) = moments((0..4096).map(|i| norm.value(i).to_f64()));
        assert!(
            (mean - 1.0).abs() < 5e-3 && (std - 0.05 / 3f64.sqrt()).abs() < 3e-3,
            "{mean} {std}"
        );
    }

    #[test]
    fn a_projection_of_unit_inputs_has_unit_outputs() {
        let (n, k) = (256, 512);
        let w = tensor("w.weight", &[n, k]);
        let x = tensor("x.weight", &[1, 1]);
        let y = (0..n as u64).map(|r| {
            let xs = (0..k as u64).map(|c| x.uniform(c) as f64 * 3f64.sqrt());
            xs.enumerate()
                .map(|(c, x)| w.value(r * k as u64 + c as u64).to_f64() * x)
                .sum::<f64>()
        });
        let y: Vec<f64> = y.collect();
        let (_, std) = moments(y.iter().copied());
        assert!((0.85..1.15).contains(&std), "{std}");
    }

    #[test]
    fn tensors_and_rows_are_independent() {
        let (a, b) = (tensor("a.weight", &[64, 64]), tensor("b.weight", &[64, 64]));
        let correlation = |shift: u64, other: &RandomTensor| {
            let n = 20_000u64;
            let dot: f64 = (0..n)
                .map(|i| (a.uniform(i) * other.uniform(i + shift)) as f64)
                .sum();
            dot / n as f64 * 3.0
        };
        for shift in [0, 1, 64, 4096, 1 << 32] {
            assert!(correlation(shift, &b).abs() < 0.03, "shift {shift}");
        }
        assert!(correlation(1, &a).abs() < 0.03 && correlation(1 << 32, &a).abs() < 0.03);
        assert!((correlation(0, &a) - 1.0).abs() < 0.03);
    }

    /// The values that the CUDA kernel must give too.
    #[test]
    fn pinned_values() {
        let w = tensor("model.layers.0.mlp.down_proj.weight", &[4096, 14336]);
        let bits = [0, 1, 4095, 1 << 33].map(|i| w.value(i).to_bits());
        assert_eq!(bits, PINNED, "{bits:#06x?}");
        assert_eq!(
            name_hash("model.norm.weight", 7),
            NORM_HASH,
            "{:#x}",
            name_hash("model.norm.weight", 7)
        );
    }

    const PINNED: [u16; 4] = [0xBBBD, 0xBBD9, 0x3BFD, 0x3BD8];
    const NORM_HASH: u64 = 0xC2FA_AC83_39AF_9982;
}
