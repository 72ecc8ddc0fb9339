//! Templates of unknown origin, rendered in a process of their own.
//!
//! A template can be written so that one instruction takes all memory, all time or all stack, and the library that runs
//! it has no hook for these. A process has: its limits end it, and whoever started it says why. The process is the
//! `lathe` program itself, started with one argument, [`ARGUMENT`]; it reads a [`Rendering`] from standard input and
//! writes text or refusal to standard output, both as JSON.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Output, Stdio};

use super::guard::{guarded_apart, one_line};
use super::template::{FUEL, Refusal, Rendering};
use crate::process::Limits;

/// The argument that makes the program a renderer.
pub const ARGUMENT: &str = "render-chat-template";

/// What rendering may take. Real templates need milliseconds and some megabytes.
const LIMITS: Limits = Limits {
    cpu_seconds: 5,
    address_space: 512 << 20,
};
/// Bytes of JSON that an answer may have; a prompt of that length fits no model.
const MAX_ANSWER: u64 = 64 << 20;

/// The program that renders templates in a process of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    program: PathBuf,
}

impl Sandbox {
    /// A program that hands [`ARGUMENT`] to [`serve`].
    pub fn of(program: impl Into<PathBuf>) -> Sandbox {
        Sandbox {
            program: program.into(),
        }
    }

    /// The program that runs now.
    ///
    /// # Errors
    /// The system does not tell which one it is.
    pub fn this_program() -> std::io::Result<Sandbox> {
        std::env::current_exe().map(Sandbox::of)
    }

    /// The text of a template.
    ///
    /// # Errors
    /// As [`Rendering::render_here`]; it takes more than the limits allow; there is no such process.
    pub fn render(&self, rendering: &Rendering) -> Result<String, Refusal> {
        let output = self.run(rendering).map_err(|error| {
            Refusal::new(format!(
                "no process to render it in ({}): {error}",
                self.program.display()
            ))
        })?;
        if output.stdout.len() as u64 > MAX_ANSWER {
            return Err(Refusal::new(format!(
                "its text has more than {MAX_ANSWER} bytes"
            )));
        }
        match serde_json::from_slice(&output.stdout) {
            Ok(answer) if output.status.success() => answer,
            _ => Err(Refusal::new(cause(output.status, &output.stderr))),
        }
    }

    fn run(&self, rendering: &Rendering) -> std::io::Result<Output> {
        let request = serde_json::to_vec(rendering)?;
        let mut child = Command::new(&self.program)
            .arg(ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // A child that ended already says why below.
            let _ = stdin.write_all(&request);
        }
        let mut answer = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(MAX_ANSWER + 1).read_to_end(&mut answer)?;
        }
        let mut output = child.wait_with_output()?;
        output.stdout = answer;
        Ok(output)
    }
}

/// Why the process ended without an answer.
fn cause(status: ExitStatus, stderr: &[u8]) -> String {
    let said = String::from_utf8_lossy(stderr);
    let mib = LIMITS.address_space >> 20;
    #[cfg(unix)]
    {
        use std::os::unix::process::ExitStatusExt;
        if matches!(status.signal(), Some(libc::SIGXCPU | libc::SIGKILL)) {
            return format!("stopped after {} seconds", LIMITS.cpu_seconds);
        }
    }
    if said.contains("memory allocation of") {
        return format!("stopped at {mib} MiB of memory");
    }
    if said.contains("overflowed its stack") {
        return "its values or its text nest too deep".into();
    }
    let said = one_line(said.lines().next().unwrap_or_default());
    format!("its process ended ({status}) {said}")
        .trim_end()
        .to_owned()
}

/// The other side: sets the limits, reads a rendering from standard input and writes the answer to standard output.
///
/// # Errors
/// The streams are not those of [`Sandbox::render`], or the limits cannot be set.
pub fn serve() -> std::io::Result<()> {
    LIMITS.set()?;
    let rendering: Rendering = serde_json::from_reader(std::io::stdin().lock())?;
    let work = || rendering.render_here(FUEL);
    let answer = guarded_apart(work).unwrap_or_else(|reason| Err(Refusal::new(reason)));
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, &answer)?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendering() -> Rendering {
        Rendering {
            source: "x".into(),
            messages: Vec::new(),
            add_generation_prompt: false,
            bos_token: None,
            eos_token: None,
            pad_token: None,
            unk_token: None,
        }
    }

    /// What is no renderer is an error of one line; the real one is tested with the program.
    #[test]
    fn programs_that_do_not_render() {
        for (program, expected) in [
            (
                "/no/such/program",
                "no process to render it in (/no/such/program): ",
            ),
            ("/bin/false", "its process ended (exit status: 1)"),
            ("/bin/true", "its process ended (exit status: 0)"),
        ] {
            let refusal = Sandbox::of(program).render(&rendering()).unwrap_err();
            assert!(refusal.reason.starts_with(expected), "{refusal:?}");
            assert!(!refusal.reason.contains('\n'), "{refusal:?}");
        }
    }
}
