//! Rotary position embedding: frequencies by the formulas of transformers'
//! `modeling_rope_utils.py` (version 5), and their application in the rotate-half form.

use super::embed::positions;
use crate::import::builder::{Builder, Built, batch, seq};
use crate::import::{HfConfig, ImportError, ImportOptions};
use crate::ops::Table;
use crate::{BinaryFn, DType, Dim, NodeId, Real, UnaryFn};
use std::f64::consts::PI;

const SUPPORTED: &str = "default, linear, llama3, yarn, dynamic (within the original length)";

/// Frequencies of one rotary embedding.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct RopeTable {
    /// Angle per position of each pair of rotated features, rounded to f32.
    pub(crate) inv_freq: Vec<f32>,
    /// Factor of cos and sin.
    pub(crate) scaling: f64,
}

/// How a family fills in rotary parameters that a configuration leaves out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RopeDefaults {
    /// Base of the frequencies.
    pub(crate) theta: f64,
    /// Rotated part of a head; `None` for families that always rotate whole heads.
    pub(crate) partial: Option<f64>,
}

impl RopeDefaults {
    /// Base 10000, whole heads.
    pub(crate) const PLAIN: RopeDefaults = RopeDefaults {
        theta: 10_000.0,
        partial: None,
    };
}

/// The parameters at one place of a configuration: `rope_parameters`, or one layer type's there.
struct Parameters<'a> {
    cfg: &'a HfConfig,
    at: &'a str,
}

impl Parameters<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.at)
    }

    fn opt(&self, key: &str) -> Result<Option<f64>, ImportError> {
        self.cfg.opt_f64(&self.key(key))
    }

    fn opt_positive(&self, key: &str) -> Result<Option<f64>, ImportError> {
        self.cfg.opt_positive(&self.key(key))
    }

    fn positive(&self, key: &str) -> Result<f64, ImportError> {
        self.opt_positive(key)?
            .ok_or_else(|| self.cfg.missing(&self.key(key), "a number above 0"))
    }

    /// The length that the model was first trained for.
    fn original_length(&self) -> Result<u32, ImportError> {
        match self
            .cfg
            .opt_size(&self.key("original_max_position_embeddings"))?
        {
            Some(n) => Ok(n),
            None => self.cfg.size("max_position_embeddings"),
        }
    }
}

impl RopeTable {
    /// The frequencies that the object at `at` asks for, for heads of `head_dim` features.
    pub(crate) fn read(
        cfg: &HfConfig,
        at: &str,
        head_dim: u32,
        defaults: RopeDefaults,
        opts: &ImportOptions,
    ) -> Result<RopeTable, ImportError> {
        cfg.check_rope_keys(at)?;
        let p = Parameters { cfg, at };
        let dim = match defaults.partial {
            None => {
                cfg.only(&p.key("partial_rotary_factor"), &1.0.into())?;
                head_dim
            }
            Some(default) => {
                let part = p.opt_positive("partial_rotary_factor")?.unwrap_or(default);
                if part > 1.0 {
                    return Err(cfg.invalid(&p.key("partial_rotary_factor"), "at most 1"));
                }
                (f64::from(head_dim) * part) as u32
            }
        };
        if dim == 0 || !dim.is_multiple_of(2) {
            return Err(cfg.invalid(
                "head_dim",
                &format!("an even number of rotated features, not {dim}"),
            ));
        }
        let theta = p.opt_positive("rope_theta")?.unwrap_or(defaults.theta);
        let base = pair_frequencies(theta, dim);
        let key = p.key("rope_type");
        match cfg.opt_str(&key)?.unwrap_or("default") {
            "default" => Ok(RopeTable::plain(base)),
            "linear" => {
                let factor = p.positive("factor")? as f32;
                Ok(RopeTable::plain(
                    base.into_iter().map(|f| f / factor).collect(),
                ))
            }
            "llama3" => llama3(&p, base),
            "yarn" => yarn(&p, theta, dim),
            "dynamic" => {
                // Up to the original length the frequencies are the plain ones; beyond it they
                // depend on the length of the sequence, so cached keys would be wrong.
                let max = cfg.size("max_position_embeddings")?;
                let original = p.original_length()?.min(max);
                let longest = opts.max_seq_len.unwrap_or(max);
                if longest > original {
                    return Err(cfg.unsupported(
                        &key,
                        &format!(
                            "dynamic for sequences up to {original} positions (asked for \
                             {longest}), beyond which its frequencies depend on the sequence \
                             length; default, linear, llama3, yarn"
                        ),
                    ));
                }
                p.positive("factor")?;
                Ok(RopeTable::plain(base))
            }
            _ => Err(cfg.unsupported(&key, SUPPORTED)),
        }
    }

    fn plain(inv_freq: Vec<f32>) -> RopeTable {
        RopeTable {
            inv_freq,
            scaling: 1.0,
        }
    }
}

/// `theta^(2i/dim)`, rounded where PyTorch rounds to f32.
fn pair_periods(theta: f64, dim: u32) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / dim as f32;
            (theta as f32 as f64).powf(f64::from(exponent)) as f32
        })
        .collect()
}

/// `1 / theta^(2i/dim)`.
fn pair_frequencies(theta: f64, dim: u32) -> Vec<f32> {
    pair_periods(theta, dim).iter().map(|p| 1.0 / p).collect()
}

/// Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between
/// interpolated.
fn llama3(p: &Parameters, base: Vec<f32>) -> Result<RopeTable, ImportError> {
    let factor = p.positive("factor")? as f32;
    let low = p.positive("low_freq_factor")?;
    let high = p.positive("high_freq_factor")?;
    if high <= low {
        return Err(p.cfg.invalid(
            &p.key("high_freq_factor"),
            &format!("more than low_freq_factor, which is {low}"),
        ));
    }
    let length = f64::from(p.original_length()?);
    let (longest, shortest) = ((length / low) as f32, (length / high) as f32);
    let inv_freq = base
        .into_iter()
        .map(|f| {
            // PyTorch computes scalar / tensor as a reciprocal times the scalar.
            let wavelength = (1.0 / f) * (2.0 * PI) as f32;
            if wavelength > longest {
                f / factor
            } else if wavelength < shortest {
                f
            } else {
                let turns = (1.0 / wavelength) * length as f32;
                let smooth = (turns - low as f32) / (high - low) as f32;
                (1.0 - smooth) * f / factor + smooth * f
            }
        })
        .collect();
    Ok(RopeTable::plain(inv_freq))
}

/// YaRN (arXiv 2309.00071): high frequencies kept, low ones divided by `factor`, a linear ramp
/// between them; cos and sin grow with the logarithm of the factor.
fn yarn(p: &Parameters, theta: f64, dim: u32) -> Result<RopeTable, ImportError> {
    let original = f64::from(p.original_length()?);
    let factor = match p.opt_positive("factor")? {
        Some(f) => f,
        None => f64::from(p.cfg.size("max_position_embeddings")?) / original,
    };
    let nonzero = |v: Option<f64>| v.filter(|&x| x != 0.0);
    let mscale = |m: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * m * factor.ln() + 1.0
        }
    };
    let scaling = match p.opt("attention_factor")? {
        Some(f) => f,
        None => match (nonzero(p.opt("mscale")?), nonzero(p.opt("mscale_all_dim")?)) {
            (Some(m), Some(all)) => mscale(m) / mscale(all),
            _ => mscale(1.0),
        },
    };
    let fast = nonzero(p.opt("beta_fast")?).unwrap_or(32.0);
    let slow = nonzero(p.opt("beta_slow")?).unwrap_or(1.0);
    let d = f64::from(dim);
    // The feature pair that turns `rotations` times over the original length.
    let correction =
        |rotations: f64| d * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (correction(fast), correction(slow));
    if p.cfg.bool_or(&p.key("truncate"), true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(d - 1.0));
    if low == high {
        high += 0.001;
    }
    let inv_freq = pair_periods(theta, dim)
        .into_iter()
        .enumerate()
        .map(|(i, period)| {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let keep = 1.0 - ramp;
            1.0 / (factor as f32 * period) * (1.0 - keep) + 1.0 / period * keep
        })
        .collect();
    Ok(RopeTable { inv_freq, scaling })
}

/// cos and sin of all positions, `[B,S,width]` each.
#[derive(Clone, Copy)]
pub(crate) struct CosSin {
    cos: NodeId,
    sin: NodeId,
    /// Features of a head that are rotated, the first ones.
    width: u32,
}

/// The module `name`: computed once for all layers, in f32, then in the model's type.
pub(crate) fn rotary_embedding(
    b: &mut Builder,
    name: &str,
    table: &RopeTable,
) -> Result<CosSin, ImportError> {
    let one = Dim::new(1);
    b.within(name, |b| {
        let positions = positions(b, &[one, seq()])?;
        let positions = b.expand(positions, &[batch(), seq()])?;
        let half = Dim::from(table.inv_freq.len());
        let freq = b.add(
            Table {
                name: "inv_freq".to_string(),
                data: table
                    .inv_freq
                    .iter()
                    .map(|&f| Real::new(f64::from(f)))
                    .collect(),
            },
            &[],
        )?;
        let freq = b.reshape(freq, &[one, half, one])?;
        let freq = b.expand(freq, &[batch(), half, one])?;
        let positions = b.cast(positions, DType::F32)?;
        let positions = b.reshape(positions, &[batch(), one, seq()])?;
        let angles = b.matmul(freq, positions)?;
        let angles = b.permute(angles, &[0, 2, 1])?;
        let angles = b.concat_last(angles, angles)?;
        let mut scaled = |f: UnaryFn| {
            let y = b.unary(f, angles)?;
            let y = b.scalar(BinaryFn::Mul, y, table.scaling)?;
            b.cast(y, b.dtype)
        };
        Ok(CosSin {
            cos: scaled(UnaryFn::Cos)?,
            sin: scaled(UnaryFn::Sin)?,
            width: 2 * table.inv_freq.len() as u32,
        })
    })
}

impl CosSin {
    /// The values with an axis for the heads: `[B,1,S,width]`.
    pub(crate) fn per_head(self, b: &mut Builder) -> Result<CosSin, ImportError> {
        let width = Dim::from(i64::from(self.width));
        let shape = [batch(), Dim::new(1), seq(), width];
        Ok(CosSin {
            cos: b.reshape(self.cos, &shape)?,
            sin: b.reshape(self.sin, &shape)?,
            ..self
        })
    }
}

/// `x·cos + rotate_half(x)·sin` on the first features of x `[B,H,S,D]`; the others pass.
pub(crate) fn apply(b: &mut Builder, x: NodeId, rope: CosSin) -> Built {
    let axis = b.last_axis(x);
    let n = b.last_extent(x);
    if rope.width == n {
        return rotate(b, x, rope);
    }
    let rotated = b.slice(x, axis, 0, rope.width)?;
    let rest = b.slice(x, axis, rope.width, n)?;
    let rotated = rotate(b, rotated, rope)?;
    b.concat_last(rotated, rest)
}

fn rotate(b: &mut Builder, x: NodeId, rope: CosSin) -> Built {
    let straight = b.binary(BinaryFn::Mul, x, rope.cos)?;
    let rotated = rotate_half(b, x)?;
    let rotated = b.binary(BinaryFn::Mul, rotated, rope.sin)?;
    b.binary(BinaryFn::Add, straight, rotated)
}

/// `concat(−second half, first half)` of the last axis.
fn rotate_half(b: &mut Builder, x: NodeId) -> Built {
    let axis = b.last_axis(x);
    let n = b.last_extent(x);
    let first = b.slice(x, axis, 0, n / 2)?;
    let second = b.slice(x, axis, n / 2, n)?;
    let second = b.unary(UnaryFn::Neg, second)?;
    b.concat_last(second, first)
}
