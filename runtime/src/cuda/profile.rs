//! How long the kernels of a step take on their own.

/// A kernel of a program with its time.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// The kernel.
    pub name: String,
    /// Where its first launch comes from in the model.
    pub path: String,
    /// Launches of a step.
    pub count: usize,
    /// Microseconds of one launch.
    pub micros: f64,
    /// GB/s of the tensors that it reads and writes, the cache not counted.
    pub gb_per_s: f64,
    /// TFLOP/s of its matrix product; 0 without one.
    pub tflops: f64,
}
