//! Checks that the type rules of operations share. A failure is said in words.

use crate::dtype::DType;
use crate::operands::{Operands, Slot};
use crate::shape::{Dim, broadcast, format_shape};
use crate::types::{TensorType, Type, format_type};

impl<'a> Operands<&'a Type> {
    /// The tensor type of a required operand.
    pub(crate) fn tensor(&self, slot: Slot) -> Result<&'a TensorType, String> {
        self[slot]
            .as_tensor()
            .ok_or_else(|| format!("operand '{}' is not a tensor", slot.name()))
    }

    /// The tensor type of an operand that may be absent.
    pub(crate) fn opt_tensor(&self, slot: Slot) -> Result<Option<&'a TensorType>, String> {
        self.get(slot).map(|_| self.tensor(slot)).transpose()
    }
}

pub(crate) fn want_dtype(t: &TensorType, d: DType, what: &str) -> Result<(), String> {
    if t.dtype == d {
        Ok(())
    } else {
        Err(format!("{what} has dtype {}, expected {d}", t.dtype))
    }
}

pub(crate) fn want_float(t: &TensorType, what: &str) -> Result<(), String> {
    if t.dtype.is_float() {
        Ok(())
    } else {
        Err(format!("{what} has dtype {}, expected a float", t.dtype))
    }
}

pub(crate) fn want_int(t: &TensorType, what: &str) -> Result<(), String> {
    if matches!(t.dtype, DType::I32 | DType::I64) {
        Ok(())
    } else {
        Err(format!("{what} has dtype {}, expected i32 or i64", t.dtype))
    }
}

pub(crate) fn want_rank(t: &TensorType, n: usize, what: &str) -> Result<(), String> {
    if t.rank() == n {
        Ok(())
    } else {
        Err(format!("{what} has rank {}, expected {n}", t.rank()))
    }
}

pub(crate) fn want_min_rank(t: &TensorType, n: usize) -> Result<(), String> {
    if t.rank() >= n {
        Ok(())
    } else {
        Err(format!(
            "rank {} is too small, expected at least {n}",
            t.rank()
        ))
    }
}

pub(crate) fn want_cache(t: &Type) -> Result<(), String> {
    match t {
        Type::Cache => Ok(()),
        other => Err(format!("expected a cache, found {}", format_type(other))),
    }
}

pub(crate) fn same_dtype(a: &TensorType, b: &TensorType) -> Result<(), String> {
    if a.dtype == b.dtype {
        Ok(())
    } else {
        Err(format!("dtypes differ: {} and {}", a.dtype, b.dtype))
    }
}

pub(crate) fn same_type(a: &TensorType, b: &TensorType) -> Result<(), String> {
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

pub(crate) fn broadcast_of(a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>, String> {
    broadcast(a, b).ok_or_else(|| {
        format!(
            "{} and {} do not broadcast",
            format_shape(a),
            format_shape(b)
        )
    })
}

pub(crate) fn axis_of(axis: u8, t: &TensorType) -> Result<usize, String> {
    if usize::from(axis) < t.rank() {
        Ok(usize::from(axis))
    } else {
        Err(format!("axis {axis} of a value of rank {}", t.rank()))
    }
}

/// An absent operand, or a vector of the given shape.
pub(crate) fn optional(
    operands: &Operands<&Type>,
    slot: Slot,
    shape: &[Dim],
) -> Result<(), String> {
    match operands.opt_tensor(slot)? {
        Some(t) if t.shape != shape => Err(format!(
            "{} has shape {}, expected {}",
            slot.name(),
            format_shape(&t.shape),
            format_shape(shape)
        )),
        _ => Ok(()),
    }
}

/// The type of `x·wᵀ`.
pub(crate) fn linear_of(x: &TensorType, w: &TensorType) -> Result<TensorType, String> {
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
    let mut y = x.clone();
    y.shape.pop();
    y.shape.push(w.shape[0]);
    Ok(y)
}

/// Rows and the factors of their columns.
pub(crate) fn norm_operands(x: &TensorType, w: &TensorType) -> Result<(), String> {
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
