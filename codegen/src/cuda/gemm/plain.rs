//! The plain kernel, for element types and sizes that the others do not take: geometry of `linear_plain.cu`.

use super::family::{Family, NormSupport};
use super::key::{Problem, epilogue_name};
use super::request::Request;
use crate::cuda::context::{Context, Geometry};
use crate::cuda::launch::Arg;
use crate::cuda::source::Body;
use lathe_ir::Epilogue;
use lathe_ir::ops::gemm;

/// Rows and columns of a block.
const TILE: usize = 64;

/// The family of `linear_plain.cu`.
pub(in crate::cuda) struct Plain;

impl Family for Plain {
    type Form = ();
    type Shape = ();

    fn forms() -> Vec<()> {
        vec![()]
    }

    fn shape(problem: &Problem, (): (), _: usize) -> Option<()> {
        (!problem.argmax).then_some(())
    }

    fn heuristic(problem: &Problem, sms: usize) -> Option<()> {
        Plain::shape(problem, (), sms)
    }

    fn candidates(_: &Problem, _: usize) -> Vec<()> {
        Vec::new()
    }

    fn norm(_: &Problem) -> NormSupport {
        NormSupport::No("the plain kernel takes no norm")
    }

    fn emit(cx: &mut Context<'_>, g: &Request, (): (), (): &()) {
        let (key, dtype) = (g.problem.key, g.problem.dtype);
        let epilogue = match key.epilogue {
            Epilogue::None => 0,
            Epilogue::Residual => 2,
            Epilogue::SwiGlu => 3,
        };
        let defines = cx
            .defines(dtype)
            .def("LATHE_EPI", epilogue)
            .def("LATHE_BIAS", u8::from(g.has(gemm::BIAS)));
        let bias = if g.has(gemm::BIAS) { "_bias" } else { "" };
        let label = format!("{}{bias}_{dtype}", epilogue_name(key.epilogue));
        let args = vec![
            Arg::Ptr(g.at(gemm::X)),
            Arg::Ptr(g.at(gemm::W)),
            Arg::Ptr(g.at(gemm::BIAS)),
            Arg::Ptr(g.at(gemm::RESIDUAL)),
            Arg::Ptr(g.y.clone()),
            Arg::I32(key.m as i32),
            Arg::I32(key.n as i32),
            Arg::I32(key.k as i32),
        ];
        let grid = [key.n.div_ceil(TILE), key.m.div_ceil(TILE), 1];
        let geometry = Geometry::new(grid, 256, 0);
        g.launch(cx, Body::LinearPlain, &label, defines, geometry, args);
    }
}
