//! What the kernel families share while a program is lowered.

use super::CudaError;
use super::choice::Choices;
use super::launch::{
    Arg, CudaOptions, Launch, MapArg, MapSwizzle, Meta, Ref, Sampling, Sizes, Workspace,
};
use super::row_sums::RowSums;
use super::source::{Body, Defines, Kernels};
use crate::plan::{Operand, Plan, Program, Step, ValueId};
use crate::work::Work;
use lathe_ir::{DType, SymEnv, TensorType};
use lathe_ir::{Slot, StepInput};

/// Shared memory that a block may have on Hopper.
pub(super) const SHARED: usize = 232_448;

/// A program being lowered.
pub(super) struct Context<'a> {
    pub(super) plan: &'a Plan,
    pub(super) program: &'a Program,
    pub(super) options: CudaOptions,
    pub(super) choices: &'a Choices,
    pub(super) sizes: Sizes,
    pub(super) sampling: Sampling,
    pub(super) env: SymEnv,
    pub(super) kernels: Kernels,
    pub(super) launches: Vec<Launch>,
    pub(super) workspaces: Vec<Workspace>,
    /// Sums of squares of rows that are at hand.
    pub(super) row_sums: RowSums,
    /// The step being lowered.
    pub(super) at: usize,
    /// The step's kernels start after their predecessors have ended.
    pub(super) serial: bool,
}

/// Where and with how much shared memory a kernel runs.
#[derive(Clone, Copy)]
pub(super) struct Geometry {
    pub(super) grid: [u32; 3],
    pub(super) block: u32,
    pub(super) cluster: u32,
    pub(super) shared: u32,
}

impl Geometry {
    pub(super) fn new(grid: [usize; 3], block: usize, shared: usize) -> Geometry {
        Geometry {
            grid: grid.map(|g| g.max(1) as u32),
            block: block as u32,
            cluster: 1,
            shared: shared as u32,
        }
    }
}

impl<'a> Context<'a> {
    pub(super) fn new(
        plan: &'a Plan,
        program: &'a Program,
        sizes: Sizes,
        sampling: Sampling,
        options: CudaOptions,
        choices: &'a Choices,
    ) -> Context<'a> {
        Context {
            plan,
            program,
            options,
            choices,
            sizes,
            sampling,
            env: sizes.env(),
            kernels: Kernels::default(),
            launches: Vec::new(),
            workspaces: Vec::new(),
            row_sums: RowSums::default(),
            at: 0,
            serial: false,
        }
    }

    pub(super) fn step(&self) -> &'a Step {
        &self.program.steps[self.at]
    }

    /// The error that this step has no kernel.
    pub(super) fn refuse(&self, reason: impl Into<String>) -> CudaError {
        let step = self.step();
        CudaError {
            program: self.program.kind.name(),
            step: self.at,
            op: step.op.name(),
            path: step.prov.path.to_string(),
            reason: reason.into(),
        }
    }

    /// Begins a step. Kernels read weights before they wait for their predecessor; where a weight
    /// is computed by an earlier step, they must not.
    pub(super) fn begin(&mut self, at: usize) {
        self.at = at;
        let step = self.step();
        let mut weights = step.op.signature().slots.iter().filter(|s| s.is_weight());
        self.serial = weights.any(|&s| matches!(step.get(s), Some(Operand::Value(_))));
    }

    /// Whether the step's kernels may start early.
    pub(super) fn pdl(&self) -> bool {
        self.options.pdl && !self.serial
    }

    /// Macros that every kernel gets.
    pub(super) fn defines(&self, dtype: DType) -> Defines {
        Defines::new(dtype).def("LATHE_PDL", u8::from(self.pdl()))
    }

    /// Adds a launch of a kernel to the program.
    pub(super) fn launch(
        &mut self,
        body: Body,
        label: &str,
        defines: Defines,
        geometry: Geometry,
        args: Vec<Arg>,
    ) -> &mut Launch {
        let step = self.step();
        // All layers share a kernel: layer numbers are left out of its comment.
        let path: Vec<&str> = step
            .prov
            .path
            .split('.')
            .map(|p| {
                if p.bytes().all(|b| b.is_ascii_digit()) {
                    "*"
                } else {
                    p
                }
            })
            .collect();
        let origin = format!("{} of {}", step.op.name(), path.join("."));
        let kernel = self.kernels.get(body, label, defines, origin);
        let (work, pdl) = (Work::of_step(step, &self.env), self.pdl());
        self.launches.push(Launch {
            kernel,
            grid: geometry.grid,
            block: geometry.block,
            cluster: geometry.cluster,
            shared: geometry.shared,
            args,
            pdl,
            step: self.at,
            work,
            library: None,
        });
        self.launches.last_mut().expect("one was pushed")
    }

    /// The tensor type of an operand.
    pub(super) fn tensor(&self, operand: Slot) -> Result<&'a TensorType, CudaError> {
        let step = self.step();
        step.tensor(operand)
            .ok_or_else(|| self.refuse(format!("operand '{}' is no tensor", operand.name())))
    }

    /// The type of a result.
    pub(super) fn result_type(&self, i: usize) -> Result<&'a TensorType, CudaError> {
        self.step()
            .result_type(i)
            .ok_or_else(|| self.refuse(format!("result {i} is no tensor")))
    }

    /// Where an operand is; a null pointer if it is absent.
    pub(super) fn operand(&self, operand: Slot) -> Result<Ref, CudaError> {
        Ok(match self.step().get(operand) {
            Some(Operand::Value(v)) => Ref::Value(*v),
            Some(Operand::Weight(w)) => Ref::Weight(*w),
            Some(Operand::Table(t)) => Ref::Table(*t),
            Some(Operand::Cache(c)) => Ref::Cache(*c),
            Some(Operand::Input(n)) => Ref::Meta(match self.program.inputs[*n].0 {
                StepInput::Tokens => Meta::Tokens,
                StepInput::Positions => Meta::Positions,
                StepInput::Rows => Meta::Rows,
            }),
            Some(Operand::Const { .. }) => {
                return Err(self.refuse(format!("operand '{}' is a constant", operand.name())));
            }
            None => Ref::Null,
        })
    }

    pub(super) fn is_absent(&self, operand: Slot) -> bool {
        self.step().get(operand).is_none()
    }

    /// The element type of an operand in memory: inputs are always i32.
    pub(super) fn stored_dtype(&self, operand: Slot) -> Result<DType, CudaError> {
        match self.step().get(operand) {
            Some(Operand::Input(_)) => Ok(DType::I32),
            _ => Ok(self.tensor(operand)?.dtype),
        }
    }

    /// Where a result goes.
    pub(super) fn result(&self, i: usize) -> Result<Ref, CudaError> {
        match self.step().results.get(i) {
            Some(Some(v)) => Ok(Ref::Value(*v)),
            _ => Err(self.refuse(format!("result {i} has no place"))),
        }
    }

    pub(super) fn result_id(&self, i: usize) -> Option<ValueId> {
        self.step().results.get(i).copied().flatten()
    }

    /// A workspace of at least these bytes.
    pub(super) fn work(&mut self, name: &str, bytes: usize, fill: Option<u32>) -> Ref {
        if let Some(i) = self.workspaces.iter().position(|w| w.name == name) {
            let w = &mut self.workspaces[i];
            w.bytes = w.bytes.max(bytes);
            return Ref::Work(i);
        }
        self.workspaces.push(Workspace {
            name: name.to_owned(),
            bytes,
            fill,
        });
        Ref::Work(self.workspaces.len() - 1)
    }

    /// Extents under the sizes of the bucket.
    pub(super) fn extents(&self, t: &TensorType) -> Vec<i64> {
        t.shape.iter().map(|d| d.eval(&self.env)).collect()
    }

    /// Rows and columns of a tensor seen as a matrix.
    pub(super) fn matrix(&self, t: &TensorType) -> (usize, usize) {
        let cols = t.shape.last().map_or(1, |d| d.eval(&self.env)) as usize;
        (t.elements(&self.env) / cols.max(1), cols)
    }
}

/// A map of a row-major bf16 matrix with boxes `[box_rows, box_cols]`.
pub(super) fn matrix_map(
    base: Ref,
    rows: usize,
    cols: usize,
    box_rows: usize,
    box_cols: usize,
) -> Arg {
    Arg::Map(MapArg {
        base,
        dims: vec![cols as u64, rows as u64],
        strides: vec![2 * cols as u64],
        block: vec![box_cols as u32, box_rows as u32],
        swizzle: match box_cols {
            64 => MapSwizzle::B128,
            32 => MapSwizzle::B64,
            16 => MapSwizzle::B32,
            _ => MapSwizzle::None,
        },
    })
}
