//! Payloads of operations as named attributes, in a fixed order, and back.

use super::lexer::{Fault, Pos, fault};
use crate::op::{Op, ReduceFn};
use crate::spec::{
    AttnSpec, Epilogue, GemmSpec, Mask, PackKind, ProjSpec, Prologue, QkvSpec, Real, RopeSpec,
    SdpaStage, WeightRef, WinSpec,
};
use crate::{DType, TensorType, Type};
use std::fmt;

/// The value of an attribute.
#[derive(Clone, PartialEq, Debug)]
pub enum Attr {
    /// An integer.
    Int(i64),
    /// A real constant.
    Real(Real),
    /// One of a few words.
    Word(String),
    /// A name.
    Text(String),
    /// Integers.
    Ints(Vec<i64>),
    /// Real constants.
    Reals(Vec<Real>),
}

impl fmt::Display for Attr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Attr::Int(v) => write!(f, "{v}"),
            Attr::Real(v) => write!(f, "{v}"),
            Attr::Word(v) => f.write_str(v),
            Attr::Text(v) => f.write_str(&super::print::quote(v)),
            Attr::Ints(v) => list(f, v),
            Attr::Reals(v) => list(f, v),
        }
    }
}

fn list<T: fmt::Display>(f: &mut fmt::Formatter<'_>, items: &[T]) -> fmt::Result {
    f.write_str("[")?;
    for (i, v) in items.iter().enumerate() {
        if i > 0 {
            f.write_str(", ")?;
        }
        write!(f, "{v}")?;
    }
    f.write_str("]")
}

type List = Vec<(&'static str, Attr)>;

/// Collects attributes.
#[derive(Default)]
struct Writer(List);

impl Writer {
    fn int(mut self, name: &'static str, v: impl Into<i64>) -> Writer {
        self.0.push((name, Attr::Int(v.into())));
        self
    }

    fn opt_int(self, name: &'static str, v: Option<impl Into<i64>>) -> Writer {
        match v {
            Some(v) => self.int(name, v),
            None => self,
        }
    }

    fn real(mut self, name: &'static str, v: Real) -> Writer {
        self.0.push((name, Attr::Real(v)));
        self
    }

    fn opt_real(self, name: &'static str, v: Option<Real>) -> Writer {
        match v {
            Some(v) => self.real(name, v),
            None => self,
        }
    }

    fn word(mut self, name: &'static str, v: &str) -> Writer {
        self.0.push((name, Attr::Word(v.to_string())));
        self
    }

    fn flag(self, name: &'static str, v: bool) -> Writer {
        self.word(name, if v { "true" } else { "false" })
    }

    fn text(mut self, name: &'static str, v: &str) -> Writer {
        self.0.push((name, Attr::Text(v.to_string())));
        self
    }

    fn attn(self, s: &AttnSpec) -> Writer {
        self.real("scale", s.scale)
            .opt_real("softcap", s.softcap)
            .flag("causal", s.mask.causal)
            .opt_int("window", s.mask.window)
            .int("groups", s.groups)
            .word("stage", stage_name(s.stage))
    }

    fn heads(self, head_norm: Option<Real>, rope: Option<RopeSpec>) -> Writer {
        self.opt_real("head_norm", head_norm)
            .opt_real("rope", rope.map(|r| r.scaling))
    }
}

fn stage_name(s: SdpaStage) -> &'static str {
    match s {
        SdpaStage::Mask => "mask",
        SdpaStage::Cap => "cap",
        SdpaStage::Scale => "scale",
        SdpaStage::Closed => "closed",
    }
}

/// The attributes of an operation, as the text shows them: whatever of its payload its type does
/// not say.
pub fn attrs(op: &Op) -> Vec<(&'static str, Attr)> {
    let w = Writer::default();
    let w = match op {
        Op::Input { name, .. } => w.text("name", name),
        Op::Weight { weight, .. } => w.text("name", &weight.name),
        Op::Const { value, .. } => w.real("value", *value),
        Op::Table { name, data } => {
            let mut w = w.text("name", name);
            w.0.push(("data", Attr::Reals(data.clone())));
            w
        }
        Op::Cache {
            layer,
            kv_heads,
            head_dim,
        } => w
            .int("layer", *layer)
            .int("kv_heads", *kv_heads)
            .int("head_dim", *head_dim),
        Op::Reduce { axis, keepdim, .. } => w.int("axis", *axis).flag("keepdim", *keepdim),
        Op::Permute(perm) => {
            let mut w = w;
            let perm = perm.iter().map(|&p| i64::from(p)).collect();
            w.0.push(("perm", Attr::Ints(perm)));
            w
        }
        Op::Slice { axis, start, end } => {
            w.int("axis", *axis).int("start", *start).int("end", *end)
        }
        Op::Concat { axis } => w.int("axis", *axis),
        Op::RmsNorm { eps } | Op::AddRms { eps } => w.real("eps", *eps),
        Op::Rope(r) => w.real("scaling", r.scaling),
        Op::RepeatKv { groups } => w.int("groups", *groups),
        Op::Sdpa(s) | Op::Attn(s) | Op::AttnStep(s) => w.attn(s),
        Op::Win(s) => w.opt_int("batch", s.batch).opt_int("seq", s.seq),
        Op::Get(i) => w.int("index", *i),
        Op::Proj(p) => w
            .int("heads", p.heads)
            .int("head_dim", p.head_dim)
            .heads(p.head_norm, p.rope),
        Op::Pack(PackKind::Qkv {
            head_dim,
            interleave,
        }) => w
            .word("kind", "qkv")
            .int("head_dim", *head_dim)
            .flag("interleave", *interleave),
        Op::Pack(PackKind::Head { head_dim }) => w.word("kind", "head").int("head_dim", *head_dim),
        Op::Pack(PackKind::GateUp) => w.word("kind", "gate_up"),
        Op::Gemm(g) => {
            let (name, eps) = match g.prologue {
                Prologue::None => ("none", None),
                Prologue::Rms { eps } => ("rms", Some(eps)),
                Prologue::AddRms { eps } => ("addrms", Some(eps)),
            };
            let epilogue = match g.epilogue {
                Epilogue::None => "none",
                Epilogue::Residual => "residual",
                Epilogue::SwiGlu => "swiglu",
            };
            w.word("prologue", name)
                .opt_real("eps", eps)
                .word("epilogue", epilogue)
        }
        Op::Chain(c) => w.text("expr", &c.to_string()),
        Op::AttnQkv(s) => w
            .int("heads", s.heads)
            .int("kv_heads", s.kv_heads)
            .int("head_dim", s.head_dim)
            .heads(s.head_norm, s.rope)
            .attn(&s.attn),
        Op::Iota { .. }
        | Op::None
        | Op::Cast(_)
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Where
        | Op::Matmul
        | Op::Embedding
        | Op::Reshape(_)
        | Op::Expand(_)
        | Op::Linear
        | Op::Softmax
        | Op::Silu
        | Op::SwiGlu
        | Op::Angles
        | Op::Select
        | Op::Sample => w,
    };
    w.0
}

/// Attributes as they were written, taken one by one.
pub(super) struct Args {
    /// Where the operation's name stands.
    pub(super) at: Pos,
    /// Name, value and place of each attribute.
    pub(super) list: Vec<(String, Attr, Pos)>,
}

impl Args {
    fn opt(&mut self, name: &str) -> Option<(Attr, Pos)> {
        let i = self.list.iter().position(|(n, ..)| n == name)?;
        let (_, v, at) = self.list.remove(i);
        Some((v, at))
    }

    fn need(&mut self, name: &str) -> Result<(Attr, Pos), Fault> {
        self.opt(name)
            .ok_or_else(|| fault(self.at, format!("attribute '{name}'"), "none".to_string()))
    }

    fn int<T: TryFrom<i64>>(&mut self, name: &str) -> Result<T, Fault> {
        let (v, at) = self.need(name)?;
        to_int(&v, at)
    }

    fn opt_int<T: TryFrom<i64>>(&mut self, name: &str) -> Result<Option<T>, Fault> {
        self.opt(name).map(|(v, at)| to_int(&v, at)).transpose()
    }

    fn real(&mut self, name: &str) -> Result<Real, Fault> {
        let (v, at) = self.need(name)?;
        to_real(&v, at)
    }

    fn opt_real(&mut self, name: &str) -> Result<Option<Real>, Fault> {
        self.opt(name).map(|(v, at)| to_real(&v, at)).transpose()
    }

    fn text(&mut self, name: &str) -> Result<String, Fault> {
        match self.need(name)? {
            (Attr::Text(v), _) => Ok(v),
            (v, at) => Err(fault(at, "a quoted name".to_string(), v.to_string())),
        }
    }

    fn word<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> Result<T, Fault> {
        let (v, at) = self.need(name)?;
        let found = match &v {
            Attr::Word(w) => choices.iter().find(|(n, _)| n == w),
            _ => None,
        };
        found.map(|&(_, t)| t).ok_or_else(|| {
            let names: Vec<&str> = choices.iter().map(|c| c.0).collect();
            fault(at, format!("one of {}", names.join(", ")), v.to_string())
        })
    }

    fn flag(&mut self, name: &str) -> Result<bool, Fault> {
        self.word(name, &[("true", true), ("false", false)])
    }

    fn attn(&mut self) -> Result<AttnSpec, Fault> {
        Ok(AttnSpec {
            scale: self.real("scale")?,
            softcap: self.opt_real("softcap")?,
            mask: Mask {
                causal: self.flag("causal")?,
                window: self.opt_int("window")?,
            },
            groups: self.int("groups")?,
            stage: self.word(
                "stage",
                &[
                    SdpaStage::Mask,
                    SdpaStage::Cap,
                    SdpaStage::Scale,
                    SdpaStage::Closed,
                ]
                .map(|s| (stage_name(s), s)),
            )?,
        })
    }

    fn rope(&mut self) -> Result<Option<RopeSpec>, Fault> {
        Ok(self.opt_real("rope")?.map(|scaling| RopeSpec { scaling }))
    }
}

fn to_int<T: TryFrom<i64>>(v: &Attr, at: Pos) -> Result<T, Fault> {
    let int = match v {
        Attr::Int(i) => T::try_from(*i).ok(),
        _ => None,
    };
    int.ok_or_else(|| {
        let bits = 8 * size_of::<T>();
        fault(
            at,
            format!("an integer of {bits} bits in range"),
            v.to_string(),
        )
    })
}

fn to_real(v: &Attr, at: Pos) -> Result<Real, Fault> {
    match v {
        Attr::Real(r) => Ok(*r),
        Attr::Int(i) => Ok(Real::new(*i as f64)),
        _ => Err(fault(at, "a number".to_string(), v.to_string())),
    }
}

/// The operation of a name, its attributes and the written type.
pub(super) fn build(name: &str, mut a: Args, ty: &Type) -> Result<Op, Fault> {
    let a = &mut a;
    let at = a.at;
    let tensor = || {
        ty.as_tensor()
            .ok_or_else(|| fault(at, format!("'{name}' of a tensor type"), "another".into()))
    };
    let op = match name {
        "input" => {
            let TensorType { dtype, shape } = tensor()?.clone();
            Op::Input {
                name: a.text("name")?,
                dtype,
                shape,
            }
        }
        "weight" => {
            let t = tensor()?;
            let shape: Option<Vec<i64>> = t.shape.iter().map(|d| d.known()).collect();
            Op::Weight {
                weight: WeightRef {
                    name: a.text("name")?,
                    shape: shape.ok_or_else(|| {
                        fault(at, "a weight of known extents".into(), "symbols".into())
                    })?,
                },
                dtype: t.dtype,
            }
        }
        "const" => Op::Const {
            value: a.real("value")?,
            dtype: tensor()?.dtype,
        },
        "table" => Op::Table {
            name: a.text("name")?,
            data: match a.need("data")? {
                (Attr::Reals(v), _) => v,
                (Attr::Ints(v), _) => v.iter().map(|&i| Real::new(i as f64)).collect(),
                (v, at) => return Err(fault(at, "a list of numbers".into(), v.to_string())),
            },
        },
        "iota" => match tensor()?.shape.as_slice() {
            &[len] => Op::Iota {
                len,
                dtype: tensor()?.dtype,
            },
            _ => return Err(fault(at, "iota of one axis".into(), "others".into())),
        },
        "cache" => Op::Cache {
            layer: a.int("layer")?,
            kv_heads: a.int("kv_heads")?,
            head_dim: a.int("head_dim")?,
        },
        "cast" => Op::Cast(tensor()?.dtype),
        "reshape" => Op::Reshape(tensor()?.shape.clone()),
        "expand" => Op::Expand(tensor()?.shape.clone()),
        "permute" => match a.need("perm")? {
            (Attr::Ints(v), at) => Op::Permute(
                v.iter()
                    .map(|&p| to_int(&Attr::Int(p), at))
                    .collect::<Result<_, _>>()?,
            ),
            // An empty list has no element type.
            (Attr::Reals(v), _) if v.is_empty() => Op::Permute(Vec::new()),
            (v, at) => return Err(fault(at, "a list of axes".into(), v.to_string())),
        },
        "slice" => Op::Slice {
            axis: a.int("axis")?,
            start: a.int("start")?,
            end: a.int("end")?,
        },
        "concat" => Op::Concat {
            axis: a.int("axis")?,
        },
        "rmsnorm" => Op::RmsNorm {
            eps: a.real("eps")?,
        },
        "addrms" => Op::AddRms {
            eps: a.real("eps")?,
        },
        "rope" => Op::Rope(RopeSpec {
            scaling: a.real("scaling")?,
        }),
        "repeat_kv" => Op::RepeatKv {
            groups: a.int("groups")?,
        },
        "sdpa" => Op::Sdpa(a.attn()?),
        "attn" => Op::Attn(a.attn()?),
        "attn_step" => Op::AttnStep(a.attn()?),
        "win" => Op::Win(WinSpec {
            batch: a.opt_int("batch")?,
            seq: a.opt_int("seq")?,
        }),
        "get" => Op::Get(a.int("index")?),
        "proj" => Op::Proj(ProjSpec {
            heads: a.int("heads")?,
            head_dim: a.int("head_dim")?,
            head_norm: a.opt_real("head_norm")?,
            rope: a.rope()?,
        }),
        "pack" => match a.word("kind", &[("qkv", 0), ("head", 1), ("gate_up", 2)])? {
            0 => Op::Pack(PackKind::Qkv {
                head_dim: a.int("head_dim")?,
                interleave: a.flag("interleave")?,
            }),
            1 => Op::Pack(PackKind::Head {
                head_dim: a.int("head_dim")?,
            }),
            _ => Op::Pack(PackKind::GateUp),
        },
        "gemm" => Op::Gemm(GemmSpec {
            prologue: match a.word("prologue", &[("none", 0), ("rms", 1), ("addrms", 2)])? {
                0 => Prologue::None,
                1 => Prologue::Rms {
                    eps: a.real("eps")?,
                },
                _ => Prologue::AddRms {
                    eps: a.real("eps")?,
                },
            },
            epilogue: a.word(
                "epilogue",
                &[
                    ("none", Epilogue::None),
                    ("residual", Epilogue::Residual),
                    ("swiglu", Epilogue::SwiGlu),
                ],
            )?,
        }),
        "chain" => {
            let text = a.text("expr")?;
            let bad = |reason| fault(at, "a chain of operations".into(), reason);
            Op::Chain(text.parse().map_err(bad)?)
        }
        "attn_qkv" => Op::AttnQkv(QkvSpec {
            heads: a.int("heads")?,
            kv_heads: a.int("kv_heads")?,
            head_dim: a.int("head_dim")?,
            head_norm: a.opt_real("head_norm")?,
            rope: a.rope()?,
            attn: a.attn()?,
        }),
        _ => {
            if let Some(&f) = ReduceFn::ALL.iter().find(|f| f.name() == name) {
                Op::Reduce {
                    f,
                    axis: a.int("axis")?,
                    keepdim: a.flag("keepdim")?,
                }
            } else if let Some(op) = Op::plain(name) {
                op
            } else {
                return Err(fault(at, "an operation".into(), format!("'{name}'")));
            }
        }
    };
    match a.list.first() {
        Some((other, _, at)) => Err(fault(
            *at,
            format!("an attribute of '{name}' that is not given yet"),
            format!("'{other}'"),
        )),
        None => Ok(op),
    }
}

/// The element type of a name, in the IR's short form only.
pub(super) fn dtype(word: &str) -> Option<DType> {
    DType::ALL.into_iter().find(|d| d.name() == word)
}
