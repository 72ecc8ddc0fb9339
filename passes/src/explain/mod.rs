//! What became of each imported value: which operation of a step program stands for it, which
//! rules led there, what else was possible and at what cost, and which rule nearly matched where
//! an operation stayed as it was.
//!
//! Everything here is plain data, so that dumps and `explain` need no e-graph. A value is named by
//! a number; equal numbers in different stages are equal values.

mod nearest;
mod tell;

pub(crate) use nearest::RuleSearch;
pub(crate) use tell::{History, Told};

use crate::egraph::analysis::Assumption;
use crate::rule::Stage;
use lathe_ir::{Both, NodeId};
use std::collections::BTreeMap;

/// The number of a value: its e-class when all stages have run.
pub type ValueNo = usize;

/// One form of a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Form {
    /// Name of the operation.
    pub op: &'static str,
    /// Its attributes as in the text form, e.g. `{axis=1}`; empty without.
    pub attrs: String,
    /// Its operands.
    pub operands: Vec<ValueNo>,
    /// Its own cost where the program is chosen, in picoseconds; `None` if nothing executes it there.
    pub own: Option<u64>,
    /// What the whole template would cost with this form and all else as it is.
    pub total: Option<u64>,
    /// The rules that gave the value a form of this operation; none if it was imported.
    pub rules: Vec<&'static str>,
    /// Whether the program has it.
    pub chosen: bool,
}

/// A value that a step program computes.
#[derive(Clone, Debug, PartialEq)]
pub struct ValueStory {
    /// Its type, as in the text form.
    pub ty: String,
    /// Its forms, the chosen one first, then by cost.
    pub forms: Vec<Form>,
}

/// A rule that was applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The rule.
    pub rule: &'static str,
    /// Its stage.
    pub stage: Stage,
    /// The value that gained a form.
    pub value: ValueNo,
    /// The operation of the new form.
    pub op: &'static str,
    /// What it rests on beside the program.
    pub assumes: Option<Assumption>,
}

/// A rule that nearly matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nearest {
    /// The rule.
    pub rule: &'static str,
    /// Operations of its pattern that were found, of how many.
    pub matched: (usize, usize),
    /// Where it failed: what the pattern wants and what is there instead, or that its condition
    /// does not hold.
    pub reason: String,
}

/// How one operation of a step program came about.
#[derive(Clone, Debug, PartialEq)]
pub struct OpStory {
    /// The operation's node in the template's program.
    pub node: NodeId,
    /// The values that it stands for: its own, and those that it makes unnecessary.
    pub values: Vec<ValueNo>,
    /// The imported nodes among them.
    pub imported: Vec<NodeId>,
    /// The rules on the way, in the order in which they applied.
    pub steps: Vec<Step>,
    /// For an operation that no rule lowered: the rule that came nearest.
    pub nearest: Option<Nearest>,
}

/// The history of one template.
#[derive(Clone, Debug, PartialEq)]
pub struct Story {
    /// The value of each imported node.
    pub imported: Vec<ValueNo>,
    /// The value of each node of the best terms after each stage; empty where there is none. Those
    /// of the general program begin with the stages of step programs.
    pub stages: Both<Vec<Vec<ValueNo>>>,
    /// The decode program.
    pub decode: ProgramStory,
    /// The general program, if there is one.
    pub general: Option<ProgramStory>,
}

/// How one program of a template came about.
#[derive(Clone, Debug, PartialEq)]
pub struct ProgramStory {
    /// The value of each node of the program.
    pub nodes: Vec<ValueNo>,
    /// Every value that the program computes.
    pub values: BTreeMap<ValueNo, ValueStory>,
    /// Every operation of the program that computes something, in order.
    pub ops: Vec<OpStory>,
}
