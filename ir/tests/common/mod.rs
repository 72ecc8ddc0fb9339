//! Random well-formed programs over every operation and payload.
#![allow(dead_code)]

use lathe_ir::ops::{
    AddRms, Angles, Attn, AttnQkv, AttnStep, Cache, Cast, Concat, Const, Embedding, Expand, Gemm,
    Get, Input, Iota, Linear, Matmul, Pack, Permute, Proj, Reduce, RepeatKv, Reshape, RmsNorm,
    Rope, Sample, Sdpa, Select, Silu, Slice, Softmax, SwiGlu, Table, Weight, Where, Win, attn_qkv,
    gemm, proj,
};
use lathe_ir::*;

/// Values of the symbols that fit the steps of [`STEP_LENS`].
pub(crate) const SYMS: [(Sym, i64); 4] = [(Sym::B, 2), (Sym::S, 3), (Sym::T, 4), (Sym::R, 2)];

/// New rows of each sequence in a step of random programs; nothing is cached before.
pub(crate) const STEP_LENS: [usize; 2] = [3, 1];

/// A deterministic generator of numbers (xorshift64*).
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }

    pub(crate) fn pick<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())].clone()
    }

    pub(crate) fn coin(&mut self) -> bool {
        self.below(2) == 0
    }
}

pub(crate) struct Gen {
    pub(crate) rng: Rng,
    pub(crate) graph: Graph,
    count: u32,
}

/// A random program of about `size` operations.
pub(crate) fn graph(seed: u64, size: usize) -> Graph {
    let mut g = Gen {
        rng: Rng::new(seed),
        graph: Graph::new(""),
        count: 0,
    };
    g.graph.name = g.name();
    for _ in 0..size {
        g.operation();
    }
    let n = g.graph.nodes().len();
    for i in 0..g.rng.below(4) {
        let id = NodeId(g.rng.below(n) as u32);
        // A cache version that a step replaces is no result.
        if g.graph.node(id).ty != Type::Cache {
            let name = if g.rng.coin() {
                format!("y{i}")
            } else {
                format!("{}{i}", g.name())
            };
            g.graph.set_output(&name, id);
        }
    }
    g.graph
}

impl Gen {
    /// A name that is not used yet, often an awkward one.
    fn name(&mut self) -> String {
        self.count += 1;
        let base = self.rng.pick(&[
            "tokens",
            "model.layers.0.q_proj",
            "a b",
            "\"q\"",
            "back\\slash",
            "новый",
            "tab\there",
            "line\nbreak",
            "// x",
            "L3",
            "",
            "\u{1}\u{7f}\u{2028}",
        ]);
        format!("{base}{}", self.count)
    }

    fn prov(&mut self) -> Prov {
        let path = self.rng.pick(&[
            "",
            "model.norm",
            "model.layers.0.self_attn.q_proj",
            "L7",
            "L",
            "a b",
            " ",
            "\"",
            "x // y",
            "é\n",
            "\\u{41}",
            "{",
        ]);
        if self.rng.coin() {
            let layer = self.rng.pick(&[0, 1, 31, u32::MAX]);
            Prov::layer(layer, path)
        } else {
            Prov::global(path)
        }
    }

    fn real(&mut self) -> Real {
        Real::new(self.rng.pick(&[
            1.0,
            0.5,
            1e-6,
            1e-5,
            0.1,
            3.0,
            1.0 / 3.0,
            1e17,
            123_456.789,
            5e-324,
            1.5e300,
        ]))
    }

    fn opt_real(&mut self) -> Option<Real> {
        let r = self.real();
        self.rng.coin().then_some(r)
    }

    fn dim(&mut self) -> Dim {
        let (s, t, b) = (Dim::sym(Sym::S), Dim::sym(Sym::T), Dim::sym(Sym::B));
        let r = Dim::sym(Sym::R);
        let n = [1, 2, 3, 5, 8].map(Dim::new);
        let made = [s + Dim::new(1), s * 2 - Dim::new(3), t - Dim::new(1), b + r];
        self.rng
            .pick(&[&n[..], &n[..], &[s, t, b, r], &made].concat())
    }

    fn shape(&mut self, min: usize, max: usize) -> Vec<Dim> {
        let n = min + self.rng.below(max - min + 1);
        (0..n).map(|_| self.dim()).collect()
    }

    fn float(&mut self) -> DType {
        self.rng.pick(&[DType::F16, DType::BF16, DType::F32])
    }

    fn int(&mut self) -> DType {
        self.rng.pick(&[DType::I32, DType::I64])
    }

    fn add(&mut self, op: impl Into<Op>, inputs: impl Into<Operands<NodeId>>) -> NodeId {
        let (op, prov) = (op.into(), self.prov());
        match self.graph.add(op.clone(), inputs, &prov) {
            Ok(id) => id,
            Err(e) => panic!("the generator makes well-typed operations: {e} ({op:?})"),
        }
    }

    fn input(&mut self, dtype: DType, shape: &[Dim]) -> NodeId {
        let name = self.name();
        self.add(
            Input {
                name,
                dtype,
                shape: shape.to_vec(),
            },
            [],
        )
    }

    /// A value of a type: an existing one or a new leaf.
    fn value(&mut self, dtype: DType, shape: &[Dim]) -> NodeId {
        let ty = Type::tensor(dtype, shape);
        let have: Vec<NodeId> = self
            .graph
            .ids()
            .filter(|&i| self.graph.node(i).ty == ty)
            .collect();
        if !have.is_empty() && self.rng.coin() {
            return self.rng.pick(&have);
        }
        let known: Option<Vec<i64>> = shape.iter().map(|d| d.known()).collect();
        match known {
            Some(shape) if dtype.is_float() && self.rng.coin() => {
                let weight = WeightRef {
                    name: self.name(),
                    shape,
                };
                self.add(Weight { weight, dtype }, [])
            }
            _ => self.input(dtype, shape),
        }
    }

    /// A value or nothing.
    fn optional(&mut self, present: bool, dtype: DType, shape: &[Dim]) -> Option<NodeId> {
        present.then(|| self.value(dtype, shape))
    }

    /// A shape that broadcasts to `shape`.
    fn narrowed(&mut self, shape: &[Dim]) -> Vec<Dim> {
        let skip = self.rng.below(shape.len() + 1);
        shape[skip..]
            .iter()
            .map(|&d| {
                if self.rng.below(3) == 0 {
                    Dim::new(1)
                } else {
                    d
                }
            })
            .collect()
    }

    fn attn(&mut self, groups: u32, causal: bool, stage: SdpaStage) -> AttnSpec {
        AttnSpec {
            scale: self.real(),
            softcap: self.opt_real(),
            mask: Mask {
                causal: causal || self.rng.coin(),
                window: self.rng.pick(&[None, Some(1), Some(4096)]),
            },
            groups,
            stage,
        }
    }

    fn cache(&mut self, kv_heads: u32, head_dim: u32) -> NodeId {
        self.count += 1;
        let layer = self.count;
        self.add(
            Cache {
                layer,
                kv_heads,
                head_dim,
            },
            [],
        )
    }

    /// Reads both elements of a tuple.
    fn split(&mut self, tuple: NodeId) {
        for i in 0..2 {
            if self.rng.coin() {
                self.add(Get(i), [tuple]);
            }
        }
    }

    /// Appends one random operation and the operands that it needs.
    #[allow(clippy::too_many_lines)]
    fn operation(&mut self) {
        let (f, eps) = (self.float(), self.real());
        let d = Dim::new;
        let token = Dim::sym(Sym::T);
        match self.rng.below(35) {
            0 => {
                let (value, dtype) = (self.real(), self.rng.pick(&DType::ALL));
                self.add(Const { value, dtype }, []);
            }
            1 => {
                let (name, n) = (self.name(), self.rng.below(4));
                let data = (0..n).map(|_| self.real()).collect();
                self.add(Table { name, data }, []);
            }
            2 => {
                let (len, dtype) = (self.dim(), self.rng.pick(&[DType::I64, DType::F32]));
                self.add(Iota { len, dtype }, []);
            }
            3 => {
                let (shape, from) = (self.shape(0, 4), self.rng.pick(&DType::ALL));
                let x = self.value(from, &shape);
                let to = self.rng.pick(&DType::ALL);
                self.add(Cast(to), [x]);
            }
            4 | 5 => {
                let g = self.rng.pick(UnaryFn::ALL);
                let dtype = if g == UnaryFn::Not { DType::Bool } else { f };
                let shape = self.shape(0, 4);
                let x = self.value(dtype, &shape);
                self.add(g, [x]);
            }
            6 | 7 => {
                let g = self.rng.pick(BinaryFn::ALL);
                let dtype = match g {
                    BinaryFn::And | BinaryFn::Or => DType::Bool,
                    BinaryFn::Div | BinaryFn::Pow => f,
                    _ => self.rng.pick(&[f, DType::I32, DType::I64]),
                };
                let shape = self.shape(0, 4);
                let narrow = self.narrowed(&shape);
                let (a, b) = (self.value(dtype, &shape), self.value(dtype, &narrow));
                let ops = if self.rng.coin() { [a, b] } else { [b, a] };
                self.add(g, ops);
            }
            8 => {
                let shape = self.shape(0, 4);
                let (n, m) = (self.narrowed(&shape), self.narrowed(&shape));
                let dtype = self.rng.pick(&DType::ALL);
                let c = self.value(DType::Bool, &shape);
                let (a, b) = (self.value(dtype, &n), self.value(dtype, &m));
                self.add(Where, [c, a, b]);
            }
            9 | 10 => {
                let (g, shape) = (self.rng.pick(ReduceFn::ALL), self.shape(1, 4));
                let (axis, keepdim) = (self.rng.below(shape.len()) as u8, self.rng.coin());
                let x = self.value(f, &shape);
                self.add(
                    Reduce {
                        f: g,
                        axis,
                        keepdim,
                    },
                    [x],
                );
            }
            11 => {
                let (lead, m, k, n) = (self.shape(0, 2), self.dim(), self.dim(), self.dim());
                let narrow = self.narrowed(&lead);
                let a = self.value(f, &[&lead[..], &[m, k]].concat());
                let b = self.value(f, &[&narrow[..], &[k, n]].concat());
                self.add(Matmul, [a, b]);
            }
            12 => {
                let (shape, dtype) = (self.shape(0, 3), self.int());
                let table = self.value(f, &[d(8), d(5)]);
                let ids = self.input(dtype, &shape);
                self.add(Embedding, [table, ids]);
            }
            13 => {
                let mut shape = self.shape(0, 4);
                let x = self.value(f, &shape);
                shape.insert(self.rng.below(shape.len() + 1), d(1));
                shape.sort();
                self.add(Reshape(shape), [x]);
            }
            14 => {
                let shape = self.shape(0, 4);
                let x = self.value(f, &shape);
                let mut perm: Vec<u8> = (0..shape.len() as u8).collect();
                for i in (1..perm.len()).rev() {
                    perm.swap(i, self.rng.below(i + 1));
                }
                self.add(Permute(perm), [x]);
            }
            15 => {
                let shape = self.shape(0, 4);
                let ones: Vec<Dim> = shape
                    .iter()
                    .map(|&n| if self.rng.coin() { d(1) } else { n })
                    .collect();
                let x = self.value(f, &ones);
                self.add(Expand(shape), [x]);
            }
            16 => {
                let mut shape = self.shape(1, 3);
                let axis = self.rng.below(shape.len());
                shape[axis] = d(8);
                let start = self.rng.below(8) as i64;
                let end = start + 1 + self.rng.below(8 - start as usize) as i64;
                let x = self.value(f, &shape);
                let axis = axis as u8;
                self.add(Slice { axis, start, end }, [x]);
            }
            17 => {
                let mut shape = self.shape(1, 3);
                let a = self.value(f, &shape);
                let axis = self.rng.below(shape.len());
                shape[axis] = self.dim();
                let b = self.value(f, &shape);
                self.add(Concat { axis: axis as u8 }, [a, b]);
            }
            18 => {
                let (lead, n) = (self.shape(0, 2), d(3));
                let x = self.value(f, &[&lead[..], &[d(5)]].concat());
                let w = self.value(f, &[n, d(5)]);
                self.add(Linear, [x, w]);
            }
            19 => {
                let shape = self.shape(1, 3);
                let x = self.value(f, &shape);
                if self.rng.coin() {
                    self.add(Softmax, [x]);
                } else {
                    self.add(Silu, [x]);
                }
            }
            20 => {
                let shape = self.shape(1, 3);
                let (x, y) = (self.value(f, &shape), self.value(f, &shape));
                let g = self.value(f, &shape[shape.len() - 1..]);
                if self.rng.coin() {
                    self.add(RmsNorm { eps }, [x, g]);
                } else {
                    let both = self.add(AddRms { eps }, [x, y, g]);
                    self.split(both);
                }
            }
            21 => {
                let shape = self.shape(0, 3);
                let (x, y) = (self.value(f, &shape), self.value(f, &shape));
                self.add(SwiGlu, [x, y]);
            }
            22 => {
                let (shape, dtype) = (self.shape(0, 2), self.int());
                let p = self.value(dtype, &shape);
                let q = self.value(DType::F32, &[d(3)]);
                self.add(Angles, [p, q]);
            }
            23 => {
                let (lead, dtype) = (self.shape(0, 3), self.int());
                let narrow = self.narrowed(&lead);
                let x = self.value(f, &[&lead[..], &[d(8)]].concat());
                let (p, q) = (self.value(dtype, &narrow), self.value(DType::F32, &[d(4)]));
                let spec = Rope { scaling: eps };
                self.add(spec, [x, p, q]);
            }
            24 => {
                let shape = self.shape(4, 4);
                let x = self.value(f, &shape);
                let groups = 1 + self.rng.below(3) as u32;
                self.add(RepeatKv { groups }, [x]);
            }
            25 => {
                let stage = self
                    .rng
                    .pick(&[SdpaStage::Mask, SdpaStage::Cap, SdpaStage::Scale]);
                let spec = self.attn(1, false, stage);
                let (lead, s) = (self.shape(2, 2), self.dim());
                let x = self.value(f, &[&lead[..], &[s, s]].concat());
                let v = self.value(f, &[&lead[..], &[s, d(3)]].concat());
                self.add(Sdpa(spec), [x, v]);
            }
            26 => {
                let groups = 1 + self.rng.below(3) as u32;
                let spec = self.attn(groups, false, SdpaStage::Closed);
                let (b, h, s) = (self.dim(), self.dim(), self.dim());
                let q = self.value(f, &[b, h * i64::from(groups), s, d(3)]);
                let k = self.value(f, &[b, h, s, d(3)]);
                let v = self.value(f, &[b, h, s, d(3)]);
                self.add(Attn(spec), [q, k, v]);
            }
            27 => {
                let (batch, seq) = self.rng.pick(&[(true, true), (true, false), (false, true)]);
                let mut shape = self.shape(0, 2);
                let at = |on: bool, sym: Sym, shape: &mut Vec<Dim>| {
                    on.then(|| {
                        shape.push(Dim::sym(sym));
                        shape.len() as u8 - 1
                    })
                };
                let batch = at(batch, Sym::B, &mut shape);
                let seq = at(seq, Sym::S, &mut shape);
                let x = self.value(f, &shape);
                self.add(Win { batch, seq }, [x]);
            }
            28 => {
                let (shape, dtype) = (self.shape(0, 2), self.int());
                let x = self.value(f, &[&[token][..], &shape].concat());
                let rows = self.input(dtype, &[Dim::sym(Sym::R)]);
                self.add(Select, [x, rows]);
            }
            29 => {
                let groups = 1 + self.rng.below(3) as u32;
                let spec = self.attn(groups, true, SdpaStage::Closed);
                let q = self.value(f, &[token, d(2 * i64::from(groups)), d(3)]);
                let k = self.value(f, &[token, d(2), d(3)]);
                let v = self.value(f, &[token, d(2), d(3)]);
                let cache = self.cache(2, 3);
                let both = self.add(AttnStep(spec), [q, k, v, cache]);
                self.split(both);
            }
            30 => {
                let (bias, norm, rope) = (self.rng.coin(), self.opt_real(), self.opt_real());
                let spec = Proj {
                    heads: 2,
                    head_dim: 4,
                    head_norm: norm,
                    rope: rope.map(|scaling| Rope { scaling }),
                };
                let (norm, rope) = (norm.is_some(), rope.is_some());
                let (x, w) = (self.value(f, &[token, d(5)]), self.value(f, &[d(8), d(5)]));
                let ops = Operands::from([x, w])
                    .with(proj::BIAS, self.optional(bias, f, &[d(8)]))
                    .with(proj::GAMMA, self.optional(norm, f, &[d(4)]))
                    .with(proj::POSITIONS, self.optional(rope, DType::I32, &[token]))
                    .with(proj::INV_FREQ, self.optional(rope, DType::F32, &[d(2)]));
                self.add(spec, ops);
            }
            31 => match self.rng.below(3) {
                0 => {
                    let interleave = self.rng.coin();
                    let head_dim = if interleave { 16 } else { 3 };
                    let n = i64::from(head_dim);
                    let ops = [
                        self.value(f, &[d(2 * n), d(5)]),
                        self.value(f, &[d(n), d(5)]),
                        self.value(f, &[d(n), d(5)]),
                    ];
                    let kind = Pack::Qkv {
                        head_dim,
                        interleave,
                    };
                    self.add(kind, ops);
                }
                1 => {
                    let x = self.value(f, &[d(16)]);
                    self.add(Pack::Head { head_dim: 16 }, [x]);
                }
                _ => {
                    let (g, u) = (self.value(f, &[d(8), d(5)]), self.value(f, &[d(8), d(5)]));
                    self.add(Pack::GateUp, [g, u]);
                }
            },
            32 => {
                let prologue = self.rng.pick(&[
                    Prologue::None,
                    Prologue::Rms { eps },
                    Prologue::AddRms { eps },
                ]);
                let epilogue =
                    self.rng
                        .pick(&[Epilogue::None, Epilogue::Residual, Epilogue::SwiGlu]);
                let sum = matches!(prologue, Prologue::AddRms { .. });
                // A norm alone does without gamma if the weight has it.
                let gamma = sum || (prologue != Prologue::None && self.rng.coin());
                let bias = self.rng.coin();
                let residual = epilogue == Epilogue::Residual;
                let (x, w) = (self.value(f, &[token, d(5)]), self.value(f, &[d(16), d(5)]));
                let ops = Operands::from([x, w])
                    .with(gemm::BIAS, self.optional(bias, f, &[d(16)]))
                    .with(gemm::RESIDUAL, self.optional(residual, f, &[token, d(16)]))
                    .with(gemm::GAMMA, self.optional(gamma, f, &[d(5)]))
                    .with(gemm::DELTA, self.optional(sum, f, &[token, d(5)]));
                let y = self.add(Gemm { prologue, epilogue }, ops);
                if sum {
                    self.split(y);
                }
            }
            33 => {
                let mut shape = self.shape(1, 3);
                let last = shape.len() - 1;
                shape[last] = d(5);
                let (x, y) = (self.value(f, &shape), self.value(f, &shape));
                let g = self.value(f, &[d(5)]);
                let (text, operands) = self.rng.pick(&[
                    (format!("silu a0; cast:{f} t0 -> t1"), 1),
                    (
                        format!("swiglu a0 a1; softmax t0; mul t1 {eps}:{f} -> t2"),
                        2,
                    ),
                    (
                        format!("mean:{last} a0; sub a1 t0; rmsnorm:{eps} t1 a2 -> t2 t0"),
                        3,
                    ),
                ]);
                let chain: Chain = text.parse().expect("a chain");
                let tuple = chain.results.len() > 1;
                let y = self.add(chain, &[x, y, g][..operands]);
                if tuple {
                    self.split(y);
                }
            }
            _ => {
                if self.rng.coin() {
                    let (x, v) = (self.dim(), self.dim());
                    let x = self.value(f, &[x, v]);
                    self.add(Sample, [x]);
                    return;
                }
                let (norm, rope) = (self.opt_real(), self.opt_real());
                let spec = AttnQkv {
                    attn: self.attn(2, true, SdpaStage::Closed),
                    heads: 4,
                    kv_heads: 2,
                    head_dim: 16,
                    head_norm: norm,
                    rope: rope.map(|scaling| Rope { scaling }),
                };
                let (norm, rope) = (norm.is_some(), rope.is_some());
                let ops = Operands::from([self.value(f, &[token, d(128)]), self.cache(2, 16)])
                    .with(attn_qkv::Q_NORM, self.optional(norm, f, &[d(16)]))
                    .with(attn_qkv::K_NORM, self.optional(norm, f, &[d(16)]))
                    .with(
                        attn_qkv::POSITIONS,
                        self.optional(rope, DType::I32, &[token]),
                    )
                    .with(attn_qkv::INV_FREQ, self.optional(rope, DType::F32, &[d(8)]));
                let both = self.add(spec, ops);
                self.split(both);
            }
        }
    }
}
