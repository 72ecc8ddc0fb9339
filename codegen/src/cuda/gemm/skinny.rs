//! The tensor-core GEMM of at most 128 rows with swapped operands: specialisation and geometry of
//! `gemm_skinny.cu`.

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

/// Warpgroups and panels of a slot that forms have.
const WIDTHS: [(usize, usize); 5] = [(1, 2), (2, 1), (1, 1), (2, 2), (1, 4)];

/// How the skinny kernel divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SkinnyForm {
    /// Consumer warpgroups, 64 rows of the weights each.
    pub warpgroups: usize,
    /// 64-wide panels of K in a slot of the ring.
    pub panels: usize,
    /// As many blocks as give every tile the same number of parts, rather than all multiprocessors.
    pub even: bool,
}

impl fmt::Display for SkinnyForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let even = if self.even { "_even" } else { "" };
        write!(f, "w{}_p{}{even}", self.warpgroups, self.panels)
    }
}

impl SkinnyForm {
    /// Reads what `Display` prints, and more than that.
    pub(super) fn parse(text: &str) -> Option<SkinnyForm> {
        let (rest, even) = match text.strip_suffix("_even") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let (warpgroups, panels) = rest.strip_prefix('w')?.split_once("_p")?;
        Some(SkinnyForm {
            warpgroups: warpgroups.parse().ok()?,
            panels: panels.parse().ok()?,
            even,
        })
    }
}

/// The family of `gemm_skinny.cu`.
pub(in crate::cuda) struct Skinny;

/// Geometry of a form by the formulas at the top of `gemm_skinny.cu`.
pub(in crate::cuda) struct Shape {
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
    [8, 16, 24, 32, 48, 64, 96, LIMITS.streaming_rows]
        .into_iter()
        .find(|&nt| nt >= m)
}

impl Family for Skinny {
    type Form = SkinnyForm;
    type Shape = Shape;

    fn forms() -> Vec<SkinnyForm> {
        let both = |(warpgroups, panels)| {
            [false, true].map(|even| SkinnyForm {
                warpgroups,
                panels,
                even,
            })
        };
        WIDTHS.into_iter().flat_map(both).collect()
    }

    fn shape(problem: &Problem, form: SkinnyForm, sms: usize) -> Option<Shape> {
        let SkinnyForm {
            warpgroups,
            panels,
            even,
        } = form;
        let key = &problem.key;
        let nt = tokens(key.m)?;
        let exists = matches!(warpgroups, 1 | 2) && matches!(panels, 1 | 2 | 4);
        if !exists || !problem.is_tensor_core() {
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
        let stages = ((LIMITS.shared_bytes - staging - scale) / slot).min(10);
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

    /// What was best for most shapes on an H100: tiles of 128 rows where they just fill the
    /// multiprocessors, else of 64; wide slots for few tokens; all tiles split alike where the parts are
    /// large.
    fn heuristic(problem: &Problem, sms: usize) -> Option<SkinnyForm> {
        let GemmKey { m, n, .. } = problem.key;
        let form = |warpgroups, panels, even| SkinnyForm {
            warpgroups,
            panels,
            even,
        };
        let wide = n.div_ceil(128);
        let panels = if m <= 64 { 2 } else { 1 };
        let preferred = match wide < sms && 10 * wide >= 9 * sms {
            true => form(2, if m <= 16 { 2 } else { 1 }, true),
            false => form(1, panels, m > 32),
        };
        [preferred, form(1, panels, false)]
            .into_iter()
            .find(|&f| Skinny::shape(problem, f, sms).is_some())
    }

    fn candidates(problem: &Problem, _: usize) -> Vec<SkinnyForm> {
        match problem.key.m <= LIMITS.streaming_rows {
            true => Skinny::forms(),
            false => Vec::new(),
        }
    }

    fn norm(_: &Problem) -> NormSupport {
        NormSupport::Factors
    }

    fn emit(cx: &mut Context<'_>, g: &Request, form: SkinnyForm, s: &Shape) {
        let SkinnyForm {
            warpgroups, panels, ..
        } = form;
        let GemmKey { m, n, k, .. } = g.problem.key;
        // As large as any form needs, so that another one can be chosen after the memory is planned.
        let most = cx.options.sms as usize * 128 * s.nt * 4;
        let partial = cx.work("skinny.partial", most, Some(u32::MAX));
        let [row_sums, out_sums, next_sums] = g.norm_args();
        let defines = cx
            .defines(g.problem.dtype)
            .def("NT", s.nt)
            .def("CWG", warpgroups)
            .def("KP", panels)
            .def("STAGES", s.stages)
            .def("EPI", g.epilogue_macro());
        let defines = g.define_norms(defines);
        let label = format!("t{}_w{warpgroups}p{panels}_{}", s.nt, g.label());
        let out = g.problem.features() as i32;
        let args = vec![
            matrix_map(g.at(gemm::W), n, k, s.rows, 64),
            matrix_map(g.at(gemm::X), m, k, m.next_multiple_of(8), 64),
            Arg::Ptr(g.y.clone()),
            Arg::Ptr(g.at(gemm::BIAS)),
            Arg::Ptr(g.at(gemm::RESIDUAL)),
            Arg::Ptr(partial),
            Arg::Ptr(Ref::Null),
            row_sums,
            out_sums,
            next_sums,
            Arg::I32(m as i32),
            Arg::I32(n as i32),
            Arg::I32(k as i32),
            Arg::I32(out),
            Arg::I32(out),
        ];
        let geometry = Geometry::new([s.grid, 1, 1], 128 * (warpgroups + 1), s.shared);
        g.launch(cx, Body::Skinny, &label, defines, geometry, args);
    }
}
