//! Sampling of the next token from one row of logits.
//!
//! The result depends on the logits, the parameters and the key (seed, request, position) alone: not on
//! the batch, the step or the thread. Randomness is counter-based (Philox4x32-10; Salmon et al.,
//! "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and the draw is a Gumbel maximum: the token
//! with the greatest `logit/temperature - ln(E)`, where `E` is an exponential variate of that token. An
//! argmax needs no sum over the vocabulary, so a device that reduces in another order picks the same
//! token. The logarithms are spelled out in separately rounded f32 operations (on CUDA: `__fmul_rn`,
//! `__fadd_rn`, `__fdiv_rn`), so that every device computes the same bits.

use std::cmp::Ordering;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingParams {
    /// Logits are divided by it; 0 means greedy.
    pub temperature: f32,
    /// Only the `top_k` most probable tokens are candidates; 0 means all of them, 1 means greedy.
    pub top_k: u32,
    /// Of the candidates left by `top_k`, only the most probable ones whose probabilities add up to at
    /// least `top_p`, in (0, 1].
    pub top_p: f32,
    /// Key of the generator.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
        }
    }
}

/// A sampling parameter outside its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// Negative or not finite.
    #[error("temperature is {0}, expected a number of 0 or more (0 is greedy)")]
    Temperature(f32),
    /// Not in (0, 1].
    #[error("top_p is {0}, expected a number above 0 and at most 1")]
    TopP(f32),
}

impl SamplingParams {
    /// Whether the most probable token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }

    /// Checks the ranges.
    pub fn validate(&self) -> Result<(), SamplingError> {
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return Err(SamplingError::Temperature(self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(SamplingError::TopP(self.top_p));
        }
        Ok(())
    }
}

/// The next token of `request` at `position` (the position that the new token will have) from its row of
/// logits `[vocab]`. Temperature is applied first, then top-k, then top-p.
///
/// `None` when no logit is a number above -inf, which a healthy model never produces.
pub fn sample(logits: &[f32], params: &SamplingParams, request: u64, position: u32) -> Option<u32> {
    let best = argmax(logits)?;
    let max = logits[best as usize];
    if params.is_greedy() || max == f32::INFINITY {
        return Some(best);
    }
    let scaled = |token: u32| (logits[token as usize] - max) / params.temperature;
    let mut noise = TokenNoise::new(params.seed, request, position);
    let all = params.top_k == 0 || params.top_k as usize >= logits.len();
    if all && params.top_p >= 1.0 {
        return gumbel_argmax(0..logits.len() as u32, scaled, &mut noise);
    }
    let mut candidates: Vec<u32> = (0..logits.len() as u32)
        .filter(|&token| scaled(token) > f32::NEG_INFINITY)
        .collect();
    let descending = |a: &u32, b: &u32| {
        logits[*b as usize]
            .total_cmp(&logits[*a as usize])
            .then(a.cmp(b))
    };
    if !all && (params.top_k as usize) < candidates.len() {
        candidates.select_nth_unstable_by(params.top_k as usize - 1, descending);
        candidates.truncate(params.top_k as usize);
    }
    if params.top_p < 1.0 {
        keep_nucleus(&mut candidates, f64::from(params.top_p), scaled, descending);
    }
    // Ascending, so that noise is drawn in whole Philox blocks and ties go to the lowest token.
    candidates.sort_unstable();
    gumbel_argmax(candidates, scaled, &mut noise)
}

/// Cuts the candidates to the most probable ones that together reach `top_p` of their probability.
///
/// A vocabulary is long and a nucleus short: only as many candidates are sorted as it turns out to need.
fn keep_nucleus(
    candidates: &mut Vec<u32>,
    top_p: f64,
    scaled: impl Fn(u32) -> f32,
    descending: impl Fn(&u32, &u32) -> Ordering,
) {
    let weight = |token: &u32| f64::from(scaled(*token)).exp();
    let threshold = top_p * candidates.iter().map(weight).sum::<f64>();
    let (mut n_sorted, mut cumulative) = (0, 0.0);
    while n_sorted < candidates.len() {
        let n_more = (2 * n_sorted).max(256);
        let rest = &mut candidates[n_sorted..];
        let n_more = if n_more < rest.len() {
            rest.select_nth_unstable_by(n_more - 1, &descending);
            n_more
        } else {
            rest.len()
        };
        rest[..n_more].sort_unstable_by(&descending);
        for (index, token) in rest[..n_more].iter().enumerate() {
            cumulative += weight(token);
            if cumulative >= threshold {
                candidates.truncate(n_sorted + index + 1);
                return;
            }
        }
        n_sorted += n_more;
    }
}

/// The token with the greatest logit, the lowest one of equals. NaN counts as -inf; `None` when nothing is
/// above -inf.
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best = (f32::NEG_INFINITY, None);
    for (token, &logit) in logits.iter().enumerate() {
        if logit > best.0 {
            best = (logit, Some(token as u32));
        }
    }
    best.1
}

/// Greatest value that [`gumbel`] takes: `-ln(2^-33)`, rounded up.
const GUMBEL_MAX: f32 = 22.875;

fn gumbel_argmax(
    tokens: impl IntoIterator<Item = u32>,
    scaled: impl Fn(u32) -> f32,
    noise: &mut TokenNoise,
) -> Option<u32> {
    let mut best = (f32::NEG_INFINITY, None);
    for token in tokens {
        let value = scaled(token);
        // NaN fails the comparison and is skipped; so is a token that no noise can lift to the top.
        if value + GUMBEL_MAX > best.0 {
            let perturbed = value + gumbel(noise.bits(token));
            if perturbed > best.0 {
                best = (perturbed, Some(token));
            }
        }
    }
    best.1
}

/// The 32 random bits of each token of one row: word `token % 4` of the Philox block with key `seed` and
/// counter `(token / 4, position, request low, request high)`.
struct TokenNoise {
    seed: [u32; 2],
    counter: [u32; 4],
    block: Option<[u32; 4]>,
}

impl TokenNoise {
    fn new(seed: u64, request: u64, position: u32) -> Self {
        let counter = [0, position, request as u32, (request >> 32) as u32];
        Self {
            seed: [seed as u32, (seed >> 32) as u32],
            counter,
            block: None,
        }
    }

    fn bits(&mut self, token: u32) -> u32 {
        let block = match self.block {
            Some(block) if self.counter[0] == token / 4 => block,
            _ => {
                self.counter[0] = token / 4;
                *self.block.insert(philox4x32_10(self.counter, self.seed))
            }
        };
        block[(token % 4) as usize]
    }
}

/// A Gumbel variate `-ln(-ln(1 - v))` from 32 random bits, `v = (bits + 1/2) / 2^32`. Small `v`, which
/// gives the large values that decide an argmax, keeps its full precision.
pub fn gumbel(bits: u32) -> f32 {
    // The largest `bits` would round to 1, whose logarithm is infinite.
    let v = ((f64::from(bits) + 0.5) * (1.0 / 4_294_967_296.0)) as f32;
    let v = v.min(1.0 - f32::EPSILON / 2.0);
    let exponential = if v < 0.25 {
        atanh_series(v / (2.0 - v))
    } else {
        -ln(1.0 - v)
    };
    -ln(exponential)
}

/// Natural logarithm of a positive normal number, within 2 ulp or 2^-24 of it.
fn ln(x: f32) -> f32 {
    const LN_2: f32 = std::f32::consts::LN_2;
    // x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
    let bits = x
        .to_bits()
        .wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits());
    let exponent = (bits as i32) >> 23;
    let mantissa = f32::from_bits((bits & 0x7f_ffff) + std::f32::consts::FRAC_1_SQRT_2.to_bits());
    exponent as f32 * LN_2 + atanh_series((mantissa - 1.0) / (mantissa + 1.0))
}

/// `2 atanh(s)` for |s| <= 0.172, the logarithm of `(1 + s) / (1 - s)`.
fn atanh_series(s: f32) -> f32 {
    let s2 = s * s;
    let tail = ((s2 * (2.0 / 9.0) + 2.0 / 7.0) * s2 + 2.0 / 5.0) * s2 + 2.0 / 3.0;
    2.0 * s + s * (s2 * tail)
}

/// One block of Philox4x32 with ten rounds.
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let mut c = counter;
    let mut k = key;
    for _ in 0..10 {
        let first = u64::from(c[0]) * 0xD251_1F53;
        let second = u64::from(c[2]) * 0xCD9E_8D57;
        c = [
            (second >> 32) as u32 ^ c[1] ^ k[0],
            second as u32,
            (first >> 32) as u32 ^ c[3] ^ k[1],
            first as u32,
        ];
        k = [
            k[0].wrapping_add(0x9E37_79B9),
            k[1].wrapping_add(0xBB67_AE85),
        ];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn params(temperature: f32, top_k: u32, top_p: f32) -> SamplingParams {
        SamplingParams {
            temperature,
            top_k,
            top_p,
            seed: 7,
        }
    }

    /// The known-answer vectors that the paper's authors publish for this generator.
    #[test]
    fn philox_known_answers() {
        assert_eq!(
            philox4x32_10([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32_10([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn argmax_takes_the_lowest_of_equals_and_skips_nan() {
        assert_eq!(argmax(&[1.0, 3.0, f32::NAN, 3.0]), Some(1));
        assert_eq!(argmax(&[f32::NEG_INFINITY, f32::NAN]), None);
        assert_eq!(argmax(&[]), None);
        assert_eq!(
            sample(&[0.0, f32::INFINITY], &params(1.0, 0, 1.0), 0, 0),
            Some(1)
        );
        assert_eq!(sample(&[f32::NAN; 3], &params(1.0, 0, 1.0), 0, 0), None);
    }

    #[test]
    fn ranges_are_checked() {
        assert!(params(0.7, 50, 0.9).validate().is_ok());
        assert_eq!(
            params(-1.0, 0, 1.0).validate(),
            Err(SamplingError::Temperature(-1.0))
        );
        assert!(params(f32::NAN, 0, 1.0).validate().is_err());
        assert_eq!(
            params(1.0, 0, 0.0).validate(),
            Err(SamplingError::TopP(0.0))
        );
        assert!(params(1.0, 0, 1.5).validate().is_err());
    }

    #[test]
    fn gumbel_agrees_with_double_precision() {
        let mut bits = 0u32;
        loop {
            let v = (f64::from(bits) + 0.5) / 4_294_967_296.0;
            let expected = -(-(-v).ln_1p()).ln();
            // Near v = 1 the f32 spacing of 1 - v limits the result; there the value is far below any maximum.
            let tolerance = if v > 0.999 {
                0.05
            } else {
                2e-6 * expected.abs().max(1.0)
            };
            let found = f64::from(gumbel(bits));
            assert!(
                (found - expected).abs() <= tolerance,
                "{bits:#x}: {found} against {expected}"
            );
            assert!(found <= f64::from(GUMBEL_MAX));
            let Some(next) = bits.checked_add(bits / 97 + 1) else {
                break;
            };
            bits = next;
        }
        assert!(gumbel(u32::MAX).is_finite());
    }

    /// Pearson's chi-squared of 20,000 draws against the softmax that the parameters define.
    fn assert_distribution(logits: &[f32], params: SamplingParams, kept: &[usize]) {
        const DRAWS: u32 = 20_000;
        let mut counts = vec![0u32; logits.len()];
        for position in 0..DRAWS {
            counts[sample(logits, &params, 3, position).unwrap() as usize] += 1;
        }
        let weight = |token: usize| f64::from(logits[token] / params.temperature).exp();
        let total: f64 = kept.iter().map(|&token| weight(token)).sum();
        let mut chi_squared = 0.0;
        for (token, &count) in counts.iter().enumerate() {
            if kept.contains(&token) {
                let expected = f64::from(DRAWS) * weight(token) / total;
                chi_squared += (f64::from(count) - expected).powi(2) / expected;
            } else {
                assert_eq!(count, 0, "token {token} was drawn");
            }
        }
        // 99.99th percentile for up to 6 degrees of freedom.
        assert!(
            chi_squared < 27.9,
            "chi squared {chi_squared}, counts {counts:?}"
        );
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.5, -1.0, 2.0, 1.0, 0.0, -3.0, 1.5];
        assert_distribution(&logits, params(1.0, 0, 1.0), &[0, 1, 2, 3, 4, 5, 6]);
        assert_distribution(&logits, params(2.5, 0, 1.0), &[0, 1, 2, 3, 4, 5, 6]);
        assert_distribution(&logits, params(1.0, 3, 1.0), &[2, 3, 6]);
        // Probabilities 0.419, 0.254, 0.154, ...: two tokens reach 0.672, three 0.826.
        assert_distribution(&logits, params(1.0, 0, 0.65), &[2, 6]);
        assert_distribution(&logits, params(1.0, 0, 0.75), &[2, 3, 6]);
        // After top-k 3 the same tokens have 0.507, 0.307, 0.186: two reach 0.814.
        assert_distribution(&logits, params(1.0, 3, 0.75), &[2, 6]);
    }

    #[test]
    fn keys_are_independent() {
        let logits = vec![0.0f32; 64];
        let draw = |seed, request, position| {
            sample(
                &logits,
                &SamplingParams {
                    seed,
                    ..params(1.0, 0, 1.0)
                },
                request,
                position,
            )
            .unwrap()
        };
        let base: Vec<u32> = (0..32).map(|position| draw(1, 2, position)).collect();
        assert_ne!(
            base,
            (0..32)
                .map(|position| draw(2, 2, position))
                .collect::<Vec<_>>()
        );
        assert_ne!(
            base,
            (0..32)
                .map(|position| draw(1, 3, position))
                .collect::<Vec<_>>()
        );
        assert_ne!(
            base,
            (0..32)
                .map(|position| draw(1, 2 | 1 << 32, position))
                .collect::<Vec<_>>()
        );
        assert!(base.iter().any(|&token| token != base[0]));
    }

    proptest! {
        #[test]
        fn greedy_is_argmax(logits in prop::collection::vec(-30f32..30.0, 1..50), seed: u64, request: u64) {
            let expected = argmax(&logits);
            let greedy = SamplingParams { temperature: 0.0, top_k: 0, top_p: 0.3, seed };
            prop_assert_eq!(sample(&logits, &greedy, request, 9), expected);
            let top_1 = SamplingParams { temperature: 1.3, top_k: 1, top_p: 1.0, seed };
            prop_assert_eq!(sample(&logits, &top_1, request, 9), expected);
            // A tiny nucleus holds the most probable token alone.
            let nucleus = SamplingParams { temperature: 0.5, top_k: 0, top_p: 1e-6, seed };
            prop_assert_eq!(sample(&logits, &nucleus, request, 9), expected);
        }

        #[test]
        fn a_draw_is_among_the_top_k(
            logits in prop::collection::vec(-5f32..5.0, 1..60), top_k in 1u32..70, top_p in 0.01f32..=1.0, seed: u64,
        ) {
            let params = SamplingParams { temperature: 0.9, top_k, top_p, seed };
            let token = sample(&logits, &params, 11, 4).unwrap();
            let above = logits.iter().filter(|&&logit| logit > logits[token as usize]).count();
            prop_assert!(above < top_k as usize);
            prop_assert_eq!(sample(&logits, &params, 11, 4), Some(token));
        }

        /// The nucleus is the one that a full sort gives.
        #[test]
        fn nucleus_by_full_sort(logits in prop::collection::vec(-3f32..3.0, 1..1500), top_p in 0.01f64..0.999) {
            let scaled = |token: u32| logits[token as usize];
            let descending =
                |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
            let mut sorted: Vec<u32> = (0..logits.len() as u32).collect();
            let total: f64 = sorted.iter().map(|&token| f64::from(scaled(token)).exp()).sum();
            let mut kept = sorted.clone();
            keep_nucleus(&mut kept, top_p, scaled, descending);
            sorted.sort_unstable_by(descending);
            let mut cumulative = 0.0;
            let n_expected = sorted.iter().take_while(|&&token| {
                let below = cumulative < top_p * total;
                cumulative += f64::from(scaled(token)).exp();
                below
            }).count();
            kept.sort_unstable_by(descending);
            prop_assert_eq!(&kept[..], &sorted[..n_expected]);
        }

        /// Skipping hopeless tokens changes nothing: the plain maximum over all tokens is the same.
        #[test]
        fn pruning_is_exact(logits in prop::collection::vec(-60f32..60.0, 1..200), seed: u64, request: u64) {
            let params = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, seed };
            let max = logits[argmax(&logits).unwrap() as usize];
            let mut noise = TokenNoise::new(seed, request, 0);
            let perturbed: Vec<f32> =
                logits.iter().enumerate().map(|(token, l)| (l - max) + gumbel(noise.bits(token as u32))).collect();
            prop_assert_eq!(sample(&logits, &params, request, 0), argmax(&perturbed));
        }
    }
}
