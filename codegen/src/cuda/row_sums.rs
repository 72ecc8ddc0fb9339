//! Sums of squares of rows: their buffers and the kernel that makes them where no other does.

use super::context::{Call, Context, Geometry, row_threads};
use super::launch::{Arg, Ref};
use super::source::Body;
use crate::work::{KernelClass, Work};
use lathe_ir::DType;

/// Bytes of a sum of squares, a fixed-point number.
pub(super) const SUM_BYTES: usize = 8;

/// One of the buffers of sums. It needs no contents: every step begins with sums that are stored.
pub(super) fn buffer(cx: &mut Context<'_>, which: usize, rows: usize) -> Ref {
    cx.work(&format!("row_sums.{which}"), rows * SUM_BYTES, None)
}

/// Stores the sums of the rows of `x`, and clears as many of another buffer.
pub(super) fn launch(
    cx: &mut Context<'_>,
    x: &Ref,
    sums: &Ref,
    clear: Option<Ref>,
    (rows, cols): (usize, usize),
    dtype: DType,
) {
    let threads = row_threads(cols, dtype);
    let defines = cx
        .defines(dtype)
        .def("LATHE_K", cols)
        .def("LATHE_THREADS", threads);
    let args = vec![
        Arg::Ptr(x.clone()),
        Arg::Ptr(sums.clone()),
        Arg::Ptr(clear.unwrap_or(Ref::Null)),
        Arg::I32(rows as i32),
    ];
    let bytes = rows * (cols * dtype.size() + SUM_BYTES);
    cx.call(Call {
        body: Body::RowSums,
        label: &format!("{cols}_{dtype}"),
        defines,
        geometry: Geometry::new([rows, 1, 1], threads, 0),
        args,
        work: Some(Work::rows(KernelClass::Pointwise, rows, cols, bytes)),
        library: None,
    });
}
