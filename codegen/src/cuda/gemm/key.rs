//! What the choice of a GEMM's kernel depends on.

use lathe_ir::{DType, Epilogue, Slot};
use std::fmt;

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
    /// Whether cuBLASLt computes it: no epilogue but a residual, which it adds as C.
    pub fn is_library_gemm(&self) -> bool {
        !self.bias && self.epilogue != Epilogue::SwiGlu
    }
}

impl fmt::Display for GemmKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let norm = if self.norm { "_norm" } else { "" };
        let bias = if self.bias { "_bias" } else { "" };
        write!(
            f,
            "m{}_n{}_k{}{norm}{bias}_{}",
            self.m,
            self.n,
            self.k,
            epilogue_name(self.epilogue)
        )
    }
}

/// The epilogue in kernel names.
pub(in crate::cuda) fn epilogue_name(e: Epilogue) -> &'static str {
    match e {
        Epilogue::None => "none",
        Epilogue::Residual => "residual",
        Epilogue::SwiGlu => "swiglu",
    }
}

/// A GEMM of any element type: what a family of kernels is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Its sizes, norm, epilogue and bias.
    pub key: GemmKey,
    /// Element type of all operands.
    pub dtype: DType,
    /// Whether the result is the index of the largest output of each row rather than the outputs.
    pub argmax: bool,
    /// Operands that a family takes only if it says so.
    pub beside: Beside,
}

/// Operands beside those that every family of kernels takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// A bit a slot.
    slots: u32,
    /// Bytes of them.
    bytes: usize,
}

impl Beside {
    /// Adds an operand of so many bytes.
    pub(in crate::cuda) fn add(&mut self, slot: Slot, bytes: usize) {
        self.slots |= 1 << slot.index();
        self.bytes += bytes;
    }

    /// Whether there are none but these.
    pub(in crate::cuda) fn is_within(self, taken: &[Slot]) -> bool {
        let taken = taken.iter().fold(0, |all, s| all | 1 << s.index());
        self.slots & !taken == 0
    }

    /// Bytes of them all.
    pub(in crate::cuda) fn bytes(self) -> usize {
        self.bytes
    }
}

impl Problem {
    /// The GEMM that a key stands for.
    pub(in crate::cuda) fn of_key(key: &GemmKey) -> Problem {
        Problem {
            key: *key,
            dtype: DType::BF16,
            argmax: false,
            beside: Beside::default(),
        }
    }

    /// Whether the tensor-core kernels compute it: bf16, sizes that they take, and no argmax. Their SwiGLU takes
    /// no bias.
    pub(in crate::cuda) fn is_tensor_core(&self) -> bool {
        let GemmKey { n, k, .. } = self.key;
        let sizes = n.is_multiple_of(8) && k.is_multiple_of(8);
        let biased = self.key.bias && self.key.epilogue == Epilogue::SwiGlu;
        self.dtype == DType::BF16 && sizes && !biased && !self.argmax
    }

    /// The columns of the result.
    pub(in crate::cuda) fn features(&self) -> usize {
        match self.key.epilogue {
            Epilogue::SwiGlu => self.key.n / 2,
            _ => self.key.n,
        }
    }
}
