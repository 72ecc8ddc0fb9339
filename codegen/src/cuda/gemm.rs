//! Which kernel runs a GEMM step: the variant that was chosen by timing, else by the heuristics
//! weight-streaming GEMV up to 4 rows, skinny tensor-core GEMM up to 128, tiled GEMM above; and a
//! plain one for other element types and ragged sizes. The tensor-core kernels take a norm whose gamma
//! is in the weight as a factor a row; a norm that the kernel does not take is a launch of its own.

use super::choice::{GemmKey, Variant};
use super::context::{Context, Geometry};
use super::launch::{Arg, LibraryGemm, Ref, Sampling};
use super::norm::{self, Norm};
use super::row_sums::{self, Sums};
use super::source::{Body, Defines, literal};
use super::{CudaError, gemv, skinny, tiled};
use crate::plan::Operand;
use crate::work::{KernelClass, Work, WorkShape, gemm_flops};
use lathe_ir::Slot;
use lathe_ir::ops::{self, Sample, X, gemm};
use lathe_ir::{DType, Epilogue, Op, Prologue};

/// A GEMM step with its operands found.
#[derive(Clone)]
pub(super) struct Gemm {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) dtype: DType,
    pub(super) prologue: Prologue,
    pub(super) epilogue: Epilogue,
    pub(super) x: Ref,
    pub(super) w: Ref,
    pub(super) bias: Option<Ref>,
    pub(super) residual: Option<Ref>,
    pub(super) gamma: Ref,
    pub(super) delta: Ref,
    /// Where `x + delta` goes.
    pub(super) sum: Ref,
    pub(super) y: Ref,
    /// The result is the index of the largest output of each row, `i32 [M]`.
    pub(super) argmax: bool,
    /// The norm as a factor a row, of the tensor-core kernels.
    pub(super) row_scale: Option<RowScale>,
    /// The library may run in the kernel's place: it leaves no sums of squares.
    pub(super) replaceable: bool,
}

/// An RMSNorm without gamma that is applied to the accumulators.
#[derive(Clone)]
pub(super) struct RowScale {
    /// Sums of squares, `[M]` fixed-point numbers.
    pub(super) sums: Ref,
    pub(super) eps: f64,
}

impl Gemm {
    /// Output features.
    pub(super) fn features(&self) -> usize {
        if self.epilogue == Epilogue::SwiGlu {
            self.n / 2
        } else {
            self.n
        }
    }

    /// What the kernel moves, with the prologue if that is still its own; logits of a fused argmax are not written.
    fn work(&self) -> Work {
        let (rows, features) = (self.m * self.k, self.m * self.features());
        let prologue = match self.prologue {
            Prologue::None => 0,
            Prologue::Rms { .. } if self.gamma == Ref::Null => 0,
            Prologue::Rms { .. } => self.k,
            Prologue::AddRms { .. } => self.k + 2 * rows,
        };
        let bias = if self.bias.is_some() { self.n } else { 0 };
        let residual = if self.residual.is_some() { features } else { 0 };
        let out = if self.argmax { 0 } else { features };
        let elements = rows + self.n * self.k + prologue + bias + residual + out;
        let (m, n, k) = (self.m, self.n, self.k);
        let sums = match &self.row_scale {
            Some(_) => m * row_sums::SUM_BYTES,
            None => 0,
        };
        Work {
            class: KernelClass::Gemm,
            shape: WorkShape::Gemm { m, n, k },
            bytes: (elements * self.dtype.size() + sums) as f64,
            flops: gemm_flops(m, n, k),
        }
    }
}

/// Whether the step after this one samples its result greedily and nobody else wants it, so that
/// the kernel can keep the logits to itself.
pub(super) fn argmax_follows(cx: &Context<'_>) -> bool {
    let step = cx.step();
    let Op::Gemm(ops::Gemm {
        epilogue: Epilogue::None,
        ..
    }) = step.op
    else {
        return false;
    };
    let Some(next) = cx.program.steps.get(cx.at + 1) else {
        return false;
    };
    let logits = step.results.last().copied().flatten();
    let rows = step.tensor(gemm::X).map_or(0, |x| cx.matrix(x).0);
    cx.sampling == Sampling::GreedyOnly
        && next.op == Op::Sample(Sample)
        && matches!(next.get(X), Some(Operand::Value(v)) if Some(*v) == logits)
        && rows <= gemv::ROWS
        && cx.is_absent(gemm::BIAS)
        && !cx.options.plain
}

pub(super) fn step(cx: &mut Context<'_>, argmax: bool) -> Result<(), CudaError> {
    let gemm = operands(cx, argmax)?;
    run(cx, gemm)
}

/// The GEMM of the current step, if its kernel can be chosen.
pub(super) fn key(cx: &mut Context<'_>) -> Result<Option<GemmKey>, CudaError> {
    let argmax = argmax_follows(cx);
    let gemm = operands(cx, argmax)?;
    Ok(GemmKey::of(&gemm, cx.options.plain))
}

fn operands(cx: &mut Context<'_>, argmax: bool) -> Result<Gemm, CudaError> {
    let (x, w) = (cx.tensor(gemm::X)?, cx.tensor(gemm::W)?);
    let (m, k) = cx.matrix(x);
    let n = w.shape[0].eval(&cx.env) as usize;
    let spec = match cx.step().op {
        Op::Gemm(spec) => spec,
        _ => ops::Gemm::PLAIN,
    };
    let optional = |slot: Slot| match cx.is_absent(slot) {
        true => Ok(None),
        false => cx.operand(slot).map(Some),
    };
    let (bias, residual) = (optional(gemm::BIAS)?, optional(gemm::RESIDUAL)?);
    let (gamma, delta) = (optional(gemm::GAMMA)?, optional(gemm::DELTA)?);
    let added = matches!(spec.prologue, Prologue::AddRms { .. });
    let sum = match (added, cx.result_id(0)) {
        (false, _) => Ref::Null,
        (true, Some(v)) => Ref::Value(v),
        (true, None) => cx.work("sum", m * k * x.dtype.size(), None),
    };
    Ok(Gemm {
        m,
        n,
        k,
        dtype: x.dtype,
        prologue: spec.prologue,
        epilogue: spec.epilogue,
        x: cx.operand(gemm::X)?,
        w: cx.operand(gemm::W)?,
        bias,
        residual,
        gamma: gamma.unwrap_or(Ref::Null),
        delta: delta.unwrap_or(Ref::Null),
        sum,
        y: if argmax {
            Ref::Sampled
        } else {
            cx.result(usize::from(added))?
        },
        argmax,
        row_scale: None,
        replaceable: false,
    })
}

fn run(cx: &mut Context<'_>, mut g: Gemm) -> Result<(), CudaError> {
    let sms = cx.options.sms as usize;
    let key = GemmKey::of(&g, cx.options.plain);
    let variant = match &key {
        Some(key) => {
            let chosen = cx.choices.get(key);
            if let Some(v) = chosen {
                v.check(key, sms).map_err(|reason| cx.refuse(reason))?;
            }
            Some(chosen.unwrap_or_else(|| Variant::heuristic(key, sms)))
        }
        None if gemv::takes(&g) => Some(Variant::Gemv),
        None => None,
    };
    let fuses_norm = match variant {
        Some(Variant::Gemv) => gemv::takes_prologue(&g),
        Some(Variant::Skinny { .. } | Variant::Tiled(_)) => scale_rows(cx, &mut g),
        _ => false,
    };
    if g.prologue != Prologue::None && !fuses_norm {
        split_prologue(cx, &mut g)?;
    }
    let library = match (variant, key) {
        (Some(Variant::CublasLt { algorithm }), Some(key)) => {
            // The own kernel stays beside it for devices without the library.
            g.replaceable = true;
            own(cx, &g, Some((&key, Variant::heuristic(&key, sms))));
            Some(LibraryGemm {
                m: g.m,
                n: g.n,
                k: g.k,
                x: g.x.clone(),
                w: g.w.clone(),
                residual: g.residual.clone(),
                y: g.y.clone(),
                algorithm,
            })
        }
        (Some(Variant::Gemv), None) => {
            gemv::launch(cx, &g);
            None
        }
        (variant, key) => {
            own(cx, &g, key.as_ref().zip(variant));
            None
        }
    };
    if let Some(launch) = cx.launches.last_mut() {
        launch.work = g.work();
        launch.library = library;
    }
    Ok(())
}

/// One of the generated kernels, its variant checked before; the plain one without a variant.
fn own(cx: &mut Context<'_>, g: &Gemm, variant: Option<(&GemmKey, Variant)>) {
    let sms = cx.options.sms as usize;
    match variant {
        Some((_, Variant::Gemv)) => gemv::launch(cx, g),
        Some((
            key,
            Variant::Skinny {
                warpgroups,
                panels,
                even,
            },
        )) => {
            let shape = skinny::Shape::new(key, warpgroups, panels, even, sms);
            let shape = shape.expect("the variant was checked");
            skinny::launch(cx, g, &shape, warpgroups, panels);
        }
        Some((key, Variant::Tiled(tile))) => {
            let shape = tiled::Shape::new(key, tile, sms);
            tiled::launch(cx, g, &shape.expect("the variant was checked"));
        }
        Some((_, Variant::CublasLt { .. })) | None => plain(cx, g),
    }
}

/// Makes a norm without gamma a factor a row, if it can be one.
fn scale_rows(cx: &mut Context<'_>, g: &mut Gemm) -> bool {
    let (Prologue::Rms { eps }, Ref::Null) = (g.prologue, &g.gamma) else {
        return false;
    };
    if !row_sums::fits(g.k, g.dtype) || !row_sums::is_fine(eps) {
        return false;
    }
    let sums = row_sums::of_operand(cx, &g.x, g.m, g.k, g.dtype);
    g.row_scale = Some(RowScale {
        sums,
        eps: eps.get(),
    });
    g.prologue = Prologue::None;
    true
}

/// What a tensor-core kernel is told of norms.
pub(super) struct RowNorms {
    scale: Option<RowScale>,
    sums: Option<Sums>,
}

impl RowNorms {
    /// Those of the current step, whose kernel must then add up its rows if a later step wants that.
    pub(super) fn new(cx: &mut Context<'_>, g: &Gemm) -> RowNorms {
        let sums = match g.epilogue {
            // No norm follows gated features.
            Epilogue::SwiGlu => None,
            _ if g.replaceable => None,
            _ => row_sums::of_result(cx, &g.y, g.m, g.n, g.dtype),
        };
        RowNorms {
            scale: g.row_scale.clone(),
            sums,
        }
    }

    /// The macros.
    pub(super) fn define(&self, defines: Defines) -> Defines {
        let defines = defines
            .def("ROW_SCALE", u8::from(self.scale.is_some()))
            .def("ROW_SUMS", u8::from(self.sums.is_some()));
        match &self.scale {
            Some(s) => defines.def("LATHE_EPS", literal(s.eps)),
            None => defines,
        }
    }

    /// The parameters: sums of squares of the operand's rows, of the result's rows, and those to clear.
    pub(super) fn args(&self) -> [Arg; 3] {
        let read = self.scale.as_ref().map(|s| &s.sums);
        let (add, clear) = self.sums.as_ref().map(|s| (&s.add, &s.clear)).unzip();
        [read, add, clear].map(|r| Arg::Ptr(r.cloned().unwrap_or(Ref::Null)))
    }

    /// The end of the name of a kernel with this `EPI`.
    pub(super) fn label(&self, epi: &str) -> String {
        format!(
            "{}{}{}",
            if self.scale.is_some() { "rms_" } else { "" },
            epi["EPI_".len()..].to_lowercase(),
            if self.sums.is_some() { "_sums" } else { "" }
        )
    }
}

/// The norm as a launch of its own; the GEMM then reads its result.
fn split_prologue(cx: &mut Context<'_>, g: &mut Gemm) -> Result<(), CudaError> {
    let y = cx.work("normed", g.m * g.k * g.dtype.size(), None);
    let (eps, delta) = match g.prologue {
        Prologue::None => return Ok(()),
        Prologue::Rms { eps } => (eps, None),
        Prologue::AddRms { eps } => (eps, Some(g.delta.clone())),
    };
    norm::launch(
        cx,
        Norm {
            x: g.x.clone(),
            delta,
            gamma: g.gamma.clone(),
            y: y.clone(),
            sum: g.sum.clone(),
            rows: g.m,
            cols: g.k,
            eps: eps.get(),
            dtype: g.dtype,
        },
    )?;
    // The GEMM's own launch counts the weights; the norm moves rows: x and y, with `delta` also that and
    // the sum.
    if let Some(launch) = cx.launches.last_mut() {
        let tensors = if g.delta == Ref::Null { 2 } else { 4 };
        let gamma = usize::from(g.gamma != Ref::Null);
        let bytes = (tensors * g.m + gamma) * g.k * g.dtype.size();
        launch.work = Work::rows(KernelClass::Pointwise, g.m, g.k, bytes);
    }
    g.x = y;
    g.prologue = Prologue::None;
    Ok(())
}

fn plain(cx: &mut Context<'_>, g: &Gemm) {
    let epilogue = match g.epilogue {
        Epilogue::None => 0,
        Epilogue::Residual => 2,
        Epilogue::SwiGlu => 3,
    };
    let defines = cx
        .defines(g.dtype)
        .def("LATHE_EPI", epilogue)
        .def("LATHE_BIAS", u8::from(g.bias.is_some()));
    let bias = if g.bias.is_some() { "_bias" } else { "" };
    let label = format!("{}{bias}_{}", epilogue_name(g.epilogue), g.dtype);
    let args = vec![
        Arg::Ptr(g.x.clone()),
        Arg::Ptr(g.w.clone()),
        Arg::Ptr(g.bias.clone().unwrap_or(Ref::Null)),
        Arg::Ptr(g.residual.clone().unwrap_or(Ref::Null)),
        Arg::Ptr(g.y.clone()),
        Arg::I32(g.m as i32),
        Arg::I32(g.n as i32),
        Arg::I32(g.k as i32),
    ];
    let grid = [g.n.div_ceil(64), g.m.div_ceil(64), 1];
    cx.launch(
        Body::LinearPlain,
        &label,
        defines,
        Geometry::new(grid, 256, 0),
        args,
    );
}

/// The epilogue in kernel names.
pub(super) fn epilogue_name(e: Epilogue) -> &'static str {
    match e {
        Epilogue::None => "none",
        Epilogue::Residual => "residual",
        Epilogue::SwiGlu => "swiglu",
    }
}

/// `EPI` of the tensor-core kernels.
pub(super) fn epilogue_macro(g: &Gemm) -> &'static str {
    match (g.epilogue, g.bias.is_some()) {
        (Epilogue::None, false) => "EPI_NONE",
        (Epilogue::None, true) => "EPI_BIAS",
        (Epilogue::Residual, false) => "EPI_RESIDUAL",
        (Epilogue::Residual, true) => "EPI_BIAS_RESIDUAL",
        (Epilogue::SwiGlu, _) => "EPI_SWIGLU",
    }
}
