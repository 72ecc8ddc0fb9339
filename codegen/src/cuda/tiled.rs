//! The tiled tensor-core GEMM for more than 128 rows: choice of the tile, specialisation and
//! geometry of `gemm.cu`.

use super::context::{Context, Geometry, matrix_map};
use super::gemm::{Gemm, epilogue_macro};
use super::launch::{Arg, Ref};
use super::source::Body;
use lathe_ir::Epilogue;

/// Shared memory that a block may have.
const SHARED: usize = 232_448;
/// Consumer warpgroups, 64 rows each.
const CWG: usize = 2;
const BM: usize = 64 * CWG;
/// Cluster rows walked together before the next columns.
const GROUP_M: usize = 8;

/// Columns of a tile and blocks of a cluster along M, by the estimated time: whole waves of tiles,
/// each of `BN` columns plus what every tile costs whatever its width.
fn tile(m: usize, n: usize, sms: usize, swiglu: bool) -> (usize, usize) {
    let mut best = (f64::INFINITY, 128, 1);
    for bn in [64, 96, 128, 160, 192, 224, 256] {
        if swiglu && bn % 32 != 0 {
            continue;
        }
        for cluster in [1, 2] {
            let rows = m.div_ceil(BM).div_ceil(cluster);
            let tiles = rows * n.div_ceil(bn);
            let waves = tiles.div_ceil(sms / cluster) as f64;
            // A single row of tiles has nothing to share; sharing W saves L2 reads.
            let sharing = if cluster == 2 { 0.98 } else { 1.0 };
            let time = waves * (bn as f64 + 24.0) * sharing;
            if time < best.0 {
                best = (time, bn, cluster);
            }
        }
    }
    (best.1, best.2)
}

/// Rows of a TMA box: the largest multiple of 8 that divides `part` and leaves no box far out of
/// bounds.
fn box_rows(total: usize, part: usize) -> usize {
    (1..=part / 8)
        .rev()
        .map(|i| 8 * i)
        .find(|&b| {
            part.is_multiple_of(b) && total.next_multiple_of(b) == total.next_multiple_of(16)
        })
        .unwrap_or(8)
}

pub(super) fn launch(cx: &mut Context<'_>, g: &Gemm) {
    let swiglu = g.epilogue == Epilogue::SwiGlu;
    let sms = cx.options.sms as usize;
    let (bn, cluster) = tile(g.m, g.n, sms, swiglu);
    let out_bn = if swiglu { bn / 2 } else { bn };
    let pw = [64, 32, 16]
        .into_iter()
        .find(|p| out_bn % p == 0)
        .unwrap_or(16);
    let fixed = CWG * 2 * 128 * pw + 16;
    let slot = (BM + bn) * 128 + 16;
    let stages = ((SHARED - fixed) / slot).min(8);
    let shared = stages * slot + fixed;
    let tiles = g.m.div_ceil(BM).div_ceil(cluster) * g.n.div_ceil(bn);
    let grid = tiles.min(sms / cluster) * cluster;
    let (a_box, w_box) = (box_rows(g.m, BM), box_rows(g.n, bn / cluster));
    let epi = epilogue_macro(g);
    let label = format!(
        "{BM}x{bn}_c{cluster}_{}",
        epi["EPI_".len()..].to_lowercase()
    );
    let defines = cx
        .defines(g.dtype)
        .def("BN", bn)
        .def("CWG", CWG)
        .def("STAGES", stages)
        .def("CLUSTER_M", cluster)
        .def("CLUSTER_N", 1)
        .def("GROUP_M", GROUP_M)
        .def("EPI", epi)
        .def("OUT_F32", 0);
    let out = g.features();
    let c = matrix_map(g.y.clone(), g.m, out, 64, pw);
    let residual = match &g.residual {
        Some(r) => matrix_map(r.clone(), g.m, out, BM, pw),
        None => c.clone(),
    };
    let args = vec![
        matrix_map(g.x.clone(), g.m, g.k, a_box, 64),
        matrix_map(g.w.clone(), g.n, g.k, w_box, 64),
        c,
        residual,
        Arg::Ptr(Ref::Null),
        Arg::Ptr(g.bias.clone().unwrap_or(Ref::Null)),
        Arg::I32(g.m as i32),
        Arg::I32(g.n as i32),
        Arg::I32(g.k as i32),
        Arg::I32(a_box as i32),
        Arg::I32(w_box as i32),
    ];
    let mut geometry = Geometry::new([grid, 1, 1], 128 * (CWG + 1), shared);
    geometry.cluster = cluster as u32;
    cx.launch(Body::Gemm, &label, defines, geometry, args);
}
