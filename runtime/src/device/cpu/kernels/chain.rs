//! Chains of pointwise operations and row reductions, by their instructions.
//!
//! Instructions are evaluated one after the other on blocks of columns, so that what an instruction
//! costs beside its arithmetic is paid once a block. A row's bits depend on the row alone.

use std::ops::Range;

use half::bf16;
use lathe_codegen::chain::{Instr, Reduction, RowProgram};
use lathe_ir::chain::Access;
use lathe_ir::{BinaryFn, UnaryFn};

use super::math::{erf, exp, sigmoid, silu, tanh_relative};
use super::pool::{SharedMut, parallel_for};
use super::simd::{Isa, Kernel, Simd, bf16_to_f32, dispatch, f32_to_bf16};
use super::{KernelError, check_len};

/// Columns of a block: a multiple of every vector length.
const BLOCK: usize = 256;
/// Elements of a task.
const TASK: usize = 8 << 10;

/// Floats to read.
#[derive(Clone, Copy, Debug)]
pub enum Floats<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

/// Floats to write.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
}

impl Floats<'_> {
    fn len(&self) -> usize {
        match self {
            Floats::F32(x) => x.len(),
            Floats::Bf16(x) => x.len(),
        }
    }

    fn at(&self, i: usize) -> f32 {
        match self {
            Floats::F32(x) => x[i],
            Floats::Bf16(x) => bf16_to_f32(x[i]),
        }
    }
}

enum Out {
    F32(SharedMut<f32>),
    Bf16(SharedMut<bf16>),
}

/// Runs a chain over `rows` rows. Operands and results are those of the program, in its order: an
/// operand that is [`Access::Full`] has `rows · width` elements, others one a row, one a column or
/// one in all.
///
/// # Errors
/// Lengths that do not match, or another number of operands or results.
pub fn chain(
    program: &RowProgram,
    rows: usize,
    operands: &[Floats<'_>],
    results: Vec<FloatsMut<'_>>,
) -> Result<(), KernelError> {
    const NAME: &str = "chain";
    if operands.len() != program.operands.len() || results.len() != program.results.len() {
        return Err(KernelError::Unsupported {
            kernel: NAME,
            what: format!("{} operands and {} results", operands.len(), results.len()),
        });
    }
    let all = rows * program.width;
    let mut flat = !program.reduces();
    for (x, (access, _)) in operands.iter().zip(&program.operands) {
        let want = match access {
            Access::Full => all,
            Access::Row => rows,
            Access::Column => program.width,
            Access::Scalar => 1,
        };
        if x.len() != want {
            return Err(KernelError::Length {
                kernel: NAME,
                operand: "operand",
                got: x.len(),
                want,
            });
        }
        flat &= matches!(access, Access::Full | Access::Scalar);
    }
    let mut out = Vec::with_capacity(results.len());
    for (x, r) in results.into_iter().zip(&program.results) {
        let want = if r.row { rows } else { all };
        flat &= !r.row;
        out.push(match x {
            FloatsMut::F32(x) => {
                check_len(NAME, "result", x, want)?;
                Out::F32(SharedMut::new(x))
            }
            FloatsMut::Bf16(x) => {
                check_len(NAME, "result", x, want)?;
                Out::Bf16(SharedMut::new(x))
            }
        });
    }
    if all == 0 {
        return Ok(());
    }
    // Where no operand knows of rows, all of them are one.
    let (rows, width) = if flat {
        (1, all)
    } else {
        (rows, program.width)
    };
    let pieces = if program.reduces() {
        1
    } else {
        width.div_ceil(TASK)
    };
    let rows_each = if pieces > 1 { 1 } else { (TASK / width).max(1) };
    let isa = Isa::current();
    parallel_for(rows.div_ceil(rows_each) * pieces, |task| {
        let (group, piece) = (task / pieces, task % pieces);
        let rows = group * rows_each..rows.min((group + 1) * rows_each);
        let columns = match pieces {
            1 => 0..width,
            _ => piece * TASK..width.min((piece + 1) * TASK),
        };
        dispatch(
            isa,
            Task {
                program,
                operands,
                out: &out,
                rows,
                columns,
                width,
            },
        );
    });
    Ok(())
}

struct Task<'a> {
    program: &'a RowProgram,
    operands: &'a [Floats<'a>],
    out: &'a [Out],
    rows: Range<usize>,
    columns: Range<usize>,
    width: usize,
}

/// A value of a block: its columns, or the same for all.
#[derive(Clone, Copy)]
enum Src {
    Block(*const f32),
    Same(f32),
}

#[inline(always)]
unsafe fn get<S: Simd>(src: Src, i: usize) -> S::V {
    match src {
        // SAFETY: the caller's guarantee: a block has BLOCK elements from there on.
        Src::Block(p) => unsafe { S::load(p.add(i)) },
        Src::Same(x) => S::splat(x),
    }
}

impl Kernel for Task<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let p = self.program;
        let code = p.code.len();
        // Zeros, so that the lanes behind the end of a row are numbers.
        let mut blocks = vec![0.0_f32; code * BLOCK];
        let mut same = vec![0.0_f32; code];
        let mut sums: Vec<(S::V, f32)> = Vec::with_capacity(code);
        let last = p.passes.len() - 1;
        for row in self.rows.clone() {
            for (at, pass) in p.passes.iter().enumerate() {
                for &i in &pass.row {
                    same[i] = self.row_value(i, row, &same);
                }
                sums.clear();
                for &r in &pass.reductions {
                    let start = match p.code[r] {
                        Instr::Reduce(Reduction::Max, _) => f32::NEG_INFINITY,
                        _ => 0.0,
                    };
                    sums.push((S::splat(start), start));
                }
                for start in self.columns.clone().step_by(BLOCK) {
                    let n = BLOCK.min(self.columns.end - start);
                    let base = blocks.as_mut_ptr();
                    for &i in &pass.columns {
                        // SAFETY: every instruction has a block of its own, and reads those of
                        // earlier ones, which have been computed.
                        unsafe { self.block::<S>(i, row, start, n, base, &same) };
                    }
                    for (&r, sum) in pass.reductions.iter().zip(&mut sums) {
                        let Instr::Reduce(f, a) = p.code[r] else {
                            continue;
                        };
                        // SAFETY: as above.
                        unsafe { accumulate::<S>(f, base.add(a * BLOCK), n, sum) };
                    }
                    if at == last {
                        for (r, out) in p.results.iter().zip(self.out).filter(|(r, _)| !r.row) {
                            let src = match p.constant[r.instr] {
                                true => Src::Same(same[r.instr]),
                                // SAFETY: as above.
                                false => Src::Block(unsafe { base.add(r.instr * BLOCK) }),
                            };
                            // SAFETY: this task alone writes these rows and columns.
                            unsafe { store::<S>(src, out, row * self.width + start, n) };
                        }
                    }
                }
                for (&r, sum) in pass.reductions.iter().zip(&sums) {
                    same[r] = match p.code[r] {
                        Instr::Reduce(Reduction::Max, _) => S::hmax(sum.0).max(sum.1),
                        _ => S::sum(sum.0) + sum.1,
                    };
                }
            }
            // Only the first task of a row that is cut has its first column.
            if self.columns.start == 0 {
                for (r, out) in p.results.iter().zip(self.out).filter(|(r, _)| r.row) {
                    // SAFETY: this task alone writes the row's element.
                    unsafe { store::<S>(Src::Same(same[r.instr]), out, row, 1) };
                }
            }
        }
    }
}

impl Task<'_> {
    /// A value that is constant along the row.
    #[inline(always)]
    fn row_value(&self, i: usize, row: usize, same: &[f32]) -> f32 {
        match self.program.code[i] {
            Instr::Load(o) => match self.program.operands[o].0 {
                Access::Row => self.operands[o].at(row),
                _ => self.operands[o].at(0),
            },
            Instr::Const(c) => c,
            Instr::Unary(f, a) => unary(f, same[a]),
            Instr::Silu(a) => same[a] / (1.0 + (-same[a]).exp()),
            Instr::Binary(f, a, b) => binary(f, same[a], same[b]),
            // Known after an earlier pass.
            Instr::Reduce(..) => same[i],
        }
    }

    /// Computes `n` columns of an instruction from `start` on.
    ///
    /// # Safety
    /// Callable below `dispatch`; `blocks` has a block for each instruction.
    #[inline(always)]
    unsafe fn block<S: Simd>(
        &self,
        i: usize,
        row: usize,
        start: usize,
        n: usize,
        blocks: *mut f32,
        same: &[f32],
    ) {
        let p = self.program;
        // SAFETY: by the contract of this function.
        let dst = unsafe { blocks.add(i * BLOCK) };
        let src = |a: usize| match p.constant[a] {
            true => Src::Same(same[a]),
            // SAFETY: as above.
            false => Src::Block(unsafe { blocks.add(a * BLOCK) }),
        };
        macro_rules! each {
            ($i:ident, $v:expr) => {
                for $i in (0..n).step_by(S::LANES) {
                    // SAFETY: BLOCK is a multiple of LANES.
                    unsafe { S::store(dst.add($i), $v) }
                }
            };
        }
        macro_rules! one {
            ($a:expr, $x:ident, $v:expr) => {{
                let a = src($a);
                each!(j, {
                    let $x = get::<S>(a, j);
                    $v
                })
            }};
        }
        macro_rules! two {
            ($a:expr, $b:expr, $x:ident, $y:ident, $v:expr) => {{
                let (a, b) = (src($a), src($b));
                each!(j, {
                    let ($x, $y) = (get::<S>(a, j), get::<S>(b, j));
                    $v
                })
            }};
        }
        match p.code[i] {
            Instr::Load(o) => {
                let at = match p.operands[o].0 {
                    Access::Full => row * self.width + start,
                    _ => start,
                };
                // SAFETY: lengths were checked; `dst` has BLOCK elements.
                unsafe { load::<S>(self.operands[o], at, n, dst) };
            }
            Instr::Unary(f, a) => match f {
                UnaryFn::Neg => one!(a, x, S::mul(x, S::splat(-1.0))),
                UnaryFn::Abs => one!(a, x, S::max(x, S::mul(x, S::splat(-1.0)))),
                UnaryFn::Relu => one!(a, x, S::max(x, S::splat(0.0))),
                UnaryFn::Exp => one!(a, x, exp::<S>(x)),
                UnaryFn::Sigmoid => one!(a, x, sigmoid::<S>(x)),
                UnaryFn::Tanh => one!(a, x, tanh_relative::<S>(x)),
                UnaryFn::Erf => one!(a, x, erf::<S>(x)),
                f => {
                    let a = src(a);
                    for j in 0..n {
                        // SAFETY: as above.
                        unsafe { *dst.add(j) = unary(f, value(a, j)) };
                    }
                }
            },
            Instr::Silu(a) => one!(a, x, silu::<S>(x)),
            Instr::Binary(f, a, b) => match f {
                BinaryFn::Add => two!(a, b, x, y, S::add(x, y)),
                BinaryFn::Sub => two!(a, b, x, y, S::sub(x, y)),
                BinaryFn::Mul => two!(a, b, x, y, S::mul(x, y)),
                BinaryFn::Div => two!(a, b, x, y, S::div(x, y)),
                BinaryFn::Maximum => two!(a, b, x, y, S::max(x, y)),
                f => {
                    let (a, b) = (src(a), src(b));
                    for j in 0..n {
                        // SAFETY: as above.
                        unsafe { *dst.add(j) = binary(f, value(a, j), value(b, j)) };
                    }
                }
            },
            // Both are constant along the row.
            Instr::Const(_) | Instr::Reduce(..) => {}
        }
    }
}

/// # Safety
/// A block has more than `i` elements.
#[inline(always)]
unsafe fn value(src: Src, i: usize) -> f32 {
    match src {
        // SAFETY: by the contract of this function.
        Src::Block(p) => unsafe { *p.add(i) },
        Src::Same(x) => x,
    }
}

/// # Safety
/// Callable below `dispatch`; `x` has `n` elements from `at` on, `dst` has BLOCK.
#[inline(always)]
unsafe fn load<S: Simd>(x: Floats<'_>, at: usize, n: usize, dst: *mut f32) {
    let whole = n / S::LANES * S::LANES;
    // SAFETY: by the contract of this function.
    unsafe {
        match x {
            Floats::F32(x) => dst.copy_from_nonoverlapping(x[at..at + n].as_ptr(), n),
            Floats::Bf16(x) => {
                let x = x[at..at + n].as_ptr();
                for j in (0..whole).step_by(S::LANES) {
                    S::store(dst.add(j), S::load_bf16(x.add(j)));
                }
                for j in whole..n {
                    *dst.add(j) = bf16_to_f32(*x.add(j));
                }
            }
        }
    }
}

/// # Safety
/// Callable below `dispatch`; `out` has `n` elements from `at` on, which nobody else uses.
#[inline(always)]
unsafe fn store<S: Simd>(src: Src, out: &Out, at: usize, n: usize) {
    let whole = n / S::LANES * S::LANES;
    // SAFETY: by the contract of this function.
    unsafe {
        match out {
            Out::F32(out) => {
                let out = out.at(at);
                for j in (0..whole).step_by(S::LANES) {
                    S::store(out.add(j), get::<S>(src, j));
                }
                for j in whole..n {
                    *out.add(j) = value(src, j);
                }
            }
            Out::Bf16(out) => {
                let out = out.at(at);
                for j in (0..whole).step_by(S::LANES) {
                    S::store_bf16(out.add(j), get::<S>(src, j));
                }
                for j in whole..n {
                    *out.add(j) = f32_to_bf16(value(src, j));
                }
            }
        }
    }
}

/// # Safety
/// Callable below `dispatch`; `x` has `n` elements.
#[inline(always)]
unsafe fn accumulate<S: Simd>(f: Reduction, x: *const f32, n: usize, sum: &mut (S::V, f32)) {
    let whole = n / S::LANES * S::LANES;
    // SAFETY: by the contract of this function.
    unsafe {
        match f {
            Reduction::Sum => {
                for j in (0..whole).step_by(S::LANES) {
                    sum.0 = S::add(sum.0, S::load(x.add(j)));
                }
                for j in whole..n {
                    sum.1 += *x.add(j);
                }
            }
            Reduction::Max => {
                for j in (0..whole).step_by(S::LANES) {
                    sum.0 = S::max(sum.0, S::load(x.add(j)));
                }
                for j in whole..n {
                    sum.1 = sum.1.max(*x.add(j));
                }
            }
        }
    }
}

#[inline(always)]
fn unary(f: UnaryFn, x: f32) -> f32 {
    match f {
        UnaryFn::Neg => -x,
        UnaryFn::Abs => x.abs(),
        UnaryFn::Exp => x.exp(),
        UnaryFn::Log => x.ln(),
        UnaryFn::Sqrt => x.sqrt(),
        UnaryFn::Rsqrt => 1.0 / x.sqrt(),
        UnaryFn::Sin => x.sin(),
        UnaryFn::Cos => x.cos(),
        UnaryFn::Tanh => x.tanh(),
        UnaryFn::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        UnaryFn::Erf => super::math::erf::<super::simd::Scalar8>([x; 8])[0],
        UnaryFn::Relu => x.max(0.0),
        // Not an operation of chains.
        UnaryFn::Not => f32::from(x == 0.0),
    }
}

#[inline(always)]
fn binary(f: BinaryFn, x: f32, y: f32) -> f32 {
    match f {
        BinaryFn::Add => x + y,
        BinaryFn::Sub => x - y,
        BinaryFn::Mul => x * y,
        BinaryFn::Div => x / y,
        BinaryFn::Pow => x.powf(y),
        BinaryFn::Maximum => x.max(y),
        BinaryFn::Minimum => x.min(y),
        // Not operations of chains.
        BinaryFn::Eq => f32::from(x == y),
        BinaryFn::Ne => f32::from(x != y),
        BinaryFn::Lt => f32::from(x < y),
        BinaryFn::Le => f32::from(x <= y),
        BinaryFn::Gt => f32::from(x > y),
        BinaryFn::Ge => f32::from(x >= y),
        BinaryFn::And => f32::from(x != 0.0 && y != 0.0),
        BinaryFn::Or => f32::from(x != 0.0 || y != 0.0),
    }
}
