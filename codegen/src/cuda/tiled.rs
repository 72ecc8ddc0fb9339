//! The tiled tensor-core GEMM for more than 128 rows: choice of the tile, specialisation and
//! geometry of `gemm.cu`.

use super::choice::{GemmKey, Tile, Variant};
use super::context::{Context, Geometry, SHARED, matrix_map};
use super::gemm::{Gemm, RowNorms, epilogue_macro};
use super::launch::{Arg, Ref};
use super::source::Body;
use lathe_ir::Epilogue;

/// Cluster rows walked together before the next columns.
const GROUP_M: usize = 8;
/// Columns that a tile can have.
const COLS: [usize; 7] = [64, 96, 128, 160, 192, 224, 256];
/// Rows that a tile can have, and the teams that take turns with such tiles.
const ROWS: [(usize, usize); 4] = [(64, 1), (128, 1), (192, 1), (128, 2)];
/// Blocks of a cluster along M and N. Where they are as fast by the estimate, the one that reads less comes first.
const CLUSTERS: [[usize; 2]; 3] = [[2, 1], [1, 2], [1, 1]];

/// Every tile, whether or not it computes a GEMM.
pub(super) fn all() -> impl Iterator<Item = Tile> {
    ROWS.into_iter().flat_map(|(rows, teams)| {
        COLS.into_iter().flat_map(move |cols| {
            CLUSTERS.into_iter().map(move |cluster| Tile {
                rows,
                cols,
                teams,
                cluster,
            })
        })
    })
}

/// Geometry of a variant by the formulas at the top of `gemm.cu`.
pub(super) struct Shape {
    tile: Tile,
    /// Columns of a panel of the output.
    panel: usize,
    stages: usize,
    shared: usize,
    grid: usize,
}

/// Whether the epilogue reads a residual, whose tiles then travel through the ring.
fn has_residual(key: &GemmKey) -> bool {
    key.epilogue == Epilogue::Residual
}

/// Waves of tiles over the multiprocessors.
fn waves(key: &GemmKey, tile: &Tile, sms: usize) -> f64 {
    let [a, b] = tile.cluster;
    let tiles = key.m.div_ceil(tile.rows).div_ceil(a) * key.n.div_ceil(tile.cols).div_ceil(b);
    tiles.div_ceil(sms / (a * b)) as f64
}

/// The tile of least estimated time: whole waves, each of its columns plus what every tile costs whatever its width,
/// in columns. With two teams half of that is hidden.
pub(super) fn heuristic(key: &GemmKey, sms: usize) -> Variant {
    let time = |tile: &Tile| {
        let fixed = if tile.teams == 1 { 24.0 } else { 12.0 };
        // A single row of tiles has nothing to share; sharing W saves L2 reads.
        let sharing = if tile.cluster == [2, 1] { 0.98 } else { 1.0 };
        waves(key, tile, sms) * (tile.cols as f64 + fixed) * sharing
    };
    let plain = Tile {
        rows: 128,
        cols: 128,
        teams: 1,
        cluster: [1, 1],
    };
    let best = all()
        .filter(|t| t.rows == 128 && t.cluster != [1, 2])
        .filter(|&t| Shape::new(key, t, sms).is_some())
        .min_by(|a, b| time(a).total_cmp(&time(b)));
    Variant::Tiled(best.unwrap_or(plain))
}

/// All tiles by estimated time: waves, each of a start and of the tensor cores' or L2's time a k step
/// (the rates were measured on an H100; within 6 % of the best for most shapes, at worst 15 %). With two teams
/// about half of the starts show. Of the clusters of a tile the two best are listed.
pub(super) fn best_tiles(key: &GemmKey, sms: usize) -> Vec<Variant> {
    const START_US: f64 = 4.0;
    let mut all: Vec<(f64, Variant)> = Vec::new();
    for of_one_size in self::all().collect::<Vec<_>>().chunks(CLUSTERS.len()) {
        let mut timed: Vec<(f64, Variant)> = Vec::new();
        for &tile in of_one_size {
            let Tile { rows, cols, .. } = tile;
            let [a, b] = tile.cluster;
            let steps = key.k.div_ceil(64) as f64;
            let cores = (rows * cols) as f64 / 50_140.0;
            let reads = (128 * rows / b + 128 * cols / a) as f64 / 102_000.0;
            let start = START_US / tile.teams as f64;
            let time = waves(key, &tile, sms) * (start + steps * cores.max(reads));
            // A cluster along an axis of one tile computes the same product twice.
            let wasted = (a > 1 && key.m <= rows) || (b > 1 && key.n <= cols);
            if !wasted && Shape::new(key, tile, sms).is_some() {
                timed.push((time, Variant::Tiled(tile)));
            }
        }
        timed.sort_by(|x, y| x.0.total_cmp(&y.0));
        all.extend(timed.into_iter().take(2));
    }
    all.sort_by(|x, y| x.0.total_cmp(&y.0));
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
    pub(super) fn new(key: &GemmKey, tile: Tile, sms: usize) -> Option<Shape> {
        let Tile {
            rows,
            cols,
            teams,
            cluster,
        } = tile;
        let swiglu = key.epilogue == Epilogue::SwiGlu;
        // All accumulators of 192 rows, or those of 128 in one warpgroup, leave too few registers for wider tiles.
        let fits = match (rows, teams) {
            (64 | 128, 1) => true,
            (192, 1) => cols <= 192,
            (128, 2) => {
                let widest = if key.bias { 160 } else { 192 };
                (128..=widest).contains(&cols) && !has_residual(key)
            }
            _ => false,
        };
        if !fits || !COLS.contains(&cols) || (swiglu && !cols.is_multiple_of(32)) {
            return None;
        }
        if !CLUSTERS.contains(&cluster) {
            return None;
        }
        let blocks = cluster[0] * cluster[1];
        let out_cols = if swiglu { cols / 2 } else { cols };
        // Narrower ones leave two teams a slot more in the ring.
        let panel = [64, 32, 56, 40, 16]
            .into_iter()
            .find(|&p| out_cols.is_multiple_of(p) && !(p == 64 && teams == 2))?;
        let fixed = rows / 64 * 2 * 128 * panel + 16;
        let slot = (rows + cols) * 128 + 16;
        let stages = ((SHARED - fixed) / slot).min(8);
        let tiles =
            key.m.div_ceil(rows).div_ceil(cluster[0]) * key.n.div_ceil(cols).div_ceil(cluster[1]);
        (stages >= 3).then_some(Shape {
            tile,
            panel,
            stages,
            shared: stages * slot + fixed,
            grid: tiles.min(sms / blocks) * blocks,
        })
    }
}

pub(super) fn launch(cx: &mut Context<'_>, g: &Gemm, s: &Shape) {
    let Tile { rows, cols, .. } = s.tile;
    let [along_m, along_n] = s.tile.cluster;
    let warpgroups = rows / 64;
    let a_box = box_rows(g.m, rows / along_n);
    let w_box = box_rows(g.n, cols / along_m);
    let epi = epilogue_macro(g);
    let norms = RowNorms::new(cx, g);
    let [row_sums, out_sums, next_sums] = norms.args();
    let label = format!("{}_{}", s.tile, norms.label(epi));
    let defines = cx
        .defines(g.dtype)
        .def("BN", cols)
        .def("CWG", warpgroups)
        .def("TEAMS", s.tile.teams)
        .def("STAGES", s.stages)
        .def("CLUSTER_M", along_m)
        .def("CLUSTER_N", along_n)
        .def("GROUP_M", GROUP_M)
        .def("EPI", epi);
    let defines = norms.define(defines);
    let out = g.features();
    let c = matrix_map(g.y.clone(), g.m, out, 64, s.panel);
    let residual = match &g.residual {
        Some(r) => matrix_map(r.clone(), g.m, out, rows, s.panel),
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
