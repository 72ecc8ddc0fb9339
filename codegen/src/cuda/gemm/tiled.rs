//! The tiled tensor-core GEMM for more than 128 rows: choice of the tile, specialisation and
//! geometry of `gemm.cu`.

use super::family::{Family, NormSupport};
use super::key::{GemmKey, Problem};
use super::request::Request;
use crate::cuda::context::{Context, Geometry, matrix_map};
use crate::cuda::launch::{Arg, Ref};
use crate::cuda::limits::LIMITS;
use crate::cuda::source::Body;
use lathe_ir::Epilogue;
use lathe_ir::ops::gemm;
use std::fmt;

/// Cluster rows walked together before the next columns.
const GROUP_M: usize = 8;
/// Columns that a tile can have.
const COLS: [usize; 7] = [64, 96, 128, 160, 192, 224, 256];
/// Rows that a tile can have, and the teams that take turns with such tiles.
const ROWS: [(usize, usize); 4] = [(64, 1), (128, 1), (192, 1), (128, 2)];
/// Blocks of a cluster along M and N. Where they are as fast by the estimate, the one that reads less comes first.
const CLUSTERS: [[usize; 2]; 3] = [[2, 1], [1, 2], [1, 1]];

/// How the tiled kernel divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tile {
    /// Rows of a tile: 64, 128 or 192.
    pub rows: usize,
    /// Columns of a tile.
    pub cols: usize,
    /// 1: all warpgroups work on a tile. 2: each has its own, and one multiplies while the other stores.
    pub teams: usize,
    /// Blocks of a cluster that share weights, and that share activations.
    pub cluster: [usize; 2],
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { rows, cols, .. } = self;
        let teams = if self.teams == 1 { "" } else { "_t2" };
        let [a, b] = self.cluster;
        write!(f, "{rows}x{cols}{teams}_c{a}x{b}")
    }
}

impl Tile {
    /// Reads what `Display` prints, and more than that.
    pub(super) fn parse(text: &str) -> Option<Tile> {
        let (tile, cluster) = text.split_once("_c")?;
        let (tile, teams) = match tile.strip_suffix("_t2") {
            Some(tile) => (tile, 2),
            None => (tile, 1),
        };
        let (rows, cols) = tile.split_once('x')?;
        let (a, b) = cluster.split_once('x')?;
        Some(Tile {
            rows: rows.parse().ok()?,
            cols: cols.parse().ok()?,
            teams,
            cluster: [a.parse().ok()?, b.parse().ok()?],
        })
    }

    /// Blocks of a cluster.
    fn blocks(&self) -> usize {
        self.cluster[0] * self.cluster[1]
    }

    /// Clusters over the result.
    fn clusters(&self, key: &GemmKey) -> usize {
        let [a, b] = self.cluster;
        key.m.div_ceil(self.rows).div_ceil(a) * key.n.div_ceil(self.cols).div_ceil(b)
    }

    /// Waves of tiles over the multiprocessors.
    fn waves(&self, key: &GemmKey, sms: usize) -> f64 {
        self.clusters(key).div_ceil(sms / self.blocks()) as f64
    }
}

/// The family of `gemm.cu`.
pub(in crate::cuda) struct Tiled;

/// Geometry of a tile by the formulas at the top of `gemm.cu`.
pub(in crate::cuda) struct Shape {
    /// Columns of a panel of the output.
    panel: usize,
    stages: usize,
    shared: usize,
    grid: usize,
}

impl Family for Tiled {
    type Form = Tile;
    type Shape = Shape;

    fn forms() -> Vec<Tile> {
        let mut all = Vec::new();
        for (rows, teams) in ROWS {
            for cols in COLS {
                all.extend(CLUSTERS.map(|cluster| Tile {
                    rows,
                    cols,
                    teams,
                    cluster,
                }));
            }
        }
        all
    }

    fn shape(problem: &Problem, tile: Tile, sms: usize) -> Option<Shape> {
        let Tile {
            rows,
            cols,
            teams,
            cluster,
        } = tile;
        let key = &problem.key;
        let swiglu = key.epilogue == Epilogue::SwiGlu;
        // All accumulators of 192 rows, or those of 128 in one warpgroup, leave too few registers for wider tiles.
        let fits = match (rows, teams) {
            (64 | 128, 1) => true,
            (192, 1) => cols <= 192,
            (128, 2) => {
                let widest = if key.bias { 160 } else { 192 };
                // A residual's tiles travel through the ring, which has no room where both teams store.
                (128..=widest).contains(&cols) && key.epilogue != Epilogue::Residual
            }
            _ => false,
        };
        if !fits || !COLS.contains(&cols) || (swiglu && !cols.is_multiple_of(32)) {
            return None;
        }
        if !CLUSTERS.contains(&cluster) || sms < tile.blocks() || !problem.is_tensor_core() {
            return None;
        }
        let out_cols = if swiglu { cols / 2 } else { cols };
        // Narrower ones leave two teams a slot more in the ring.
        let panel = [64, 32, 56, 40, 16]
            .into_iter()
            .find(|&p| out_cols.is_multiple_of(p) && !(p == 64 && teams == 2))?;
        let fixed = rows / 64 * 2 * 128 * panel + 16;
        let slot = (rows + cols) * 128 + 16;
        let stages = ((LIMITS.shared_bytes - fixed) / slot).min(8);
        let blocks = tile.blocks();
        (stages >= 3).then_some(Shape {
            panel,
            stages,
            shared: stages * slot + fixed,
            grid: tile.clusters(key).min(sms / blocks) * blocks,
        })
    }

    /// The tile of least estimated time: whole waves, each of its columns plus what every tile costs whatever its
    /// width, in columns. With two teams half of that is hidden.
    fn heuristic(problem: &Problem, sms: usize) -> Option<Tile> {
        let time = |tile: &Tile| {
            let fixed = if tile.teams == 1 { 24.0 } else { 12.0 };
            // A single row of tiles has nothing to share; sharing W saves L2 reads.
            let sharing = if tile.cluster == [2, 1] { 0.98 } else { 1.0 };
            tile.waves(&problem.key, sms) * (tile.cols as f64 + fixed) * sharing
        };
        Tiled::forms()
            .into_iter()
            .filter(|t| t.rows == 128 && t.cluster != [1, 2])
            .filter(|&t| Tiled::shape(problem, t, sms).is_some())
            .min_by(|a, b| time(a).total_cmp(&time(b)))
    }

    /// Tiles by estimated time: waves, each of a start and of the tensor cores' or L2's time a k step
    /// (the rates were measured on an H100; within 6 % of the best for most shapes, at worst 15 %). With two teams
    /// about half of the starts show. Of the clusters of a tile the two best are listed. None for rows that are
    /// fewer than half a tile: they waste the tensor cores and gain nothing.
    fn candidates(problem: &Problem, sms: usize) -> Vec<Tile> {
        const START_US: f64 = 4.0;
        /// Most tiles, also where the skinny kernel has forms beside them.
        const MOST: usize = 8;
        const STREAMING_ROWS: usize = LIMITS.streaming_rows;
        let key = &problem.key;
        let most = match key.m {
            0..=32 => 0,
            33..=STREAMING_ROWS => MOST / 2,
            _ => MOST,
        };
        let mut all: Vec<(f64, Tile)> = Vec::new();
        for of_one_size in Tiled::forms().chunks(CLUSTERS.len()) {
            let mut timed: Vec<(f64, Tile)> = Vec::new();
            for &tile in of_one_size {
                let Tile { rows, cols, .. } = tile;
                let [a, b] = tile.cluster;
                // A cluster along an axis of one tile computes the same product twice.
                let wasted = (a > 1 && key.m <= rows) || (b > 1 && key.n <= cols);
                if wasted || Tiled::shape(problem, tile, sms).is_none() {
                    continue;
                }
                let steps = key.k.div_ceil(64) as f64;
                let cores = (rows * cols) as f64 / 50_140.0;
                let reads = (128 * rows / b + 128 * cols / a) as f64 / 102_000.0;
                let start = START_US / tile.teams as f64;
                let time = tile.waves(key, sms) * (start + steps * cores.max(reads));
                timed.push((time, tile));
            }
            timed.sort_by(|x, y| x.0.total_cmp(&y.0));
            all.extend(timed.into_iter().take(2));
        }
        all.sort_by(|x, y| x.0.total_cmp(&y.0));
        all.into_iter().take(most).map(|(_, tile)| tile).collect()
    }

    fn norm(_: &Problem) -> NormSupport {
        NormSupport::Factors
    }

    fn emit(cx: &mut Context<'_>, g: &Request, tile: Tile, s: &Shape) {
        let Tile { rows, cols, .. } = tile;
        let GemmKey { m, n, k, .. } = g.problem.key;
        let [along_m, along_n] = tile.cluster;
        let warpgroups = rows / 64;
        let a_box = box_rows(m, rows / along_n);
        let w_box = box_rows(n, cols / along_m);
        let [row_sums, out_sums, next_sums] = g.norm_args();
        let label = format!("{tile}_{}", g.label());
        let defines = cx
            .defines(g.problem.dtype)
            .def("BN", cols)
            .def("CWG", warpgroups)
            .def("TEAMS", tile.teams)
            .def("STAGES", s.stages)
            .def("CLUSTER_M", along_m)
            .def("CLUSTER_N", along_n)
            .def("GROUP_M", GROUP_M)
            .def("EPI", g.epilogue_macro());
        let defines = g.define_norms(defines);
        let out = g.problem.features();
        let c = matrix_map(g.y.clone(), m, out, 64, s.panel);
        let residual = match g.get(gemm::RESIDUAL) {
            Some(r) => matrix_map(r, m, out, rows, s.panel),
            None => c.clone(),
        };
        let args = vec![
            matrix_map(g.at(gemm::X), m, k, a_box, 64),
            matrix_map(g.at(gemm::W), n, k, w_box, 64),
            c,
            residual,
            Arg::Ptr(Ref::Null),
            Arg::Ptr(g.at(gemm::BIAS)),
            row_sums,
            out_sums,
            next_sums,
            Arg::I32(m as i32),
            Arg::I32(n as i32),
            Arg::I32(k as i32),
            Arg::I32(a_box as i32),
            Arg::I32(w_box as i32),
        ];
        let mut geometry = Geometry::new([s.grid, 1, 1], 128 * (warpgroups + 1), s.shared);
        geometry.cluster = tile.blocks() as u32;
        g.launch(cx, Body::Gemm, &label, defines, geometry, args);
    }
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
