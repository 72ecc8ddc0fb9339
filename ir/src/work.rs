//! What an operation has to compute and to move, whatever executes it.
//!
//! Told once: the cost model puts the rates of a device on it and chooses programs by it, and the tables of measured
//! kernels refine it by what their launches leave out.

use crate::ops::{Attn, AttnStep, attn, attn_qkv, attn_step, gemm, linear, matmul};
use crate::{Epilogue, Op, Operands, Slot, SymEnv, TensorType, Type, chain};

/// Operations (a multiply-add counts two) and bytes of one operation at given sizes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct OpWork {
    /// The sizes of its matrix product.
    pub product: Option<Product>,
    /// Its heads, if it attends over a KV cache. What that takes follows from the lengths of the sequences and is in
    /// none of the other fields.
    pub attention: Option<Heads>,
    /// Operations of matrix products.
    pub matrix: f64,
    /// Operations elsewhere, without those of a GEMM's prologue.
    pub vector: f64,
    /// Bytes of operands that are read, each once. A lookup reads the rows that it picks.
    pub read: f64,
    /// Bytes of results.
    pub written: f64,
    /// Whether it needs a kernel: leaves and views do not.
    pub kernel: bool,
}

/// A matrix product `[M, K] · [N, K]ᵀ`, or as many of them as M is a multiple of one's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Rows of the result, in all.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// What is summed over.
    pub k: usize,
}

impl Product {
    /// Operations.
    pub fn flops(self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }
}

/// Sizes of an attention over a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Heads {
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Features of a head.
    pub head_dim: u32,
    /// Bytes of a cached element.
    pub element: u32,
    /// Keys that a row sees at most, its own among them.
    pub window: Option<u32>,
}

impl Heads {
    /// Operations of `Q·Kᵀ` and `P·V` for one row and one key that it sees.
    pub fn pair_flops(&self) -> f64 {
        4.0 * f64::from(self.heads) * f64::from(self.head_dim)
    }

    /// Bytes of a cached token: its keys and its values.
    pub fn token_bytes(&self) -> f64 {
        2.0 * f64::from(self.kv_heads) * f64::from(self.head_dim) * f64::from(self.element)
    }

    /// How many of so many keys a row sees.
    pub fn seen(&self, keys: usize) -> usize {
        self.window.map_or(keys, |w| keys.min(w as usize))
    }
}

impl OpWork {
    /// The work of an operation on operands of these types, for a result of this one.
    pub fn of(op: &Op, operands: &Operands<&Type>, result: &Type, env: &SymEnv) -> OpWork {
        let tensor = |slot: Slot| operands.get(slot)?.as_tensor();
        let elements = result.as_tensor().map_or(0, |t| t.elements(env));
        if op.is_leaf() || matches!(op, Op::Reshape(_) | Op::Get(_)) {
            return OpWork::default();
        }
        let mut w = OpWork {
            vector: elements as f64,
            read: operands.iter().map(|t| bytes(t, env)).sum(),
            written: bytes(result, env),
            kernel: true,
            ..OpWork::default()
        };
        match op {
            Op::Select(_) | Op::Embedding(_) => w.read = w.written,
            Op::Matmul(_) => w.multiply(product(elements, tensor(matmul::A), result, env)),
            Op::Linear(_) => w.multiply(projection(tensor(linear::X), tensor(linear::W), env)),
            Op::Gemm(spec) => {
                w.multiply(projection(tensor(gemm::X), tensor(gemm::W), env));
                let outputs = w.product.map_or(0, |p| p.m * p.n);
                w.vector = match spec.epilogue {
                    Epilogue::None => 0.0,
                    _ => outputs as f64,
                };
            }
            Op::Attn(Attn(s)) => {
                if let Some(q) = tensor(attn::Q) {
                    let keys = extent(q, 2, env) as f64;
                    let seen = if s.mask.causal { keys / 2.0 } else { keys };
                    w.matrix = 4.0 * q.elements(env) as f64 * seen;
                }
            }
            Op::AttnStep(AttnStep(s)) => {
                w.attention = tensor(attn_step::Q)
                    .zip(tensor(attn_step::K))
                    .map(|(q, k)| Heads {
                        heads: extent(q, 1, env) as u32,
                        kv_heads: extent(k, 1, env) as u32,
                        head_dim: extent(q, 2, env) as u32,
                        element: q.dtype.size() as u32,
                        window: s.mask.window,
                    });
            }
            Op::AttnQkv(s) => {
                w.attention = tensor(attn_qkv::QKV).map(|qkv| Heads {
                    heads: s.heads,
                    kv_heads: s.kv_heads,
                    head_dim: s.head_dim,
                    element: qkv.dtype.size() as u32,
                    window: s.attn.mask.window,
                });
            }
            Op::Chain(c) => {
                let tensors = operands.iter().filter_map(|t| t.as_tensor());
                if let Ok(domain) = chain::domain(tensors) {
                    let elements: f64 = domain.iter().map(|d| d.eval(env) as f64).product();
                    w.vector = elements * c.statements.len() as f64;
                }
            }
            Op::RmsNorm(_) | Op::AddRms(_) | Op::Softmax(_) => w.vector *= 4.0,
            _ => {}
        }
        w
    }

    /// All bytes, each operand and result once.
    pub fn bytes(&self) -> f64 {
        self.read + self.written
    }

    fn multiply(&mut self, product: Option<Product>) {
        self.product = product;
        self.matrix = product.map_or(0.0, Product::flops);
    }
}

/// The product of rows with a weight as it is stored, `[N, K]`.
fn projection(x: Option<&TensorType>, w: Option<&TensorType>, env: &SymEnv) -> Option<Product> {
    let (x, w) = (x?, w?);
    let k = last(w, env);
    let (m, n) = (x.elements(env) / k.max(1), w.elements(env) / k.max(1));
    Some(Product { m, n, k })
}

/// Products of matrices, of the first of which one is given, with as many elements in the results.
fn product(
    elements: usize,
    a: Option<&TensorType>,
    result: &Type,
    env: &SymEnv,
) -> Option<Product> {
    let n = last(result.as_tensor()?, env);
    Some(Product {
        m: elements / n.max(1),
        n,
        k: last(a?, env),
    })
}

fn extent(t: &TensorType, axis: usize, env: &SymEnv) -> usize {
    t.shape.get(axis).map_or(0, |d| d.eval(env)) as usize
}

fn last(t: &TensorType, env: &SymEnv) -> usize {
    t.shape.last().map_or(1, |d| d.eval(env)) as usize
}

/// Bytes of a value; a cache counts by what is attended to, not here.
fn bytes(t: &Type, env: &SymEnv) -> f64 {
    match t {
        Type::Tensor(t) => t.bytes(env) as f64,
        Type::Tuple(ts) => ts.iter().map(|t| bytes(t, env)).sum(),
        Type::Cache => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Gemm, Reshape, X};
    use crate::{DType, Dim, Sym};

    fn tensor(shape: &[Dim]) -> Type {
        Type::Tensor(TensorType {
            dtype: DType::BF16,
            shape: shape.to_vec(),
        })
    }

    /// By hand: 3 rows of 8 features with a weight of 5 rows.
    #[test]
    fn a_gemm_by_hand() {
        let env = SymEnv::new(&[(Sym::T, 3)]);
        let (t, k, n) = (Dim::sym(Sym::T), Dim::new(8), Dim::new(5));
        let (x, w, y) = (tensor(&[t, k]), tensor(&[n, k]), tensor(&[t, n]));
        let operands = Operands::default().with(gemm::X, &x).with(gemm::W, &w);
        let work = OpWork::of(&Op::Gemm(Gemm::default()), &operands, &y, &env);
        let of = |m, n, k| Product { m, n, k };
        assert_eq!(work.product, Some(of(3, 5, 8)));
        assert_eq!(
            (work.matrix, work.vector, work.bytes()),
            (240.0, 0.0, (24.0 + 40.0 + 15.0) * 2.0)
        );
    }

    #[test]
    fn a_view_is_free() {
        let x = tensor(&[Dim::new(4)]);
        let to = vec![Dim::new(2), Dim::new(2)];
        let y = tensor(&to);
        let op = Op::Reshape(Reshape(to));
        let operands = Operands::default().with(X, &x);
        let work = OpWork::of(&op, &operands, &y, &SymEnv::new(&[]));
        assert_eq!(work, OpWork::default());
    }

    #[test]
    fn a_cached_token_by_hand() {
        let heads = Heads {
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            element: 2,
            window: Some(3),
        };
        assert_eq!((heads.pair_flops(), heads.token_bytes()), (128.0, 64.0));
        assert_eq!((heads.seen(2), heads.seen(9)), (2, 3));
    }
}
