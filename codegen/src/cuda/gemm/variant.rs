//! The kernels that a GEMM can be given: lathe's own that are worth a choice, and the vendor's library.

use super::kernel::GemmKernel;
use super::key::{GemmKey, Problem};
use super::skinny::SkinnyForm;
use super::tiled::Tile;
use std::fmt;
use std::str::FromStr;

/// A kernel with its geometry. Its text form is stable: `gemv`, `skinny_w1_p2`, `skinny_w1_p2_even`,
/// `tiled_128x192_c2x1`, `tiled_128x160_t2_c2x1`, `cublaslt_3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Variant {
    /// The weight-streaming kernel.
    Gemv,
    /// The tensor-core kernel with swapped operands.
    Skinny(SkinnyForm),
    /// The tiled tensor-core kernel.
    Tiled(Tile),
    /// The vendor's library, by its algorithm's place in the list that it proposes.
    CublasLt {
        /// Place in the list.
        algorithm: usize,
    },
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Variant::Gemv => f.write_str("gemv"),
            Variant::Skinny(form) => write!(f, "skinny_{form}"),
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
            if let Some(rest) = text.strip_prefix("skinny_") {
                return SkinnyForm::parse(rest).map(Variant::Skinny);
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
    /// The own kernel that it is; `None` for the library.
    pub(in crate::cuda) fn kernel(self) -> Option<GemmKernel> {
        match self {
            Variant::Gemv => Some(GemmKernel::Gemv),
            Variant::Skinny(form) => Some(GemmKernel::Skinny(form)),
            Variant::Tiled(tile) => Some(GemmKernel::Tiled(tile)),
            Variant::CublasLt { .. } => None,
        }
    }

    /// An own kernel that can be chosen; `None` for the plain one.
    fn of(kernel: GemmKernel) -> Option<Variant> {
        match kernel {
            GemmKernel::Gemv => Some(Variant::Gemv),
            GemmKernel::Skinny(form) => Some(Variant::Skinny(form)),
            GemmKernel::Tiled(tile) => Some(Variant::Tiled(tile)),
            GemmKernel::Plain => None,
        }
    }

    /// Why this variant does not compute a GEMM on a device of `sms` multiprocessors.
    ///
    /// # Errors
    /// The reason.
    pub fn check(&self, key: &GemmKey, sms: usize) -> Result<(), String> {
        let problem = Problem::of_key(key);
        match self.kernel() {
            Some(kernel) if kernel.computes(&problem, sms) => Ok(()),
            Some(kernel) => Err(kernel.refusal(&problem, sms)),
            None if key.is_library_gemm() => Ok(()),
            None => Err(format!("the variant {self} does not compute {key}")),
        }
    }

    /// What the families' own rules choose.
    ///
    /// # Panics
    /// The key is of no bf16 GEMM that the tensor cores take, or there is no multiprocessor.
    pub fn heuristic(key: &GemmKey, sms: usize) -> Variant {
        let kernel = GemmKernel::heuristic(&Problem::of_key(key), sms, false);
        Variant::of(kernel).expect("the tensor cores take every GEMM with a key")
    }

    /// Every variant of lathe's own kernels that computes a GEMM.
    pub fn all(key: &GemmKey, sms: usize) -> Vec<Variant> {
        GemmKernel::forms()
            .filter_map(Variant::of)
            .filter(|v| v.check(key, sms).is_ok())
            .collect()
    }

    /// The variants worth timing, the heuristic's first.
    pub fn candidates(key: &GemmKey, sms: usize) -> Vec<Variant> {
        let mut all = vec![Variant::heuristic(key, sms)];
        for kernel in GemmKernel::candidates(&Problem::of_key(key), sms) {
            let Some(v) = Variant::of(kernel) else {
                continue;
            };
            if !all.contains(&v) && v.check(key, sms).is_ok() {
                all.push(v);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::Epilogue;

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
