//! The order of loads, waits and matrix products that the kernels' speed and correctness rest on, and
//! that the compiler may change without a word:
//!
//! - Under programmatic dependent launch a kernel may read weights before it waits for its
//!   predecessor (`ACQBULK`) and must read everything else behind it. The compiler moves loads that it
//!   knows to be of constant memory across the wait, in both directions.
//! - In attention the exponentials of one block overlap the product P·V of the block before: they stand
//!   between the wait for Q·K (one group left) and the wait for P·V (none left).
//! - The matrix products of a k-step run while the next is issued: one group may be left.

use super::sass::Instruction;

/// What can be checked of a kernel.
pub(crate) const CHECKS: [&str; 6] = [
    "waits",
    "early weights",
    "late activations",
    "early keys",
    "overlapped softmax",
    "overlapped products",
];

/// What was checked and what is wrong.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) made: Vec<&'static str>,
    pub(crate) violations: Vec<String>,
}

impl Outcome {
    fn check(&mut self, name: &'static str, holds: bool, otherwise: impl Into<String>) {
        self.made.push(name);
        if !holds {
            self.violations.push(otherwise.into());
        }
    }
}

/// Loads from global memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Load {
    /// Into registers, so many bytes a thread.
    Registers(usize),
    /// Into shared memory by threads.
    Shared,
    /// Into shared memory by the copy engine.
    Bulk,
}

fn load(i: &Instruction) -> Option<Load> {
    let mut parts = i.op.split('.');
    match parts.next()? {
        "LDG" => {
            let width = parts.find_map(|p| match p {
                "128" => Some(16),
                "64" => Some(8),
                "U16" | "S16" => Some(2),
                "U8" | "S8" => Some(1),
                _ => None,
            });
            Some(Load::Registers(width.unwrap_or(4)))
        }
        "LDGSTS" => Some(Load::Shared),
        // Shared from global; the other direction stores.
        "UBLKCP" if i.op.contains(".S.G") => Some(Load::Bulk),
        "UTMALDG" => Some(Load::Bulk),
        _ => None,
    }
}

/// Checks the kernel `name` with source `code`.
pub(crate) fn check(name: &str, code: &str, instructions: &[Instruction]) -> Outcome {
    let mut out = Outcome::default();
    // The first definition holds: those behind it are defaults.
    let defined = |name: &str, value| define(code, name) == Some(value);
    let waits: Vec<usize> = positions(instructions, |i| i.op == "ACQBULK");
    if !defined("LATHE_PDL", 1) {
        out.check(
            "waits",
            waits.is_empty(),
            "it waits without being launched early",
        );
    } else if waits.is_empty() {
        out.check("waits", false, "no wait for the predecessor");
    } else {
        out.check("waits", true, "");
        early_and_late(&mut out, name, &defined, instructions, &waits);
    }
    if name.starts_with("attn_prefill") {
        let keys = define(code, "BN").unwrap_or(128);
        softmax(&mut out, instructions, keys / 2);
    }
    if name.starts_with("gemm") || name.starts_with("skinny") {
        let overlaps = positions(instructions, |i| leaves(i) == Some(1));
        let reason = "every product waits for the one before";
        out.check("overlapped products", !overlaps.is_empty(), reason);
    }
    out
}

/// What may and must stand before the wait, and what behind it.
fn early_and_late(
    out: &mut Outcome,
    name: &str,
    defined: &dyn Fn(&str, usize) -> bool,
    instructions: &[Instruction],
    waits: &[usize],
) {
    let (before, behind) = instructions.split_at(waits[0]);
    let count = |part: &[Instruction], which: &dyn Fn(Load) -> bool| {
        part.iter().filter_map(load).filter(|l| which(*l)).count()
    };
    let registers: &dyn Fn(Load) -> bool = &|l| matches!(l, Load::Registers(_));
    let wide: &dyn Fn(Load) -> bool = &|l| matches!(l, Load::Registers(16));
    let any: &dyn Fn(Load) -> bool = &|_| true;
    let early = count(before, registers);
    if name.starts_with("gemv") || name.starts_with("norm") {
        let gemv = name.starts_with("gemv");
        if gemv {
            let weights = count(before, &|l| l == Load::Bulk) + count(before, wide);
            out.check(
                "early weights",
                weights > 0,
                "the weight loads were sunk below the wait",
            );
        }
        let gamma = !defined("LATHE_NO_GAMMA", 1);
        if gamma && (!gemv || !defined("LATHE_PRO", 0)) {
            // The norm's weight and the row have as many vectors.
            let (gamma, rows) = (count(before, wide), count(behind, wide));
            out.check(
                "early weights",
                gamma > 0,
                "the norm's weight was sunk below the wait",
            );
            let reason = format!("{gamma} vectors are read before the wait, {rows} behind it");
            out.check("late activations", gamma <= rows, reason);
        } else {
            let reason = format!("{early} activation loads were hoisted above the wait");
            out.check("late activations", early == 0, reason);
        }
    } else if name.starts_with("gemm") || name.starts_with("skinny") {
        // The loading warp and the others wait each for themselves.
        let bulk = |part: &[Instruction]| count(part, &|l| l == Load::Bulk);
        let mut ends = waits.to_vec();
        ends.push(instructions.len());
        let mut start = 0;
        let per_part: Vec<usize> = ends
            .iter()
            .map(|&end| {
                let n = bulk(&instructions[start..end]);
                start = end;
                n
            })
            .collect();
        let around = per_part.windows(2).any(|w| w[0] > 0 && w[1] > 0);
        out.check(
            "early weights",
            around,
            "the weight loads were sunk below the wait",
        );
        let reason = format!("{early} loads were hoisted above the wait");
        out.check("late activations", early == 0, reason);
    } else if name.starts_with("attn_decode") && defined("LATHE_PREFETCH", 1) {
        let keys = count(before, &|l| l == Load::Shared);
        out.check(
            "early keys",
            keys > 0,
            "the cached keys were sunk below the wait",
        );
        let other = count(before, &|l| matches!(l, Load::Registers(n) if n != 4));
        let reason = format!("{other} loads of activations were hoisted above the wait");
        out.check("late activations", other == 0, reason);
    } else {
        let early = count(before, any);
        let reason = format!("{early} loads were hoisted above the wait");
        out.check("late activations", early == 0, reason);
    }
}

/// Between every wait that leaves one group and the next that leaves none stand the exponentials of a
/// block: `elements` a thread.
fn softmax(out: &mut Outcome, instructions: &[Instruction], elements: usize) {
    let starts = positions(instructions, |i| leaves(i) == Some(1));
    out.check(
        "overlapped softmax",
        starts.len() >= 2,
        "no block overlaps another",
    );
    for start in starts {
        let rest = &instructions[start + 1..];
        let end = rest
            .iter()
            .position(|i| leaves(i).is_some())
            .unwrap_or(rest.len());
        let exponentials = rest[..end]
            .iter()
            .filter(|i| i.op.starts_with("MUFU.EX2"))
            .count();
        let reason = format!(
            "{exponentials} of {elements} exponentials of a block stand before the wait for P·V"
        );
        out.check("overlapped softmax", exponentials >= elements, reason);
    }
}

/// How many groups of matrix products a wait leaves in flight: `WARPGROUP.DEPBAR.LE gsb0, 0x1`.
fn leaves(i: &Instruction) -> Option<usize> {
    let rest =
        i.op.starts_with("WARPGROUP.DEPBAR")
            .then_some(&i.operands)?;
    let (_, count) = rest.rsplit_once("0x")?;
    usize::from_str_radix(count.trim(), 16).ok()
}

fn positions(instructions: &[Instruction], which: impl Fn(&Instruction) -> bool) -> Vec<usize> {
    let all = instructions.iter().enumerate();
    all.filter(|(_, i)| which(i)).map(|(at, _)| at).collect()
}

/// The number that a macro stands for.
fn define(code: &str, name: &str) -> Option<usize> {
    let prefix = format!("#define {name} ");
    code.lines()
        .find_map(|l| l.strip_prefix(&prefix)?.trim().parse().ok())
}
