//! What the kernel families share while a program is lowered.

use super::bucket::Bucket;
use super::error::CudaError;
use super::launch::{
    Arg, CudaOptions, Launch, LibraryGemm, MapArg, MapSwizzle, Meta, Ref, Sampling, Sizes,
    Workspace,
};
use super::source::{Body, Defines, Kernels};
use crate::plan::{Operand, Program, Step, ValueId};
use crate::work::Work;
use lathe_ir::{DType, Slot, StepInput, SymEnv, TensorType};

/// A program being lowered.
pub(super) struct Context<'a> {
    pub(super) program: &'a Program,
    pub(super) options: CudaOptions,
    pub(super) sizes: Sizes,
    pub(super) sampling: Sampling,
    pub(super) env: SymEnv,
    pub(super) kernels: Kernels,
    pub(super) launches: Vec<Launch>,
    pub(super) workspaces: Vec<Workspace>,
    /// The step being lowered.
    pub(super) at: usize,
    /// The step's kernels may start before their predecessors have ended.
    pub(super) early: bool,
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

/// A kernel and what one launch of it is given.
pub(super) struct Call<'a> {
    pub(super) body: Body,
    /// Tells kernels of a body apart.
    pub(super) label: &'a str,
    pub(super) defines: Defines,
    pub(super) geometry: Geometry,
    pub(super) args: Vec<Arg>,
    /// What it does; the work of the step if that is not told.
    pub(super) work: Option<Work>,
    /// What may run in its place.
    pub(super) library: Option<LibraryGemm>,
}

impl<'a> Context<'a> {
    pub(super) fn new(bucket: &Bucket<'a>) -> Context<'a> {
        Context {
            program: bucket.program,
            options: bucket.options,
            sizes: bucket.sizes,
            sampling: bucket.sampling,
            env: bucket.sizes.env(),
            kernels: Kernels::default(),
            launches: Vec::new(),
            workspaces: Vec::new(),
            at: 0,
            early: false,
        }
    }

    pub(super) fn step(&self) -> &'a Step {
        &self.program.steps[self.at]
    }

    /// The error that this step has no kernel.
    pub(super) fn refuse(&self, reason: impl Into<String>) -> CudaError {
        CudaError::at(self.program, self.at, reason)
    }

    /// Begins a step; with `early` its kernels may start before their predecessors have ended.
    pub(super) fn begin(&mut self, at: usize, early: bool) {
        (self.at, self.early) = (at, early);
    }

    /// Macros that every kernel gets.
    pub(super) fn defines(&self, dtype: DType) -> Defines {
        Defines::new(dtype).def("LATHE_PDL", u8::from(self.early))
    }

    /// Launches a kernel that does all the work of the step.
    pub(super) fn launch(
        &mut self,
        body: Body,
        label: &str,
        defines: Defines,
        geometry: Geometry,
        args: Vec<Arg>,
    ) {
        self.call(Call {
            body,
            label,
            defines,
            geometry,
            args,
            work: None,
            library: None,
        });
    }

    /// Adds a launch of a kernel to the program.
    pub(super) fn call(&mut self, call: Call<'_>) {
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
        let kernel = self
            .kernels
            .get(call.body, call.label, call.defines, origin);
        self.launches.push(Launch {
            kernel,
            grid: call.geometry.grid,
            block: call.geometry.block,
            cluster: call.geometry.cluster,
            shared: call.geometry.shared,
            args: call.args,
            pdl: self.early,
            step: self.at,
            work: call.work.unwrap_or_else(|| self.step_work()),
            library: call.library,
        });
    }

    /// The work of the whole step.
    pub(super) fn step_work(&self) -> Work {
        Work::of_step(self.step(), &self.env)
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
        match self.step().get(operand) {
            Some(operand) => self.place(operand),
            None => Ok(Ref::Null),
        }
    }

    /// Where an operand of the step is.
    pub(super) fn place(&self, operand: &Operand) -> Result<Ref, CudaError> {
        Ok(match operand {
            Operand::Value(v) => Ref::Value(*v),
            Operand::Weight(w) => Ref::Weight(*w),
            Operand::Table(t) => Ref::Table(*t),
            Operand::Cache(c) => Ref::Cache(*c),
            Operand::Input(n) => Ref::Meta(match self.program.inputs[*n].0 {
                StepInput::Tokens => Meta::Tokens,
                StepInput::Positions => Meta::Positions,
                StepInput::Rows => Meta::Rows,
            }),
            Operand::Const { .. } => {
                return Err(self.refuse("a constant has no place in memory"));
            }
        })
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

/// Threads of a block that goes over one row: one for each 16-byte vector, in whole warps.
pub(super) fn row_threads(cols: usize, dtype: DType) -> usize {
    (cols * dtype.size() / 16)
        .next_multiple_of(32)
        .clamp(32, 256)
}
