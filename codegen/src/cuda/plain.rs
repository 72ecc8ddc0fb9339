//! The remaining operations, each by one kind of `plain.cu`: reductions, matrix products, gathers,
//! softmax and strided copies.

use super::context::{Call, Context, Geometry};
use super::error::CudaError;
use super::geo::{Geo, broadcast_strides, dense};
use super::launch::{Arg, Ref};
use super::source::{Body, c_type};
use crate::work::Work;
use lathe_ir::Slot;
use lathe_ir::ops::{Concat, Matmul, Pack, Permute, Reduce, RepeatKv, Slice, Softmax};
use lathe_ir::ops::{X, concat, embedding, matmul, select};
use lathe_ir::{DType, Op, ReduceFn};

pub(super) fn embed(cx: &mut Context<'_>) -> Result<(), CudaError> {
    let table = cx.tensor(embedding::TABLE)?;
    let (vocab, width) = cx.matrix(table);
    if !(width * table.dtype.size()).is_multiple_of(16) {
        return gather(cx, embedding::TABLE, embedding::IDS);
    }
    let rows = cx.tensor(embedding::IDS)?.elements(&cx.env);
    if cx.stored_dtype(embedding::IDS)? != DType::I32 {
        return gather(cx, embedding::TABLE, embedding::IDS);
    }
    let defines = cx
        .defines(table.dtype)
        .def("LATHE_H", width)
        .def("LATHE_V", vocab);
    let args = vec![
        Arg::Ptr(cx.operand(embedding::TABLE)?),
        Arg::Ptr(cx.operand(embedding::IDS)?),
        Arg::Ptr(cx.result(0)?),
        Arg::I32(rows as i32),
    ];
    let label = format!("{width}_{}", table.dtype);
    cx.launch(
        Body::Embed,
        &label,
        defines,
        Geometry::new([rows, 1, 1], 128, 0),
        args,
    );
    Ok(())
}

pub(super) fn step(cx: &mut Context<'_>) -> Result<(), CudaError> {
    match cx.step().op.clone() {
        Op::Reduce(Reduce { f, axis, .. }) => reduce(cx, f, usize::from(axis)),
        Op::Matmul(Matmul) => matmul(cx),
        Op::Embedding(_) => gather(cx, embedding::TABLE, embedding::IDS),
        Op::Select(_) => gather(cx, select::X, select::ROWS),
        Op::Softmax(Softmax) => softmax(cx),
        Op::Permute(Permute(perm)) => {
            let x = cx.extents(cx.tensor(X)?);
            let strides = dense(&x);
            let dims: Vec<i64> = perm.iter().map(|&p| x[usize::from(p)]).collect();
            let from: Vec<i64> = perm.iter().map(|&p| strides[usize::from(p)]).collect();
            copy(cx, X, &dims, &from, 0, None)
        }
        Op::Expand(_) => {
            let dims = cx.extents(cx.result_type(0)?);
            let from = broadcast_strides(&cx.extents(cx.tensor(X)?), &dims);
            copy(cx, X, &dims, &from, 0, None)
        }
        Op::Slice(Slice { axis, start, .. }) => {
            let dims = cx.extents(cx.result_type(0)?);
            let from = dense(&cx.extents(cx.tensor(X)?));
            let offset = start * from[usize::from(axis)];
            copy(cx, X, &dims, &from, offset, None)
        }
        Op::Concat(Concat { axis }) => concat(cx, usize::from(axis)),
        Op::RepeatKv(RepeatKv { groups }) => {
            let x = cx.extents(cx.tensor(X)?);
            let s = dense(&x);
            let dims = [x[0], x[1], i64::from(groups), x[2], x[3]];
            copy(cx, X, &dims, &[s[0], s[1], 0, s[2], s[3]], 0, None)
        }
        Op::Pack(kind) => pack(cx, kind),
        _ => Err(cx.refuse("no CUDA kernel computes it")),
    }
}

/// Copies a strided view of an operand, to strides and an offset of the result if given.
fn copy(
    cx: &mut Context<'_>,
    operand: Slot,
    dims: &[i64],
    from: &[i64],
    offset: i64,
    to: Option<(&[i64], i64)>,
) -> Result<(), CudaError> {
    let mut geo = Geo::of(cx, dims)?;
    geo.a[..dims.len()].copy_from_slice(from);
    geo.offsets[0] = offset;
    if let Some((strides, offset)) = to {
        geo.out[..dims.len()].copy_from_slice(strides);
        geo.offsets[3] = offset;
    }
    let (from_type, to_type) = (cx.stored_dtype(operand)?, cx.result_type(0)?.dtype);
    let compute = if to_type.is_float() { "float" } else { "i64" };
    let defines = cx
        .defines(DType::F32)
        .def("LATHE_KIND", 0)
        .def("LATHE_RANK", dims.len().max(1))
        .def("LATHE_TA", c_type(from_type))
        .def("LATHE_TO", c_type(to_type))
        .def("LATHE_CT", compute);
    let grid = [(geo.n as usize).div_ceil(256), 1, 1];
    let label = format!("copy_r{}_{to_type}", dims.len());
    let inputs = [cx.operand(operand)?, Ref::Null, Ref::Null];
    let mut args: Vec<Arg> = inputs.map(Arg::Ptr).to_vec();
    args.push(Arg::Ptr(cx.result(0)?));
    args.push(Arg::Words(geo.words()));
    // A step may copy several operands, a launch each.
    let work = Work {
        bytes: geo.n as f64 * (from_type.size() + to_type.size()) as f64,
        ..cx.step_work()
    };
    cx.call(Call {
        body: Body::Plain,
        label: &label,
        defines,
        geometry: Geometry::new(grid, 256, 0),
        args,
        work: Some(work),
        library: None,
    });
    Ok(())
}

/// Two tensors one after the other along an axis.
fn concat(cx: &mut Context<'_>, axis: usize) -> Result<(), CudaError> {
    let (a, b) = (cx.tensor(concat::A)?, cx.tensor(concat::B)?);
    let out = cx.result_type(0)?;
    let dims = cx.extents(out);
    let (first, second) = (cx.extents(a), cx.extents(b));
    let (from_a, from_b) = (dense(&first), dense(&second));
    let mut geo = Geo::of(cx, &dims)?;
    geo.a[..dims.len()].copy_from_slice(&from_a);
    geo.b[..dims.len()].copy_from_slice(&from_b);
    geo.reduced[0] = first[axis];
    geo.offsets[1] = -first[axis] * from_b[axis];
    let compute = if out.dtype.is_float() { "float" } else { "i64" };
    let defines = cx
        .defines(DType::F32)
        .def("LATHE_KIND", 0)
        .def("LATHE_RANK", dims.len().max(1))
        .def("LATHE_CONCAT", axis)
        .def("LATHE_TA", c_type(cx.stored_dtype(concat::A)?))
        .def("LATHE_TB", c_type(cx.stored_dtype(concat::B)?))
        .def("LATHE_TO", c_type(out.dtype))
        .def("LATHE_CT", compute);
    let grid = [(geo.n as usize).div_ceil(256), 1, 1];
    let label = format!("concat{axis}_r{}_{}", dims.len(), out.dtype);
    let inputs = [cx.operand(concat::A)?, cx.operand(concat::B)?, Ref::Null];
    launch(
        cx,
        &label,
        defines,
        Geometry::new(grid, 256, 0),
        inputs,
        &geo,
    )
}

fn launch(
    cx: &mut Context<'_>,
    label: &str,
    defines: super::source::Defines,
    geometry: Geometry,
    inputs: [Ref; 3],
    geo: &Geo,
) -> Result<(), CudaError> {
    let mut args: Vec<Arg> = inputs.map(Arg::Ptr).to_vec();
    args.push(Arg::Ptr(cx.result(0)?));
    args.push(Arg::Words(geo.words()));
    cx.launch(Body::Plain, label, defines, geometry, args);
    Ok(())
}

fn reduce(cx: &mut Context<'_>, f: ReduceFn, axis: usize) -> Result<(), CudaError> {
    let x = cx.tensor(X)?;
    let mut dims = cx.extents(x);
    let mut strides = dense(&dims);
    let (extent, stride) = (dims.remove(axis), strides.remove(axis));
    let mut geo = Geo::of(cx, &dims)?;
    geo.a[..dims.len()].copy_from_slice(&strides);
    geo.reduced[5] = extent;
    geo.b[5] = stride;
    let code = match f {
        ReduceFn::Sum => 0,
        ReduceFn::Amax => 1,
        ReduceFn::Mean => 2,
        ReduceFn::Argmax => 4,
    };
    let out = cx.result_type(0)?.dtype;
    let defines = cx
        .defines(DType::F32)
        .def("LATHE_KIND", 1)
        .def("LATHE_RANK", dims.len().max(1))
        .def("LATHE_TA", c_type(x.dtype))
        .def("LATHE_TO", c_type(out))
        .def("LATHE_RED", code);
    let label = format!("{}_r{}_{}", cx.step().op.name(), dims.len(), x.dtype);
    let geometry = Geometry::new([geo.n as usize, 1, 1], 128, 0);
    let inputs = [cx.operand(X)?, Ref::Null, Ref::Null];
    launch(cx, &label, defines, geometry, inputs, &geo)
}

fn matmul(cx: &mut Context<'_>) -> Result<(), CudaError> {
    let (a, b) = (cx.tensor(matmul::A)?, cx.tensor(matmul::B)?);
    let out = cx.result_type(0)?;
    let (ad, bd, od) = (cx.extents(a), cx.extents(b), cx.extents(out));
    let rank = od.len();
    if rank > 4 {
        return Err(cx.refuse(format!("{rank} axes, the kernel takes 4")));
    }
    let full = |d: &[i64]| [&vec![1; 4 - d.len()][..], d].concat();
    let (ad, bd, od) = (full(&ad), full(&bd), full(&od));
    // Broadcasting over the two leading axes only.
    let lead = |d: &[i64]| {
        let s = dense(d);
        [0, 1].map(|i| if d[i] == 1 { 0 } else { s[i] })
    };
    let (m, n, k) = (od[2], od[3], ad[3]);
    let mut geo = Geo::new(&[od[0], od[1], m, n, k, 1]);
    let [a0, a1] = lead(&ad);
    let [b0, b1] = lead(&bd);
    geo.a = [a0, a1, k, 0, 1, 0];
    geo.b = [b0, b1, 0, 1, n, 0];
    geo.out = [od[1] * m * n, m * n, n, 1, 0, 0];
    let defines = cx
        .defines(DType::F32)
        .def("LATHE_KIND", 2)
        .def("LATHE_TA", c_type(a.dtype))
        .def("LATHE_TB", c_type(b.dtype))
        .def("LATHE_TO", c_type(out.dtype));
    let grid = [
        (n as usize).div_ceil(16),
        (m as usize).div_ceil(16),
        (od[0] * od[1]) as usize,
    ];
    let inputs = [cx.operand(matmul::A)?, cx.operand(matmul::B)?, Ref::Null];
    let label = format!("matmul_{}", out.dtype);
    launch(
        cx,
        &label,
        defines,
        Geometry::new(grid, 256, 0),
        inputs,
        &geo,
    )
}

/// Rows of an operand by the indices in another.
fn gather(cx: &mut Context<'_>, x: Slot, ids: Slot) -> Result<(), CudaError> {
    let operands = [cx.operand(x)?, cx.operand(ids)?, Ref::Null];
    let (x, out) = (cx.tensor(x)?, cx.result_type(0)?);
    let rows = cx.extents(x)[0];
    let count = cx.tensor(ids)?.elements(&cx.env) as i64;
    let inner = x.elements(&cx.env) as i64 / rows.max(1);
    let mut geo = Geo::new(&[1, count, inner, rows]);
    geo.n = count * inner;
    let defines = cx
        .defines(DType::F32)
        .def("LATHE_KIND", 3)
        .def("LATHE_TA", c_type(x.dtype))
        .def("LATHE_TO", c_type(out.dtype))
        .def("LATHE_TI", c_type(cx.stored_dtype(ids)?));
    let grid = [(geo.n as usize).div_ceil(256), 1, 1];
    let label = format!("gather_{}", x.dtype);
    launch(
        cx,
        &label,
        defines,
        Geometry::new(grid, 256, 0),
        operands,
        &geo,
    )
}

fn softmax(cx: &mut Context<'_>) -> Result<(), CudaError> {
    let x = cx.tensor(X)?;
    let (rows, cols) = cx.matrix(x);
    let geo = Geo::new(&[rows as i64, cols as i64]);
    let defines = cx
        .defines(DType::F32)
        .def("LATHE_KIND", 5)
        .def("LATHE_TA", c_type(x.dtype))
        .def("LATHE_TO", c_type(cx.result_type(0)?.dtype));
    let label = format!("softmax_{}", x.dtype);
    let inputs = [cx.operand(X)?, Ref::Null, Ref::Null];
    launch(
        cx,
        &label,
        defines,
        Geometry::new([rows, 1, 1], 128, 0),
        inputs,
        &geo,
    )
}

/// Computed weights laid out as one (weights from files are packed while they are loaded).
fn pack(cx: &mut Context<'_>, kind: Pack) -> Result<(), CudaError> {
    let mut at = 0;
    for i in 0..cx.step().operands.len() {
        let part = Slot::nth(i);
        let (rows, k) = match cx.extents(cx.tensor(part)?)[..] {
            [n] => (n, 1),
            [n, k] => (n, k),
            _ => return Err(cx.refuse("weights have one or two axes")),
        };
        // Views [heads, block, half, 8, K] of the destination and their strides in the source.
        let halves = |d: i64| {
            let dims = vec![rows / d, d / 16, 2, 8, k];
            let from = vec![d * k, 8 * k, d / 2 * k, k, 1];
            let to = vec![d * k, 16 * k, 8 * k, k, 1];
            (dims, from, to)
        };
        let (dims, from, to) = match kind {
            Pack::GateUp => (vec![rows / 8, 8, k], vec![8 * k, k, 1], vec![16 * k, k, 1]),
            Pack::Qkv {
                head_dim,
                interleave: true,
            } if i < 2 => halves(i64::from(head_dim)),
            Pack::Head { head_dim } => halves(i64::from(head_dim)),
            Pack::Qkv { .. } => (vec![rows, k], vec![k, 1], vec![k, 1]),
        };
        let offset = match kind {
            Pack::GateUp => i as i64 * 8 * k,
            _ => at * k,
        };
        copy(cx, part, &dims, &from, 0, Some((&to, offset)))?;
        at += rows;
    }
    Ok(())
}
