//! The weight-streaming GEMV of at most 4 rows: specialisation and geometry of `gemv.cu`.

use super::family::{Family, NormSupport};
use super::key::{GemmKey, Problem, epilogue_name};
use super::request::{NormArgs, Request};
use crate::cuda::context::{Context, Geometry};
use crate::cuda::launch::{Arg, Ref};
use crate::cuda::limits::LIMITS;
use crate::cuda::source::{Body, literal};
use lathe_ir::Epilogue;
use lathe_ir::ops::gemm;

const WARPS: usize = 8;
/// Rows of a group.
const R: usize = 2;
/// Shared memory with which no two blocks share a multiprocessor.
const ALONE: usize = 116_000;
/// Bytes a warp brings into L2 of the weights that the next kernel reads first.
const NEXT: usize = 4096;
/// 16-byte vectors of the rows that a thread can keep while it normalises them.
const NORM_VECTORS: usize = 16;

/// The family of `gemv.cu`.
pub(in crate::cuda) struct Gemv;

/// Geometry by the formulas at the top of `gemv.cu`.
pub(in crate::cuda) struct Shape {
    grid: usize,
    kc: usize,
    slots: usize,
    shared: usize,
}

impl Shape {
    /// Bytes that the kernel brings into L2 of the weights that the next one reads first.
    pub(in crate::cuda) fn prefetched(&self) -> usize {
        self.grid * WARPS * NEXT
    }
}

impl Family for Gemv {
    type Form = ();
    type Shape = Shape;

    fn forms() -> Vec<()> {
        vec![()]
    }

    fn shape(problem: &Problem, (): (), sms: usize) -> Option<Shape> {
        let GemmKey { m, n, k, bias, .. } = problem.key;
        let size = problem.dtype.size();
        let epilogue = problem.key.epilogue;
        let vectors = (k * size).is_multiple_of(16);
        let takes_bias = epilogue == Epilogue::None && !problem.argmax;
        if m > LIMITS.prologue_rows || !vectors || (bias && !takes_bias) {
            return None;
        }
        let kc = 512 / size * 4;
        let groups = n.div_ceil(R);
        let grid = sms.min(groups);
        let rounds = groups / (grid * WARPS);
        let rem = groups - rounds * grid * WARPS;
        let pairs = rem.div_ceil(grid);
        let chunks = k.div_ceil(kc);
        let umin = (rem / grid) * chunks / WARPS;
        let sp = match umin {
            0 => WARPS,
            _ => ((chunks - 1).div_ceil(umin) + 1).min(WARPS).min(chunks),
        };
        let added = match bias || epilogue == Epilogue::Residual {
            true => rounds * WARPS + pairs,
            false => 0,
        };
        let part = (rounds * WARPS + pairs * sp + added) * R * m * 4;
        let up = |b: usize| b.next_multiple_of(16);
        let bytes = |slots: usize| {
            up(WARPS * slots * R * kc * size)
                + up(m * k * size)
                + up(part)
                + up(WARPS * slots * 8)
                + up(WARPS * m * 8)
        };
        let slots = (2..=6).rev().find(|&s| bytes(s) <= LIMITS.shared_bytes)?;
        Some(Shape {
            grid,
            kc,
            slots,
            shared: bytes(slots).max(ALONE),
        })
    }

    fn heuristic(problem: &Problem, sms: usize) -> Option<()> {
        Gemv::shape(problem, (), sms).map(|_| ())
    }

    fn candidates(_: &Problem, _: usize) -> Vec<()> {
        Vec::new()
    }

    fn norm(problem: &Problem) -> NormSupport {
        let GemmKey { m, k, .. } = problem.key;
        let vec = 16 / problem.dtype.size();
        match m * (k / vec).div_ceil(32 * WARPS) <= NORM_VECTORS {
            true => NormSupport::Whole,
            false => NormSupport::No("the rows do not fit into the GEMV's registers"),
        }
    }

    fn emit(cx: &mut Context<'_>, g: &Request, (): (), s: &Shape) {
        let (key, dtype, argmax) = (g.problem.key, g.problem.dtype, g.problem.argmax);
        let (prologue, eps, bare) = match &g.norm {
            NormArgs::Whole { eps, gamma, added } => match added {
                None => (1, Some(*eps), *gamma == Ref::Null),
                Some(_) => (2, Some(*eps), false),
            },
            NormArgs::None | NormArgs::Factors { .. } => (0, None, false),
        };
        let epilogue = match (argmax, key.epilogue) {
            (true, _) => 4,
            (_, Epilogue::None) => u8::from(g.has(gemm::BIAS)),
            (_, Epilogue::Residual) => 2,
            (_, Epilogue::SwiGlu) => 3,
        };
        let label = format!(
            "m{}_n{}_k{}_{}_{}{}_{dtype}",
            key.m,
            key.n,
            key.k,
            ["plain", "rms", "addrms"][prologue],
            if argmax {
                "argmax"
            } else {
                epilogue_name(key.epilogue)
            },
            if g.has(gemm::BIAS) { "_bias" } else { "" },
        );
        let mut defines = cx
            .defines(dtype)
            .def("LATHE_M", key.m)
            .def("LATHE_N", key.n)
            .def("LATHE_K", key.k)
            .def("LATHE_GRID", s.grid)
            .def("LATHE_WARPS", WARPS)
            .def("LATHE_KC", s.kc)
            .def("LATHE_SLOTS", s.slots)
            .def("LATHE_R", R)
            .def("LATHE_PRO", prologue)
            .def("LATHE_NO_GAMMA", u8::from(bare))
            .def("LATHE_EPI", epilogue);
        if let Some(eps) = eps {
            defines = defines.def("LATHE_EPS", literal(eps));
        }
        if argmax {
            // Logits are compared as they would be stored, so that ties fall alike with and without logits.
            defines = defines.def("LATHE_MAP(v)", "round_to<E>(v)");
        }
        if g.next.is_some() {
            defines = defines.def("LATHE_NEXT", NEXT);
        }
        let (best, counter) = match argmax {
            true => (
                cx.work("argmax.best", 64, Some(0)),
                cx.work("argmax.counter", 16, Some(0)),
            ),
            false => (Ref::Null, Ref::Null),
        };
        let (gamma, delta, sum) = match &g.norm {
            NormArgs::Whole { gamma, added, .. } => {
                let (delta, sum) = added.clone().unwrap_or((Ref::Null, Ref::Null));
                (gamma.clone(), delta, sum)
            }
            NormArgs::None | NormArgs::Factors { .. } => (Ref::Null, Ref::Null, Ref::Null),
        };
        let addend = g.get(gemm::BIAS).or_else(|| g.get(gemm::RESIDUAL));
        let args = vec![
            Arg::Ptr(g.at(gemm::W)),
            Arg::Ptr(g.at(gemm::X)),
            Arg::Ptr(delta),
            Arg::Ptr(gamma),
            Arg::Ptr(addend.unwrap_or(Ref::Null)),
            Arg::Ptr(g.y.clone()),
            Arg::Ptr(sum),
            Arg::Ptr(best),
            Arg::Ptr(counter),
            Arg::Ptr(g.next.clone().unwrap_or(Ref::Null)),
        ];
        let geometry = Geometry::new([s.grid, 1, 1], 32 * WARPS, s.shared);
        g.launch(cx, Body::Gemv, &label, defines, geometry, args);
    }
}
