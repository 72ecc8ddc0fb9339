//! Chains: the body of `chain.cu`, generated from the instructions of a chain.

use super::context::{Context, Geometry};
use super::elementwise::{binary, unary};
use super::error::CudaError;
use super::launch::Arg;
use super::source::{Body, c_type, literal};
use crate::chain::{Instr, Pass, Reduction, RowProgram};
use lathe_ir::DType;
use lathe_ir::Slot;
use lathe_ir::chain::Access;
use std::fmt::Write;

/// Elements of a 16-byte vector of 16-bit floats.
const VECTOR: usize = 8;
/// Floats of operands that a thread keeps in registers over the passes.
const KEPT: usize = 64;

pub(super) fn step(cx: &mut Context<'_>) -> Result<(), CudaError> {
    let Some(program) = RowProgram::of_step(cx.step()) else {
        return Err(cx.refuse("it is no chain"));
    };
    let program = program.map_err(|reason| cx.refuse(reason))?;
    let rows = program.row_count(&cx.env);
    let text = Text::new(&program);
    let mut args = Vec::new();
    for i in 0..program.operands.len() {
        args.push(Arg::Ptr(cx.operand(Slot::nth(i))?));
    }
    for (i, _) in program.results.iter().enumerate() {
        args.push(Arg::Ptr(cx.result(i)?));
    }
    args.push(Arg::I32(rows as i32));
    let body = text.body();
    let defines = cx
        .defines(DType::F32)
        .def("LATHE_W", program.width)
        .def("LATHE_V", text.vector)
        .def("LATHE_THREADS", text.threads)
        .def("LATHE_PARAMS", text.params())
        .def("LATHE_BODY", body.trim_end().replace('\n', " \\\n"));
    let blocks = match program.reduces() {
        true => rows,
        false => (rows * program.width / text.vector).div_ceil(text.threads),
    };
    // The name tells what is in the chain, and tells chains of the same operations apart.
    let names = match &cx.step().op {
        lathe_ir::Op::Chain(c) => c.names().join("_"),
        _ => String::new(),
    };
    let names: String = names.chars().take(40).collect();
    let label = format!(
        "{}_{names}_{:08x}",
        program.width,
        hash(&[&text.params(), &body])
    );
    let geometry = Geometry::new([blocks, 1, 1], text.threads, 0);
    cx.launch(Body::Chain, &label, defines, geometry, args);
    Ok(())
}

/// FNV-1a.
fn hash(texts: &[&str]) -> u32 {
    let bytes = texts.iter().flat_map(|t| t.bytes());
    bytes.fold(0x811c_9dc5, |h, b| {
        (h ^ u32::from(b)).wrapping_mul(0x0100_0193)
    })
}

struct Text<'a> {
    program: &'a RowProgram,
    /// Elements that a thread takes at a time.
    vector: usize,
    threads: usize,
    /// Whether a thread keeps the operands of its columns.
    keeps: bool,
}

impl<'a> Text<'a> {
    fn new(program: &'a RowProgram) -> Text<'a> {
        let vector = match program.width.is_multiple_of(VECTOR) {
            true => VECTOR,
            false => 1,
        };
        let threads = match program.reduces() {
            true => (program.width / vector)
                .next_multiple_of(32)
                .clamp(32, 1024),
            false => 256,
        };
        let columns = |a: &Access| matches!(a, Access::Full | Access::Column);
        let operands = program.operands.iter().filter(|o| columns(&o.0)).count();
        let each = program.width.div_ceil(vector * threads) * vector;
        Text {
            program,
            vector,
            threads,
            keeps: program.reduces() && operands * each <= KEPT,
        }
    }

    fn params(&self) -> String {
        let operands = self.program.operands.iter().enumerate();
        let operands = operands.map(|(i, (_, d))| format!("const {}* p{i}, ", c_type(*d)));
        let results = self.program.results.iter().enumerate();
        let results = results.map(|(i, r)| format!("{}* q{i}, ", c_type(r.dtype)));
        operands
            .chain(results)
            .chain(["i32 rows".to_owned()])
            .collect()
    }

    fn body(&self) -> String {
        match self.program.reduces() {
            true => self.rows(),
            false => self.pointwise(),
        }
    }

    fn pointwise(&self) -> String {
        let mut out = String::new();
        let pass = &self.program.passes[0];
        let _ = writeln!(out, "const i64 at = ((i64)blockIdx.x * T + tid) * V;");
        let _ = writeln!(out, "if (at >= (i64)rows * W) return;");
        let _ = writeln!(out, "const i64 row = at / W;");
        let _ = writeln!(out, "const int col = (int)(at - row * W);");
        self.row_values(&mut out, pass);
        self.loads(&mut out, pass, "");
        self.results_open(&mut out);
        self.columns(&mut out, pass, "");
        self.stores(&mut out, "");
        self.row_stores(&mut out, "col == 0");
        out
    }

    fn rows(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "const i64 row = blockIdx.x;");
        let _ = writeln!(out, "constexpr int N = (W + T * V - 1) / (T * V);");
        if self.keeps {
            let used: Vec<usize> = (0..self.program.operands.len())
                .filter(|&i| self.is_column(i))
                .collect();
            for i in &used {
                let _ = writeln!(out, "float k{i}[N][V];");
            }
            self.open_loop(&mut out);
            for &i in &used {
                let _ = writeln!(out, "    load_v({}, k{i}[it]);", self.place(i));
            }
            let _ = writeln!(out, "  }}\n}}");
        }
        let last = self.program.passes.len() - 1;
        for (at, pass) in self.program.passes.iter().enumerate() {
            self.row_values(&mut out, pass);
            for &r in &pass.reductions {
                let start = match self.program.code[r] {
                    Instr::Reduce(Reduction::Max, _) => "NEG_INF",
                    _ => "0.0f",
                };
                let _ = writeln!(out, "float s{r} = {start};");
            }
            if at < last || self.program.results.iter().any(|r| !r.row) {
                self.open_loop(&mut out);
                self.loads(&mut out, pass, "    ");
                if at == last {
                    self.results_open(&mut out);
                }
                self.columns(&mut out, pass, "    ");
                if at == last {
                    self.stores(&mut out, "    ");
                }
                let _ = writeln!(out, "  }}\n}}");
            }
            for &r in &pass.reductions {
                let max = matches!(self.program.code[r], Instr::Reduce(Reduction::Max, _));
                let _ = writeln!(out, "const float v{r} = block_reduce<{max}>(s{r}, red);");
            }
        }
        self.row_stores(&mut out, "tid == 0");
        out
    }

    /// A loop over the columns of a thread: `it` and `col`.
    fn open_loop(&self, out: &mut String) {
        let _ = writeln!(out, "_Pragma(\"unroll\") for (int it = 0; it < N; ++it) {{");
        let _ = writeln!(out, "  const int col = (it * T + tid) * V;");
        let _ = writeln!(out, "  if (W % (T * V) == 0 || col < W) {{");
    }

    fn is_column(&self, operand: usize) -> bool {
        matches!(
            self.program.operands[operand].0,
            Access::Full | Access::Column
        )
    }

    /// Where an operand's element for `row` and `col` is.
    fn place(&self, operand: usize) -> String {
        match self.program.operands[operand].0 {
            Access::Full => format!("p{operand} + row * W + col"),
            Access::Column => format!("p{operand} + col"),
            Access::Row => format!("p{operand} + row"),
            Access::Scalar => format!("p{operand}"),
        }
    }

    fn row_values(&self, out: &mut String, pass: &Pass) {
        for &i in &pass.row {
            let _ = writeln!(out, "const float v{i} = {};", self.expression(i));
        }
    }

    fn loads(&self, out: &mut String, pass: &Pass, indent: &str) {
        if self.keeps {
            return;
        }
        for &i in &pass.columns {
            if let Instr::Load(o) = self.program.code[i] {
                let _ = writeln!(
                    out,
                    "{indent}float k{o}[V]; load_v({}, k{o});",
                    self.place(o)
                );
            }
        }
    }

    fn results_open(&self, out: &mut String) {
        for (i, r) in self.program.results.iter().enumerate() {
            if !r.row {
                let _ = writeln!(out, "float y{i}[V];");
            }
        }
    }

    fn columns(&self, out: &mut String, pass: &Pass, indent: &str) {
        let _ = writeln!(
            out,
            "{indent}_Pragma(\"unroll\") for (int e = 0; e < V; ++e) {{"
        );
        for &i in &pass.columns {
            let _ = writeln!(out, "{indent}  const float v{i} = {};", self.expression(i));
        }
        for &r in &pass.reductions {
            let _ = match self.program.code[r] {
                Instr::Reduce(Reduction::Max, a) => {
                    writeln!(out, "{indent}  s{r} = fmaxf(s{r}, v{a});")
                }
                Instr::Reduce(Reduction::Sum, a) => writeln!(out, "{indent}  s{r} += v{a};"),
                _ => Ok(()),
            };
        }
        if pass.reductions.is_empty() {
            for (i, r) in self
                .program
                .results
                .iter()
                .enumerate()
                .filter(|(_, r)| !r.row)
            {
                let _ = writeln!(out, "{indent}  y{i}[e] = v{};", r.instr);
            }
        }
        let _ = writeln!(out, "{indent}}}");
    }

    fn stores(&self, out: &mut String, indent: &str) {
        for (i, r) in self.program.results.iter().enumerate() {
            if !r.row {
                let _ = writeln!(out, "{indent}store_v(q{i} + row * W + col, y{i});");
            }
        }
    }

    fn row_stores(&self, out: &mut String, condition: &str) {
        for (i, r) in self
            .program
            .results
            .iter()
            .enumerate()
            .filter(|(_, r)| r.row)
        {
            let _ = writeln!(
                out,
                "if ({condition}) q{i}[row] = from_f32<{}>(v{});",
                c_type(r.dtype),
                r.instr
            );
        }
    }

    fn expression(&self, i: usize) -> String {
        let v = |i: usize| format!("v{i}");
        match self.program.code[i] {
            Instr::Load(o) if !self.program.constant[i] => match self.keeps {
                true => format!("k{o}[it][e]"),
                false => format!("k{o}[e]"),
            },
            Instr::Load(o) => format!("to_f32(*({}))", self.place(o)),
            Instr::Const(c) => literal(f64::from(c)),
            Instr::Unary(f, a) => unary(f, &v(a)),
            Instr::Silu(a) => format!("silu(v{a})"),
            Instr::Binary(f, a, b) => binary(f, &v(a), &v(b)),
            Instr::Reduce(..) => v(i),
        }
    }
}
