//! Norms as factors: what a GEMM needs to know of its rows in order to do without a norm before it.
//!
//! A tensor-core GEMM whose weight has gamma in its columns takes an RMSNorm as one factor a row. It needs
//! the row's sum of squares, which the kernel that writes the rows adds up while it has them in registers.
//! Two buffers take turns: a kernel adds to one and clears the other for the next, whose readers are over
//! by then. The first rows of a step get their sums from a kernel that stores them, so that nothing is
//! carried from one step to the next.

use super::context::{Context, Geometry};
use super::launch::{Arg, Ref};
use super::norm::row_threads;
use super::source::Body;
use crate::plan::{Operand, Step, ValueId};
use crate::work::{KernelClass, Work};
use lathe_ir::ops::gemm;
use lathe_ir::{DType, Op, Prologue, Real};

/// Bytes of a sum of squares, a fixed-point number.
pub(super) const SUM_BYTES: usize = 8;

/// Which sums of squares there are.
#[derive(Debug, Default)]
pub(super) struct RowSums {
    latest: Option<Latest>,
}

/// The sums that were made last.
#[derive(Clone, Copy, Debug)]
struct Latest {
    value: ValueId,
    /// The buffer that has them. As many rows of the other are clear.
    which: usize,
    rows: usize,
}

/// Where a kernel adds the sums of its rows, and what it clears.
#[derive(Clone, Debug)]
pub(super) struct Sums {
    pub(super) add: Ref,
    pub(super) clear: Ref,
}

/// Whether the tensor-core kernels can add up rows of so many columns.
pub(super) fn fits(cols: usize, dtype: DType) -> bool {
    dtype == DType::BF16 && cols.is_multiple_of(64)
}

/// Least `eps` for which sums in steps of 2^-20 are fine enough. Each part of a row, 64 columns or more, is
/// rounded by at most 2^-21, so a mean square is off by at most 2^-27 = 7.5e-9. With the 1e-6 of many models
/// that is 0.75 % of `eps`, to which it is added.
const LEAST_EPS: f64 = 5e-7;

/// Whether a norm can be taken as factors, as far as `eps` goes.
pub(super) fn is_fine(eps: Real) -> bool {
    eps.get() >= LEAST_EPS
}

/// Whether a step takes the norm of a value as factors, if its kernel can.
fn takes_factors(step: &Step, value: ValueId) -> bool {
    matches!(&step.op, Op::Gemm(spec) if matches!(spec.prologue, Prologue::Rms { eps } if is_fine(eps)))
        && step.get(gemm::X) == Some(&Operand::Value(value))
        && step.get(gemm::GAMMA).is_none()
}

/// Whether a step from number `from` on may read the sums of a value.
fn is_read_from(cx: &Context<'_>, from: usize, value: ValueId) -> bool {
    let steps = &cx.program.steps[from..];
    steps.iter().any(|s| takes_factors(s, value))
}

fn buffer(cx: &mut Context<'_>, which: usize, rows: usize) -> Ref {
    // It needs no contents: every step begins with sums that are stored.
    cx.work(&format!("row_sums.{which}"), rows * SUM_BYTES, None)
}

/// The sums of squares of the rows of an operand: those that its kernel has left, or else those of a
/// kernel that is launched here.
pub(super) fn of_operand(
    cx: &mut Context<'_>,
    x: &Ref,
    rows: usize,
    cols: usize,
    dtype: DType,
) -> Ref {
    let value = match x {
        Ref::Value(v) => Some(*v),
        _ => None,
    };
    let latest = cx.row_sums.latest;
    // A view with other rows has other sums.
    if let Some(l) = latest
        && value == Some(l.value)
        && l.rows == rows
    {
        return buffer(cx, l.which, rows);
    }
    // Sums that somebody still waits for stay where they are.
    let waited_for = latest.is_some_and(|l| is_read_from(cx, cx.at, l.value));
    let (sums, clear) = match value {
        Some(value) if !waited_for => {
            let which = latest.map_or(0, |l| 1 - l.which);
            cx.row_sums.latest = Some(Latest { value, which, rows });
            (buffer(cx, which, rows), buffer(cx, 1 - which, rows))
        }
        _ => (buffer(cx, 2, rows), Ref::Null),
    };
    let threads = row_threads(cols, dtype);
    let defines = cx
        .defines(dtype)
        .def("LATHE_K", cols)
        .def("LATHE_THREADS", threads);
    let args = vec![
        Arg::Ptr(x.clone()),
        Arg::Ptr(sums.clone()),
        Arg::Ptr(clear),
        Arg::I32(rows as i32),
    ];
    let geometry = Geometry::new([rows, 1, 1], threads, 0);
    let label = format!("{cols}_{dtype}");
    let launch = cx.launch(Body::RowSums, &label, defines, geometry, args);
    let bytes = rows * (cols * dtype.size() + SUM_BYTES);
    launch.work = Work::rows(KernelClass::Pointwise, rows, cols, bytes);
    sums
}

/// Where the kernel of the current step has to add up the rows of its result, if a later step takes their
/// norm as factors. The caller's kernel must then do so.
pub(super) fn of_result(
    cx: &mut Context<'_>,
    result: &Ref,
    rows: usize,
    cols: usize,
    dtype: DType,
) -> Option<Sums> {
    let Ref::Value(value) = *result else {
        return None;
    };
    // Without sums in this step so far no buffer is known to be clear; what somebody reads is not cleared.
    let Latest { which, .. } = cx
        .row_sums
        .latest
        .filter(|l| l.rows == rows && !is_read_from(cx, cx.at, l.value))?;
    if !fits(cols, dtype) || !is_read_from(cx, cx.at + 1, value) {
        return None;
    }
    let (add, clear) = (1 - which, which);
    cx.row_sums.latest = Some(Latest {
        value,
        which: add,
        rows,
    });
    Some(Sums {
        add: buffer(cx, add, rows),
        clear: buffer(cx, clear, rows),
    })
}
