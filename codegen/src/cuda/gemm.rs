//! Which kernel runs a GEMM step: weight-streaming GEMV up to 4 rows, skinny tensor-core GEMM up to
//! 128, tiled GEMM above, and a plain one for other element types and ragged sizes. A norm prologue
//! that the kernel does not take becomes a launch of its own.

use super::context::{Context, Geometry};
use super::launch::{Arg, Ref, Sampling};
use super::norm::{self, Norm};
use super::source::Body;
use super::{CudaError, gemv, skinny, tiled};
use crate::plan::Operand;
use lathe_ir::{DType, Epilogue, GemmSpec, Op, Prologue};

/// Most rows of the weight-streaming kernel.
const GEMV_ROWS: usize = 4;
/// Most rows of the skinny kernel.
const SKINNY_ROWS: usize = 128;

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

    fn flops(&self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }
}

/// Whether the step after this one samples its result greedily and nobody else wants it, so that
/// the kernel can keep the logits to itself.
pub(super) fn argmax_follows(cx: &Context<'_>) -> bool {
    let step = cx.step();
    let Op::Gemm(GemmSpec {
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
    let rows = step.tensor(0).map_or(0, |x| cx.matrix(x).0);
    cx.sampling == Sampling::GreedyOnly
        && next.op == Op::Sample
        && matches!(next.operands[0], Operand::Value(v) if Some(v) == logits)
        && rows <= GEMV_ROWS
        && cx.is_absent(2)
        && !cx.options.plain
}

pub(super) fn step(cx: &mut Context<'_>, argmax: bool) -> Result<(), CudaError> {
    let (x, w) = (cx.tensor(0)?, cx.tensor(1)?);
    let (m, k) = cx.matrix(x);
    let n = w.shape[0].eval(&cx.env) as usize;
    let spec = match cx.step().op {
        Op::Gemm(spec) => spec,
        _ => GemmSpec::PLAIN,
    };
    let is_gemm = matches!(cx.step().op, Op::Gemm(_));
    let optional = |i: usize| match is_gemm && !cx.is_absent(i) {
        true => cx.operand(i).map(Some),
        false => Ok(None),
    };
    let (bias, residual) = (optional(2)?, optional(3)?);
    let (gamma, delta) = (optional(4)?, optional(5)?);
    let added = matches!(spec.prologue, Prologue::AddRms { .. });
    let sum = match (added, cx.result_id(0)) {
        (false, _) => Ref::Null,
        (true, Some(v)) => Ref::Value(v),
        (true, None) => cx.work("sum", m * k * x.dtype.size(), None),
    };
    let gemm = Gemm {
        m,
        n,
        k,
        dtype: x.dtype,
        prologue: spec.prologue,
        epilogue: spec.epilogue,
        x: cx.operand(0)?,
        w: cx.operand(1)?,
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
    };
    run(cx, gemm)
}

fn run(cx: &mut Context<'_>, mut g: Gemm) -> Result<(), CudaError> {
    let flops = g.flops();
    let streams = g.m <= GEMV_ROWS && gemv::takes(&g);
    let prologue_fits = streams && gemv::takes_prologue(&g);
    if g.prologue != Prologue::None && !prologue_fits {
        split_prologue(cx, &mut g)?;
    }
    let matrix_cores = g.dtype == DType::BF16
        && !cx.options.plain
        && g.n.is_multiple_of(8)
        && g.k.is_multiple_of(8)
        // Their SwiGLU takes no bias.
        && (g.bias.is_none() || g.epilogue != Epilogue::SwiGlu);
    if streams {
        gemv::launch(cx, &g);
    } else if matrix_cores && g.m <= SKINNY_ROWS {
        skinny::launch(cx, &g);
    } else if matrix_cores {
        tiled::launch(cx, &g);
    } else {
        plain(cx, &g);
    }
    if let Some(launch) = cx.launches.last_mut() {
        launch.flops = flops;
    }
    Ok(())
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
    // The GEMM's own launch counts the weights; the norm moves only rows.
    if let Some(launch) = cx.launches.last_mut() {
        launch.bytes = (3 * g.m * g.k * g.dtype.size()) as f64;
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
