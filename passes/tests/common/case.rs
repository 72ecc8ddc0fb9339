//! The format of the file tests: commands, a program, and what comes of it below a line `---`.
//!
//! Lines above the program that begin with `//!` are commands, each at most once:
//!
//! - `//! run: NAME, ..`: stages and rules, run in this order on one e-graph, and `chains`;
//! - `//! goal: GOAL`: what the result is chosen by (`size`, `rewritten`, `decode[:BATCH]`,
//!   `prefill[:TOKENS]` on an H100), `rewritten` if absent;
//! - `//! interp`: the program and the result are also evaluated on random inputs and compared;
//! - `//! error: TEXT`: the file does not read, or the passes fail, with this in the message.
//!
//! Any other word is an error, and so is a file that asks for nothing. Lines that begin with `//`
//! are for readers.

use lathe_passes::egraph::cost::{CostPoint, DeviceModel};
use lathe_passes::opt::Goal;

/// One file test.
#[derive(Debug)]
pub struct Case {
    pub passes: Vec<String>,
    pub goal: Goal,
    pub interp: bool,
    pub error: Option<String>,
    /// The text above `---`, with its comments.
    pub program: String,
    pub expected: String,
}

impl Case {
    /// Reads a file.
    ///
    /// # Errors
    /// A command that does not follow the grammar, with its line.
    pub fn read(content: &str) -> Result<Case, String> {
        let (program, expected) = match content.split_once("\n---\n") {
            Some((p, e)) => (format!("{p}\n"), e.to_string()),
            None => (content.to_string(), String::new()),
        };
        let mut case = Case {
            passes: Vec::new(),
            goal: Goal::Rewritten,
            interp: false,
            error: None,
            program: String::new(),
            expected,
        };
        let mut seen: Vec<&str> = Vec::new();
        let mut above = true;
        for (i, line) in program.lines().enumerate() {
            let at = |e: String| format!("line {}: {e}", i + 1);
            above &= line.starts_with("//");
            let Some(command) = line.trim_start().strip_prefix("//!") else {
                continue;
            };
            if !above {
                return Err(at("commands stand above the program".to_string()));
            }
            let word = case.command(command.trim()).map_err(at)?;
            if seen.contains(&word) {
                return Err(at(format!("'{word}' stands twice")));
            }
            seen.push(word);
        }
        if seen.iter().all(|w| !["run", "error"].contains(w)) {
            return Err("neither 'run' nor 'error' is asked for".to_string());
        }
        case.program = program;
        Ok(case)
    }

    /// Takes one command; its word comes back.
    fn command(&mut self, command: &str) -> Result<&'static str, String> {
        let (word, text) = match command.split_once(':') {
            Some((word, text)) => (word.trim_end(), text.trim()),
            None => (command, ""),
        };
        match (word, text) {
            ("interp", "") => {
                self.interp = true;
                Ok("interp")
            }
            ("run" | "goal" | "error", "") => Err(format!("'{word}' needs a text")),
            ("run", names) => {
                self.passes = names.split(',').map(|n| n.trim().to_string()).collect();
                Ok("run")
            }
            ("goal", goal) => {
                self.goal = goal_of(goal)?;
                Ok("goal")
            }
            ("error", text) => {
                self.error = Some(text.to_string());
                Ok("error")
            }
            _ => Err(format!(
                "unknown command '{command}'; known are 'run: NAME, ..', 'goal: GOAL', 'interp' and 'error: TEXT'"
            )),
        }
    }
}

fn goal_of(text: &str) -> Result<Goal, String> {
    let (word, n) = match text.split_once(':') {
        Some((w, n)) => (w, Some(n.parse::<i64>().map_err(|e| e.to_string())?)),
        None => (text, None),
    };
    match (word, n) {
        ("size", None) => Ok(Goal::Size),
        ("rewritten", None) => Ok(Goal::Rewritten),
        ("decode", n) => Ok(Goal::Time(CostPoint::decode(
            n.unwrap_or(1),
            512,
            DeviceModel::H100,
        ))),
        ("prefill", n) => Ok(Goal::Time(CostPoint::prefill(
            n.unwrap_or(2048),
            DeviceModel::H100,
        ))),
        _ => Err(format!("unknown goal '{text}'")),
    }
}
