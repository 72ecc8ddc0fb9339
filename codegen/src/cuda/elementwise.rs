//! Elementwise operations with broadcasting, by `plain.cu`.

use super::context::{Context, Geometry};
use super::error::CudaError;
use super::geo::{Geo, broadcast_strides};
use super::launch::{Arg, Ref};
use super::source::{Body, c_type, literal};
use crate::plan::Operand;
use lathe_ir::ops::angles;
use lathe_ir::ops::{self, Angles, Cast, Silu, SwiGlu, Where};
use lathe_ir::{BinaryFn, DType, Op, UnaryFn};

pub(super) fn step(cx: &mut Context<'_>) -> Result<(), CudaError> {
    let step = cx.step();
    let out = cx.result_type(0)?;
    let dims = cx.extents(out);
    // Memory operands get the parameters a, b, c in turn; constants are written into the expression.
    let mut names = Vec::new();
    let mut types = Vec::new();
    let mut args = Vec::new();
    let mut geo = Geo::of(cx, &dims)?;
    for &operand in step.op.signature().slots {
        if let Some(&Operand::Const { value, dtype }) = step.get(operand) {
            names.push(constant(value.get(), dtype));
            continue;
        }
        let slot = args.len();
        let shape = cx.extents(cx.tensor(operand)?);
        let strides = match step.op {
            // An outer product: the rows of the positions, the columns of the frequencies.
            Op::Angles(_) if operand == angles::POSITIONS => {
                broadcast_strides(&[&shape[..], &[1]].concat(), &dims)
            }
            _ => broadcast_strides(&shape, &dims),
        };
        let (name, to) = match slot {
            0 => ("a", &mut geo.a),
            1 => ("b", &mut geo.b),
            _ => ("c", &mut geo.c),
        };
        to[..dims.len()].copy_from_slice(&strides);
        names.push(name.to_owned());
        types.push(cx.stored_dtype(operand)?);
        args.push(Arg::Ptr(cx.operand(operand)?));
    }
    let is_integer = |t: &DType| !t.is_float();
    let exact = types.iter().all(is_integer)
        && (is_integer(&out.dtype) || step.op.is_leaf())
        && !matches!(step.op, Op::Angles(Angles));
    let expr = expression(cx, &names)?;
    let inputs = args.len();
    let mut defines = cx
        .defines(DType::F32)
        .def("LATHE_KIND", 0)
        .def("LATHE_RANK", dims.len().max(1))
        .def("LATHE_INPUTS", inputs)
        .def("LATHE_TO", c_type(out.dtype))
        .def("LATHE_CT", if exact { "i64" } else { "float" });
    for (name, t) in ["LATHE_TA", "LATHE_TB", "LATHE_TC"].iter().zip(&types) {
        defines = defines.def(name, c_type(*t));
    }
    defines = defines.def("LATHE_EXPR(a, b, c, ix)", format!("({expr})"));
    args.resize(3, Arg::Ptr(Ref::Null));
    args.push(Arg::Ptr(cx.result(0)?));
    let n = geo.n;
    args.push(Arg::Words(geo.words()));
    let label = format!("{}_r{}_{}", step.op.name(), dims.len(), out.dtype);
    let grid = [(n as usize).div_ceil(256), 1, 1];
    cx.launch(
        Body::Plain,
        &label,
        defines,
        Geometry::new(grid, 256, 0),
        args,
    );
    Ok(())
}

/// A constant of an element type, rounded to it.
fn constant(v: f64, dtype: DType) -> String {
    match dtype {
        DType::BF16 | DType::F16 => format!("round_to<{}>({})", c_type(dtype), literal(v)),
        DType::F32 => literal(v),
        _ => format!("((i64){})", v as i64),
    }
}

fn expression(cx: &Context<'_>, x: &[String]) -> Result<String, CudaError> {
    let a = x.first().map_or("", String::as_str);
    let b = x.get(1).map_or("", String::as_str);
    let call = |f: &str| format!("{f}({a})");
    Ok(match &cx.step().op {
        Op::Cast(Cast(DType::Bool)) => format!("{a} != 0"),
        Op::Cast(_) => a.to_owned(),
        Op::Iota(_) => "ix[0]".to_owned(),
        Op::Where(Where) => format!("{a} != 0 ? {b} : {}", x[2]),
        Op::Silu(Silu) => call("silu"),
        Op::SwiGlu(SwiGlu) => format!("silu({a}) * {b}"),
        Op::Angles(Angles) => format!("{a} * {b}"),
        Op::Unary(f) => unary(*f, a),
        Op::Binary(BinaryFn::Pow) => power(cx, a, b),
        Op::Binary(f) => binary(*f, a, b),
        op => return Err(cx.refuse(format!("{} is not elementwise", op.name()))),
    })
}

/// A function of a value.
pub(super) fn unary(f: UnaryFn, a: &str) -> String {
    let call = |f: &str| format!("{f}({a})");
    match f {
        UnaryFn::Neg => format!("-{a}"),
        UnaryFn::Abs => format!("{a} < 0 ? -{a} : {a}"),
        UnaryFn::Exp => call("expf"),
        UnaryFn::Log => call("logf"),
        UnaryFn::Sqrt => call("sqrtf"),
        UnaryFn::Rsqrt => call("rsqrtf"),
        UnaryFn::Sin => call("sinf"),
        UnaryFn::Cos => call("cosf"),
        UnaryFn::Tanh => call("tanhf"),
        UnaryFn::Sigmoid => format!("1.0f / (1.0f + expf(-{a}))"),
        UnaryFn::Erf => call("erff"),
        UnaryFn::Relu => format!("{a} > 0 ? {a} : 0"),
        UnaryFn::Not => format!("{a} == 0"),
    }
}

/// A function of two values.
pub(super) fn binary(f: BinaryFn, a: &str, b: &str) -> String {
    let infix = |op: &str| format!("{a} {op} {b}");
    match f {
        BinaryFn::Add => infix("+"),
        BinaryFn::Sub => infix("-"),
        BinaryFn::Mul => infix("*"),
        BinaryFn::Div => infix("/"),
        BinaryFn::Pow => format!("powf({a}, {b})"),
        BinaryFn::Maximum => format!("{a} > {b} ? {a} : {b}"),
        BinaryFn::Minimum => format!("{a} < {b} ? {a} : {b}"),
        BinaryFn::Eq => infix("=="),
        BinaryFn::Ne => infix("!="),
        BinaryFn::Lt => infix("<"),
        BinaryFn::Le => infix("<="),
        BinaryFn::Gt => infix(">"),
        BinaryFn::Ge => infix(">="),
        BinaryFn::And => format!("{a} != 0 && {b} != 0"),
        BinaryFn::Or => format!("{a} != 0 || {b} != 0"),
    }
}

/// Small whole powers are products: `powf` of a negative base is exact for them too, but slow.
fn power(cx: &Context<'_>, a: &str, b: &str) -> String {
    match cx.step().get(ops::binary::B) {
        Some(Operand::Const { value, .. }) if value.get() == 2.0 => format!("{a} * {a}"),
        Some(Operand::Const { value, .. }) if value.get() == 3.0 => format!("{a} * {a} * {a}"),
        _ => binary(BinaryFn::Pow, a, b),
    }
}
