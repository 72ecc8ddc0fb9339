//! What a program means, by the interpreter in f64, and how far another computation of it may differ.
//!
//! Most results agree to the last few digits. Where they do not, the program itself is asked how
//! much it amplifies: it is evaluated again with a little noise on every value that it computes, as
//! much as the arithmetic in question rounds. A result may differ by a multiple of what the noise does. So
//! programs that divide by almost nothing, or truncate what is almost an integer, accuse nobody.

use crate::rng::Rng;
use lathe_ir::interp::{Float, Interp, StepMeta, Value, eval_op};
use lathe_ir::{BinaryFn, DType, Graph, Node, NodeId, Op, SdpaStage, Sym, WeightRef};
use lathe_passes::egraph::analysis::{Applied, Assumption};
use lathe_passes::trial::Trial;
use std::cell::OnceCell;

/// How a result was computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arithmetic {
    /// In f64, casts between floats being identities: equality over the reals.
    Real,
    /// On a device, in f32.
    Single,
    /// On a device, values in memory being bf16.
    Half,
}

impl Arithmetic {
    /// The difference that is never looked into, relative to the largest element.
    fn negligible(self) -> f64 {
        match self {
            Arithmetic::Real => 1e-10,
            Arithmetic::Single => 1e-5,
            Arithmetic::Half => 0.02,
        }
    }

    /// Relative size of the noise on a value of an element type.
    fn noise(self, dtype: DType) -> f64 {
        match (self, dtype) {
            (Arithmetic::Real, _) => 1e-13,
            (_, DType::BF16) => 1.0 / 256.0,
            (_, DType::F16) => 1.0 / 2048.0,
            _ => 1e-6,
        }
    }

    /// How many times the effect of the noise is allowed.
    fn factor(self) -> f64 {
        match self {
            Arithmetic::Real => 1000.0,
            Arithmetic::Single => 20.0,
            Arithmetic::Half => 6.0,
        }
    }
}

/// Evaluations with noise.
const RUNS: u64 = 6;

/// The results of a program, one number after the other.
pub(crate) type Numbers = Vec<f64>;

/// A program in the arithmetic of devices.
struct Others {
    /// Its results in f32, and in f64 with values rounded to their element types.
    results: Vec<Numbers>,
    /// In f32 it computes something that is no number.
    no_number: bool,
}

/// The meaning of a program in one trial.
pub(crate) struct Oracle<'a> {
    pub(crate) trial: Trial<'a>,
    /// The program, or its windows.
    reference: &'a Graph,
    exact: Numbers,
    poisoned: bool,
    /// Something that it computes is no number.
    no_number: bool,
    /// The largest magnitude of a score of the program.
    scores: f64,
    others: OnceCell<Others>,
}

impl<'a> Oracle<'a> {
    /// # Errors
    /// The interpreter refuses the program, such as for an index that its table does not have.
    pub(crate) fn new(trial: Trial<'a>, reference: &'a Graph) -> Result<Oracle<'a>, String> {
        let (mut poisoned, mut no_number, mut scores) = (false, false, 0.0);
        let exact = run::<f64>(&trial, reference, false, &mut |node, values| {
            poisoned |= is_poison(reference, node, values);
            no_number |= reads_no_number(node, values);
            scores = largest_score(reference, node, values).max(scores);
        })?;
        no_number |= exact.iter().any(|v| v.is_nan());
        Ok(Oracle {
            trial,
            reference,
            exact,
            poisoned,
            no_number,
            scores,
            others: OnceCell::new(),
        })
    }

    /// Whether the program keeps to what the rules took for granted.
    pub(crate) fn allows<'x>(&self, log: impl IntoIterator<Item = &'x Applied>) -> bool {
        let assumed = log.into_iter().filter_map(|a| a.assumes.as_ref());
        self.allows_all(assumed)
    }

    /// As [`Oracle::allows`].
    pub(crate) fn allows_all<'x>(&self, all: impl IntoIterator<Item = &'x Assumption>) -> bool {
        all.into_iter().all(|a| self.scores <= a.scores_below.get())
    }

    /// Whether results are what the program means, as far as this arithmetic can tell.
    ///
    /// # Errors
    /// They are not: where.
    pub(crate) fn judge(&self, found: &[f64], how: Arithmetic) -> Result<(), String> {
        let Some(mut fault) = differing(&self.exact, found, how.negligible(), 0.0) else {
            return Ok(());
        };
        // Kernels promise nothing of what is no number: their maxima pass over it, and comparisons and
        // integers make numbers of it again.
        if how != Arithmetic::Real && (self.no_number || self.others().no_number) {
            return Ok(());
        }
        let numbers = !self.exact.iter().chain(found).all(|v| v.is_finite());
        // What is hidden from an attention may be no number, and then whether it is looked at matters.
        if numbers && self.poisoned {
            return Ok(());
        }
        if how != Arithmetic::Real {
            // As narrow types and f32 have it: they overflow and vanish earlier.
            for other in &self.others().results {
                match differing(other, found, how.negligible(), 0.0) {
                    None => return Ok(()),
                    Some(other) => {
                        fault = std::cmp::min_by(fault, other, |a, b| a.0.total_cmp(&b.0))
                    }
                }
            }
        }
        let Some(noise) = self.noise(how) else {
            return Ok(());
        };
        let allowed = noise * how.factor();
        let centres = std::iter::once(&self.exact).chain(match how {
            Arithmetic::Real => &[],
            _ => &self.others().results[..],
        });
        for centre in centres {
            if differing(centre, found, how.negligible(), allowed).is_none() {
                return Ok(());
            }
        }
        Err(fault.1)
    }

    fn others(&self) -> &Others {
        self.others.get_or_init(|| {
            let mut no_number = false;
            let narrow = run::<f32>(&self.trial, self.reference, true, &mut |node, values| {
                no_number |= reads_no_number(node, values);
            });
            let rounded = run::<f64>(&self.trial, self.reference, true, &mut |_, _| {});
            Others {
                results: [narrow, rounded].into_iter().flatten().collect(),
                no_number,
            }
        })
    }

    /// The largest effect of noise on a result; none where it decides what is a number, or stops the
    /// program.
    fn noise(&self, how: Arithmetic) -> Option<f64> {
        let mut largest = 0.0_f64;
        for seed in 0..RUNS {
            let mut rng = Rng::new(seed ^ 0x6e6f_6973_6500);
            let noisy = noisy(&self.trial, self.reference, how, &mut rng).ok()?;
            for (a, b) in self.exact.iter().zip(&noisy) {
                match (a.is_finite(), b.is_finite()) {
                    (true, true) => largest = largest.max((a - b).abs()),
                    _ if a == b || (a.is_nan() && b.is_nan()) => {}
                    _ => return None,
                }
            }
        }
        Some(largest)
    }
}

/// Whether an operand has an element that is no number.
fn reads_no_number<F: Float>(node: &Node, values: &[Option<Value<F>>]) -> bool {
    let floats = |id: &NodeId| values[id.index()].as_ref()?.as_float();
    let mut tensors = node.inputs.iter().filter_map(floats);
    tensors.any(|t| t.data.iter().any(|v| v.to_f64().is_nan()))
}

/// The largest magnitude among the operands of a node that may be scores, `[..,S,S]` of products.
fn largest_score(graph: &Graph, node: &Node, values: &[Option<Value<f64>>]) -> f64 {
    let is_score = |id: &&NodeId| {
        let made = matches!(
            graph.node(**id).op,
            Op::Matmul(_) | Op::Input(_) | Op::Binary(BinaryFn::Mul | BinaryFn::Div)
        );
        let square = |t: &lathe_ir::TensorType| t.rank() == 4 && t.shape[2] == t.shape[3];
        made && graph.tensor(**id).is_some_and(square)
    };
    let scores = node.inputs.iter().filter(is_score);
    let tensors = scores.filter_map(|id| values[id.index()].as_ref()?.as_float());
    let all = tensors.flat_map(|t| &t.data);
    all.fold(0.0, |m, v| m.max(v.abs()))
}

/// Whether a product reads something on its right that is no number, or a mask is put on scores of the
/// input that are none.
fn is_poison(graph: &Graph, node: &Node, values: &[Option<Value<f64>>]) -> bool {
    let scores = |id: &&NodeId| {
        let of_batch = |t: &lathe_ir::TensorType| t.rank() == 4 && t.shape[0].is_sym(Sym::B);
        graph.tensor(**id).is_some_and(of_batch)
    };
    let suspects: Vec<&NodeId> = match &node.op {
        Op::Matmul(_) => node.inputs.iter().skip(1).collect(),
        Op::Sdpa(s) if s.0.stage != SdpaStage::Closed => node.inputs.iter().collect(),
        Op::Binary(BinaryFn::Add) | Op::Where(_) => node.inputs.iter().filter(scores).collect(),
        _ => Vec::new(),
    };
    let floats = |id: &NodeId| values[id.index()].as_ref()?.as_float();
    let mut tensors = suspects.into_iter().filter_map(floats);
    tensors.any(|t| t.data.iter().any(|v| !v.is_finite()))
}

/// The first element in which numbers differ by more than a share of the largest and an absolute
/// amount: by how much, and how to say it.
fn differing(expected: &[f64], found: &[f64], share: f64, allowed: f64) -> Option<(f64, String)> {
    if expected.len() != found.len() {
        let what = format!("{} numbers instead of {}", found.len(), expected.len());
        return Some((f64::INFINITY, what));
    }
    let finite = expected.iter().filter(|v| v.is_finite());
    let scale = finite.fold(0.0_f64, |m, v| m.max(v.abs()));
    let limit = share * scale + allowed;
    let mut worst: Option<(f64, usize)> = None;
    for (i, (a, b)) in expected.iter().zip(found).enumerate() {
        let d = match (a.is_finite(), b.is_finite()) {
            (true, true) => (a - b).abs(),
            _ if a == b || (a.is_nan() && b.is_nan()) => 0.0,
            _ => f64::INFINITY,
        };
        if d > limit && worst.is_none_or(|w| d > w.0) {
            worst = Some((d, i));
        }
    }
    let (d, i) = worst?;
    let what = format!(
        "number {i} is {:e} and not {:e} (largest {scale:e})",
        found[i], expected[i]
    );
    Some((d, what))
}

/// All results as numbers.
pub(crate) fn numbers<F: Float>(value: &Value<F>, out: &mut Numbers) {
    match value {
        Value::Float(t) => out.extend(t.data.iter().map(|v| v.to_f64())),
        Value::Int(t) => out.extend(t.data.iter().map(|&v| v as f64)),
        Value::Bool(t) => out.extend(t.data.iter().map(|&v| f64::from(u8::from(v)))),
        Value::Cache(_) | Value::Tuple(_) => {}
    }
}

/// What looks on while a program is evaluated: a node, and the values before it.
type See<'s, F> = dyn FnMut(&Node, &[Option<Value<F>>]) + 's;

/// Runs a program on whole sequences; `see` is shown every node with the values before it.
fn run<F: Float>(
    trial: &Trial<'_>,
    graph: &Graph,
    round: bool,
    see: &mut See<'_, F>,
) -> Result<Numbers, String> {
    evaluate(trial, graph, round, see, &mut |_, _| {})
}

fn noisy(
    trial: &Trial<'_>,
    graph: &Graph,
    how: Arithmetic,
    rng: &mut Rng,
) -> Result<Numbers, String> {
    evaluate::<f64>(trial, graph, false, &mut |_, _| {}, &mut |node, value| {
        let Some(ty) = node.ty.as_tensor().filter(|_| !node.op.is_leaf()) else {
            return;
        };
        let moves = matches!(
            node.op,
            Op::Reshape(_) | Op::Permute(_) | Op::Expand(_) | Op::Slice(_) | Op::Concat(_)
        );
        if let (Value::Float(t), false) = (value, moves) {
            for v in &mut t.data {
                *v *= 1.0 + how.noise(ty.dtype) * rng.unit();
            }
        }
    })
}

fn evaluate<F: Float>(
    trial: &Trial<'_>,
    graph: &Graph,
    round: bool,
    see: &mut See<'_, F>,
    change: &mut dyn FnMut(&Node, &mut Value<F>),
) -> Result<Numbers, String> {
    let weights = |w: &WeightRef| Ok(trial.weight(w));
    let mut interp = trial.interp::<F>(graph, trial.whole(), &weights)?;
    interp.round = round;
    let mut values: Vec<Option<Value<F>>> = Vec::with_capacity(graph.nodes().len());
    for node in graph.nodes() {
        see(node, &values);
        let value = |i: &NodeId| values[i.index()].as_ref().expect("operands come first");
        let inputs = node.inputs.map(value);
        let mut value =
            eval_op(&node.op, inputs, &node.ty, &mut interp).map_err(|e| e.to_string())?;
        change(node, &mut value);
        values.push(Some(value));
    }
    let mut out = Vec::new();
    for (_, id) in graph.outputs() {
        numbers(values[id.index()].as_ref().expect("evaluated"), &mut out);
    }
    Ok(out)
}

/// The results of a form of the program on whole sequences.
///
/// # Errors
/// The interpreter refuses it.
pub(crate) fn whole(trial: &Trial<'_>, form: &Graph) -> Result<Numbers, String> {
    run::<f64>(trial, form, false, &mut |_, _| {})
}

/// The steps in which sequences of the trial are run: ragged chunks, or a row at a time.
pub(crate) fn steps(trial: &Trial<'_>, decode: bool, rng: &mut Rng) -> Vec<StepMeta> {
    let mut past = vec![0; trial.batch];
    let mut out = Vec::new();
    while past.iter().any(|&p| p < trial.len) {
        let lens: Vec<usize> = past
            .iter()
            .map(|p| match decode {
                true => 1,
                false => (1 + rng.below(3)).min(trial.len - p),
            })
            .collect();
        out.push(StepMeta::new(&lens, &past));
        for (p, n) in past.iter_mut().zip(&lens) {
            *p += n;
        }
    }
    out
}

/// The logits of all rows of a step program, in the order of whole sequences.
///
/// # Errors
/// The interpreter refuses it.
pub(crate) fn stepped(
    trial: &Trial<'_>,
    form: &Graph,
    steps: &[StepMeta],
) -> Result<Numbers, String> {
    let weights = |w: &WeightRef| Ok(trial.weight(w));
    let mut rows = Rows::new(trial);
    let mut caches = Default::default();
    for step in steps {
        let mut interp: Interp<'_, f64> = trial.interp(form, step.clone(), &weights)?;
        interp.caches = caches;
        let out = interp.run(form).map_err(|e| e.to_string())?;
        caches = interp.caches;
        let logits = out.get("logits").ok_or("the logits are gone")?;
        let mut found = Vec::new();
        numbers(logits, &mut found);
        rows.put(step, &found);
    }
    Ok(rows.0.concat())
}

/// Rows of logits by sequence and position.
pub(crate) struct Rows(Vec<Numbers>, usize);

impl Rows {
    pub(crate) fn new(trial: &Trial<'_>) -> Rows {
        Rows(vec![Vec::new(); trial.batch * trial.len], trial.len)
    }

    /// Puts the rows of a step where they belong.
    pub(crate) fn put(&mut self, step: &StepMeta, found: &[f64]) {
        let width = found.len() / step.tokens().max(1);
        for (i, (b, p)) in step.rows().enumerate() {
            self.0[b * self.1 + p] = found[i * width..(i + 1) * width].to_vec();
        }
    }

    pub(crate) fn numbers(self) -> Numbers {
        self.0.concat()
    }
}
