//! Feed-forward networks.

use super::linear::{Part, linear, linear_part};
use crate::import::builder::{Builder, Built};
use crate::import::{HfConfig, ImportError};
use crate::{BinaryFn, NodeId, UnaryFn};

/// Activation functions by their names in `hidden_act`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Activation {
    /// `x·sigmoid(x)`.
    Silu,
    /// `max(x, 0)`.
    Relu,
    /// `x·Φ(x)` with the error function.
    Gelu,
    /// `x·Φ(x)` by its tanh approximation.
    GeluTanh,
}

impl Activation {
    const SUPPORTED: &str = "silu, swish, relu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast";

    /// The activation that `key` names, or `default` if it is absent.
    pub(crate) fn read(
        cfg: &HfConfig,
        key: &str,
        default: Activation,
    ) -> Result<Activation, ImportError> {
        Ok(match cfg.opt_str(key)? {
            None => default,
            Some("silu" | "swish") => Activation::Silu,
            Some("relu") => Activation::Relu,
            Some("gelu") => Activation::Gelu,
            Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Activation::GeluTanh,
            Some(_) => return Err(cfg.unsupported(key, Activation::SUPPORTED)),
        })
    }
}

/// The activation in parts, at the module `act_fn`.
pub(crate) fn activation(b: &mut Builder, f: Activation, x: NodeId) -> Built {
    b.within("act_fn", |b| match f {
        Activation::Silu => {
            let s = b.unary(UnaryFn::Sigmoid, x)?;
            b.binary(BinaryFn::Mul, x, s)
        }
        Activation::Relu => b.unary(UnaryFn::Relu, x),
        Activation::Gelu => {
            let t = b.scalar(BinaryFn::Mul, x, std::f64::consts::FRAC_1_SQRT_2)?;
            let t = b.unary(UnaryFn::Erf, t)?;
            gelu_tail(b, x, t)
        }
        Activation::GeluTanh => {
            let cube = b.scalar(BinaryFn::Pow, x, 3.0)?;
            let cube = b.scalar(BinaryFn::Mul, cube, 0.044_715)?;
            let t = b.binary(BinaryFn::Add, x, cube)?;
            let t = b.scalar(BinaryFn::Mul, t, (2.0 / std::f64::consts::PI).sqrt())?;
            let t = b.unary(UnaryFn::Tanh, t)?;
            gelu_tail(b, x, t)
        }
    })
}

/// `0.5·x·(1 + t)`.
fn gelu_tail(b: &mut Builder, x: NodeId, t: NodeId) -> Built {
    let half = b.scalar(BinaryFn::Mul, x, 0.5)?;
    let t = b.scalar(BinaryFn::Add, t, 1.0)?;
    b.binary(BinaryFn::Mul, half, t)
}

/// `down(act(gate(x))·up(x))` at the module `mlp`.
pub(crate) fn gated_mlp(
    b: &mut Builder,
    x: NodeId,
    [hidden, intermediate]: [u32; 2],
    act: Activation,
    bias: bool,
) -> Built {
    b.within("mlp", |b| {
        let gate = linear(b, "gate_proj", x, [intermediate, hidden], bias)?;
        let gate = activation(b, act, gate)?;
        let up = linear(b, "up_proj", x, [intermediate, hidden], bias)?;
        let h = b.binary(BinaryFn::Mul, gate, up)?;
        linear(b, "down_proj", h, [hidden, intermediate], bias)
    })
}

/// The same with one tensor `gate_up_proj`: gate rows first (Phi-3).
pub(crate) fn fused_gated_mlp(
    b: &mut Builder,
    x: NodeId,
    [hidden, intermediate]: [u32; 2],
    act: Activation,
) -> Built {
    b.within("mlp", |b| {
        let mut half = |i: u32| {
            let part = Part {
                groups: 1,
                from: i * intermediate,
                to: (i + 1) * intermediate,
            };
            let shape = [2 * intermediate, hidden];
            linear_part(b, "gate_up_proj", x, shape, false, part)
        };
        let (gate, up) = (half(0)?, half(1)?);
        let gate = activation(b, act, gate)?;
        let h = b.binary(BinaryFn::Mul, up, gate)?;
        linear(b, "down_proj", h, [hidden, intermediate], false)
    })
}

/// `second(act(first(x)))` at the module `mlp`, its two projections named by the family.
pub(crate) fn plain_mlp(
    b: &mut Builder,
    x: NodeId,
    [first, second]: [&str; 2],
    [hidden, intermediate]: [u32; 2],
    act: Activation,
    bias: bool,
) -> Built {
    b.within("mlp", |b| {
        let h = linear(b, first, x, [intermediate, hidden], bias)?;
        let h = activation(b, act, h)?;
        linear(b, second, h, [hidden, intermediate], bias)
    })
}
