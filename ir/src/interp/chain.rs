//! Chains, statement by statement. Inside a kernel nothing is rounded; results are, by the caller.

use super::eval::{Call, Eval};
use super::leaves::numbers;
use super::{Float, Value, elementwise, linalg, rows};
use crate::chain::{Chain, ChainArg, ChainOp};
use crate::operands::Operands;

impl Eval for Chain {
    fn eval<F: Float>(
        &self,
        x: &Operands<&Value<F>>,
        _: &mut Call<'_, '_, F>,
    ) -> Result<Value<F>, String> {
        let inputs: Vec<&Value<F>> = x.iter().copied().collect();
        let mut values: Vec<Value<F>> = Vec::with_capacity(self.statements.len());
        for s in &self.statements {
            let mut operands = Vec::with_capacity(s.args.len());
            for a in &s.args {
                let value = match *a {
                    ChainArg::Operand(i) => inputs.get(usize::from(i)).map(|&v| v.clone()),
                    ChainArg::Value(i) => values.get(usize::from(i)).cloned(),
                    ChainArg::Const { value, dtype } => {
                        Some(numbers(&[value.get()], Vec::new(), dtype))
                    }
                };
                operands.push(value.ok_or("a statement reads what is not there")?);
            }
            values.push(statement(&s.op, &operands)?);
        }
        let result = |&r: &u8| values.get(usize::from(r)).cloned().ok_or("no such result");
        match &self.results[..] {
            [r] => Ok(result(r)?),
            many => Ok(Value::Tuple(
                many.iter().map(result).collect::<Result<_, _>>()?,
            )),
        }
    }
}

fn statement<F: Float>(op: &ChainOp, x: &[Value<F>]) -> Result<Value<F>, String> {
    match (op, x) {
        (ChainOp::Cast(to), [x]) => elementwise::cast(x, *to),
        (ChainOp::Unary(f), [x]) => elementwise::unary(*f, x),
        (ChainOp::Binary(f), [a, b]) => elementwise::binary(*f, a, b),
        (ChainOp::Silu, [x]) => Ok(Value::Float(x.float()?.map(elementwise::silu))),
        (ChainOp::SwiGlu, [gate, up]) => elementwise::swiglu(gate.float()?, up.float()?),
        (ChainOp::Softmax, [x]) => rows::softmax(x.float()?).map(Value::Float),
        (ChainOp::RmsNorm { eps }, [x, gamma]) => {
            rows::rmsnorm(x.float()?, gamma.float()?, *eps, None).map(Value::Float)
        }
        (ChainOp::Reduce { f, axis }, [x]) => linalg::reduce(*f, *axis, true, x.float()?),
        (op, x) => Err(format!("{} does not take {} operands", op.name(), x.len())),
    }
}
