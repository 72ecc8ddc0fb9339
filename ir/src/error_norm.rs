//! How far a result is from a reference, as all tests and reports measure it.

/// Relative error ‖x − reference‖ / ‖reference‖ in the Euclidean norm, summed in f64. A NaN in either is a NaN, and so
/// is the error of nothing to nothing.
///
/// # Panics
/// If the lengths differ.
pub fn relative_error<T: Copy + Into<f64>>(x: &[T], reference: &[T]) -> f64 {
    assert_eq!(x.len(), reference.len(), "values of one result");
    let square = |v: f64| v * v;
    let pairs = x.iter().zip(reference);
    let difference: f64 = pairs.map(|(&a, &b)| square(a.into() - b.into())).sum();
    let size: f64 = reference.iter().map(|&b| square(b.into())).sum();
    (difference / size).sqrt()
}

#[cfg(test)]
mod tests {
    use super::relative_error;

    #[test]
    fn errors_are_relative_and_nan_is_one() {
        let reference = [3.0_f32, 4.0];
        assert_eq!(relative_error(&reference, &reference), 0.0);
        assert_eq!(relative_error(&[3.0, 4.5], &reference), 0.1);
        assert!(relative_error(&[3.0, f32::NAN], &reference).is_nan());
        assert_eq!(relative_error(&[-6.0_f64, 0.0], &[6.0, 0.0]), 2.0);
    }
}
