//! Building sample graphs for rules: a seeded generator of small odd sizes and a terse builder.

use lathe_ir::{
    BinaryFn, DType, Dim, Graph, NodeId, Op, Prov, Real, ReduceFn, Sym, UnaryFn, WeightRef,
};

/// A seeded source of sizes (SplitMix64), so that samples are the same on every machine.
#[derive(Clone, Debug)]
pub struct Gen {
    state: u64,
}

impl Gen {
    /// A generator for a seed.
    pub fn new(seed: u64) -> Gen {
        Gen { state: seed }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// One of the given values.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[(self.next() % of.len() as u64) as usize]
    }

    /// A small extent, often odd.
    pub fn dim(&mut self) -> i64 {
        self.pick(&[1, 2, 3, 5, 8])
    }

    /// An extent of at least 2, for axes whose extent 1 would make operations trivial.
    pub fn wide(&mut self) -> i64 {
        self.pick(&[2, 3, 5, 8])
    }

    /// f32 or bf16: imports of both have different casts.
    pub fn float(&mut self) -> DType {
        self.pick(&[DType::F32, DType::BF16])
    }

    /// A value in `[-1, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// Builds a sample graph. Methods panic on ill-typed operations: samples are code, not input.
#[derive(Debug)]
pub struct Build {
    graph: Graph,
    prov: Prov,
}

/// The batch symbol as an extent.
pub fn b() -> Dim {
    Dim::sym(Sym::B)
}

/// The sequence symbol as an extent.
pub fn s() -> Dim {
    Dim::sym(Sym::S)
}

/// The token symbol as an extent.
pub fn t() -> Dim {
    Dim::sym(Sym::T)
}

/// A constant extent.
pub fn n(v: i64) -> Dim {
    Dim::new(v)
}

impl Default for Build {
    fn default() -> Self {
        Build::new()
    }
}

impl Build {
    /// An empty sample.
    pub fn new() -> Build {
        Build {
            graph: Graph::new("sample"),
            prov: Prov::layer(0, "sample"),
        }
    }

    /// Any operation.
    pub fn op(&mut self, op: Op, inputs: &[NodeId]) -> NodeId {
        self.graph
            .add(op, inputs, &self.prov)
            .unwrap_or_else(|e| panic!("sample: {e}"))
    }

    /// A run-time input.
    pub fn input(&mut self, name: &str, dtype: DType, shape: &[Dim]) -> NodeId {
        self.op(
            Op::Input {
                name: name.to_string(),
                dtype,
                shape: shape.to_vec(),
            },
            &[],
        )
    }

    /// A weight.
    pub fn weight(&mut self, name: &str, dtype: DType, shape: &[i64]) -> NodeId {
        self.op(
            Op::Weight {
                weight: WeightRef {
                    name: name.to_string(),
                    shape: shape.to_vec(),
                },
                dtype,
            },
            &[],
        )
    }

    /// A constant.
    pub fn konst(&mut self, value: f64, dtype: DType) -> NodeId {
        self.op(
            Op::Const {
                value: Real::new(value),
                dtype,
            },
            &[],
        )
    }

    /// A unary function.
    pub fn un(&mut self, f: UnaryFn, x: NodeId) -> NodeId {
        self.op(Op::Unary(f), &[x])
    }

    /// A binary function.
    pub fn bin(&mut self, f: BinaryFn, a: NodeId, b: NodeId) -> NodeId {
        self.op(Op::Binary(f), &[a, b])
    }

    /// A reduction of the last axis that keeps it with extent 1.
    pub fn reduce_last(&mut self, f: ReduceFn, x: NodeId) -> NodeId {
        let rank = self.graph.tensor(x).expect("a tensor").rank();
        let axis = rank as u8 - 1;
        self.op(
            Op::Reduce {
                f,
                axis,
                keepdim: true,
            },
            &[x],
        )
    }

    /// A cast, left out when the value has the type already, as importers do.
    pub fn cast(&mut self, x: NodeId, to: DType) -> NodeId {
        if self.graph.tensor(x).expect("a tensor").dtype == to {
            x
        } else {
            self.op(Op::Cast(to), &[x])
        }
    }

    /// A reshape.
    pub fn reshape(&mut self, x: NodeId, shape: &[Dim]) -> NodeId {
        self.op(Op::Reshape(shape.to_vec()), &[x])
    }

    /// A permutation of axes.
    pub fn permute(&mut self, x: NodeId, perm: &[u8]) -> NodeId {
        self.op(Op::Permute(perm.to_vec()), &[x])
    }

    /// A slice of one axis.
    pub fn slice(&mut self, x: NodeId, axis: u8, start: i64, end: i64) -> NodeId {
        self.op(Op::Slice { axis, start, end }, &[x])
    }

    /// Rows of one step of a full-sequence value.
    pub fn win(&mut self, x: NodeId, batch: Option<u8>, seq: Option<u8>) -> NodeId {
        self.op(Op::Win(lathe_ir::WinSpec { batch, seq }), &[x])
    }

    /// A table of `count` rotary frequencies.
    pub fn freqs(&mut self, count: i64) -> NodeId {
        let data = (0..count)
            .map(|i| Real::new(0.7f64.powi(i as i32)))
            .collect();
        let name = "inv_freq".to_string();
        self.op(Op::Table { name, data }, &[])
    }

    /// An absent operand.
    pub fn none(&mut self) -> NodeId {
        self.op(Op::None, &[])
    }

    /// The finished sample, with one output for each given value.
    pub fn done(mut self, outputs: &[NodeId]) -> Graph {
        for (i, &id) in outputs.iter().enumerate() {
            self.graph.set_output(&format!("y{i}"), id);
        }
        self.graph
    }
}
