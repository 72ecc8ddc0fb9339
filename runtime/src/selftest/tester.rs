//! The self-test of a device, whichever it is.

use super::{Report, SelftestError, Subject, cpu};

/// A device under test, with what its results are held against.
pub trait Tester {
    /// Whether the reference is so slow that only small cases are feasible.
    fn has_slow_reference(&self) -> bool;

    /// Families of kernels that a full run must have compared.
    fn families(&self) -> &'static [&'static str];

    /// Compiles the kernels that the comparisons of all subjects need; returns how many there are.
    ///
    /// # Errors
    /// A step has no kernel, or a kernel does not compile.
    fn prepare(&mut self, subjects: &[Subject]) -> Result<usize, SelftestError>;

    /// Compares every step of a subject's cases, of the families that the filter leaves.
    ///
    /// # Errors
    /// The subject cannot be loaded, or a step does not come to its end.
    fn check(
        &mut self,
        subject: &Subject,
        seed: u64,
        report: &mut Report,
    ) -> Result<(), SelftestError>;

    /// Compares whole steps in sessions of `steps` decode steps; does nothing where there is but one
    /// way to run a step, and where there is a filter. Says whether it did anything.
    ///
    /// # Errors
    /// As [`Tester::check`].
    fn check_sessions(
        &mut self,
        subject: &Subject,
        steps: usize,
        seed: u64,
        report: &mut Report,
    ) -> Result<bool, SelftestError>;
}

/// The CPU's kernels against the interpreter in f64.
#[derive(Clone, Debug, Default)]
pub struct CpuTester {
    /// Only operations whose names contain this are compared.
    pub filter: Option<String>,
}

impl Tester for CpuTester {
    fn has_slow_reference(&self) -> bool {
        true
    }

    fn families(&self) -> &'static [&'static str] {
        &[]
    }

    fn prepare(&mut self, _subjects: &[Subject]) -> Result<usize, SelftestError> {
        Ok(0)
    }

    fn check(
        &mut self,
        subject: &Subject,
        seed: u64,
        report: &mut Report,
    ) -> Result<(), SelftestError> {
        cpu::check(subject, seed, self.filter.as_deref(), report)
    }

    fn check_sessions(
        &mut self,
        _subject: &Subject,
        _steps: usize,
        _seed: u64,
        _report: &mut Report,
    ) -> Result<bool, SelftestError> {
        Ok(false)
    }
}
