//! Pointwise kernels for unfused use.

use super::math::{Activation, act_v, silu};
use super::pool::{SharedMut, parallel_for};
use super::simd::{Isa, Kernel, Simd, dispatch};
use super::{Elem, KernelError, check_len, whole_rows};

/// Elements of a task.
const TASK: usize = 16 << 10;

/// out = silu(gate) · up, all `[len]`, rounded once.
///
/// # Errors
/// Lengths that do not match.
pub fn silu_mul<E: Elem>(gate: &[E], up: &[E], out: &mut [E]) -> Result<(), KernelError> {
    check_len("silu_mul", "up", up, gate.len())?;
    check_len("silu_mul", "out", out, gate.len())?;
    over_vectors(gate, Some(up), Op::SiluMul, out);
    Ok(())
}

/// out = act(x), both `[len]`.
///
/// # Errors
/// Lengths that do not match.
pub fn activation<E: Elem>(act: Activation, x: &[E], out: &mut [E]) -> Result<(), KernelError> {
    check_len("activation", "out", out, x.len())?;
    over_vectors(x, None, Op::Act(act), out);
    Ok(())
}

/// out = a + b, all `[len]`, rounded once.
///
/// # Errors
/// Lengths that do not match.
pub fn add<E: Elem>(a: &[E], b: &[E], out: &mut [E]) -> Result<(), KernelError> {
    check_len("add", "b", b, a.len())?;
    check_len("add", "out", out, a.len())?;
    over_vectors(a, Some(b), Op::Add, out);
    Ok(())
}

/// out = silu(gate) · up of gate|up packed by 8: `packed` `[T, 2 I]` with `features` = I, `out` `[T, I]`.
///
/// # Errors
/// Lengths that do not match; I is not a multiple of 8.
pub fn silu_mul_packed<E: Elem>(
    packed: &[E],
    features: usize,
    out: &mut [E],
) -> Result<(), KernelError> {
    const NAME: &str = "silu_mul_packed";
    if !features.is_multiple_of(8) {
        return Err(KernelError::Unsupported {
            kernel: NAME,
            what: format!("{features} features, not a multiple of 8"),
        });
    }
    check_len(NAME, "packed", packed, 2 * out.len())?;
    check_len(NAME, "out", out, whole_rows(out.len(), features))?;
    // Rows hold whole blocks, so the blocks of all rows form one sequence.
    let mut halves = ([E::default(); 512], [E::default(); 512]);
    for (packed, out) in packed.chunks(1024).zip(out.chunks_mut(512)) {
        let (gate, up) = (&mut halves.0[..out.len()], &mut halves.1[..out.len()]);
        for (b, block) in packed.chunks_exact(16).enumerate() {
            gate[8 * b..][..8].copy_from_slice(&block[..8]);
            up[8 * b..][..8].copy_from_slice(&block[8..]);
        }
        over_vectors(gate, Some(up), Op::SiluMul, out);
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Op {
    SiluMul,
    Add,
    Act(Activation),
}

struct Vectors<'a, E> {
    a: &'a [E],
    b: Option<&'a [E]>,
    op: Op,
    out: *mut E,
}

fn over_vectors<E: Elem>(a: &[E], b: Option<&[E]>, op: Op, out: &mut [E]) {
    let isa = Isa::current();
    let shared = SharedMut::new(out);
    parallel_for(a.len().div_ceil(TASK), |i| {
        let range = i * TASK..a.len().min((i + 1) * TASK);
        let out = shared.at(range.start);
        dispatch(
            isa,
            Vectors {
                a: &a[range.clone()],
                b: b.map(|b| &b[range]),
                op,
                out,
            },
        );
    });
}

impl<E: Elem> Kernel for Vectors<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let len = self.a.len();
        let whole = len / S::LANES * S::LANES;
        let b = self.b.unwrap_or(self.a);
        for i in (0..whole).step_by(S::LANES) {
            // SAFETY: the vectors lie inside the slices and this task's range of `out`.
            unsafe {
                apply::<S, E>(
                    self.op,
                    self.a[i..].as_ptr(),
                    b[i..].as_ptr(),
                    self.out.add(i),
                );
            }
        }
        if whole < len {
            let mut rest = [[E::default(); 16]; 3];
            rest[0][..len - whole].copy_from_slice(&self.a[whole..]);
            rest[1][..len - whole].copy_from_slice(&b[whole..]);
            let [x, y, z] = &mut rest;
            // SAFETY: the arrays hold a vector; this task alone writes its range of `out`, which
            // has `len` elements.
            unsafe {
                apply::<S, E>(self.op, x.as_ptr(), y.as_ptr(), z.as_mut_ptr());
                self.out
                    .add(whole)
                    .copy_from_nonoverlapping(z.as_ptr(), len - whole);
            }
        }
    }
}

/// One vector. A function, because a closure would not be inlined below `dispatch` for certain.
///
/// # Safety
/// Callable below `dispatch`; the pointers are valid for LANES values.
#[inline(always)]
unsafe fn apply<S: Simd, E: Elem>(op: Op, a: *const E, b: *const E, out: *mut E) {
    // SAFETY: the caller's guarantee.
    unsafe {
        let x = E::load::<S>(a);
        let v = match op {
            Op::SiluMul => S::mul(silu::<S>(x), E::load::<S>(b)),
            Op::Add => S::add(x, E::load::<S>(b)),
            Op::Act(act) => act_v::<S>(act, x),
        };
        E::store::<S>(out, v);
    }
}
