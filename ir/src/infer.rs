//! Type derivation: which operand types an operation accepts and what it returns. The graph
//! builder, the verifier and the e-graph analysis all use this one function.

use crate::dtype::DType;
use crate::op::{BinaryFn, Op, ReduceFn, UnaryFn};
use crate::shape::{Dim, Sym, broadcast, element_count, format_shape};
use crate::spec::{Epilogue, Prologue};
use crate::text::format_type;
use crate::{TensorType, Type};
use thiserror::Error;

/// An operation does not accept its operands.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{op}: {reason}")]
pub struct TypeError {
    /// The operation's name.
    pub op: &'static str,
    /// What was found and what was expected.
    pub reason: String,
}

/// The result type of an operation on operands of these types.
///
/// # Errors
/// The number of operands, an element type or an extent does not fit.
pub fn infer(op: &Op, inputs: &[&Type]) -> Result<Type, TypeError> {
    derive(op, inputs).map_err(|reason| TypeError {
        op: op.name(),
        reason,
    })
}

type R = Result<Type, String>;

fn derive(op: &Op, inputs: &[&Type]) -> R {
    match op {
        Op::Input { dtype, shape, .. } => {
            arity(inputs, 0).map(|()| Type::tensor(*dtype, &shape[..]))
        }
        Op::Weight { weight, dtype } => {
            arity(inputs, 0).map(|()| Type::tensor(*dtype, weight.dims()))
        }
        Op::Const { dtype, .. } => arity(inputs, 0).map(|()| Type::tensor(*dtype, [])),
        Op::Table { data, .. } => {
            arity(inputs, 0).map(|()| Type::tensor(DType::F32, [Dim::from(data.len())]))
        }
        Op::Iota { len, dtype } => arity(inputs, 0).map(|()| Type::tensor(*dtype, [*len])),
        Op::Cache { .. } => arity(inputs, 0).map(|()| Type::Cache),
        Op::None => arity(inputs, 0).map(|()| Type::None),
        Op::Cast(to) => tensors::<1>(inputs).map(|[x]| Type::tensor(*to, &x.shape[..])),
        Op::Unary(f) => unary(*f, inputs),
        Op::Binary(f) => binary(*f, inputs),
        Op::Where => {
            let [c, a, b] = tensors(inputs)?;
            want_dtype(c, DType::Bool, "condition")?;
            same_dtype(a, b)?;
            let ab = broadcast_of(&a.shape, &b.shape)?;
            Ok(Type::tensor(a.dtype, broadcast_of(&c.shape, &ab)?))
        }
        Op::Reduce { f, axis, keepdim } => reduce(*f, *axis, *keepdim, inputs),
        Op::Matmul => matmul(inputs),
        Op::Embedding => {
            let [table, ids] = tensors(inputs)?;
            want_rank(table, 2, "table")?;
            want_int(ids, "ids")?;
            let mut shape = ids.shape.clone();
            shape.push(table.shape[1]);
            Ok(Type::tensor(table.dtype, shape))
        }
        Op::Reshape(shape) => {
            let [x] = tensors(inputs)?;
            let count = element_count(shape);
            if element_count(&x.shape) != count || count.0 == i64::MAX {
                return Err(format!(
                    "{} does not hold as many elements as {}",
                    format_shape(&x.shape),
                    format_shape(shape)
                ));
            }
            Ok(Type::tensor(x.dtype, &shape[..]))
        }
        Op::Permute(perm) => permute(perm, inputs),
        Op::Expand(shape) => {
            let [x] = tensors(inputs)?;
            let fits = x.rank() == shape.len()
                && x.shape.iter().zip(shape).all(|(a, b)| a == b || a.is(1));
            if !fits {
                return Err(format!(
                    "{} does not stretch to {}",
                    format_shape(&x.shape),
                    format_shape(shape)
                ));
            }
            Ok(Type::tensor(x.dtype, &shape[..]))
        }
        Op::Slice { axis, start, end } => slice(*axis, *start, *end, inputs),
        Op::Concat { axis } => concat(*axis, inputs),
        Op::Linear => {
            let [x, w] = tensors(inputs)?;
            linear(x, w)
        }
        Op::Softmax | Op::Silu => {
            let [x] = tensors(inputs)?;
            want_float(x, "x")?;
            want_min_rank(x, usize::from(matches!(op, Op::Softmax)))?;
            Ok(Type::Tensor(x.clone()))
        }
        Op::RmsNorm { .. } => {
            let [x, w] = tensors(inputs)?;
            norm_operands(x, w)?;
            Ok(Type::Tensor(x.clone()))
        }
        Op::SwiGlu => {
            let [g, u] = tensors(inputs)?;
            same_type(g, u)?;
            want_float(g, "gate")?;
            Ok(Type::Tensor(g.clone()))
        }
        Op::Angles => {
            let [p, f] = tensors(inputs)?;
            want_rank(f, 1, "inv_freq")?;
            let mut shape = p.shape.clone();
            shape.push(f.shape[0]);
            Ok(Type::tensor(DType::F32, shape))
        }
        Op::Rope(_) => rope(inputs),
        Op::RepeatKv { groups } => {
            let [x] = tensors(inputs)?;
            want_rank(x, 4, "x")?;
            let mut shape = x.shape.clone();
            shape[1] = shape[1] * i64::from(*groups);
            Ok(Type::tensor(x.dtype, shape))
        }
        Op::Sdpa(_) => matmul(inputs),
        Op::Attn(spec) => attn(spec.groups, inputs),
        Op::Win(w) => win(*w, inputs),
        Op::Select => {
            let [x, rows] = tensors(inputs)?;
            want_rank(rows, 1, "rows")?;
            want_int(rows, "rows")?;
            want_min_rank(x, 1)?;
            let mut shape = x.shape.clone();
            shape[0] = rows.shape[0];
            Ok(Type::tensor(x.dtype, shape))
        }
        Op::Get(i) => {
            arity(inputs, 1)?;
            match inputs[0] {
                Type::Tuple(ts) if usize::from(*i) < ts.len() => Ok(ts[usize::from(*i)].clone()),
                other => Err(format!(
                    "no element {i} in a value of type {}",
                    format_type(other)
                )),
            }
        }
        Op::AttnStep(spec) => {
            arity(inputs, 4)?;
            let [q, k, v] = tensors(&inputs[..3])?;
            want_rank(q, 3, "q")?;
            want_rank(k, 3, "k")?;
            step_heads(spec.groups, q, k, v)?;
            want_cache(inputs[3])?;
            Ok(Type::Tuple(vec![Type::Tensor(q.clone()), Type::Cache]))
        }
        Op::Proj(p) => {
            arity(inputs, 6)?;
            let [x, w] = tensors(&inputs[..2])?;
            let y = linear(x, w)?;
            let n = i64::from(p.heads).saturating_mul(i64::from(p.head_dim));
            let y = y.as_tensor().expect("linear returns a tensor");
            if !y.shape[y.rank() - 1].is(n) {
                return Err(format!("weight has {} rows, expected {n}", w.shape[0]));
            }
            optional(inputs[2], &[Dim::new(n)], "bias")?;
            optional(inputs[3], &[Dim::new(i64::from(p.head_dim))], "head norm")?;
            let mut shape = y.shape.clone();
            shape.pop();
            shape.push(Dim::new(i64::from(p.heads)));
            shape.push(Dim::new(i64::from(p.head_dim)));
            Ok(Type::tensor(y.dtype, shape))
        }
        Op::Pack(kind) => pack(*kind, inputs),
        Op::Chain(c) => c.ty(inputs).map_err(|e| e.reason),
        Op::AddRms { .. } => {
            let [r, d, w] = tensors(inputs)?;
            same_type(r, d)?;
            norm_operands(r, w)?;
            Ok(Type::Tuple(vec![
                Type::Tensor(r.clone()),
                Type::Tensor(r.clone()),
            ]))
        }
        Op::Gemm(spec) => gemm(spec.prologue, spec.epilogue, inputs),
        Op::AttnQkv(spec) => {
            arity(inputs, 6)?;
            let [qkv] = tensors(&inputs[..1])?;
            want_rank(qkv, 2, "qkv")?;
            let n = i64::from(spec.features());
            if !qkv.shape[1].is(n) {
                return Err(format!(
                    "packed rows have {} features, expected {n}",
                    qkv.shape[1]
                ));
            }
            want_cache(inputs[5])?;
            let out = [
                qkv.shape[0],
                Dim::new(i64::from(spec.heads)),
                Dim::new(i64::from(spec.head_dim)),
            ];
            Ok(Type::Tuple(vec![Type::tensor(qkv.dtype, out), Type::Cache]))
        }
        Op::Sample => {
            let [x] = tensors(inputs)?;
            want_rank(x, 2, "logits")?;
            Ok(Type::tensor(DType::I32, [x.shape[0]]))
        }
    }
}

fn arity(inputs: &[&Type], n: usize) -> Result<(), String> {
    if inputs.len() == n {
        Ok(())
    } else {
        Err(format!("expected {n} operands, found {}", inputs.len()))
    }
}

fn tensors<'a, const N: usize>(inputs: &[&'a Type]) -> Result<[&'a TensorType; N], String> {
    arity(inputs, N)?;
    let mut out = Vec::with_capacity(N);
    for (i, t) in inputs.iter().enumerate() {
        out.push(
            t.as_tensor()
                .ok_or_else(|| format!("operand {i} is not a tensor"))?,
        );
    }
    Ok(out.try_into().expect("arity was checked"))
}

fn want_dtype(t: &TensorType, d: DType, what: &str) -> Result<(), String> {
    if t.dtype == d {
        Ok(())
    } else {
        Err(format!("{what} has dtype {}, expected {d}", t.dtype))
    }
}

fn want_float(t: &TensorType, what: &str) -> Result<(), String> {
    if t.dtype.is_float() {
        Ok(())
    } else {
        Err(format!("{what} has dtype {}, expected a float", t.dtype))
    }
}

fn want_int(t: &TensorType, what: &str) -> Result<(), String> {
    if matches!(t.dtype, DType::I32 | DType::I64) {
        Ok(())
    } else {
        Err(format!("{what} has dtype {}, expected i32 or i64", t.dtype))
    }
}

fn want_rank(t: &TensorType, n: usize, what: &str) -> Result<(), String> {
    if t.rank() == n {
        Ok(())
    } else {
        Err(format!("{what} has rank {}, expected {n}", t.rank()))
    }
}

fn want_min_rank(t: &TensorType, n: usize) -> Result<(), String> {
    if t.rank() >= n {
        Ok(())
    } else {
        Err(format!(
            "rank {} is too small, expected at least {n}",
            t.rank()
        ))
    }
}

fn want_cache(t: &Type) -> Result<(), String> {
    match t {
        Type::Cache => Ok(()),
        other => Err(format!("expected a cache, found {}", format_type(other))),
    }
}

fn same_dtype(a: &TensorType, b: &TensorType) -> Result<(), String> {
    if a.dtype == b.dtype {
        Ok(())
    } else {
        Err(format!("dtypes differ: {} and {}", a.dtype, b.dtype))
    }
}

fn same_type(a: &TensorType, b: &TensorType) -> Result<(), String> {
    same_dtype(a, b)?;
    if a.shape == b.shape {
        Ok(())
    } else {
        Err(format!(
            "shapes differ: {} and {}",
            format_shape(&a.shape),
            format_shape(&b.shape)
        ))
    }
}

fn broadcast_of(a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>, String> {
    broadcast(a, b).ok_or_else(|| {
        format!(
            "{} and {} do not broadcast",
            format_shape(a),
            format_shape(b)
        )
    })
}

fn axis_of(axis: u8, t: &TensorType) -> Result<usize, String> {
    if usize::from(axis) < t.rank() {
        Ok(usize::from(axis))
    } else {
        Err(format!("axis {axis} of a value of rank {}", t.rank()))
    }
}

/// An absent operand, or a vector of the given shape.
fn optional(t: &Type, shape: &[Dim], what: &str) -> Result<(), String> {
    match t {
        Type::None => Ok(()),
        Type::Tensor(t) if t.shape == shape => Ok(()),
        Type::Tensor(t) => Err(format!(
            "{what} has shape {}, expected {}",
            format_shape(&t.shape),
            format_shape(shape)
        )),
        other => Err(format!("{what} is {}", format_type(other))),
    }
}

fn unary(f: UnaryFn, inputs: &[&Type]) -> R {
    let [x] = tensors(inputs)?;
    match f {
        UnaryFn::Not => want_dtype(x, DType::Bool, "x")?,
        UnaryFn::Neg | UnaryFn::Abs | UnaryFn::Relu if x.dtype != DType::Bool => {}
        _ => want_float(x, "x")?,
    }
    Ok(Type::Tensor(x.clone()))
}

fn binary(f: BinaryFn, inputs: &[&Type]) -> R {
    let [a, b] = tensors(inputs)?;
    same_dtype(a, b)?;
    let logical = matches!(f, BinaryFn::And | BinaryFn::Or);
    if logical != (a.dtype == DType::Bool) && !(f.is_comparison() && a.dtype == DType::Bool) {
        return Err(format!("does not apply to {}", a.dtype));
    }
    let dtype = if f.is_comparison() {
        DType::Bool
    } else {
        a.dtype
    };
    Ok(Type::tensor(dtype, broadcast_of(&a.shape, &b.shape)?))
}

fn reduce(f: ReduceFn, axis: u8, keepdim: bool, inputs: &[&Type]) -> R {
    let [x] = tensors(inputs)?;
    let axis = axis_of(axis, x)?;
    want_float(x, "x")?;
    let mut shape = x.shape.clone();
    if keepdim {
        shape[axis] = Dim::new(1);
    } else {
        shape.remove(axis);
    }
    let dtype = if f == ReduceFn::Argmax {
        DType::I64
    } else {
        x.dtype
    };
    Ok(Type::tensor(dtype, shape))
}

fn matmul(inputs: &[&Type]) -> R {
    let [a, b] = tensors(inputs)?;
    same_dtype(a, b)?;
    want_float(a, "a")?;
    want_min_rank(a, 2)?;
    want_min_rank(b, 2)?;
    let (ra, rb) = (a.rank(), b.rank());
    if a.shape[ra - 1] != b.shape[rb - 2] {
        return Err(format!(
            "inner extents differ: {} and {}",
            format_shape(&a.shape),
            format_shape(&b.shape)
        ));
    }
    let mut shape = broadcast_of(&a.shape[..ra - 2], &b.shape[..rb - 2])?;
    shape.push(a.shape[ra - 2]);
    shape.push(b.shape[rb - 1]);
    Ok(Type::tensor(a.dtype, shape))
}

fn permute(perm: &[u8], inputs: &[&Type]) -> R {
    let [x] = tensors(inputs)?;
    let mut seen = vec![false; x.rank()];
    for &p in perm {
        match seen.get_mut(usize::from(p)) {
            Some(s) if !*s => *s = true,
            _ => return Err(format!("{perm:?} is no permutation of {} axes", x.rank())),
        }
    }
    if perm.len() != x.rank() {
        return Err(format!("{perm:?} is no permutation of {} axes", x.rank()));
    }
    let shape: Vec<Dim> = perm.iter().map(|&p| x.shape[usize::from(p)]).collect();
    Ok(Type::tensor(x.dtype, shape))
}

fn slice(axis: u8, start: i64, end: i64, inputs: &[&Type]) -> R {
    let [x] = tensors(inputs)?;
    let axis = axis_of(axis, x)?;
    let extent = x.shape[axis]
        .known()
        .ok_or_else(|| format!("axis {axis} has the symbolic extent {}", x.shape[axis]))?;
    if !(0 <= start && start < end && end <= extent) {
        return Err(format!(
            "{start}..{end} does not lie in an axis of extent {extent}"
        ));
    }
    let mut shape = x.shape.clone();
    shape[axis] = Dim::new(end - start);
    Ok(Type::tensor(x.dtype, shape))
}

fn concat(axis: u8, inputs: &[&Type]) -> R {
    let [a, b] = tensors(inputs)?;
    same_dtype(a, b)?;
    let axis = axis_of(axis, a)?;
    let fits = a.rank() == b.rank() && (0..a.rank()).all(|i| i == axis || a.shape[i] == b.shape[i]);
    if !fits {
        return Err(format!(
            "{} and {} differ beside axis {axis}",
            format_shape(&a.shape),
            format_shape(&b.shape)
        ));
    }
    let mut shape = a.shape.clone();
    shape[axis] = shape[axis] + b.shape[axis];
    Ok(Type::tensor(a.dtype, shape))
}

fn linear(x: &TensorType, w: &TensorType) -> R {
    same_dtype(x, w)?;
    want_float(x, "x")?;
    want_min_rank(x, 1)?;
    want_rank(w, 2, "weight")?;
    if x.shape[x.rank() - 1] != w.shape[1] {
        return Err(format!(
            "x {} does not fit the weight {}",
            format_shape(&x.shape),
            format_shape(&w.shape)
        ));
    }
    let mut shape = x.shape.clone();
    shape.pop();
    shape.push(w.shape[0]);
    Ok(Type::tensor(x.dtype, shape))
}

fn norm_operands(x: &TensorType, w: &TensorType) -> Result<(), String> {
    want_float(x, "x")?;
    want_min_rank(x, 1)?;
    same_dtype(x, w)?;
    if w.shape != x.shape[x.rank() - 1..] {
        return Err(format!(
            "gamma {} does not fit x {}",
            format_shape(&w.shape),
            format_shape(&x.shape)
        ));
    }
    Ok(())
}

fn rope(inputs: &[&Type]) -> R {
    let [x, pos, freq] = tensors(inputs)?;
    want_float(x, "x")?;
    want_min_rank(x, 1)?;
    want_rank(freq, 1, "inv_freq")?;
    let lead = &x.shape[..x.rank() - 1];
    if broadcast(&pos.shape, lead).as_deref() != Some(lead) {
        return Err(format!(
            "positions {} do not broadcast to {}",
            format_shape(&pos.shape),
            format_shape(lead)
        ));
    }
    if freq.shape[0] * 2 != x.shape[x.rank() - 1] {
        return Err(format!(
            "{} frequencies for rows of {} features",
            freq.shape[0],
            x.shape[x.rank() - 1]
        ));
    }
    Ok(Type::Tensor(x.clone()))
}

fn attn(groups: u32, inputs: &[&Type]) -> R {
    let [q, k, v] = tensors(inputs)?;
    same_dtype(q, k)?;
    same_type(k, v)?;
    want_rank(q, 4, "q")?;
    want_rank(k, 4, "k")?;
    let mut expected = k.shape.clone();
    expected[1] = expected[1] * i64::from(groups);
    if q.shape != expected {
        return Err(format!(
            "q {} does not fit k {} with {groups} query heads a KV head",
            format_shape(&q.shape),
            format_shape(&k.shape)
        ));
    }
    Ok(Type::Tensor(q.clone()))
}

fn step_heads(groups: u32, q: &TensorType, k: &TensorType, v: &TensorType) -> Result<(), String> {
    same_dtype(q, k)?;
    same_type(k, v)?;
    let expected = [q.shape[0], k.shape[1] * i64::from(groups), k.shape[2]];
    if q.shape != expected {
        return Err(format!(
            "q {} does not fit k {} with {groups} query heads a KV head",
            format_shape(&q.shape),
            format_shape(&k.shape)
        ));
    }
    Ok(())
}

fn win(w: crate::spec::WinSpec, inputs: &[&Type]) -> R {
    let [x] = tensors(inputs)?;
    for (axis, sym) in [(w.batch, Sym::B), (w.seq, Sym::S)] {
        if let Some(a) = axis {
            let a = axis_of(a, x)?;
            if !x.shape[a].is_sym(sym) {
                return Err(format!(
                    "axis {a} has extent {}, expected {}",
                    x.shape[a],
                    sym.name()
                ));
            }
        }
    }
    if w.batch.is_none() && w.seq.is_none() {
        return Err("neither batch nor sequence axis".to_string());
    }
    let mut shape = vec![Dim::sym(Sym::T)];
    for (i, &d) in x.shape.iter().enumerate() {
        let i = Some(i as u8);
        if i != w.batch && i != w.seq {
            shape.push(d);
        }
    }
    Ok(Type::tensor(x.dtype, shape))
}

fn pack(kind: crate::spec::PackKind, inputs: &[&Type]) -> R {
    let mut rows = Vec::new();
    let mut first: Option<&TensorType> = None;
    for t in inputs {
        let t = t.as_tensor().ok_or("an operand is not a tensor")?;
        want_min_rank(t, 1)?;
        let n = t.shape[0].known().ok_or("an operand has symbolic rows")?;
        rows.push(usize::try_from(n).map_err(|_| format!("an operand has {n} rows"))?);
        match first {
            None => first = Some(t),
            Some(f) => {
                same_dtype(f, t)?;
                if f.shape[1..] != t.shape[1..] {
                    return Err("operands have rows of different lengths".to_string());
                }
            }
        }
    }
    let first = first.ok_or("no operands")?;
    let n = kind
        .packed_rows(&rows)
        .ok_or_else(|| format!("operands of {rows:?} rows do not fit {kind:?}"))?;
    let mut shape = first.shape.clone();
    shape[0] = Dim::from(n);
    Ok(Type::tensor(first.dtype, shape))
}

fn gemm(prologue: Prologue, epilogue: Epilogue, inputs: &[&Type]) -> R {
    arity(inputs, 6)?;
    let [x, w] = tensors(&inputs[..2])?;
    let y = linear(x, w)?;
    let mut y = y.as_tensor().expect("linear returns a tensor").clone();
    optional(inputs[2], &w.shape[..1], "bias")?;
    let last = y.rank() - 1;
    if epilogue == Epilogue::SwiGlu {
        let n = y.shape[last].known().unwrap_or(0);
        if n % 16 != 0 {
            return Err(format!("{n} interleaved rows are no multiple of 16"));
        }
        y.shape[last] = Dim::new(n / 2);
    }
    match (epilogue == Epilogue::Residual, inputs[3]) {
        (true, Type::Tensor(t)) => same_type(t, &y)?,
        (false, Type::None) => {}
        (_, other) => return Err(format!("residual is {}", format_type(other))),
    }
    match (prologue, inputs[4], inputs[5]) {
        (Prologue::None, Type::None, Type::None) => Ok(Type::Tensor(y)),
        (Prologue::Rms { .. }, Type::None, Type::None) => Ok(Type::Tensor(y)),
        (Prologue::Rms { .. }, Type::Tensor(g), Type::None) => {
            norm_operands(x, g)?;
            Ok(Type::Tensor(y))
        }
        (Prologue::AddRms { .. }, Type::Tensor(g), Type::Tensor(d)) => {
            norm_operands(x, g)?;
            same_type(x, d)?;
            Ok(Type::Tuple(vec![Type::Tensor(x.clone()), Type::Tensor(y)]))
        }
        _ => Err("the prologue's operands do not fit".to_string()),
    }
}
