//! Norms as factors: who adds up the squares of the rows of which value, and in which buffer.
//!
//! A tensor-core GEMM whose weight has gamma in its columns takes an RMSNorm as one factor a row. It needs
//! the row's sum of squares, which the kernel that writes the rows adds up while it has them in registers.
//! Two buffers take turns: a kernel adds to one and clears the other for the next, whose readers are over
//! by then. The first rows of a step get their sums from a kernel that stores them, so that nothing is
//! carried from one step to the next.

use super::verdict::Verdict;
use crate::cuda::gemm::operands::GemmStep;
use crate::plan::{Operand, Program, ValueId};
use lathe_ir::ops::gemm;
use lathe_ir::{DType, Prologue, Real, SymEnv};

/// Where the sums of squares of an operand's rows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperandSums {
    /// An earlier kernel has left them in a buffer.
    Left {
        /// The buffer.
        buffer: usize,
    },
    /// A kernel of their own stores them.
    Launched {
        /// The buffer.
        buffer: usize,
        /// The buffer that it clears for the next kernel that adds up its rows.
        clear: Option<usize>,
    },
}

/// Where a kernel adds up the rows of its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResultSums {
    /// The buffer to which it adds.
    pub add: usize,
    /// The buffer that it clears.
    pub clear: usize,
    /// Rows.
    pub rows: usize,
}

/// The sums that were made last.
#[derive(Clone, Copy, Debug)]
struct Latest {
    value: ValueId,
    /// The step whose kernels made them.
    by: usize,
    /// The buffer that has them. As many rows of the other are clear.
    buffer: usize,
    rows: usize,
}

/// Which sums of squares there are, while the steps of a program are gone through in order.
pub(super) struct RowSums {
    /// The steps that take the norm of a value as factors, if their kernels can.
    readers: Vec<(usize, ValueId)>,
    latest: Option<Latest>,
}

/// The buffer of sums that stand aside while others are still to be read.
const ASIDE: usize = 2;

/// Whether the tensor-core kernels can add up rows of so many columns.
pub(super) fn fits(cols: usize, dtype: DType) -> bool {
    dtype == DType::BF16 && cols.is_multiple_of(64)
}

/// Least `eps` for which sums in steps of 2^-20 are fine enough. Each part of a row, 64 columns or more, is
/// rounded by at most 2^-21, so a mean square is off by at most 2^-27 = 7.5e-9. With the 1e-6 of many models
/// that is 0.75 % of `eps`, to which it is added.
const LEAST_EPS: f64 = 5e-7;

/// Whether a norm can be taken as factors, as far as `eps` goes.
pub(super) fn is_fine(eps: Real) -> bool {
    eps.get() >= LEAST_EPS
}

impl RowSums {
    pub(super) fn new(program: &Program, env: &SymEnv) -> RowSums {
        let takes_factors = |at: usize| {
            let g = GemmStep::of(&program.steps[at], env)?.ok()?;
            let fine = matches!(g.prologue, Prologue::Rms { eps } if is_fine(eps));
            match g.get(gemm::X)? {
                Operand::Value(v) if fine && g.get(gemm::GAMMA).is_none() => Some((at, *v)),
                _ => None,
            }
        };
        RowSums {
            readers: (0..program.steps.len()).filter_map(takes_factors).collect(),
            latest: None,
        }
    }

    /// The first step from number `from` on that may read the sums of a value.
    fn reader(&self, from: usize, value: ValueId) -> Option<usize> {
        let reads = |(at, v): &(usize, ValueId)| *at >= from && *v == value;
        self.readers.iter().copied().find(reads).map(|(at, _)| at)
    }

    /// The sums of squares of the rows of the operand of step `at`: those that its kernel has left, or else those of a
    /// kernel of their own.
    pub(super) fn of_operand(
        &mut self,
        at: usize,
        x: Option<&Operand>,
        rows: usize,
    ) -> (OperandSums, String) {
        let value = match x {
            Some(Operand::Value(v)) => Some(*v),
            _ => None,
        };
        // A view with other rows has other sums.
        if let Some(l) = self.latest
            && value == Some(l.value)
            && l.rows == rows
        {
            let buffer = l.buffer;
            let why = format!("factors of its rows from the sums of step {}", l.by);
            return (OperandSums::Left { buffer }, why);
        }
        // Sums that somebody still waits for stay where they are.
        let waits = |l: &Latest| self.reader(at, l.value).is_some();
        let why = "factors of its rows from sums that a launch makes: no kernel has left them";
        match value {
            Some(value) if !self.latest.as_ref().is_some_and(waits) => {
                let buffer = self.latest.map_or(0, |l| 1 - l.buffer);
                self.latest = Some(Latest {
                    value,
                    by: at,
                    buffer,
                    rows,
                });
                let clear = Some(1 - buffer);
                (OperandSums::Launched { buffer, clear }, why.to_owned())
            }
            _ => {
                let (buffer, clear) = (ASIDE, None);
                (OperandSums::Launched { buffer, clear }, why.to_owned())
            }
        }
    }

    /// Where the kernel of step `at` has to add up the rows of its result; `None` if no later step takes their norm as
    /// factors. `can` is why the kernel cannot do it, if so.
    pub(super) fn of_result(
        &mut self,
        at: usize,
        result: Option<ValueId>,
        (rows, cols): (usize, usize),
        dtype: DType,
        cannot: Option<String>,
    ) -> Option<Verdict<ResultSums>> {
        let value = result?;
        let reader = self.reader(at + 1, value)?;
        if let Some(reason) = cannot {
            return Some(Verdict::not(reason));
        }
        if !fits(cols, dtype) {
            return Some(Verdict::not(format!(
                "rows of {cols} columns of {dtype} are not whole parts of 64 in bf16"
            )));
        }
        // Without sums in this step so far no buffer is known to be clear.
        let Some(latest) = self.latest.filter(|l| l.rows == rows) else {
            return Some(Verdict::not(
                "no buffer is known to be clear: nothing before has sums of as many rows",
            ));
        };
        // What somebody reads is not cleared.
        if let Some(other) = self.reader(at, latest.value) {
            return Some(Verdict::not(format!(
                "step {other} has yet to read the sums of step {}",
                latest.by
            )));
        }
        let (add, clear) = (1 - latest.buffer, latest.buffer);
        self.latest = Some(Latest {
            value,
            by: at,
            buffer: add,
            rows,
        });
        let sums = ResultSums { add, clear, rows };
        let why = format!("step {reader} takes the norm of the result as factors");
        Some(Verdict::made(sums, why))
    }
}
