//! What a step is given and what it returns, by name in programs.

/// A run-time input of a step.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum StepInput {
    /// `i32[T]`: token ids of the rows.
    Tokens,
    /// `i32[T]`: positions of the rows in their sequences.
    Positions,
    /// `i32[R]`: the rows whose logits are wanted.
    Rows,
}

impl StepInput {
    /// The name of its input in step programs.
    pub fn name(self) -> &'static str {
        match self {
            StepInput::Tokens => "step.tokens",
            StepInput::Positions => "step.positions",
            StepInput::Rows => "step.rows",
        }
    }

    /// The input of a name. Programs over whole sequences spell theirs without `step.`.
    pub fn by_name(name: &str) -> Option<StepInput> {
        match name.strip_prefix("step.").unwrap_or(name) {
            "tokens" => Some(StepInput::Tokens),
            "positions" => Some(StepInput::Positions),
            "rows" => Some(StepInput::Rows),
            _ => None,
        }
    }
}

/// A result of a step.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Output {
    /// `i32[R]`: the next token of each wanted row.
    Next,
    /// `[R, V]`: the logits of each wanted row.
    Logits,
}

impl Output {
    /// Its name among the outputs of a program.
    pub fn name(self) -> &'static str {
        match self {
            Output::Next => "next",
            Output::Logits => "logits",
        }
    }

    /// The result of a name.
    pub fn by_name(name: &str) -> Option<Output> {
        match name {
            "next" => Some(Output::Next),
            "logits" => Some(Output::Logits),
            _ => None,
        }
    }
}
