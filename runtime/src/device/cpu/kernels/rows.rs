//! Kernels that select rows or look along them: embedding lookup, row selection, argmax.

use super::pool::{SharedMut, parallel_for};
use super::{Elem, KernelError, check_index, check_len};

/// Rows `ids[i]` of `table`, times `scale` if there is one (rounded once). Also selects the rows to sample.
///
/// `table`: `[V, K]`, `ids`: `[T]`, `out`: `[T, K]`.
///
/// # Errors
/// Lengths that do not match; an id outside the table.
pub fn embed<E: Elem>(
    ids: &[i32],
    table: &[E],
    k: usize,
    scale: Option<f32>,
    out: &mut [E],
) -> Result<(), KernelError> {
    const NAME: &str = "embed";
    check_len(NAME, "out", out, ids.len() * k)?;
    let rows = table.len().checked_div(k).unwrap_or(0);
    check_len(NAME, "table", table, rows * k)?;
    for (t, &id) in ids.iter().enumerate() {
        check_index(NAME, "id", t, id, rows)?;
    }
    if k == 0 {
        return Ok(());
    }
    for (&id, out) in ids.iter().zip(out.chunks_exact_mut(k)) {
        let row = &table[id as usize * k..][..k];
        match scale {
            None => out.copy_from_slice(row),
            Some(scale) => {
                for (o, r) in out.iter_mut().zip(row) {
                    *o = E::from_f32(r.to_f32() * scale);
                }
            }
        }
    }
    Ok(())
}

/// Position of the largest value of each row of `x`: `[M, N]`; the first among equals. NaN is never the largest,
/// and a row of NaN gives 0.
///
/// # Errors
/// Lengths that do not match; N = 0.
pub fn argmax<E: Elem>(x: &[E], n: usize, ids: &mut [i32]) -> Result<(), KernelError> {
    const NAME: &str = "argmax";
    check_len(NAME, "x", x, ids.len() * n)?;
    if n == 0 || i32::try_from(n).is_err() {
        return Err(KernelError::Unsupported {
            kernel: NAME,
            what: format!("rows of {n}"),
        });
    }
    let rows = ids.len();
    let out = SharedMut::new(ids);
    parallel_for(rows, |r| {
        let row = &x[r * n..][..n];
        let mut best = (f32::NEG_INFINITY, 0);
        // Chunks first: the largest value of a chunk vectorises, its place does not.
        for (c, chunk) in row.chunks(256).enumerate() {
            let largest = chunk
                .iter()
                .fold(f32::NEG_INFINITY, |m, v| m.max(v.to_f32()));
            if largest > best.0 {
                let place = chunk
                    .iter()
                    .position(|v| v.to_f32() == largest)
                    .unwrap_or(0);
                best = (largest, c * 256 + place);
            }
        }
        // SAFETY: each task writes its own id.
        unsafe { *out.at(r) = best.1 as i32 };
    });
    Ok(())
}
