//! Programs in text form that nobody would write: the file tests' programs with other numbers, or with
//! damage. They are refused, or the passes do with them what they do; nothing panics.

mod common;

use common::case::Case;
use lathe_ir::text;
use lathe_passes::egraph::cost::{CostPoint, DeviceModel};
use lathe_passes::opt::{Goal, run};
use proptest::prelude::*;
use proptest::sample::Index;
use std::path::PathBuf;

/// Numbers at the bounds of what the text form takes, and some around those of real programs.
const NUMBERS: [&str; 16] = [
    "0",
    "1",
    "2",
    "3",
    "7",
    "8",
    "16",
    "17",
    "64",
    "255",
    "256",
    "65536",
    "2147483647",
    "4294967295",
    "4294967296",
    "1099511627776",
];
const PIECES: [&str; 18] = [
    "", "9", "-", "[", "]", "(", ")", "{", "}", "\"", "\\", "//", "%", "*", "S", "1e999", ",", "\n",
];

fn programs() -> Vec<(Vec<String>, String)> {
    let read = |path: PathBuf| {
        let content = std::fs::read_to_string(path).unwrap();
        let mut case = Case::read(&content).unwrap();
        if case.passes.is_empty() {
            case.passes.push("recognize".to_string());
        }
        (case.passes, case.program)
    };
    common::programs().into_iter().map(read).collect()
}

/// Reads the program and runs the passes on it under each goal.
fn opt(passes: &[String], program: &str) {
    let graph = match text::parse(program) {
        Ok(graph) => graph,
        Err(error) => {
            // One line each.
            let shown = error.to_string();
            assert!(
                shown
                    .lines()
                    .all(|l| l.contains(": ") && !l.contains(char::is_control)),
                "{shown:?}"
            );
            return;
        }
    };
    let _ = lathe_ir::verify(&graph);
    let passes: Vec<&str> = passes.iter().map(String::as_str).collect();
    let device = DeviceModel::H100;
    for goal in [
        Goal::Rewritten,
        Goal::Time(CostPoint::decode(64, 1000, device.clone())),
        Goal::Time(CostPoint::prefill(2048, device)),
    ] {
        if let Ok(report) = run(&graph, &passes, &goal) {
            // Extents may have grown past what a text may write.
            let _ = text::parse(&text::print(&report.graph));
        }
    }
}

/// The numbers of a text that stand for themselves, each once.
fn numbers(program: &str) -> Vec<&str> {
    let inside = |c: char| c.is_alphanumeric() || "%._\"".contains(c);
    let mut all: Vec<&str> = program
        .split(|c| !inside(c))
        .filter(|word| !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit()))
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// The program with every occurrence of one number as another, so that types still fit.
fn with_number(program: &str, old: &str, new: &str) -> String {
    let mut out = String::new();
    let mut word = String::new();
    for c in program.chars().chain([' ']) {
        if c.is_alphanumeric() || "%._\"".contains(c) {
            word.push(c);
            continue;
        }
        out += if word == old { new } else { &word };
        word.clear();
        out.push(c);
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn other_numbers_do_not_panic(
        which: Index,
        changes in prop::collection::vec((any::<Index>(), any::<Index>()), 1..4),
    ) {
        let all = programs();
        let (passes, mut program) = all[which.index(all.len())].clone();
        for (old, new) in changes {
            let known = numbers(&program);
            if known.is_empty() {
                break;
            }
            program = with_number(&program, known[old.index(known.len())], NUMBERS[new.index(NUMBERS.len())]);
        }
        opt(&passes, &program);
    }

    #[test]
    fn damaged_programs_do_not_panic(
        which: Index,
        edits in prop::collection::vec((any::<Index>(), 0..PIECES.len() + 1, any::<char>()), 1..4),
    ) {
        let all = programs();
        let (passes, program) = &all[which.index(all.len())];
        let mut text: Vec<char> = program.chars().collect();
        for (at, what, c) in edits {
            let i = at.index(text.len());
            match PIECES.get(what) {
                Some(&"") => { text.remove(i); }
                Some(piece) => { text.splice(i..i, piece.chars()); }
                None => text[i] = c,
            }
        }
        opt(passes, &text.into_iter().collect::<String>());
    }
}
