//! Feed-forward networks.

use super::linear::{Part, conv1d, linear, linear_part};
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
fn activation(b: &mut Builder, f: Activation, x: NodeId) -> Built {
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

/// The forms of feed-forward networks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mlp {
    /// `down(act(gate(x))·up(x))`.
    Gated {
        /// Whether the three projections have biases.
        bias: bool,
    },
    /// The same with one tensor `gate_up_proj`: gate rows first (Phi-3).
    Fused,
    /// `second(act(first(x)))`.
    Plain {
        /// The family's names of the two projections.
        names: [&'static str; 2],
        /// Whether they have biases.
        bias: bool,
    },
    /// The same with weights `[K, N]` (GPT-2).
    Conv1d {
        /// The family's names of the two projections.
        names: [&'static str; 2],
    },
}

impl Mlp {
    /// The module `mlp` on x `[B,S,hidden]`.
    pub(crate) fn build(
        self,
        b: &mut Builder,
        x: NodeId,
        [hidden, intermediate]: [u32; 2],
        act: Activation,
    ) -> Built {
        let (up, down) = ([intermediate, hidden], [hidden, intermediate]);
        b.within("mlp", |b| match self {
            Mlp::Gated { bias } => {
                let gate = linear(b, "gate_proj", x, up, bias)?;
                let gate = activation(b, act, gate)?;
                let h = linear(b, "up_proj", x, up, bias)?;
                let h = b.binary(BinaryFn::Mul, gate, h)?;
                linear(b, "down_proj", h, down, bias)
            }
            Mlp::Fused => {
                let mut half = |i: u32| {
                    let part = Part {
                        groups: 1,
                        from: i * intermediate,
                        to: (i + 1) * intermediate,
                    };
                    linear_part(
                        b,
                        "gate_up_proj",
                        x,
                        [2 * intermediate, hidden],
                        false,
                        part,
                    )
                };
                let (gate, h) = (half(0)?, half(1)?);
                let gate = activation(b, act, gate)?;
                let h = b.binary(BinaryFn::Mul, h, gate)?;
                linear(b, "down_proj", h, down, false)
            }
            Mlp::Plain {
                names: [first, second],
                bias,
            } => {
                let h = linear(b, first, x, up, bias)?;
                let h = activation(b, act, h)?;
                linear(b, second, h, down, bias)
            }
            Mlp::Conv1d {
                names: [first, second],
            } => {
                let h = conv1d(b, first, x, [hidden, intermediate])?;
                let h = activation(b, act, h)?;
                conv1d(b, second, h, [intermediate, hidden])
            }
        })
    }
}
