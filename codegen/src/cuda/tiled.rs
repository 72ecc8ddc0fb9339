//! The tiled tensor-core GEMM for more than 128 rows: choice of the tile, specialisation and
//! geometry of `gemm.cu`.

use super::choice::{GemmKey, Variant};
use super::context::{Context, Geometry, SHARED, matrix_map};
use super::gemm::{Gemm, RowNorms, epilogue_macro};
use super::launch::{Arg, Ref};
use super::source::Body;
use lathe_ir::Epilogue;

/// Cluster rows walked together before the next columns.
const GROUP_M: usize = 8;
/// Columns that a tile can have.
const COLS: [usize; 7] = [64, 96, 128, 160, 192, 224, 256];

/// Geometry of a variant by the formulas at the top of `gemm.cu`.
pub(super) struct Shape {
    rows: usize,
    cols: usize,
    cluster: [usize; 2],
    /// Columns of a panel of the output.
    panel: usize,
    stages: usize,
    shared: usize,
    grid: usize,
}

/// Columns of a tile and blocks of a cluster along M, by the estimated time: whole waves of tiles,
/// each of its columns plus what every tile costs whatever its width.
pub(super) fn heuristic(key: &GemmKey, sms: usize) -> Variant {
    const ROWS: usize = 128;
    let mut best = (f64::INFINITY, 128, 1);
    for cols in COLS {
        if key.epilogue == Epilogue::SwiGlu && cols % 32 != 0 {
            continue;
        }
        for cluster in [1, 2] {
            let rows = key.m.div_ceil(ROWS).div_ceil(cluster);
            let tiles = rows * key.n.div_ceil(cols);
            let waves = tiles.div_ceil(sms / cluster) as f64;
            // A single row of tiles has nothing to share; sharing W saves L2 reads.
            let sharing = if cluster == 2 { 0.98 } else { 1.0 };
            let time = waves * (cols as f64 + 24.0) * sharing;
            if time < best.0 {
                best = (time, cols, cluster);
            }
        }
    }
    Variant::Tiled {
        rows: ROWS,
        cols: best.1,
        cluster: [best.2, 1],
    }
}

/// All tiles by estimated time: waves, each of a start and of the tensor cores' or L2's time a k step
/// (the rates were measured on an H100; within 6 % of the best for most shapes, at worst 15 %).
pub(super) fn best_tiles(key: &GemmKey, sms: usize) -> Vec<Variant> {
    let mut all: Vec<(f64, Variant)> = Vec::new();
    for rows in [64, 128, 192] {
        for cols in COLS {
            for cluster in [[1, 1], [2, 1], [1, 2]] {
                let [a, b] = cluster;
                let tiles = key.m.div_ceil(rows).div_ceil(a) * key.n.div_ceil(cols).div_ceil(b);
                let waves = tiles.div_ceil(sms / (a * b)) as f64;
                let steps = key.k.div_ceil(64) as f64;
                let cores = (rows * cols) as f64 / 50_140.0;
                let reads = (128 * rows / b + 128 * cols / a) as f64 / 102_000.0;
                let variant = Variant::Tiled {
                    rows,
                    cols,
                    cluster,
                };
                // A cluster along an axis of one tile computes the same product twice.
                let wasted = (a > 1 && key.m <= rows) || (b > 1 && key.n <= cols);
                if !wasted && Shape::new(key, rows, cols, cluster, sms).is_some() {
                    all.push((waves * (4.0 + steps * cores.max(reads)), variant));
                }
            }
        }
    }
    all.sort_by(|x, y| x.0.total_cmp(&y.0).then(x.1.cmp(&y.1)));
    all.into_iter().map(|(_, v)| v).collect()
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

impl Shape {
    /// None if the variant does not compute the GEMM.
    pub(super) fn new(
        key: &GemmKey,
        rows: usize,
        cols: usize,
        cluster: [usize; 2],
        sms: usize,
    ) -> Option<Shape> {
        let swiglu = key.epilogue == Epilogue::SwiGlu;
        let tile = matches!(rows, 64 | 128 | 192) && COLS.contains(&cols);
        // Three warpgroups leave too few registers for wider tiles.
        let registers = rows < 192 || cols <= 192;
        if !tile || !registers || (swiglu && !cols.is_multiple_of(32)) {
            return None;
        }
        if !matches!(cluster, [1, 1] | [2, 1] | [1, 2]) {
            return None;
        }
        let blocks = cluster[0] * cluster[1];
        let out_cols = if swiglu { cols / 2 } else { cols };
        let panel = [64, 32, 16].into_iter().find(|p| out_cols % p == 0)?;
        let fixed = rows / 64 * 2 * 128 * panel + 16;
        let slot = (rows + cols) * 128 + 16;
        let stages = ((SHARED - fixed) / slot).min(8);
        let tiles =
            key.m.div_ceil(rows).div_ceil(cluster[0]) * key.n.div_ceil(cols).div_ceil(cluster[1]);
        (stages >= 3).then_some(Shape {
            rows,
            cols,
            cluster,
            panel,
            stages,
            shared: stages * slot + fixed,
            grid: tiles.min(sms / blocks) * blocks,
        })
    }
}

pub(super) fn launch(cx: &mut Context<'_>, g: &Gemm, s: &Shape) {
    let [along_m, along_n] = s.cluster;
    let warpgroups = s.rows / 64;
    let a_box = box_rows(g.m, s.rows / along_n);
    let w_box = box_rows(g.n, s.cols / along_m);
    let epi = epilogue_macro(g);
    let norms = RowNorms::new(cx, g);
    let [row_sums, out_sums, next_sums] = norms.args();
    let label = format!(
        "{}x{}_c{along_m}x{along_n}_{}",
        s.rows,
        s.cols,
        norms.label(epi)
    );
    let defines = cx
        .defines(g.dtype)
        .def("BN", s.cols)
        .def("CWG", warpgroups)
        .def("STAGES", s.stages)
        .def("CLUSTER_M", along_m)
        .def("CLUSTER_N", along_n)
        .def("GROUP_M", GROUP_M)
        .def("EPI", epi)
        .def("OUT_F32", 0);
    let defines = norms.define(defines);
    let out = g.features();
    let c = matrix_map(g.y.clone(), g.m, out, 64, s.panel);
    let residual = match &g.residual {
        Some(r) => matrix_map(r.clone(), g.m, out, s.rows, s.panel),
        None => c.clone(),
    };
    let args = vec![
        matrix_map(g.x.clone(), g.m, g.k, a_box, 64),
        matrix_map(g.w.clone(), g.n, g.k, w_box, 64),
        c,
        residual,
        Arg::Ptr(Ref::Null),
        Arg::Ptr(g.bias.clone().unwrap_or(Ref::Null)),
        row_sums,
        out_sums,
        next_sums,
        Arg::I32(g.m as i32),
        Arg::I32(g.n as i32),
        Arg::I32(g.k as i32),
        Arg::I32(a_box as i32),
        Arg::I32(w_box as i32),
    ];
    let mut geometry = Geometry::new([s.grid, 1, 1], 128 * (warpgroups + 1), s.shared);
    geometry.cluster = (along_m * along_n) as u32;
    cx.launch(Body::Gemm, &label, defines, geometry, args);
}
