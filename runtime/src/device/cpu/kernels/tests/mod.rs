//! Kernels against naive f64 references, on every instruction set of the machine, into poisoned outputs.

mod attention;
mod chain;
mod linear;
mod simple;

use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{Elem, Isa};

/// Runs `f` once per instruction set available here.
fn each_isa(mut f: impl FnMut(Isa)) {
    let mut count = 0;
    for isa in Isa::ALL {
        count += usize::from(isa.with(|| f(isa)).is_some());
    }
    assert!(count >= 1, "the portable path is always available");
}

fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// `len` values uniform in -1..1, rounded to the storage type.
fn random<E: Elem>(rng: &mut StdRng, len: usize) -> Vec<E> {
    (0..len)
        .map(|_| E::from_f32(rng.random_range(-1.0f32..1.0)))
        .collect()
}

/// An output buffer that fails any comparison where it is not written.
fn poisoned<E: Elem>(len: usize) -> Vec<E> {
    vec![E::from_f32(f32::NAN); len]
}

fn wide<E: Elem>(x: &[E]) -> Vec<f64> {
    x.iter().map(|v| f64::from(v.to_f32())).collect()
}

/// Unit roundoff of a storage type.
fn epsilon<E: Elem>() -> f64 {
    if E::NAME == "bf16" {
        1.0 / 256.0
    } else {
        f64::from(f32::EPSILON)
    }
}

/// Asserts |got - want| <= relative · |want| + absolute everywhere.
#[track_caller]
fn assert_close<E: Elem>(what: &str, got: &[E], want: &[f64], relative: f64, absolute: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(g.to_f32()) - w).abs();
        // `!(a <= b)` also catches NaN.
        assert!(
            error <= relative * w.abs() + absolute,
            "{what}: element {i} is {g:?}, expected {w} (error {error:e})"
        );
    }
}

/// The bits of a buffer, for bitwise comparison.
fn bits<E: Elem>(x: &[E]) -> Vec<u32> {
    x.iter().map(|v| v.to_f32().to_bits()).collect()
}

#[test]
fn bf16_conversion_matches_half() {
    let mut rng = rng(1);
    for _ in 0..10_000 {
        let x = f32::from_bits(rng.random());
        let (ours, theirs) = (<bf16 as Elem>::from_f32(x), bf16::from_f32(x));
        assert!(
            ours == theirs || (ours.is_nan() && theirs.is_nan()),
            "{x:e}: {ours:?} and {theirs:?}"
        );
    }
}

#[test]
fn parallel_for_visits_each_index_once() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    for len in [0, 1, 2, 7, 1000] {
        let visits: Vec<AtomicUsize> = (0..len).map(|_| AtomicUsize::new(0)).collect();
        super::pool::parallel_for(len, |i| {
            // A nested loop runs on its own thread and must not deadlock.
            super::pool::parallel_for(2, |_| ());
            visits[i].fetch_add(1, Ordering::Relaxed);
        });
        assert!(visits.iter().all(|v| v.load(Ordering::Relaxed) == 1));
    }
}

#[test]
fn parallel_for_survives_a_panic_and_sleep() {
    for _ in 0..3 {
        let result = std::panic::catch_unwind(|| {
            super::pool::parallel_for(8, |i| assert!(i != 5, "expected by the test"));
        });
        assert!(result.is_err());
        // Long enough for the workers to park.
        std::thread::sleep(std::time::Duration::from_millis(5));
        let sum = std::sync::atomic::AtomicUsize::new(0);
        super::pool::parallel_for(100, |i| {
            sum.fetch_add(i, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 4950);
    }
}
