//! The tensor-core GEMM of at most 128 rows with swapped operands: specialisation and geometry of
//! `gemm_skinny.cu`.

use super::choice::{GemmKey, Variant};
use super::context::{Context, Geometry, SHARED, matrix_map};
use super::gemm::{Gemm, RowNorms, epilogue_macro};
use super::launch::{Arg, Ref};
use super::source::Body;
use lathe_ir::Epilogue;

/// Most rows.
pub(super) const ROWS: usize = 128;

/// Warpgroups and panels of a slot that variants have.
pub(super) const FORMS: [(usize, usize); 5] = [(1, 2), (2, 1), (1, 1), (2, 2), (1, 4)];

/// Geometry of a variant by the formulas at the top of `gemm_skinny.cu`.
pub(super) struct Shape {
    /// Tokens that the kernel can take.
    nt: usize,
    /// Rows of the weights in a tile.
    rows: usize,
    stages: usize,
    shared: usize,
    grid: usize,
}

/// Tokens of the smallest kernel that takes `m` rows.
fn tokens(m: usize) -> Option<usize> {
    [8, 16, 24, 32, 48, 64, 96, 128]
        .into_iter()
        .find(|&nt| nt >= m)
}

/// What was best for most shapes on an H100: tiles of 128 rows where they just fill the
/// multiprocessors, else of 64; wide slots for few tokens; all tiles split alike where the parts are
/// large.
pub(super) fn heuristic(key: &GemmKey, sms: usize) -> Variant {
    let variant = |warpgroups, panels, even| Variant::Skinny {
        warpgroups,
        panels,
        even,
    };
    let wide = key.n.div_ceil(128);
    let panels = if key.m <= 64 { 2 } else { 1 };
    let preferred = match wide < sms && 10 * wide >= 9 * sms {
        true => variant(2, if key.m <= 16 { 2 } else { 1 }, true),
        false => variant(1, panels, key.m > 32),
    };
    match preferred.check(key, sms) {
        Ok(()) => preferred,
        Err(_) => variant(1, panels, false),
    }
}

impl Shape {
    /// None if the variant does not compute the GEMM.
    pub(super) fn new(
        key: &GemmKey,
        warpgroups: usize,
        panels: usize,
        even: bool,
        sms: usize,
    ) -> Option<Shape> {
        let nt = tokens(key.m)?;
        if !matches!(warpgroups, 1 | 2) || !matches!(panels, 1 | 2 | 4) {
            return None;
        }
        let rows = 64 * warpgroups;
        let features = match key.epilogue {
            Epilogue::SwiGlu => 32,
            _ => 64,
        };
        let staged = match nt {
            nt if nt <= 32 => nt,
            nt if nt % 32 == 0 => 32,
            _ => 16,
        };
        let staging = warpgroups * staged * (features + 4) * 4;
        let slot = panels * (rows + nt) * 128 + 16;
        let scale = if key.norm { warpgroups * 4 * nt } else { 0 };
        let stages = ((SHARED - staging - scale) / slot).min(10);
        let tiles = key.n.div_ceil(rows);
        let units = tiles * key.k.div_ceil(64 * panels);
        let grid = match even {
            false => units.min(sms),
            // Tiles that are all split into the same number of parts.
            true if tiles < sms && !sms.is_multiple_of(tiles) => (sms / tiles * tiles).min(units),
            true => return None,
        };
        (stages >= 3).then_some(Shape {
            nt,
            rows,
            stages,
            shared: stages * slot + staging + scale,
            grid,
        })
    }
}

pub(super) fn launch(cx: &mut Context<'_>, g: &Gemm, s: &Shape, warpgroups: usize, panels: usize) {
    // As large as any variant needs, so that another one can be chosen after the memory is planned.
    let most = cx.options.sms as usize * 128 * s.nt * 4;
    let partial = cx.work("skinny.partial", most, Some(u32::MAX));
    let epi = epilogue_macro(g);
    let norms = RowNorms::new(cx, g);
    let [row_sums, out_sums, next_sums] = norms.args();
    let defines = cx
        .defines(g.dtype)
        .def("NT", s.nt)
        .def("CWG", warpgroups)
        .def("KP", panels)
        .def("STAGES", s.stages)
        .def("EPI", epi);
    let defines = norms.define(defines);
    let label = norms.label(epi);
    let label = format!("t{}_w{warpgroups}p{panels}_{label}", s.nt);
    let out = g.features() as i32;
    let args = vec![
        matrix_map(g.w.clone(), g.n, g.k, s.rows, 64),
        matrix_map(g.x.clone(), g.m, g.k, g.m.next_multiple_of(8), 64),
        Arg::Ptr(g.y.clone()),
        Arg::Ptr(g.bias.clone().unwrap_or(Ref::Null)),
        Arg::Ptr(g.residual.clone().unwrap_or(Ref::Null)),
        Arg::Ptr(partial),
        Arg::Ptr(Ref::Null),
        row_sums,
        out_sums,
        next_sums,
        Arg::I32(g.m as i32),
        Arg::I32(g.n as i32),
        Arg::I32(g.k as i32),
        Arg::I32(out),
        Arg::I32(out),
    ];
    let geometry = Geometry::new([s.grid, 1, 1], 128 * (warpgroups + 1), s.shared);
    cx.launch(Body::Skinny, &label, defines, geometry, args);
}
