//! Values of the interpreter: dense row-major tensors, cache handles and tuples.

use super::Float;

/// A dense row-major tensor.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Tensor<T> {
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The elements; as many as the extents' product.
    pub data: Vec<T>,
}

impl<T> Tensor<T> {
    /// A tensor of these extents and elements.
    ///
    /// # Panics
    /// The number of elements is not the product of the extents.
    pub fn new(shape: impl Into<Vec<usize>>, data: Vec<T>) -> Tensor<T> {
        let shape = shape.into();
        assert_eq!(
            shape.iter().product::<usize>(),
            data.len(),
            "a tensor holds as many elements as its shape says"
        );
        Tensor { shape, data }
    }

    /// A rank-0 tensor.
    pub fn scalar(v: T) -> Tensor<T> {
        Tensor {
            shape: Vec::new(),
            data: vec![v],
        }
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Extent of the last axis; 1 for a scalar.
    pub fn last(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The same shape with each element mapped.
    pub fn map<O>(&self, f: impl Fn(T) -> O) -> Tensor<O>
    where
        T: Copy,
    {
        Tensor {
            shape: self.shape.clone(),
            data: self.data.iter().map(|&x| f(x)).collect(),
        }
    }
}

/// A value of the program.
#[derive(Clone, PartialEq, Debug)]
pub enum Value<F> {
    /// A tensor of any float element type.
    Float(Tensor<F>),
    /// A tensor of i32 or i64.
    Int(Tensor<i64>),
    /// A tensor of bool.
    Bool(Tensor<bool>),
    /// A handle of the KV cache of a layer; the rows are in [`super::Interp::caches`].
    Cache(CacheRef),
    /// Several values.
    Tuple(Vec<Value<F>>),
}

/// Which cache a value stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CacheRef {
    /// Layer index; the key in [`super::Interp::caches`].
    pub layer: u32,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Features per head.
    pub head_dim: usize,
}

impl<F: Float> Value<F> {
    /// Extents, if this is a tensor.
    pub fn shape(&self) -> Option<&[usize]> {
        match self {
            Value::Float(t) => Some(&t.shape),
            Value::Int(t) => Some(&t.shape),
            Value::Bool(t) => Some(&t.shape),
            _ => None,
        }
    }

    /// The tensor, if this is a float tensor.
    pub fn as_float(&self) -> Option<&Tensor<F>> {
        match self {
            Value::Float(t) => Some(t),
            _ => None,
        }
    }

    /// The tensor, if this is an integer tensor.
    pub fn as_int(&self) -> Option<&Tensor<i64>> {
        match self {
            Value::Int(t) => Some(t),
            _ => None,
        }
    }

    pub(super) fn kind(&self) -> &'static str {
        match self {
            Value::Float(_) => "a float tensor",
            Value::Int(_) => "an integer tensor",
            Value::Bool(_) => "a bool tensor",
            Value::Cache(_) => "a cache",
            Value::Tuple(_) => "a tuple",
        }
    }

    pub(super) fn float(&self) -> Result<&Tensor<F>, String> {
        self.as_float()
            .ok_or_else(|| format!("expected a float tensor, found {}", self.kind()))
    }

    pub(super) fn int(&self) -> Result<&Tensor<i64>, String> {
        self.as_int()
            .ok_or_else(|| format!("expected an integer tensor, found {}", self.kind()))
    }

    pub(super) fn bool(&self) -> Result<&Tensor<bool>, String> {
        match self {
            Value::Bool(t) => Ok(t),
            other => Err(format!("expected a bool tensor, found {}", other.kind())),
        }
    }

    pub(super) fn cache(&self) -> Result<CacheRef, String> {
        match self {
            Value::Cache(c) => Ok(*c),
            other => Err(format!("expected a cache, found {}", other.kind())),
        }
    }

    /// The elements of a numeric tensor as floats.
    pub(super) fn to_float(&self) -> Result<Tensor<F>, String> {
        match self {
            Value::Float(t) => Ok(t.clone()),
            Value::Int(t) => Ok(t.map(|v| F::from_f64(v as f64))),
            other => Err(format!("expected a numeric tensor, found {}", other.kind())),
        }
    }
}

/// Row-major strides of a shape.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut out = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        out[i - 1] = out[i] * shape[i];
    }
    out
}

/// Strides with which a tensor of `shape` is read under the extents `to` it is broadcast to.
/// `None` if it does not stretch to them.
pub(super) fn broadcast_strides(shape: &[usize], to: &[usize]) -> Option<Vec<usize>> {
    let skip = to.len().checked_sub(shape.len())?;
    let own = strides(shape);
    let mut out = vec![0; to.len()];
    for i in 0..shape.len() {
        if shape[i] == to[skip + i] {
            out[skip + i] = own[i];
        } else if shape[i] != 1 {
            return None;
        }
    }
    Some(out)
}

/// The shape of a broadcast.
pub(super) fn broadcast_shape(a: &[usize], b: &[usize]) -> Result<Vec<usize>, String> {
    let rank = a.len().max(b.len());
    let at = |s: &[usize], i: usize| {
        let skip = rank - s.len();
        if i < skip { 1 } else { s[i - skip] }
    };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y || y == 1 => Ok(x),
            (1, y) => Ok(y),
            _ => Err(format!("{a:?} and {b:?} do not broadcast")),
        })
        .collect()
}

/// Axes of `N` operands that are walked together: extent, and the stride in each operand.
pub(super) type Axes<const N: usize> = Vec<(usize, [usize; N])>;

/// Joins neighbouring axes that every operand walks without a gap. The result has at least one
/// axis, so that the innermost one always exists.
pub(super) fn coalesce<const N: usize>(shape: &[usize], strides: [&[usize]; N]) -> Axes<N> {
    let mut out: Axes<N> = Vec::with_capacity(shape.len());
    for (i, &n) in shape.iter().enumerate() {
        if n == 1 {
            continue;
        }
        let here = strides.map(|s| s[i]);
        match out.last_mut() {
            Some((len, st)) if (0..N).all(|k| st[k] == here[k] * n) => {
                *len *= n;
                *st = here;
            }
            _ => out.push((n, here)),
        }
    }
    if out.is_empty() {
        out.push((1, [0; N]));
    }
    out
}

/// Calls `body` with the operands' offsets at the start of each innermost axis, in row-major
/// order.
pub(super) fn walk<const N: usize>(axes: &Axes<N>, mut body: impl FnMut([usize; N])) {
    if axes.iter().any(|a| a.0 == 0) {
        return;
    }
    let outer = &axes[..axes.len() - 1];
    let mut index = vec![0; outer.len()];
    let mut offset = [0; N];
    loop {
        body(offset);
        let mut axis = outer.len();
        loop {
            if axis == 0 {
                return;
            }
            axis -= 1;
            let (n, st) = outer[axis];
            index[axis] += 1;
            for k in 0..N {
                offset[k] += st[k];
            }
            if index[axis] < n {
                break;
            }
            for k in 0..N {
                offset[k] -= st[k] * n;
            }
            index[axis] = 0;
        }
    }
}
