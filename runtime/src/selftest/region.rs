//! A tensor of a batch inside the tensor of its bucket: the same axes, some of them longer.

use lathe_ir::{SymEnv, TensorType};

/// Extents of a type under an assignment of the symbols.
pub(crate) fn extents(ty: &TensorType, env: &SymEnv) -> Vec<usize> {
    ty.shape.iter().map(|d| d.eval(env) as usize).collect()
}

/// Elements of a dense run of `part` and where each run starts in `whole`, in elements; runs are in
/// the order of `part`.
fn runs(part: &[usize], whole: &[usize]) -> (usize, Vec<usize>) {
    debug_assert!(part.len() == whole.len() && part.iter().zip(whole).all(|(p, w)| p <= w));
    // The last axis that is cut; a run spans it and everything inside.
    let cut = (0..part.len()).rev().find(|&i| part[i] != whole[i]);
    let cut = cut.unwrap_or(0);
    let run = part.iter().skip(cut).product();
    let mut starts = vec![0];
    for (axis, &n) in part.iter().enumerate().take(cut) {
        let stride: usize = whole[axis + 1..].iter().product();
        starts = starts
            .iter()
            .flat_map(|s| (0..n).map(move |i| s + i * stride))
            .collect();
    }
    (run, starts)
}

/// Writes the dense elements `from` of a tensor `part` into their places in a tensor `whole`.
pub(crate) fn spread(from: &[u8], part: &[usize], to: &mut [u8], whole: &[usize], size: usize) {
    let (run, starts) = runs(part, whole);
    for (i, at) in starts.iter().enumerate() {
        to[at * size..][..run * size].copy_from_slice(&from[i * run * size..][..run * size]);
    }
}

/// The dense elements of the part of a tensor.
pub(crate) fn gather(from: &[u8], whole: &[usize], part: &[usize], size: usize) -> Vec<u8> {
    let (run, starts) = runs(part, whole);
    let mut out = Vec::with_capacity(run * starts.len() * size);
    for at in starts {
        out.extend_from_slice(&from[at * size..][..run * size]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_comes_back_and_the_rest_is_left() {
        for (part, whole) in [
            (vec![3, 4], vec![8, 4]),
            (vec![2, 3, 4], vec![2, 8, 4]),
            (vec![2, 3, 1, 5], vec![4, 8, 1, 6]),
            (vec![7], vec![7]),
            (vec![], vec![]),
        ] {
            let (n, m): (usize, usize) = (part.iter().product(), whole.iter().product());
            let from: Vec<u8> = (0..2 * n).map(|i| i as u8 + 1).collect();
            let mut to = vec![0; 2 * m];
            spread(&from, &part, &mut to, &whole, 2);
            assert_eq!(gather(&to, &whole, &part, 2), from);
            assert_eq!(to.iter().filter(|&&b| b == 0).count(), 2 * (m - n));
        }
    }
}
