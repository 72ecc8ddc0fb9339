//! Counting outcomes.

use lathe_ir::DType;
use std::collections::BTreeMap;

/// Failures that are kept with their descriptions.
const KEPT: usize = 40;

/// How one comparison ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Largest error, as [`super::compare`] defines it; 0 where results must be equal.
    pub error: f64,
    /// Largest error allowed.
    pub tolerance: f64,
    /// What is wrong, if anything.
    pub fault: Option<String>,
}

impl Outcome {
    /// A check that only passes or fails.
    pub fn exact(fault: Option<String>) -> Outcome {
        Outcome {
            fault,
            ..Outcome::default()
        }
    }

    /// The worse of two outcomes of one case: a fault, else the error nearest to its tolerance.
    #[must_use]
    pub fn and(self, other: Outcome) -> Outcome {
        match (&self.fault, &other.fault) {
            (Some(_), _) => self,
            (None, Some(_)) => other,
            _ if other.share() > self.share() => other,
            _ => self,
        }
    }

    /// The error as a share of the tolerance.
    fn share(&self) -> f64 {
        if self.error == 0.0 {
            0.0
        } else {
            self.error / self.tolerance
        }
    }
}

/// All cases of one family in one element type.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// Comparisons made.
    pub cases: usize,
    /// Comparisons that failed.
    pub failed: usize,
    /// The case whose error came nearest to its tolerance, among those that are numbers.
    pub worst: Outcome,
}

/// A failed comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// Family.
    pub family: String,
    /// Model, batch, step.
    pub place: String,
    /// What is wrong.
    pub what: String,
}

/// All outcomes of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// By family and element type.
    pub rows: BTreeMap<(String, DType), Row>,
    /// The first failures.
    pub failures: Vec<Failure>,
}

impl Report {
    /// Counts an outcome.
    pub fn record(
        &mut self,
        family: &str,
        dtype: DType,
        place: impl FnOnce() -> String,
        outcome: Outcome,
    ) {
        let row = self.rows.entry((family.to_owned(), dtype)).or_default();
        row.cases += 1;
        if let Some(what) = &outcome.fault {
            row.failed += 1;
            if self.failures.len() < KEPT {
                self.failures.push(Failure {
                    family: family.to_owned(),
                    place: place(),
                    what: what.clone(),
                });
            }
        }
        if outcome.error.is_finite() && outcome.share() >= row.worst.share() {
            row.worst = outcome;
        }
    }

    /// Comparisons made and failed.
    pub fn totals(&self) -> (usize, usize) {
        let sum = |f: fn(&Row) -> usize| self.rows.values().map(f).sum();
        (sum(|r| r.cases), sum(|r| r.failed))
    }

    /// Whether a family was tested, alone or as a part of a step.
    pub fn covers(&self, family: &str) -> bool {
        self.rows.keys().any(|(name, _)| {
            let mut parts = name.split(" + ");
            parts.any(|p| p.split(' ').next() == Some(family))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_and_the_worst_case_is_kept() {
        let mut report = Report::default();
        let ok = |error| Outcome {
            error,
            tolerance: 1e-3,
            fault: None,
        };
        report.record("norm + gemv", DType::F32, || "a".into(), ok(1e-5));
        report.record("norm + gemv", DType::F32, || "b".into(), ok(5e-4));
        report.record("plain add", DType::BF16, || "c".into(), ok(0.0));
        let bad = Outcome::exact(Some("element 3 was not written".into()));
        report.record("plain add", DType::BF16, || "d".into(), bad.clone());
        assert_eq!(report.totals(), (4, 1));
        assert_eq!(report.failures[0].place, "d");
        let row = &report.rows[&("norm + gemv".to_owned(), DType::F32)];
        assert_eq!((row.cases, row.failed, row.worst.error), (2, 0, 5e-4));
        assert!(report.covers("gemv") && report.covers("plain") && !report.covers("gemm"));
        assert_eq!(ok(1e-5).and(bad.clone()).and(ok(5e-4)), bad);
        assert_eq!(ok(1e-5).and(ok(5e-4)).error, 5e-4);
    }
}
