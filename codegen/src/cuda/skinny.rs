//! The tensor-core GEMM of at most 128 rows with swapped operands: specialisation and geometry of
//! `gemm_skinny.cu`.

use super::context::{Context, Geometry, matrix_map};
use super::gemm::{Gemm, epilogue_macro};
use super::launch::{Arg, Ref};
use super::source::Body;
use lathe_ir::Epilogue;

/// Shared memory that a block may have.
const SHARED: usize = 232_448;

pub(super) fn launch(cx: &mut Context<'_>, g: &Gemm) {
    let nt = [8, 16, 24, 32, 48, 64, 96, 128]
        .into_iter()
        .find(|&nt| nt >= g.m)
        .unwrap_or(128);
    // One warpgroup and wide slots for few tokens; two where the token tile is as large as the weights'.
    let (cwg, kp) = if nt <= 32 { (1, 2) } else { (2, 1) };
    let rows = 64 * cwg;
    let features = if g.epilogue == Epilogue::SwiGlu {
        32
    } else {
        64
    };
    let tc = match nt {
        nt if nt <= 32 => nt,
        nt if nt % 32 == 0 => 32,
        _ => 16,
    };
    let staging = cwg * tc * (features + 4) * 4;
    let slot = kp * (rows + nt) * 128 + 16;
    let stages = ((SHARED - staging) / slot).min(10);
    let shared = stages * slot + staging;
    let units = g.n.div_ceil(rows) * g.k.div_ceil(64 * kp);
    let grid = units.min(cx.options.sms as usize);
    let partial = cx.work("skinny.partial", grid * rows * nt * 4, Some(u32::MAX));
    let epi = epilogue_macro(g);
    let defines = cx
        .defines(g.dtype)
        .def("NT", nt)
        .def("CWG", cwg)
        .def("KP", kp)
        .def("STAGES", stages)
        .def("MIN_CTAS", 1)
        .def("EPI", epi)
        .def("OUT_F32", 0)
        .def("EVICT_FIRST", 1);
    let label = format!("t{nt}_{}", epi["EPI_".len()..].to_lowercase());
    let out = g.features() as i32;
    let args = vec![
        matrix_map(g.w.clone(), g.n, g.k, rows, 64),
        matrix_map(g.x.clone(), g.m, g.k, g.m.next_multiple_of(8), 64),
        Arg::Ptr(g.y.clone()),
        Arg::Ptr(g.bias.clone().unwrap_or(Ref::Null)),
        Arg::Ptr(g.residual.clone().unwrap_or(Ref::Null)),
        Arg::Ptr(partial),
        Arg::Ptr(Ref::Null),
        Arg::I32(g.m as i32),
        Arg::I32(g.n as i32),
        Arg::I32(g.k as i32),
        Arg::I32(out),
        Arg::I32(out),
    ];
    let geometry = Geometry::new([grid, 1, 1], 128 * (cwg + 1), shared);
    cx.launch(Body::Skinny, &label, defines, geometry, args);
}
