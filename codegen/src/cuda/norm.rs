//! RMSNorm, with or without the residual sum before it.

use super::context::{Call, Context, Geometry, row_threads};
use super::error::CudaError;
use super::launch::{Arg, Ref};
use super::source::{Body, literal};
use crate::work::Work;
use lathe_ir::ops::{AddRms, RmsNorm};
use lathe_ir::ops::{addrms, rmsnorm};
use lathe_ir::{DType, Op};

/// A norm over rows; with `delta` of `x + delta`, which goes to `sum`.
pub(super) struct Norm {
    pub(super) x: Ref,
    pub(super) delta: Option<Ref>,
    /// Null if it is 1.
    pub(super) gamma: Ref,
    pub(super) y: Ref,
    pub(super) sum: Ref,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) eps: f64,
    pub(super) dtype: DType,
}

pub(super) fn step(cx: &mut Context<'_>) -> Result<(), CudaError> {
    let x = cx.tensor(rmsnorm::X)?;
    let (rows, cols) = cx.matrix(x);
    let bytes = rows * cols * x.dtype.size();
    let norm = match cx.step().op {
        Op::RmsNorm(RmsNorm { eps }) => Norm {
            x: cx.operand(rmsnorm::X)?,
            delta: None,
            gamma: cx.operand(rmsnorm::GAMMA)?,
            y: cx.result(0)?,
            sum: Ref::Null,
            rows,
            cols,
            eps: eps.get(),
            dtype: x.dtype,
        },
        Op::AddRms(AddRms { eps }) => Norm {
            x: cx.operand(addrms::X)?,
            delta: Some(cx.operand(addrms::DELTA)?),
            gamma: cx.operand(addrms::GAMMA)?,
            y: match cx.result_id(1) {
                Some(v) => Ref::Value(v),
                None => cx.work("unread", bytes, None),
            },
            sum: match cx.result_id(0) {
                Some(v) => Ref::Value(v),
                None => cx.work("sum", bytes, None),
            },
            rows,
            cols,
            eps: eps.get(),
            dtype: x.dtype,
        },
        _ => return Err(cx.refuse("it is no norm")),
    };
    let work = cx.step_work();
    launch(cx, norm, work);
    Ok(())
}

/// Launches a norm, which does this work.
pub(super) fn launch(cx: &mut Context<'_>, n: Norm, work: Work) {
    let vectors = (n.cols * n.dtype.size()).is_multiple_of(16);
    let threads = row_threads(n.cols, n.dtype);
    let label = format!(
        "{}{}{}_{}",
        if n.delta.is_some() { "add_" } else { "" },
        if n.gamma == Ref::Null { "plain_" } else { "" },
        n.cols,
        n.dtype
    );
    let defines = cx
        .defines(n.dtype)
        .def("LATHE_K", n.cols)
        .def("LATHE_VECTORS", u8::from(vectors))
        .def("LATHE_ADD", u8::from(n.delta.is_some()))
        .def("LATHE_NO_GAMMA", u8::from(n.gamma == Ref::Null))
        .def("LATHE_EPS", literal(n.eps))
        .def("LATHE_THREADS", threads);
    let args = vec![
        Arg::Ptr(n.x),
        Arg::Ptr(n.delta.unwrap_or(Ref::Null)),
        Arg::Ptr(n.gamma),
        Arg::Ptr(n.y),
        Arg::Ptr(n.sum),
        Arg::I32(n.rows as i32),
    ];
    cx.call(Call {
        body: Body::Norm,
        label: &label,
        defines,
        geometry: Geometry::new([n.rows, 1, 1], threads, 0),
        args,
        work: Some(work),
        library: None,
    });
}
