//! A GEMM with all that its kernel is told.

use super::key::Problem;
use crate::cuda::context::{Call, Context, Geometry};
use crate::cuda::launch::{Arg, LibraryGemm, Ref};
use crate::cuda::row_sums::SUM_BYTES;
use crate::cuda::source::{Body, Defines, literal};
use crate::work::{KernelClass, Work, WorkShape};
use lathe_ir::ops::gemm;
use lathe_ir::{Epilogue, Operands, Product, Slot};

/// A GEMM with its operands found and its fusions decided.
pub(in crate::cuda) struct Request {
    pub(in crate::cuda) problem: Problem,
    /// What the step reads, by name, x as the kernel finds it.
    pub(in crate::cuda) operands: Operands<Ref>,
    pub(in crate::cuda) y: Ref,
    /// The norm that the kernel takes with it.
    pub(in crate::cuda) norm: NormArgs,
    /// Where the kernel adds up the squares of its result's rows.
    pub(in crate::cuda) sums: Option<Sums>,
    /// The weights of a later kernel, to be brought into L2.
    pub(in crate::cuda) next: Option<Ref>,
    /// The library's algorithm that may run in the kernel's place.
    pub(in crate::cuda) library: Option<usize>,
}

/// A norm that is part of a GEMM's kernel.
pub(in crate::cuda) enum NormArgs {
    /// There is none, or it was launched before.
    None,
    /// The rows are normalised before the product.
    Whole {
        eps: f64,
        /// Null if it is 1.
        gamma: Ref,
        /// What is added before the norm, and where the sum goes.
        added: Option<(Ref, Ref)>,
    },
    /// The accumulators are multiplied by a factor a row.
    Factors {
        /// Sums of squares, `[M]` fixed-point numbers.
        sums: Ref,
        eps: f64,
    },
}

/// Where a kernel adds the sums of its rows, and what it clears.
#[derive(Clone, Debug)]
pub(in crate::cuda) struct Sums {
    pub(in crate::cuda) add: Ref,
    pub(in crate::cuda) clear: Ref,
}

impl Request {
    /// An operand.
    pub(in crate::cuda) fn at(&self, operand: Slot) -> Ref {
        self.get(operand).unwrap_or(Ref::Null)
    }

    /// An operand, if it is present.
    pub(in crate::cuda) fn get(&self, operand: Slot) -> Option<Ref> {
        self.operands.get_ref(operand).cloned()
    }

    /// Whether an operand is present.
    pub(in crate::cuda) fn has(&self, operand: Slot) -> bool {
        self.operands.get_ref(operand).is_some()
    }

    /// What the kernel moves, with the norm that is part of it; logits of a fused argmax are not written.
    fn work(&self) -> Work {
        let key = &self.problem.key;
        let (m, n, k) = (key.m, key.n, key.k);
        let (rows, features) = (m * k, m * self.problem.features());
        let norm = match &self.norm {
            NormArgs::Whole { added: Some(_), .. } => k + 2 * rows,
            NormArgs::Whole {
                gamma: Ref::Null, ..
            } => 0,
            NormArgs::Whole { .. } => k,
            NormArgs::None | NormArgs::Factors { .. } => 0,
        };
        let bias = if self.has(gemm::BIAS) { n } else { 0 };
        let residual = if self.has(gemm::RESIDUAL) {
            features
        } else {
            0
        };
        let out = if self.problem.argmax { 0 } else { features };
        let elements = rows + n * k + norm + bias + residual + out;
        let sums = match &self.norm {
            NormArgs::Factors { .. } => m * SUM_BYTES,
            _ => 0,
        };
        Work {
            class: KernelClass::Gemm,
            shape: WorkShape::Gemm { m, n, k },
            bytes: (elements * self.problem.dtype.size() + sums + self.problem.beside.bytes())
                as f64,
            flops: Product { m, n, k }.flops(),
        }
    }

    fn library(&self) -> Option<LibraryGemm> {
        let key = &self.problem.key;
        self.library.map(|algorithm| LibraryGemm {
            m: key.m,
            n: key.n,
            k: key.k,
            x: self.at(gemm::X),
            w: self.at(gemm::W),
            residual: self.get(gemm::RESIDUAL),
            y: self.y.clone(),
            algorithm,
        })
    }

    /// Launches a kernel for this GEMM.
    pub(in crate::cuda) fn launch(
        &self,
        cx: &mut Context<'_>,
        body: Body,
        label: &str,
        defines: Defines,
        geometry: Geometry,
        args: Vec<Arg>,
    ) {
        cx.call(Call {
            body,
            label,
            defines,
            geometry,
            args,
            work: Some(self.work()),
            library: self.library(),
        });
    }

    /// `EPI` of the tensor-core kernels.
    pub(in crate::cuda) fn epilogue_macro(&self) -> &'static str {
        match (self.problem.key.epilogue, self.has(gemm::BIAS)) {
            (Epilogue::None, false) => "EPI_NONE",
            (Epilogue::None, true) => "EPI_BIAS",
            (Epilogue::Residual, false) => "EPI_RESIDUAL",
            (Epilogue::Residual, true) => "EPI_BIAS_RESIDUAL",
            (Epilogue::SwiGlu, _) => "EPI_SWIGLU",
        }
    }

    fn factors(&self) -> Option<(&Ref, f64)> {
        match &self.norm {
            NormArgs::Factors { sums, eps } => Some((sums, *eps)),
            _ => None,
        }
    }

    /// The macros that tell a tensor-core kernel of norms.
    pub(in crate::cuda) fn define_norms(&self, defines: Defines) -> Defines {
        let defines = defines
            .def("ROW_SCALE", u8::from(self.factors().is_some()))
            .def("ROW_SUMS", u8::from(self.sums.is_some()));
        match self.factors() {
            Some((_, eps)) => defines.def("LATHE_EPS", literal(eps)),
            None => defines,
        }
    }

    /// The parameters for that: sums of squares of the operand's rows, of the result's rows, and those to clear.
    pub(in crate::cuda) fn norm_args(&self) -> [Arg; 3] {
        let read = self.factors().map(|(sums, _)| sums);
        let (add, clear) = self.sums.as_ref().map(|s| (&s.add, &s.clear)).unzip();
        [read, add, clear].map(|r| Arg::Ptr(r.cloned().unwrap_or(Ref::Null)))
    }

    /// The end of a tensor-core kernel's name.
    pub(in crate::cuda) fn label(&self) -> String {
        format!(
            "{}{}{}",
            if self.factors().is_some() { "rms_" } else { "" },
            self.epilogue_macro()["EPI_".len()..].to_lowercase(),
            if self.sums.is_some() { "_sums" } else { "" }
        )
    }
}
