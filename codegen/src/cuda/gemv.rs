//! The weight-streaming GEMV of at most 4 rows: specialisation and geometry of `gemv.cu`.

use super::choice::GemmKey;
use super::context::{Context, Geometry, SHARED};
use super::gemm::{Gemm, epilogue_name};
use super::launch::{Arg, Ref};
use super::source::{Body, literal};
use crate::plan::Operand;
use lathe_ir::ops::Linear;
use lathe_ir::ops::gemm;
use lathe_ir::{Epilogue, Op, Prologue};

/// Most rows.
pub(super) const ROWS: usize = 4;
const WARPS: usize = 8;
/// Rows of a group.
const R: usize = 2;
/// Shared memory with which no two blocks share a multiprocessor.
const ALONE: usize = 116_000;
/// Bytes a warp brings into L2 of the weights that the next kernel reads first.
const NEXT: usize = 4096;

/// Whether the kernel computes this GEMM, its prologue aside.
pub(super) fn takes(g: &Gemm) -> bool {
    let vectors = (g.k * g.dtype.size()).is_multiple_of(16);
    let epilogue = g.bias.is_none() || (g.epilogue == Epilogue::None && !g.argmax);
    g.m <= ROWS && vectors && epilogue && g.shape(132).is_some()
}

/// Whether the kernel computes a bf16 GEMM, its prologue aside or fused.
pub(super) fn computes(key: &GemmKey) -> bool {
    let vectors = (2 * key.k).is_multiple_of(16);
    let epilogue = !key.bias || key.epilogue == Epilogue::None;
    let added = key.bias || key.epilogue == Epilogue::Residual;
    key.m <= ROWS && vectors && epilogue && shape(key.m, key.n, key.k, 2, added, 132).is_some()
}

/// Whether the prologue's rows fit into registers.
pub(super) fn takes_prologue(g: &Gemm) -> bool {
    let vec = 16 / g.dtype.size();
    g.m * (g.k / vec).div_ceil(32 * WARPS) <= 16
}

struct Shape {
    grid: usize,
    kc: usize,
    slots: usize,
    shared: usize,
}

/// Geometry by the formulas at the top of `gemv.cu`.
fn shape(m: usize, n: usize, k: usize, size: usize, addend: bool, sms: usize) -> Option<Shape> {
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
    let added = if addend { rounds * WARPS + pairs } else { 0 };
    let part = (rounds * WARPS + pairs * sp + added) * R * m * 4;
    let up = |b: usize| b.next_multiple_of(16);
    let bytes = |slots: usize| {
        up(WARPS * slots * R * kc * size)
            + up(m * k * size)
            + up(part)
            + up(WARPS * slots * 8)
            + up(WARPS * m * 8)
    };
    let slots = (2..=6).rev().find(|&s| bytes(s) <= SHARED)?;
    Some(Shape {
        grid,
        kc,
        slots,
        shared: bytes(slots).max(ALONE),
    })
}

impl Gemm {
    fn shape(&self, sms: usize) -> Option<Shape> {
        let addend = self.bias.is_some() || self.epilogue == Epilogue::Residual;
        shape(self.m, self.n, self.k, self.dtype.size(), addend, sms)
    }
}

pub(super) fn launch(cx: &mut Context<'_>, g: &Gemm) {
    let s = g
        .shape(cx.options.sms as usize)
        .expect("`takes` was asked first");
    let (prologue, eps) = match g.prologue {
        Prologue::None => (0, None),
        Prologue::Rms { eps } => (1, Some(eps)),
        Prologue::AddRms { eps } => (2, Some(eps)),
    };
    let epilogue = match (g.argmax, g.epilogue) {
        (true, _) => 4,
        (_, Epilogue::None) => u8::from(g.bias.is_some()),
        (_, Epilogue::Residual) => 2,
        (_, Epilogue::SwiGlu) => 3,
    };
    let next = next_weights(cx, s.grid * WARPS * NEXT);
    let label = format!(
        "m{}_n{}_k{}_{}_{}{}_{}",
        g.m,
        g.n,
        g.k,
        ["plain", "rms", "addrms"][prologue],
        if g.argmax {
            "argmax"
        } else {
            epilogue_name(g.epilogue)
        },
        if g.bias.is_some() { "_bias" } else { "" },
        g.dtype
    );
    let mut defines = cx
        .defines(g.dtype)
        .def("LATHE_M", g.m)
        .def("LATHE_N", g.n)
        .def("LATHE_K", g.k)
        .def("LATHE_GRID", s.grid)
        .def("LATHE_WARPS", WARPS)
        .def("LATHE_KC", s.kc)
        .def("LATHE_SLOTS", s.slots)
        .def("LATHE_R", R)
        .def("LATHE_PRO", prologue)
        .def(
            "LATHE_NO_GAMMA",
            u8::from(prologue == 1 && g.gamma == Ref::Null),
        )
        .def("LATHE_EPI", epilogue);
    if let Some(eps) = eps {
        defines = defines.def("LATHE_EPS", literal(eps.get()));
    }
    if g.argmax {
        // Logits are compared as they would be stored, so that ties fall alike with and without logits.
        defines = defines.def("LATHE_MAP(v)", "round_to<E>(v)");
    }
    if next.is_some() {
        defines = defines.def("LATHE_NEXT", NEXT);
    }
    let (best, counter) = match g.argmax {
        true => (
            cx.work("argmax.best", 64, Some(0)),
            cx.work("argmax.counter", 16, Some(0)),
        ),
        false => (Ref::Null, Ref::Null),
    };
    let addend = g.bias.clone().or_else(|| g.residual.clone());
    let args = vec![
        Arg::Ptr(g.w.clone()),
        Arg::Ptr(g.x.clone()),
        Arg::Ptr(g.delta.clone()),
        Arg::Ptr(g.gamma.clone()),
        Arg::Ptr(addend.unwrap_or(Ref::Null)),
        Arg::Ptr(g.y.clone()),
        Arg::Ptr(g.sum.clone()),
        Arg::Ptr(best),
        Arg::Ptr(counter),
        Arg::Ptr(next.unwrap_or(Ref::Null)),
    ];
    let geometry = Geometry::new([s.grid, 1, 1], 32 * WARPS, s.shared);
    cx.launch(Body::Gemv, &label, defines, geometry, args);
}

/// The weights of the next GEMM of the program, if they have so many bytes.
fn next_weights(cx: &Context<'_>, bytes: usize) -> Option<Ref> {
    let later = &cx.program.steps[cx.at + 1..];
    let next = later
        .iter()
        .find(|s| matches!(s.op, Op::Gemm(_) | Op::Linear(Linear)))?;
    match next.get(gemm::W) {
        Some(&Operand::Weight(w)) if cx.plan.weights[w].recipe.bytes() >= bytes => {
            Some(Ref::Weight(w))
        }
        _ => None,
    }
}
