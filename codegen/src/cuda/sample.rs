//! Sampling of the next tokens.

use super::context::{Context, Geometry};
use super::error::CudaError;
use super::launch::{Arg, Meta, Ref, Sampling};
use super::source::Body;
use lathe_ir::ops::X;

pub(super) fn step(cx: &mut Context<'_>) -> Result<(), CudaError> {
    let logits = cx.tensor(X)?;
    let (rows, vocab) = cx.matrix(logits);
    let greedy = cx.sampling != Sampling::Params;
    let defines = cx
        .defines(logits.dtype)
        .def("LATHE_V", vocab)
        .def("LATHE_GREEDY", u8::from(greedy));
    let label = format!(
        "{}{vocab}_{}",
        if greedy { "greedy_" } else { "" },
        logits.dtype
    );
    let meta = |m| Arg::Ptr(Ref::Meta(m));
    let args = vec![
        Arg::Ptr(cx.operand(X)?),
        meta(Meta::Temperature),
        meta(Meta::TopK),
        meta(Meta::TopP),
        meta(Meta::Seed),
        meta(Meta::Request),
        meta(Meta::SamplePositions),
        Arg::Ptr(Ref::Sampled),
        Arg::I32(rows as i32),
    ];
    cx.launch(
        Body::Sample,
        &label,
        defines,
        Geometry::new([rows, 1, 1], 1024, 0),
        args,
    );
    Ok(())
}
