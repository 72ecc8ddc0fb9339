//! Trials: programs evaluated on random numbers, so that two of them can be held against each other.
//!
//! A trial gives every weight and input of a program a value that follows from its name and a seed.
//! What a rewrite makes of the program gets the same values: an input `step.x` holds the rows of the
//! input `x` that a step computes, and `step.positions` their positions.

use crate::opt::{is_full_sequence, windowed};
use crate::rules::STEP;
use indexmap::IndexMap;
use lathe_ir::interp::{Float, Interp, StepMeta, Tensor, Value, WeightFn, eval_op};
use lathe_ir::ops::{Input, Win};
use lathe_ir::{DType, Graph, Op, StepInput, Sym, SymEnv, TensorType, Type, WeightRef, infer};
use std::fmt;

/// Sequences of a trial, where nothing else is asked for.
const BATCH: usize = 2;
/// Positions of each sequence.
const LEN: usize = 5;
/// Random integers are below this: indices of all but the smallest tables.
pub const INTEGERS: usize = 5;

/// Random values for what a program leaves open.
#[derive(Clone, Copy, Debug)]
pub struct Trial<'a> {
    /// The program as it was written: it says what `x` is, of which `step.x` is a part.
    pub program: &'a Graph,
    /// Other seeds give other numbers.
    pub seed: u64,
    /// Number of sequences.
    pub batch: usize,
    /// Positions of each sequence.
    pub len: usize,
}

impl<'a> Trial<'a> {
    /// A trial of two sequences of five positions.
    pub fn new(program: &'a Graph, seed: u64) -> Trial<'a> {
        Trial {
            program,
            seed,
            batch: BATCH,
            len: LEN,
        }
    }

    /// All rows of all sequences, in one step.
    pub fn whole(&self) -> StepMeta {
        StepMeta::new(&vec![self.len; self.batch], &vec![0; self.batch])
    }

    /// The elements of a weight, in `[-1, 1)`. Every element type holds them exactly.
    pub fn weight<F: Float>(&self, w: &WeightRef) -> Vec<F> {
        let n: i64 = w.shape.iter().product();
        let unit = |i| F::from_f64((unit(self.seed, &w.name, i) * 64.0).floor() / 64.0);
        (0..n.max(0) as u64).map(unit).collect()
    }

    /// Values of the symbols in a step; all its rows are wanted.
    pub fn syms(&self, step: &StepMeta) -> SymEnv {
        let t = step.tokens() as i64;
        SymEnv::new(&[
            (Sym::B, self.batch as i64),
            (Sym::S, self.len as i64),
            (Sym::T, t),
            (Sym::R, t),
        ])
    }

    /// An interpreter for a form of the program, with the values of its inputs in a step.
    ///
    /// # Errors
    /// An input of the form is none that a step has.
    pub fn interp<'w, F: Float>(
        &self,
        form: &Graph,
        step: StepMeta,
        weights: &'w WeightFn<'w, F>,
    ) -> Result<Interp<'w, F>, String> {
        let syms = self.syms(&step);
        let mut interp = Interp::new(syms, weights);
        for node in form.nodes() {
            if let (Op::Input(Input { name, .. }), Type::Tensor(ty)) = (&node.op, &node.ty) {
                let value = self.input(name, ty, &step)?;
                interp.inputs.insert(name.clone(), value);
            }
        }
        interp.step = Some(step);
        Ok(interp)
    }

    fn input<F: Float>(
        &self,
        name: &str,
        ty: &TensorType,
        step: &StepMeta,
    ) -> Result<Value<F>, String> {
        let syms = self.syms(step);
        let shape: Vec<usize> = ty
            .shape
            .iter()
            .map(|d| d.eval(&syms).max(0) as usize)
            .collect();
        let n = shape.iter().product::<usize>();
        let wanted = Some(name) == StepInput::Rows.name().into();
        if wanted || name == StepInput::Positions.name() {
            let of_row = |(i, (_, p)): (usize, (usize, usize))| if wanted { i } else { p } as i64;
            let rows: Vec<i64> = step.rows().enumerate().map(of_row).collect();
            if !matches!(ty.dtype, DType::I32 | DType::I64) || shape != [rows.len()] {
                return Err(format!("input '{name}' is no vector of integers"));
            }
            return Ok(Value::Int(Tensor::new(shape, rows)));
        }
        if let Some(full) = name.strip_prefix(STEP)
            && let Some(ty) = self.input_type(full)
        {
            return self.window(full, ty, step);
        }
        let unit = |i: usize| unit(self.seed, name, i as u64);
        Ok(match ty.dtype {
            DType::Bool => Value::Bool(Tensor::new(shape, (0..n).map(|i| unit(i) > 0.0).collect())),
            DType::I32 | DType::I64 => {
                let below = |i| ((unit(i) + 1.0) / 2.0 * INTEGERS as f64) as i64;
                Value::Int(Tensor::new(shape, (0..n).map(below).collect()))
            }
            _ => {
                let float = |i| F::from_f64((unit(i) * 64.0).floor() / 64.0);
                Value::Float(Tensor::new(shape, (0..n).map(float).collect()))
            }
        })
    }

    /// The type of an input of the program.
    fn input_type(&self, wanted: &str) -> Option<&'a TensorType> {
        self.program.nodes().iter().find_map(|node| match &node.op {
            Op::Input(Input { name, .. }) if name == wanted => node.ty.as_tensor(),
            _ => None,
        })
    }

    /// The rows of a step out of a full-sequence input.
    fn window<F: Float>(
        &self,
        name: &str,
        ty: &TensorType,
        step: &StepMeta,
    ) -> Result<Value<F>, String> {
        let full = self.input::<F>(name, ty, step)?;
        let axis = |sym| ty.shape.iter().position(|d| d.is_sym(sym)).map(|i| i as u8);
        let win: Op = Win {
            batch: axis(Sym::B),
            seq: axis(Sym::S),
        }
        .into();
        let full_ty = Type::Tensor(ty.clone());
        let rows = infer(&win, [&full_ty]).map_err(|e| e.to_string())?;
        let none = |_: &WeightRef| Err("a window reads no weight".to_string());
        let mut state = Interp::new(self.syms(step), &none);
        state.step = Some(step.clone());
        eval_op(&win, [&full], &rows, &mut state).map_err(|e| e.to_string())
    }

    /// The results of a form in one step of all rows, caches left out.
    ///
    /// # Errors
    /// The interpreter refuses it.
    pub fn results(&self, form: &Graph) -> Result<IndexMap<String, Value<f64>>, String> {
        let weights = |w: &WeightRef| Ok(self.weight(w));
        let mut interp = self.interp::<f64>(form, self.whole(), &weights)?;
        let mut out = interp.run(form).map_err(|e| e.to_string())?;
        out.retain(|_, v| !matches!(v, Value::Cache(_)));
        Ok(out)
    }
}

/// A number in `[-1, 1)` from a name and an index.
fn unit(seed: u64, name: &str, index: u64) -> f64 {
    let mut z = (name.bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64 ^ seed, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
        })
        .wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
}

/// Where two programs differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// The result.
    pub output: String,
    /// The element; empty where the values are of different kinds or extents.
    pub index: Vec<usize>,
    /// The element of the program as it was, and of its other form.
    pub values: [String; 2],
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [before, after] = &self.values;
        let (output, index) = (&self.output, &self.index);
        write!(f, "{output}{index:?} is {before} before and {after} after")
    }
}

/// Evaluates a program and another form of it on the same numbers, in f64: the first result that
/// differs by more than `tolerance`, relative to its largest element, or in where it is no number. If
/// the other form is a step program, its results are the windows of the program's.
///
/// # Errors
/// One of them cannot be evaluated.
pub fn difference(
    program: &Graph,
    form: &Graph,
    seed: u64,
    tolerance: f64,
) -> Result<Option<Difference>, String> {
    let trial = Trial::new(program, seed);
    let steps = !is_full_sequence(form) && is_full_sequence(program);
    let reference = match steps {
        true => &windowed(program).map_err(|e| e.to_string())?,
        false => program,
    };
    let before = trial
        .results(reference)
        .map_err(|e| format!("before: {e}"))?;
    let after = trial.results(form).map_err(|e| format!("after: {e}"))?;
    for (output, x) in &before {
        let Some(y) = after.get(output) else {
            return Err(format!("the result {output} is gone"));
        };
        if let Some((index, values)) = differing(x, y, tolerance) {
            return Ok(Some(Difference {
                output: output.clone(),
                index,
                values,
            }));
        }
    }
    Ok(None)
}

/// The first element in which two values differ.
pub fn differing(
    x: &Value<f64>,
    y: &Value<f64>,
    tolerance: f64,
) -> Option<(Vec<usize>, [String; 2])> {
    let shape = x.shape().unwrap_or_default();
    let at = |i: usize, a: &dyn fmt::Debug, b: &dyn fmt::Debug| {
        let mut rest = i;
        let mut index: Vec<usize> = Vec::with_capacity(shape.len());
        for &n in shape.iter().rev() {
            index.insert(0, rest % n);
            rest /= n;
        }
        Some((index, [format!("{a:?}"), format!("{b:?}")]))
    };
    match (x, y) {
        (Value::Float(x), Value::Float(y)) if x.shape == y.shape => {
            let finite = x.data.iter().filter(|v| v.is_finite());
            let scale = finite.fold(1.0_f64, |m, v| m.max(v.abs()));
            let differ = |(a, b): (&f64, &f64)| match (a.is_finite(), b.is_finite()) {
                (true, true) => (a - b).abs() > tolerance * scale,
                _ => a != b && !(a.is_nan() && b.is_nan()),
            };
            let i = x.data.iter().zip(&y.data).position(differ)?;
            at(i, &x.data[i], &y.data[i])
        }
        (Value::Int(x), Value::Int(y)) if x.shape == y.shape => {
            let i = x.data.iter().zip(&y.data).position(|(a, b)| a != b)?;
            at(i, &x.data[i], &y.data[i])
        }
        (Value::Bool(x), Value::Bool(y)) if x.shape == y.shape => {
            let i = x.data.iter().zip(&y.data).position(|(a, b)| a != b)?;
            at(i, &x.data[i], &y.data[i])
        }
        _ => {
            let kind = |v: &Value<f64>| match v {
                Value::Float(t) => format!("a float tensor {:?}", t.shape),
                Value::Int(t) => format!("an integer tensor {:?}", t.shape),
                Value::Bool(t) => format!("a bool tensor {:?}", t.shape),
                Value::Cache(_) => "a cache".to_string(),
                Value::Tuple(_) => "a tuple".to_string(),
            };
            Some((Vec::new(), [kind(x), kind(y)]))
        }
    }
}
