//! What an operation costs at a given point: a roofline.
//!
//! Cost = max(operations / rate, bytes / bandwidth) + launch, in picoseconds as integers, so that
//! sums are exact and comparisons never depend on the order of summation. Weight-only layout
//! changes cost nothing: they are executed once, while loading. Operations without a kernel
//! ([`lathe_ir::Op::Win`], [`lathe_ir::Op::Sdpa`]) cost [`INFINITE`]: an extraction that cannot
//! avoid them fails and names them.

use lathe_ir::ops::{Gemm, gemm};
use lathe_ir::{DType, KernelLimits, Known, Op, OpWork, Operands, Prologue, Sym, SymEnv, Type};

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
    /// Seconds from the end of one kernel to the start of the next, inside a graph.
    pub launch: f64,
    /// What its kernels take.
    pub limits: KernelLimits,
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
        launch: 1.2e-6,
        limits: KernelLimits::HOPPER,
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
        launch: 2e-6,
        limits: KernelLimits::CPU,
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

/// What the kernel of one operation does at a point: [`OpWork`] with what depends on the device and on the lengths of
/// the sequences. A multiply-add counts two.
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
    known: Known,
    at: &CostPoint,
) -> u64 {
    match work(op, inputs, output, known, at) {
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
    known: Known,
    at: &CostPoint,
) -> Option<Work> {
    match op {
        // A projection is a step towards the packed form, the others towards attention.
        Op::Win(_) | Op::Sdpa(_) | Op::Proj(_) => return None,
        // Laid out by the loader, or computed once by the program `once`.
        _ if known.before_steps() => return Some(Work::default()),
        Op::Select(_) if at.selects_all() => return Some(Work::default()),
        _ => {}
    }
    let told = OpWork::of(op, inputs, output, &at.env);
    if !told.kernel {
        return Some(Work::default());
    }
    let mut w = Work {
        matrix: told.matrix,
        vector: told.vector,
        bytes: told.bytes(),
        launches: 1,
        ..Work::default()
    };
    match op {
        // At equal work the projection with a weight as it is stored is preferred, and to that the form with prologue
        // and epilogue.
        Op::Matmul(_) => w.bytes += 2048.0,
        Op::Linear(_) => w.bytes += 1024.0,
        Op::Gemm(spec) => prologue(&mut w, spec, inputs, &told, at)?,
        // Rows of a prefill are rotated and appended by a kernel of their own.
        Op::AttnQkv(_) if !at.selects_all() => w.launches = 2,
        _ => {}
    }
    if let Some(heads) = told.attention {
        let seen = heads.seen(at.context.max(0) as usize) as f64;
        w.matrix += at.env.get(Sym::T) as f64 * seen * heads.pair_flops();
        w.bytes += at.env.get(Sym::B) as f64 * seen * heads.token_bytes();
    }
    Some(w)
}

/// Adds what a GEMM's kernel does before the product; `None` if none takes so many rows with it.
fn prologue(
    w: &mut Work,
    spec: &Gemm,
    inputs: &Operands<&Type>,
    told: &OpWork,
    at: &CostPoint,
) -> Option<()> {
    let of = told.product?;
    let limits = at.device.limits;
    let units = f64::from(limits.units);
    let rereads = match spec.prologue {
        Prologue::None => return Some(()),
        Prologue::Rms { .. } if of.m > limits.prologue_rows => {
            if inputs.get(gemm::GAMMA).is_some() {
                return None;
            }
            // A sum of squares a row, 8 bytes, written with the rows and read by every unit.
            let sums = 8.0 * of.m as f64;
            w.bytes += sums;
            w.cached = sums * units;
            w.vector += of.m as f64 * (2 * of.k + of.n) as f64;
            return Some(());
        }
        Prologue::AddRms { .. } if of.m > limits.prologue_rows => return None,
        Prologue::Rms { .. } => 1.0,
        Prologue::AddRms { .. } => 2.0,
    };
    let rows = (of.m * of.k) as f64;
    let element = inputs.get(gemm::X)?.as_tensor()?.dtype.size() as f64;
    w.cached = rereads * rows * element * units;
    w.vector += 4.0 * rows;
    Some(())
}

/// Bytes of one cached token of one layer.
pub fn kv_token_bytes(kv_heads: u32, head_dim: u32, dtype: DType) -> u64 {
    let elements = u64::from(kv_heads).saturating_mul(head_dim.into());
    elements.saturating_mul(2 * dtype.size() as u64)
}
