//! Which kernel variant runs a GEMM: the variants that can, and a table of choices that were made by
//! timing. Nothing here measures; without an entry in the table the families' heuristics decide.

use super::gemm::Gemm;
use super::{gemv, skinny, tiled};
use lathe_ir::{DType, Epilogue, Prologue};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// A bf16 GEMM as far as the choice of its kernel depends on it: `[M, K] · [N, K]ᵀ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GemmKey {
    /// Rows of the bucket.
    pub m: usize,
    /// Output features, before SwiGLU.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Whether a norm comes before it, which a variant fuses or launches on its own.
    pub norm: bool,
    /// What happens to the accumulators.
    pub epilogue: Epilogue,
    /// Whether a bias is added.
    pub bias: bool,
}

impl GemmKey {
    /// The key of a GEMM that has more than one variant: bf16, sizes that the tensor cores take, and
    /// no argmax.
    pub(super) fn of(g: &Gemm, plain: bool) -> Option<GemmKey> {
        let sizes = g.n.is_multiple_of(8) && g.k.is_multiple_of(8);
        // The tensor cores' SwiGLU takes no bias.
        let biased = g.bias.is_some() && g.epilogue == Epilogue::SwiGlu;
        let tunable = g.dtype == DType::BF16 && !plain && sizes && !biased && !g.argmax;
        tunable.then(|| GemmKey {
            m: g.m,
            n: g.n,
            k: g.k,
            norm: g.prologue != Prologue::None,
            epilogue: g.epilogue,
            bias: g.bias.is_some(),
        })
    }

    /// Whether cuBLASLt computes it: no epilogue but a residual, which it adds as C.
    pub fn is_library_gemm(&self) -> bool {
        !self.bias && self.epilogue != Epilogue::SwiGlu
    }
}

impl fmt::Display for GemmKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let norm = if self.norm { "_norm" } else { "" };
        let bias = if self.bias { "_bias" } else { "" };
        let epilogue = super::gemm::epilogue_name(self.epilogue);
        write!(
            f,
            "m{}_n{}_k{}{norm}{bias}_{epilogue}",
            self.m, self.n, self.k
        )
    }
}

/// A kernel with its geometry. Its text form is stable: `gemv`, `skinny_w1_p2`, `skinny_w1_p2_even`,
/// `tiled_128x192_c2x1`, `tiled_128x160_t2_c2x1`, `cublaslt_3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Variant {
    /// The weight-streaming kernel.
    Gemv,
    /// The tensor-core kernel with swapped operands.
    Skinny {
        /// Consumer warpgroups, 64 rows of the weights each.
        warpgroups: usize,
        /// 64-wide panels of K in a slot of the ring.
        panels: usize,
        /// As many blocks as give every tile the same number of parts, rather than all
        /// multiprocessors.
        even: bool,
    },
    /// The tiled tensor-core kernel.
    Tiled(Tile),
    /// The vendor's library, by its algorithm's place in the list that it proposes.
    CublasLt {
        /// Place in the list.
        algorithm: usize,
    },
}

/// How the tiled kernel divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tile {
    /// Rows of a tile: 64, 128 or 192.
    pub rows: usize,
    /// Columns of a tile.
    pub cols: usize,
    /// 1: all warpgroups work on a tile. 2: each has its own, and one multiplies while the other stores.
    pub teams: usize,
    /// Blocks of a cluster that share weights, and that share activations.
    pub cluster: [usize; 2],
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { rows, cols, .. } = self;
        let teams = if self.teams == 1 { "" } else { "_t2" };
        let [a, b] = self.cluster;
        write!(f, "{rows}x{cols}{teams}_c{a}x{b}")
    }
}

impl Tile {
    fn parse(text: &str) -> Option<Tile> {
        let (tile, cluster) = text.split_once("_c")?;
        let (tile, teams) = match tile.strip_suffix("_t2") {
            Some(tile) => (tile, 2),
            None => (tile, 1),
        };
        let (rows, cols) = tile.split_once('x')?;
        let (a, b) = cluster.split_once('x')?;
        Some(Tile {
            rows: rows.parse().ok()?,
            cols: cols.parse().ok()?,
            teams,
            cluster: [a.parse().ok()?, b.parse().ok()?],
        })
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Variant::Gemv => f.write_str("gemv"),
            Variant::Skinny {
                warpgroups,
                panels,
                even,
            } => {
                let even = if *even { "_even" } else { "" };
                write!(f, "skinny_w{warpgroups}_p{panels}{even}")
            }
            Variant::Tiled(tile) => write!(f, "tiled_{tile}"),
            Variant::CublasLt { algorithm } => write!(f, "cublaslt_{algorithm}"),
        }
    }
}

impl FromStr for Variant {
    type Err = String;

    fn from_str(text: &str) -> Result<Variant, String> {
        let read = || -> Option<Variant> {
            if text == "gemv" {
                return Some(Variant::Gemv);
            }
            if let Some(rest) = text.strip_prefix("cublaslt_") {
                return Some(Variant::CublasLt {
                    algorithm: rest.parse().ok()?,
                });
            }
            if let Some(rest) = text.strip_prefix("skinny_w") {
                let (rest, even) = match rest.strip_suffix("_even") {
                    Some(rest) => (rest, true),
                    None => (rest, false),
                };
                let (warpgroups, panels) = rest.split_once("_p")?;
                return Some(Variant::Skinny {
                    warpgroups: warpgroups.parse().ok()?,
                    panels: panels.parse().ok()?,
                    even,
                });
            }
            Tile::parse(text.strip_prefix("tiled_")?).map(Variant::Tiled)
        };
        // Only what prints itself again is a variant: `skinny_w+1_p2` is none.
        read()
            .filter(|v| v.to_string() == text)
            .ok_or_else(|| format!("'{text}' is no kernel variant"))
    }
}

impl Variant {
    /// Why this variant does not compute a GEMM on a device of `sms` multiprocessors.
    ///
    /// # Errors
    /// The reason.
    pub fn check(&self, key: &GemmKey, sms: usize) -> Result<(), String> {
        let fits = match *self {
            Variant::Gemv => gemv::computes(key),
            Variant::Skinny {
                warpgroups,
                panels,
                even,
            } => skinny::Shape::new(key, warpgroups, panels, even, sms).is_some(),
            Variant::Tiled(tile) => tiled::Shape::new(key, tile, sms).is_some(),
            Variant::CublasLt { .. } => key.is_library_gemm(),
        };
        match fits {
            true => Ok(()),
            false => Err(format!("the variant {self} does not compute {key}")),
        }
    }

    /// What the families' own rules choose.
    pub fn heuristic(key: &GemmKey, sms: usize) -> Variant {
        if gemv::computes(key) {
            Variant::Gemv
        } else if key.m <= skinny::ROWS {
            skinny::heuristic(key, sms)
        } else {
            tiled::heuristic(key, sms)
        }
    }

    /// Every variant of lathe's own kernels that computes a GEMM.
    pub fn all(key: &GemmKey, sms: usize) -> Vec<Variant> {
        let mut all = vec![Variant::Gemv];
        for (warpgroups, panels) in skinny::FORMS {
            for even in [false, true] {
                all.push(Variant::Skinny {
                    warpgroups,
                    panels,
                    even,
                });
            }
        }
        all.extend(tiled::all().map(Variant::Tiled));
        all.retain(|v| v.check(key, sms).is_ok());
        all
    }

    /// The variants worth timing, the heuristic's first.
    pub fn candidates(key: &GemmKey, sms: usize) -> Vec<Variant> {
        /// Tiles taken by estimated time, beside the heuristic's.
        const TILES: usize = 8;
        let mut all = vec![Variant::heuristic(key, sms)];
        let mut add = |v: Variant| {
            if !all.contains(&v) && v.check(key, sms).is_ok() {
                all.push(v);
            }
        };
        if key.m <= skinny::ROWS {
            for (warpgroups, panels) in skinny::FORMS {
                for even in [false, true] {
                    add(Variant::Skinny {
                        warpgroups,
                        panels,
                        even,
                    });
                }
            }
        }
        // Fewer rows than half a tile waste the tensor cores and gain nothing.
        if key.m > 32 {
            let few = key.m <= skinny::ROWS;
            let take = if few { TILES / 2 } else { TILES };
            tiled::best_tiles(key, sms)
                .into_iter()
                .take(take)
                .for_each(add);
        }
        all
    }
}

/// Variants that were chosen by timing; GEMMs without an entry are left to the heuristics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choices(BTreeMap<GemmKey, Variant>);

impl Choices {
    /// Enters a choice.
    pub fn insert(&mut self, key: GemmKey, variant: Variant) {
        self.0.insert(key, variant);
    }

    /// The choice for a GEMM.
    pub fn get(&self, key: &GemmKey) -> Option<Variant> {
        self.0.get(key).copied()
    }

    /// All choices, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&GemmKey, &Variant)> {
        self.0.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(m: usize, n: usize, k: usize, epilogue: Epilogue) -> GemmKey {
        GemmKey {
            m,
            n,
            k,
            norm: false,
            epilogue,
            bias: false,
        }
    }

    #[test]
    fn variants_read_what_they_print() {
        let sizes = [1, 4, 8, 64, 100, 128, 129, 320, 384, 512, 2048];
        for m in sizes {
            for (n, k, epilogue) in [
                (28672, 4096, Epilogue::SwiGlu),
                (4096, 14336, Epilogue::Residual),
                (6144, 4096, Epilogue::None),
                (2048, 2048, Epilogue::Residual),
            ] {
                let key = key(m, n, k, epilogue);
                let all = Variant::candidates(&key, 132);
                assert!(all.len() > 1, "{key}");
                assert_eq!(all[0], Variant::heuristic(&key, 132));
                for v in &all {
                    assert_eq!(v.to_string().parse::<Variant>().as_ref(), Ok(v));
                    v.check(&key, 132).unwrap();
                }
                let whole = Variant::all(&key, 132);
                assert!(all.iter().all(|v| whole.contains(v)), "{key}");
                let distinct: std::collections::BTreeSet<_> = all.iter().collect();
                assert_eq!(distinct.len(), all.len());
            }
        }
        for bad in [
            "",
            "gemv2",
            "skinny_w1",
            "tiled_128x_c1x1",
            "tiled_128x128_t1_c1x1",
            "tiled_128x128_c1x1_t2",
            "skinny_w01_p2",
            "cublaslt_-1",
        ] {
            assert!(bad.parse::<Variant>().is_err(), "{bad}");
        }
    }

    #[test]
    fn variants_that_do_not_compute_a_gemm_are_refused() {
        let swiglu = key(384, 28672, 4096, Epilogue::SwiGlu);
        let refused = |text: &str, key: &GemmKey| {
            let v: Variant = text.parse().unwrap();
            v.check(key, 132).unwrap_err()
        };
        // SwiGLU needs whole blocks of 16 gate and 16 up rows in a tile.
        assert!(refused("tiled_128x48_c1x1", &swiglu).contains("does not compute m384"));
        for text in [
            "gemv",
            "skinny_w1_p2",
            "cublaslt_0",
            "tiled_256x128_c1x1",
            "tiled_128x128_c4x1",
            "tiled_128x256_t2_c2x1",
            "tiled_64x128_t2_c2x1",
        ] {
            refused(text, &swiglu);
        }
        // Where both teams store, the ring has no room for the residual's tiles.
        let down = key(384, 4096, 14336, Epilogue::Residual);
        refused("tiled_128x128_t2_c2x1", &down);
        refused("skinny_w3_p1", &key(8, 4096, 4096, Epilogue::None));
        refused("gemv", &key(5, 4096, 4096, Epilogue::None));
    }
}
