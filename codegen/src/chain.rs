//! Chains as every device computes them: scalar instructions over one row, in passes.
//!
//! The statements of a [`Chain`] are taken apart until only pointwise functions, sums and maxima of
//! rows are left. Each instruction is either constant along a row or has a value for each column.
//! Values are computed column by column in as many passes over the row as reductions stand behind
//! one another, plus one for the results: what a later pass needs is computed again.

use crate::plan::Step;
use lathe_ir::ChainOp;
use lathe_ir::chain::{Access, ChainArg, access, domain};
use lathe_ir::{BinaryFn, Chain, DType, Dim, Op, ReduceFn, SymEnv, TensorType, Type, UnaryFn};

/// What is computed of the elements of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Their sum.
    Sum,
    /// The largest.
    Max,
}

/// One value, in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Instr {
    /// An element of an operand.
    Load(usize),
    /// A constant.
    Const(f32),
    /// A function of a value.
    Unary(UnaryFn, usize),
    /// `x·sigmoid(x)`.
    Silu(usize),
    /// A function of two values.
    Binary(BinaryFn, usize, usize),
    /// A reduction of a value over the row.
    Reduce(Reduction, usize),
}

/// One pass over a row.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Pass {
    /// Values that are constant along the row, computed before it.
    pub row: Vec<usize>,
    /// Values of each column.
    pub columns: Vec<usize>,
    /// Reductions that are known after it.
    pub reductions: Vec<usize>,
}

/// A result in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainResult {
    /// Its instruction.
    pub instr: usize,
    /// Its element type.
    pub dtype: DType,
    /// One element a row, rather than one a column.
    pub row: bool,
}

/// A chain over rows of one width.
#[derive(Clone, Debug, PartialEq)]
pub struct RowProgram {
    /// Extents of the rows' indices.
    pub rows: Vec<Dim>,
    /// Elements of a row.
    pub width: usize,
    /// How each operand lies in the domain, and its element type.
    pub operands: Vec<(Access, DType)>,
    /// The instructions; each reads earlier ones only.
    pub code: Vec<Instr>,
    /// For each instruction, whether it is constant along a row.
    pub constant: Vec<bool>,
    /// The passes in order; the last one has no reductions and stores the results.
    pub passes: Vec<Pass>,
    /// The results in order.
    pub results: Vec<ChainResult>,
}

impl RowProgram {
    /// Takes a chain over operands of these types apart.
    ///
    /// # Errors
    /// The chain is ill-typed, or no kernel has such a result.
    pub fn new(chain: &Chain, operands: &[&Type]) -> Result<RowProgram, String> {
        let types = chain.types(operands)?;
        let domain = domain(operands.iter().filter_map(|t| t.as_tensor()))?;
        let width = domain
            .last()
            .and_then(|d| d.known())
            .ok_or("rows of unknown length")?;
        let lies =
            |t: &TensorType| access(&t.shape, &domain).ok_or("an operand outside the domain");
        let mut build = Build::default();
        let mut loads = Vec::with_capacity(operands.len());
        for t in operands {
            let t = t.as_tensor().ok_or("an operand is no tensor")?;
            loads.push((lies(t)?, t.dtype));
        }
        build.loads = loads
            .iter()
            .map(|l| matches!(l.0, Access::Row | Access::Scalar))
            .collect();
        let mut values: Vec<usize> = Vec::with_capacity(types.len());
        for s in &chain.statements {
            let mut args = Vec::with_capacity(s.args.len());
            let mut widths = Vec::with_capacity(s.args.len());
            for a in &s.args {
                let (arg, ty) = match *a {
                    ChainArg::Operand(i) => {
                        let i = usize::from(i);
                        (build.add(Instr::Load(i)), operands[i].as_tensor())
                    }
                    ChainArg::Value(i) => (values[usize::from(i)], Some(&types[usize::from(i)])),
                    ChainArg::Const { value, .. } => {
                        (build.add(Instr::Const(value.get() as f32)), None)
                    }
                };
                args.push(arg);
                widths.push(ty.and_then(|t| t.shape.last()?.known()).unwrap_or(1));
            }
            values.push(build.statement(&s.op, &args, &widths)?);
        }
        let mut results = Vec::with_capacity(chain.results.len());
        for &r in &chain.results {
            let t = &types[usize::from(r)];
            let row = match lies(t)? {
                Access::Full => false,
                Access::Row => true,
                _ => return Err("a result that is the same for all rows".into()),
            };
            results.push(ChainResult {
                instr: values[usize::from(r)],
                dtype: t.dtype,
                row,
            });
        }
        let passes = build.passes(&results);
        Ok(RowProgram {
            rows: domain[..domain.len() - 1].to_vec(),
            width: width as usize,
            operands: loads,
            code: build.code,
            constant: build.constant,
            passes,
            results,
        })
    }

    /// The program of a step; `None` if it is no chain.
    pub fn of_step(step: &Step) -> Option<Result<RowProgram, String>> {
        let Op::Chain(chain) = &step.op else {
            return None;
        };
        let types: Vec<&Type> = step.types.iter().collect();
        Some(RowProgram::new(chain, &types))
    }

    /// Rows under an assignment of the symbols.
    pub fn row_count(&self, env: &SymEnv) -> usize {
        self.rows
            .iter()
            .map(|d| d.eval(env).max(0) as usize)
            .product()
    }

    /// Whether whole rows are needed at a time.
    pub fn reduces(&self) -> bool {
        self.passes.len() > 1
    }
}

#[derive(Default)]
struct Build {
    /// Whether each operand is constant along a row.
    loads: Vec<bool>,
    code: Vec<Instr>,
    constant: Vec<bool>,
    /// Reductions that stand behind one another before the value is known.
    level: Vec<usize>,
}

impl Build {
    /// Adds an instruction unless there is an equal one.
    fn add(&mut self, instr: Instr) -> usize {
        if let Some(i) = self.code.iter().position(|x| *x == instr) {
            return i;
        }
        let both = |x: &[bool], a: usize, b: usize| x[a] && x[b];
        let (constant, level) = match instr {
            Instr::Load(i) => (self.loads[i], 0),
            Instr::Const(_) => (true, 0),
            Instr::Unary(_, a) | Instr::Silu(a) => (self.constant[a], self.level[a]),
            Instr::Binary(_, a, b) => {
                (both(&self.constant, a, b), self.level[a].max(self.level[b]))
            }
            Instr::Reduce(_, a) => (true, self.level[a] + 1),
        };
        self.code.push(instr);
        self.constant.push(constant);
        self.level.push(level);
        self.code.len() - 1
    }

    fn binary(&mut self, f: BinaryFn, a: usize, b: usize) -> usize {
        self.add(Instr::Binary(f, a, b))
    }

    /// A reduction; of what is constant along the row it is the value itself.
    fn reduce(&mut self, r: Reduction, a: usize) -> usize {
        match self.constant[a] {
            true => a,
            false => self.add(Instr::Reduce(r, a)),
        }
    }

    fn mean(&mut self, x: usize, width: i64) -> usize {
        let sum = self.reduce(Reduction::Sum, x);
        let n = self.add(Instr::Const(width as f32));
        self.binary(BinaryFn::Div, sum, n)
    }

    /// The value of a statement. `widths` are the extents of the operands' last axes.
    fn statement(&mut self, op: &ChainOp, x: &[usize], widths: &[i64]) -> Result<usize, String> {
        Ok(match (op, x) {
            // Between floats a cast only says how a value would be stored.
            (ChainOp::Cast(_), &[a]) => a,
            (ChainOp::Unary(f), &[a]) => self.add(Instr::Unary(*f, a)),
            (ChainOp::Silu, &[a]) => self.add(Instr::Silu(a)),
            (ChainOp::SwiGlu, &[g, u]) => {
                let g = self.add(Instr::Silu(g));
                self.binary(BinaryFn::Mul, g, u)
            }
            (ChainOp::Binary(BinaryFn::Pow), &[a, b]) => match self.code[b] {
                Instr::Const(2.0) => self.binary(BinaryFn::Mul, a, a),
                Instr::Const(3.0) => {
                    let square = self.binary(BinaryFn::Mul, a, a);
                    self.binary(BinaryFn::Mul, square, a)
                }
                _ => self.binary(BinaryFn::Pow, a, b),
            },
            (ChainOp::Binary(f), &[a, b]) => self.binary(*f, a, b),
            (
                ChainOp::Reduce {
                    f: ReduceFn::Mean, ..
                },
                &[a],
            ) => self.mean(a, widths[0]),
            (
                ChainOp::Reduce {
                    f: ReduceFn::Sum, ..
                },
                &[a],
            ) => self.reduce(Reduction::Sum, a),
            (
                ChainOp::Reduce {
                    f: ReduceFn::Amax, ..
                },
                &[a],
            ) => self.reduce(Reduction::Max, a),
            (ChainOp::RmsNorm { eps }, &[a, gamma]) => {
                let square = self.binary(BinaryFn::Mul, a, a);
                let mean = self.mean(square, widths[0]);
                let eps = self.add(Instr::Const(eps.get() as f32));
                let sum = self.binary(BinaryFn::Add, mean, eps);
                let scale = self.add(Instr::Unary(UnaryFn::Rsqrt, sum));
                let y = self.binary(BinaryFn::Mul, a, scale);
                self.binary(BinaryFn::Mul, y, gamma)
            }
            (ChainOp::Softmax, &[a]) => {
                let max = self.reduce(Reduction::Max, a);
                let x = self.binary(BinaryFn::Sub, a, max);
                let e = self.add(Instr::Unary(UnaryFn::Exp, x));
                let sum = self.reduce(Reduction::Sum, e);
                self.binary(BinaryFn::Div, e, sum)
            }
            (op, _) => return Err(format!("{} has no place in a chain", op.name())),
        })
    }

    fn passes(&self, results: &[ChainResult]) -> Vec<Pass> {
        let mut wanted = vec![false; self.code.len()];
        results
            .iter()
            .for_each(|r| self.mark(r.instr, &mut wanted, true));
        let last = (0..self.code.len())
            .filter(|&i| wanted[i])
            .map(|i| self.level[i])
            .max()
            .unwrap_or(0);
        (0..=last)
            .map(|level| {
                let reductions: Vec<usize> = (0..self.code.len())
                    .filter(|&i| {
                        wanted[i]
                            && self.level[i] == level + 1
                            && matches!(self.code[i], Instr::Reduce(..))
                    })
                    .collect();
                let mut columns = vec![false; self.code.len()];
                for &r in &reductions {
                    if let Instr::Reduce(_, a) = self.code[r] {
                        self.mark(a, &mut columns, false);
                    }
                }
                if level == last {
                    for r in results.iter().filter(|r| !r.row) {
                        self.mark(r.instr, &mut columns, false);
                    }
                }
                let is = |i: &usize| wanted[*i];
                Pass {
                    row: (0..self.code.len())
                        .filter(is)
                        .filter(|&i| {
                            let reduction = matches!(self.code[i], Instr::Reduce(..));
                            self.constant[i] && !reduction && self.level[i] == level
                        })
                        .collect(),
                    columns: (0..self.code.len()).filter(|&i| columns[i]).collect(),
                    reductions,
                }
            })
            .collect()
    }

    /// Marks an instruction and what it reads: everything, or only values of columns.
    fn mark(&self, i: usize, marks: &mut [bool], all: bool) {
        if marks[i] || (self.constant[i] && !all) {
            return;
        }
        marks[i] = true;
        match self.code[i] {
            Instr::Load(_) | Instr::Const(_) => {}
            Instr::Unary(_, a) | Instr::Silu(a) | Instr::Reduce(_, a) => self.mark(a, marks, all),
            Instr::Binary(_, a, b) => {
                self.mark(a, marks, all);
                self.mark(b, marks, all);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::Sym;

    #[test]
    fn a_layer_norm_takes_three_passes() {
        let (t, h) = (Dim::sym(Sym::T), Dim::new(64));
        let x = Type::tensor(DType::BF16, [t, h]);
        let gamma = Type::tensor(DType::BF16, [h]);
        let chain: Chain = "mean:1 a0; sub a0 t0; rmsnorm:1e-5 t1 a1; add t2 a2 -> t3 t0"
            .parse()
            .unwrap();
        let p = RowProgram::new(&chain, &[&x, &gamma, &gamma]).unwrap();
        assert_eq!((p.width, p.passes.len()), (64, 3));
        assert_eq!(
            p.passes
                .iter()
                .map(|p| p.reductions.len())
                .collect::<Vec<_>>(),
            [1, 1, 0]
        );
        assert!(p.results[1].row && !p.results[0].row);
        // x alone; x - mean and its square; gamma, beta and the rest.
        assert_eq!(
            p.passes.iter().map(|p| p.columns.len()).collect::<Vec<_>>(),
            [1, 3, 7]
        );
        assert_eq!(p.row_count(&SymEnv::new(&[(Sym::T, 5)])), 5);
    }

    #[test]
    fn equal_values_are_computed_once() {
        let x = Type::tensor(DType::F32, [Dim::new(3), Dim::new(8)]);
        let chain: Chain = "pow a0 3.0:f32; cast:bf16 a0; mul t1 t1; mul t0 t2 -> t3"
            .parse()
            .unwrap();
        // The dtypes differ, so that this is no well-typed chain; without the cast it is.
        assert!(RowProgram::new(&chain, &[&x]).is_err());
        let chain: Chain = "pow a0 3.0:f32; mul a0 a0; mul t0 t1 -> t2"
            .parse()
            .unwrap();
        let p = RowProgram::new(&chain, &[&x]).unwrap();
        assert_eq!(p.passes.len(), 1);
        // a0, the constant of pow, the square, the cube, their product.
        assert_eq!(p.code.len(), 5);
    }
}
