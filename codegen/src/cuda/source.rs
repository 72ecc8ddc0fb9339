//! Kernel text: defines, the common prelude and one of the files of `kernels/`.

use indexmap::IndexMap;
use lathe_ir::DType;
use std::fmt::Write;

const PRELUDE: &str = include_str!("kernels/prelude.cuh");
const HOPPER: &str = include_str!("kernels/hopper.cuh");

/// One module of CUDA C with one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSource {
    /// Name of the module and of its entry.
    pub name: String,
    /// The family, one of [`FAMILIES`] or the probe of the machine's ceilings.
    pub family: &'static str,
    /// The whole text, header-free.
    pub text: String,
}

impl KernelSource {
    /// The text behind the comments that name where the kernel comes from. Kernels of different ops
    /// or models with equal code are one kernel.
    pub fn code(&self) -> &str {
        let start = self.text.find("#define LATHE_NAME").unwrap_or(0);
        &self.text[start..]
    }
}

/// The kernel families, each a file of `kernels/`.
pub const FAMILIES: [&str; 18] = [
    "attn_decode",
    "attn_plain",
    "attn_plan",
    "attn_prefill",
    "chain",
    "embed",
    "gemm",
    "gemv",
    "kv_append",
    "linear_plain",
    "norm",
    "plain",
    "rope",
    "rope_append",
    "row_sums",
    "sample",
    "skinny",
    "tokens",
];

/// A file of `kernels/`, in the order of [`FAMILIES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Body {
    AttnDecode,
    AttnPlain,
    AttnPlan,
    AttnPrefill,
    Chain,
    Embed,
    Gemm,
    Gemv,
    KvAppend,
    LinearPlain,
    Norm,
    Plain,
    Rope,
    RopeAppend,
    RowSums,
    Sample,
    Skinny,
    Tokens,
    /// No part of a plan.
    Probe,
}

impl Body {
    fn text(self) -> &'static str {
        match self {
            Body::AttnDecode => include_str!("kernels/attn_decode.cu"),
            Body::AttnPlain => include_str!("kernels/attn_plain.cu"),
            Body::AttnPlan => include_str!("kernels/attn_plan.cu"),
            Body::AttnPrefill => include_str!("kernels/attn_prefill.cu"),
            Body::Chain => include_str!("kernels/chain.cu"),
            Body::Embed => include_str!("kernels/embed.cu"),
            Body::Gemm => include_str!("kernels/gemm.cu"),
            Body::Gemv => include_str!("kernels/gemv.cu"),
            Body::KvAppend => include_str!("kernels/kv_append.cu"),
            Body::LinearPlain => include_str!("kernels/linear_plain.cu"),
            Body::Norm => include_str!("kernels/norm.cu"),
            Body::Plain => include_str!("kernels/plain.cu"),
            Body::Probe => include_str!("kernels/probe.cu"),
            Body::Rope => include_str!("kernels/rope.cu"),
            Body::RopeAppend => include_str!("kernels/rope_append.cu"),
            Body::RowSums => include_str!("kernels/row_sums.cu"),
            Body::Sample => include_str!("kernels/sample.cu"),
            Body::Skinny => include_str!("kernels/gemm_skinny.cu"),
            Body::Tokens => include_str!("kernels/tokens.cu"),
        }
    }

    fn needs_hopper(self) -> bool {
        matches!(self, Body::AttnPrefill | Body::Gemm | Body::Skinny)
    }

    fn name(self) -> &'static str {
        FAMILIES.get(self as usize).copied().unwrap_or("probe")
    }
}

/// The texts of some bodies with what they include.
pub(super) fn text_of(bodies: &[Body]) -> String {
    let texts = bodies.iter().map(|b| b.text());
    [PRELUDE, HOPPER].into_iter().chain(texts).collect()
}

/// The macros that specialise a kernel, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Defines(Vec<(String, String)>);

impl Defines {
    /// The element type of the kernel.
    pub(super) fn new(dtype: DType) -> Defines {
        let code = match dtype {
            DType::BF16 => 1,
            DType::F16 => 2,
            _ => 0,
        };
        Defines::default().def("LATHE_DTYPE", code)
    }

    pub(super) fn def(mut self, name: &str, value: impl ToString) -> Defines {
        self.0.push((name.to_owned(), value.to_string()));
        self
    }
}

/// Kernels under construction: equal ones are shared, and each remembers who asked for it.
#[derive(Debug, Default)]
pub(super) struct Kernels(IndexMap<(Body, String, Defines), Vec<String>>);

impl Kernels {
    /// The index of the kernel, made if it is new. `label` tells variants of a family apart.
    pub(super) fn get(
        &mut self,
        body: Body,
        label: &str,
        defines: Defines,
        origin: String,
    ) -> usize {
        let entry = self.0.entry((body, label.to_owned(), defines));
        let index = entry.index();
        let origins = entry.or_default();
        if !origins.contains(&origin) {
            origins.push(origin);
        }
        index
    }

    /// The final texts.
    pub(super) fn finish(self) -> Vec<KernelSource> {
        self.0
            .into_iter()
            .map(|((body, label, defines), origins)| {
                let name = match label.is_empty() {
                    true => body.name().to_owned(),
                    false => format!("{}_{label}", body.name()),
                };
                let mut text = String::new();
                for origin in &origins {
                    let _ = writeln!(text, "// {origin}");
                }
                let _ = writeln!(text, "#define LATHE_NAME {name}");
                for (key, value) in &defines.0 {
                    let _ = writeln!(text, "#define {key} {value}");
                }
                text.push_str(PRELUDE);
                if body.needs_hopper() {
                    text.push_str(HOPPER);
                }
                text.push_str(body.text());
                KernelSource {
                    name,
                    family: body.name(),
                    text,
                }
            })
            .collect()
    }
}

/// The C type in which the kernels store elements.
pub(super) fn c_type(dtype: DType) -> &'static str {
    match dtype {
        DType::Bool => "b8",
        DType::I32 => "i32",
        DType::I64 => "i64",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::F32 => "float",
    }
}

/// An f32 literal.
pub(super) fn literal(v: f64) -> String {
    let v = v as f32;
    if v.is_nan() {
        "__int_as_float(0x7fc00000)".into()
    } else if v.is_infinite() {
        let bits = if v > 0.0 { "0x7f800000" } else { "0xff800000" };
        format!("__int_as_float({bits})")
    } else {
        format!("{v:?}f")
    }
}
