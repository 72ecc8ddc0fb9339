//! What an operation costs at a given point: a roofline.
//!
//! Cost = max(operations / rate, bytes / bandwidth) + launch, in picoseconds as integers, so that
//! sums are exact and comparisons never depend on the order of summation. Weight-only layout
//! changes cost nothing: they are executed once, while loading. Operations without a kernel
//! ([`lathe_ir::Op::Win`], [`lathe_ir::Op::Sdpa`]) cost [`INFINITE`]: an extraction that cannot
//! avoid them fails and names them.

use lathe_ir::ops::{
    Attn, AttnStep, Gemm, attn, attn_qkv, attn_step, gemm as gemm_of, linear, matmul,
};
use lathe_ir::{DType, Epilogue, Op, Prologue, Sym, SymEnv, TensorType, Type};
use lathe_ir::{Operands, Slot};

/// The cost of what cannot be executed. Sums saturate here.
pub const INFINITE: u64 = u64::MAX / 4;

/// Rates of a device, for the roofline.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceModel {
    /// Name in dumps and predictions.
    pub name: &'static str,
    /// Matrix-unit operations per second (a multiply-add counts two) in 16-bit types.
    pub matrix_flops: f64,
    /// Operations per second outside the matrix units.
    pub vector_flops: f64,
    /// Bytes per second from memory.
    pub bandwidth: f64,
    /// Bytes per second from the last-level cache, over all units.
    pub cache_bandwidth: f64,
    /// Units that would each repeat a prologue.
    pub units: f64,
    /// Seconds from the end of one kernel to the start of the next, inside a graph.
    pub launch: f64,
    /// Most rows whose norm every unit repeats: with more, a GEMM takes a norm only if gamma is in its
    /// weight, as one factor a row.
    pub max_prologue_rows: i64,
}

impl DeviceModel {
    /// NVIDIA H100 80GB HBM3. Measured ceilings: read stream 3.16 TB/s, bf16 GEMM 740 TFLOP/s,
    /// 0.9 µs per kernel in a graph (docs/measurements.md).
    pub const H100: DeviceModel = DeviceModel {
        name: "h100",
        matrix_flops: 740e12,
        vector_flops: 30e12,
        bandwidth: 3.16e12,
        cache_bandwidth: 5.5e12,
        units: 132.0,
        launch: 1.2e-6,
        max_prologue_rows: 4,
    };

    /// NVIDIA H200: as an H100 with 4.28 TB/s.
    pub const H200: DeviceModel = DeviceModel {
        name: "h200",
        bandwidth: 4.28e12,
        ..DeviceModel::H100
    };

    /// A CPU of a few cores with bf16 dot products. Only ratios matter for extraction.
    pub const CPU: DeviceModel = DeviceModel {
        name: "cpu",
        matrix_flops: 200e9,
        vector_flops: 20e9,
        bandwidth: 20e9,
        cache_bandwidth: 200e9,
        units: 1.0,
        launch: 2e-6,
        max_prologue_rows: i64::MAX,
    };

    /// The model of a name, for `--target`.
    pub fn by_name(name: &str) -> Option<DeviceModel> {
        [Self::H100, Self::H200, Self::CPU]
            .into_iter()
            .find(|d| d.name == name)
    }
}

/// Where costs are taken: sizes of the symbols and the mean KV length.
#[derive(Clone, Debug, PartialEq)]
pub struct CostPoint {
    /// Values of B, S, T and R.
    pub env: SymEnv,
    /// Mean number of cached tokens that a row attends to.
    pub context: i64,
    /// The device.
    pub device: DeviceModel,
}

impl CostPoint {
    /// One token for each of `batch` sequences.
    pub fn decode(batch: i64, context: i64, device: DeviceModel) -> CostPoint {
        CostPoint {
            env: SymEnv::new(&[
                (Sym::B, batch),
                (Sym::S, context),
                (Sym::T, batch),
                (Sym::R, batch),
            ]),
            context,
            device,
        }
    }

    /// One sequence of `tokens` new tokens, whose last row is sampled.
    pub fn prefill(tokens: i64, device: DeviceModel) -> CostPoint {
        CostPoint {
            env: SymEnv::new(&[(Sym::B, 1), (Sym::S, tokens), (Sym::T, tokens), (Sym::R, 1)]),
            context: tokens / 2,
            device,
        }
    }

    /// Whether every row of the step is sampled, so that selecting rows is the identity.
    fn selects_all(&self) -> bool {
        self.env.get(Sym::T) == self.env.get(Sym::R)
    }
}

/// Operations (multiply-add = 2) and bytes of memory traffic of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Operations on the matrix units.
    pub matrix: f64,
    /// Operations elsewhere.
    pub vector: f64,
    /// Bytes read and written, each operand once.
    pub bytes: f64,
    /// Bytes re-read from cache by every unit (prologues).
    pub cached: f64,
    /// Kernels launched.
    pub launches: u32,
}

/// The cost of one operation in picoseconds.
pub fn op_cost(
    op: &Op,
    inputs: &Operands<&Type>,
    output: &Type,
    weight_only: bool,
    at: &CostPoint,
) -> u64 {
    match work(op, inputs, output, weight_only, at) {
        Some(w) => picoseconds(&w, &at.device),
        None => INFINITE,
    }
}

/// Roofline time of some work.
pub fn picoseconds(w: &Work, d: &DeviceModel) -> u64 {
    let busy = (w.matrix / d.matrix_flops + w.vector / d.vector_flops).max(w.bytes / d.bandwidth)
        + w.cached / d.cache_bandwidth;
    let t = busy + f64::from(w.launches) * d.launch;
    (t * 1e12).round() as u64
}

/// The work of one operation, or `None` if it has no kernel at this point.
pub fn work(
    op: &Op,
    inputs: &Operands<&Type>,
    output: &Type,
    weight_only: bool,
    at: &CostPoint,
) -> Option<Work> {
    let env = &at.env;
    let bytes = |t: &Type| type_bytes(t, env);
    let all_bytes = inputs.iter().map(|t| bytes(t)).sum::<f64>() + bytes(output);
    let tensor = |slot: Slot| inputs.get(slot)?.as_tensor();
    let elements = |t: &Type| t.as_tensor().map_or(0.0, |t| t.elements(env) as f64);
    let mut w = Work {
        bytes: all_bytes,
        vector: elements(output),
        launches: 1,
        ..Work::default()
    };
    match op {
        Op::Win(_) | Op::Sdpa(_) => return None,
        op if op.is_leaf() => return Some(Work::default()),
        // Laid out by the loader, or computed once by the program `once`.
        _ if weight_only => return Some(Work::default()),
        Op::Reshape(_) | Op::Get(_) => return Some(Work::default()),
        Op::Select(_) if at.selects_all() => return Some(Work::default()),
        Op::Select(_) => w.bytes = 2.0 * bytes(output),
        Op::Embedding(_) => w.bytes = 2.0 * bytes(output),
        Op::Matmul(_) => {
            let k = tensor(matmul::A)?.shape.last()?.eval(env) as f64;
            w.matrix = 2.0 * elements(output) * k;
            // At equal work the projection with a weight as it is stored is preferred.
            w.bytes += 2048.0;
        }
        // A projection is a step towards the packed form: it has no kernel of its own.
        Op::Proj(_) => return None,
        Op::Linear(_) => {
            let k = tensor(linear::W)?.shape.last()?.eval(env) as f64;
            w.matrix = 2.0 * elements(output) * k;
            // At equal work the form with prologue and epilogue is preferred.
            w.bytes += 1024.0;
        }
        Op::Gemm(spec) => return gemm(spec, inputs, output, at, w),
        Op::Attn(Attn(s)) => {
            let q = tensor(attn::Q)?;
            let keys = q.shape[2].eval(env) as f64;
            let seen = if s.mask.causal { keys / 2.0 } else { keys };
            w.matrix = 4.0 * q.elements(env) as f64 * seen;
        }
        Op::AttnStep(AttnStep(s)) => {
            let (q, k) = (tensor(attn_step::Q)?, tensor(attn_step::K)?);
            let row = k.shape[1].eval(env) as f64 * k.shape[2].eval(env) as f64;
            cached_attention(&mut w, at, s.mask.window, q, row, q.elements(env) as f64);
        }
        Op::AttnQkv(s) => {
            let qkv = tensor(attn_qkv::QKV)?;
            let rows = qkv.shape[0].eval(env) as f64;
            let kv_row = f64::from(s.kv_heads) * f64::from(s.head_dim);
            let q = rows * f64::from(s.heads) * f64::from(s.head_dim);
            cached_attention(&mut w, at, s.attn.mask.window, qkv, kv_row, q);
            // Rows of a prefill are rotated and appended by a kernel of their own.
            w.launches = if at.selects_all() { 1 } else { 2 };
        }
        Op::Chain(c) => {
            let tensors = inputs.iter().filter_map(|t| t.as_tensor());
            let domain = lathe_ir::chain::domain(tensors).ok()?;
            let elements: f64 = domain.iter().map(|d| d.eval(env) as f64).product();
            w.vector = elements * c.statements.len() as f64;
        }
        Op::RmsNorm(_) | Op::AddRms(_) | Op::Softmax(_) => w.vector *= 4.0,
        _ => {}
    }
    Some(w)
}

fn cached_attention(
    w: &mut Work,
    at: &CostPoint,
    window: Option<u32>,
    rows: &TensorType,
    kv_row: f64,
    q_elements: f64,
) {
    let context = window.map_or(at.context, |n| at.context.min(i64::from(n))) as f64;
    let sequences = at.env.get(Sym::B) as f64;
    w.matrix = 4.0 * q_elements * context;
    w.bytes += sequences * context * kv_row * 2.0 * rows.dtype.size() as f64;
}

fn gemm(
    spec: &Gemm,
    inputs: &Operands<&Type>,
    output: &Type,
    at: &CostPoint,
    mut w: Work,
) -> Option<Work> {
    let tensor = |slot: Slot| inputs.get(slot)?.as_tensor();
    let (x, weight) = (tensor(gemm_of::X)?, tensor(gemm_of::W)?);
    let (n, k) = (
        weight.shape[0].eval(&at.env) as f64,
        weight.shape[1].eval(&at.env) as f64,
    );
    let rows = x.elements(&at.env) as f64 / k;
    w.matrix = 2.0 * rows * n * k;
    w.vector = if spec.epilogue == Epilogue::None {
        0.0
    } else {
        rows * n
    };
    w.bytes =
        inputs.iter().map(|t| type_bytes(t, &at.env)).sum::<f64>() + type_bytes(output, &at.env);
    if spec.prologue != Prologue::None {
        if rows > at.device.max_prologue_rows as f64 {
            let factors = matches!(spec.prologue, Prologue::Rms { .. })
                && inputs.get(gemm_of::GAMMA).is_none();
            if !factors {
                return None;
            }
            // A sum of squares a row, 8 bytes, written with the rows and read by every unit.
            let sums = 8.0 * rows;
            w.bytes += sums;
            w.cached = sums * at.device.units;
            w.vector += rows * (2.0 * k + n);
            return Some(w);
        }
        let rereads = if matches!(spec.prologue, Prologue::AddRms { .. }) {
            2.0
        } else {
            1.0
        };
        w.cached = rereads * rows * k * x.dtype.size() as f64 * at.device.units;
        w.vector += 4.0 * rows * k;
    }
    Some(w)
}

fn type_bytes(t: &Type, env: &SymEnv) -> f64 {
    match t {
        Type::Tensor(t) => t.bytes(env) as f64,
        Type::Tuple(ts) => ts.iter().map(|t| type_bytes(t, env)).sum(),
        Type::Cache => 0.0,
    }
}

/// Bytes of one cached token of one layer.
pub fn kv_token_bytes(kv_heads: u32, head_dim: u32, dtype: DType) -> u64 {
    let elements = u64::from(kv_heads).saturating_mul(head_dim.into());
    elements.saturating_mul(2 * dtype.size() as u64)
}
