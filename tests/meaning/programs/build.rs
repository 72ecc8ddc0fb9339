//! A builder of programs that may come out ill-typed: then a piece is nothing, and its user goes on
//! without it.

use crate::rng::Rng;
use lathe_ir::ops::{
    Cast, Concat, Const, Embedding, Expand, Input, Iota, Matmul, Permute, Reduce, Reshape, Slice,
    Weight, Where,
};
use lathe_ir::{
    BinaryFn, DType, Dim, Graph, NodeId, Op, Prov, Real, ReduceFn, Sym, UnaryFn, WeightRef,
};

/// A value, or nothing where the program would be ill-typed.
pub(crate) type Built = Option<NodeId>;

/// Constants that trip rules up.
pub(crate) const NUMBERS: [f64; 16] = [
    0.0,
    1.0,
    -1.0,
    0.5,
    2.0,
    3.0,
    -2.0,
    1e-6,
    1e-3,
    100.0,
    -1e4,
    -1e9,
    1e30,
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::NAN,
];

/// The batch symbol as an extent.
pub(crate) fn b() -> Dim {
    Dim::sym(Sym::B)
}

/// The sequence symbol as an extent.
pub(crate) fn s() -> Dim {
    Dim::sym(Sym::S)
}

/// A constant extent.
pub(crate) fn n(v: i64) -> Dim {
    Dim::new(v)
}

pub(crate) struct Build {
    pub(crate) rng: Rng,
    pub(crate) graph: Graph,
    pub(crate) prov: Prov,
    /// The model's element type.
    pub(crate) dtype: DType,
    /// One in how many choices is odd.
    pub(crate) oddity: usize,
    weights: usize,
}

impl Build {
    pub(crate) fn new(mut rng: Rng) -> Build {
        let oddity = rng.pick(&[6, 12, 25, 60, 1000]);
        let dtype = rng.pick(&[DType::F32, DType::F32, DType::F32, DType::BF16]);
        Build {
            rng,
            graph: Graph::new("fuzz"),
            prov: Prov::global("model"),
            dtype,
            oddity,
            weights: 0,
        }
    }

    /// Whether this choice is an odd one.
    pub(crate) fn odd(&mut self) -> bool {
        self.rng.one_in(self.oddity)
    }

    /// The usual item, or an odd one.
    pub(crate) fn usual<T: Clone>(&mut self, usual: T, odd: &[T]) -> T {
        match self.odd() {
            true => self.rng.pick(odd),
            false => usual,
        }
    }

    /// Any operation. Equal leaves are one node, as a program has them.
    pub(crate) fn op(&mut self, op: impl Into<Op>, inputs: &[NodeId]) -> Built {
        let op = op.into();
        if op.is_leaf() {
            let same = |node: &&lathe_ir::Node| match (&node.op, &op) {
                (Op::Weight(a), Op::Weight(b)) => a.weight.name == b.weight.name,
                (Op::Input(a), Op::Input(b)) => a.name == b.name,
                (a, b) => a == b,
            };
            if let Some(at) = self.graph.nodes().iter().position(|n| same(&n)) {
                return Some(NodeId(at as u32));
            }
        }
        self.graph.add(op, inputs, &self.prov).ok()
    }

    pub(crate) fn shape(&self, x: NodeId) -> Vec<Dim> {
        self.graph.tensor(x).map_or(Vec::new(), |t| t.shape.clone())
    }

    /// The last extent, where it is a number.
    pub(crate) fn features(&self, x: NodeId) -> i64 {
        self.shape(x).last().and_then(|d| d.known()).unwrap_or(1)
    }

    pub(crate) fn dtype_of(&self, x: NodeId) -> DType {
        self.graph.tensor(x).map_or(self.dtype, |t| t.dtype)
    }

    pub(crate) fn input(&mut self, name: &str, dtype: DType, shape: &[Dim]) -> Built {
        let name = name.to_string();
        let shape = shape.to_vec();
        self.op(Input { name, dtype, shape }, &[])
    }

    /// A weight of its own, or now and then one that is there already.
    pub(crate) fn weight(&mut self, shape: &[i64]) -> Built {
        if self.odd() {
            let dims: Vec<Dim> = shape.iter().map(|&n| Dim::new(n)).collect();
            let like = |id: &NodeId| {
                let node = self.graph.node(*id);
                let ty = self.graph.tensor(*id);
                matches!(node.op, Op::Weight(_)) && ty.is_some_and(|t| t.shape == dims)
            };
            let known: Vec<NodeId> = self.graph.ids().filter(like).collect();
            if !known.is_empty() {
                return Some(self.rng.pick(&known));
            }
        }
        self.weights += 1;
        let name = match self.prov.layer {
            Some(l) => format!("model.layers.{l}.w{}", self.weights),
            None => format!("model.w{}", self.weights),
        };
        let weight = WeightRef {
            name,
            shape: shape.to_vec(),
        };
        let dtype = self.dtype;
        self.op(Weight { weight, dtype }, &[])
    }

    pub(crate) fn konst(&mut self, value: f64, dtype: DType) -> Built {
        let value = Real::new(value);
        self.op(Const { value, dtype }, &[])
    }

    pub(crate) fn iota(&mut self, len: Dim, dtype: DType) -> Built {
        self.op(Iota { len, dtype }, &[])
    }

    pub(crate) fn un(&mut self, f: UnaryFn, x: NodeId) -> Built {
        self.op(f, &[x])
    }

    pub(crate) fn bin(&mut self, f: BinaryFn, a: NodeId, b: NodeId) -> Built {
        self.op(f, &[a, b])
    }

    /// A function of two operands in either order.
    pub(crate) fn either(&mut self, f: BinaryFn, a: NodeId, b: NodeId) -> Built {
        match self.rng.one_in(3) {
            true => self.bin(f, b, a),
            false => self.bin(f, a, b),
        }
    }

    /// A function of a value and a constant.
    pub(crate) fn with(&mut self, f: BinaryFn, x: NodeId, value: f64) -> Built {
        let c = self.konst(value, self.dtype_of(x))?;
        self.bin(f, x, c)
    }

    /// A conversion; nothing where the type is that already.
    pub(crate) fn cast(&mut self, x: NodeId, to: DType) -> Built {
        match self.dtype_of(x) == to {
            true => Some(x),
            false => self.op(Cast(to), &[x]),
        }
    }

    /// Now and then a value goes through other element types, some of which do not hold it.
    pub(crate) fn maybe_casts(&mut self, x: NodeId) -> Built {
        if !self.odd() {
            return Some(x);
        }
        let back = self.dtype_of(x);
        let mut y = x;
        for _ in 0..1 + self.rng.below(2) {
            let to = self.rng.pick(&DType::ALL);
            y = self.cast(y, to)?;
        }
        self.cast(y, back)
    }

    /// A reduction of the last axis that keeps it, mostly.
    pub(crate) fn reduce(&mut self, f: ReduceFn, x: NodeId) -> Built {
        let last = (self.shape(x).len() as u8).checked_sub(1)?;
        let axis = self.usual(last, &[0, 1, 2]);
        let keepdim = self.usual(true, &[false]);
        self.op(Reduce { f, axis, keepdim }, &[x])
    }

    pub(crate) fn reshape(&mut self, x: NodeId, shape: &[Dim]) -> Built {
        match self.shape(x) == shape {
            true => Some(x),
            false => self.op(Reshape(shape.to_vec()), &[x]),
        }
    }

    pub(crate) fn expand(&mut self, x: NodeId, shape: &[Dim]) -> Built {
        self.op(Expand(shape.to_vec()), &[x])
    }

    pub(crate) fn permute(&mut self, x: NodeId, perm: &[u8]) -> Built {
        self.op(Permute(perm.to_vec()), &[x])
    }

    pub(crate) fn slice(&mut self, x: NodeId, start: i64, end: i64) -> Built {
        let axis = (self.shape(x).len() as u8).checked_sub(1)?;
        self.op(Slice { axis, start, end }, &[x])
    }

    pub(crate) fn concat(&mut self, a: NodeId, b: NodeId) -> Built {
        let axis = (self.shape(a).len() as u8).checked_sub(1)?;
        self.op(Concat { axis }, &[a, b])
    }

    pub(crate) fn matmul(&mut self, a: NodeId, b: NodeId) -> Built {
        self.op(Matmul, &[a, b])
    }

    pub(crate) fn choose(&mut self, c: NodeId, a: NodeId, b: NodeId) -> Built {
        self.op(Where, &[c, a, b])
    }

    pub(crate) fn embedding(&mut self, table: NodeId, ids: NodeId) -> Built {
        self.op(Embedding, &[table, ids])
    }

    /// `x·wᵀ` with a weight `[out, in]`, or `x·w` with one `[in, out]`, mostly without a bias.
    pub(crate) fn linear(&mut self, x: NodeId, out: i64) -> Built {
        let k = self.features(x);
        let y = if self.rng.one_in(8) {
            let w = self.weight(&[k, out])?;
            self.matmul(x, w)?
        } else {
            let w = self.weight(&[out, k])?;
            let w = self.permute(w, &[1, 0])?;
            self.matmul(x, w)?
        };
        if !self.rng.one_in(4) {
            return Some(y);
        }
        let extent = self.usual(out, &[1]);
        let bias = self.weight(&[extent])?;
        self.either(BinaryFn::Add, y, bias)
    }
}
