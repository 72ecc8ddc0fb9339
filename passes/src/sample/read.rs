//! Reads a file of samples.

use super::expr::{is_name, names};
use super::{Hole, Samples, Template};
use thiserror::Error;

/// A file of samples does not follow the format, or a program in it is none.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("{file}:{line}: {message}")]
pub struct SampleError {
    /// The path of the file below `samples/`.
    pub file: String,
    /// The line, from 1; 0 for the whole file.
    pub line: usize,
    /// What is wrong.
    pub message: String,
}

impl SampleError {
    pub(super) fn new(file: &str, line: usize, message: &str) -> SampleError {
        SampleError {
            file: file.to_string(),
            line,
            message: message.to_string(),
        }
    }
}

impl Samples {
    /// Reads the samples of a rule; `file` is for messages.
    ///
    /// # Errors
    /// The first line that does not follow the format, a hole that is not declared or not used, or
    /// no sample at all.
    pub fn parse(file: &str, content: &str) -> Result<Samples, SampleError> {
        let mut reader = Reader::new(file);
        for (i, line) in content.lines().enumerate() {
            reader.line(i + 1, line)?;
        }
        reader.finish()
    }
}

struct Reader<'a> {
    file: &'a str,
    /// Holes declared above the first program.
    shared: Vec<Hole>,
    /// The names of those that some program uses.
    used: Vec<String>,
    /// The program that is being read, and whether it is a near miss.
    open: Option<(Template, bool)>,
    done: Samples,
}

impl<'a> Reader<'a> {
    fn new(file: &'a str) -> Reader<'a> {
        Reader {
            file,
            shared: Vec::new(),
            used: Vec::new(),
            open: None,
            done: Samples {
                samples: Vec::new(),
                near_misses: Vec::new(),
            },
        }
    }

    fn fail<T>(&self, line: usize, message: &str) -> Result<T, SampleError> {
        Err(SampleError::new(self.file, line, message))
    }

    fn line(&mut self, at: usize, line: &str) -> Result<(), SampleError> {
        if let Some(rest) = line.strip_prefix("---") {
            return self.open(at, rest);
        }
        if let Some(rest) = line.strip_prefix("//!") {
            let holes = self.holes(at, rest.trim())?;
            match &mut self.open {
                None => self.shared.extend(holes),
                Some((t, _)) if t.text.is_empty() => {
                    t.holes.extend(holes);
                    t.line = at;
                }
                Some(_) => return self.fail(at, "holes are declared above the program"),
            }
            return Ok(());
        }
        match &mut self.open {
            Some((t, _)) => {
                t.text += line;
                t.text.push('\n');
                Ok(())
            }
            None if line.is_empty() || line.starts_with("//") => Ok(()),
            None => self.fail(at, "expected '--- sample' above the first program"),
        }
    }

    /// The line that opens a program: `--- sample`, `--- sample: TITLE`, `--- near miss: REASON`.
    fn open(&mut self, at: usize, rest: &str) -> Result<(), SampleError> {
        self.close()?;
        let (kind, title) = match rest.split_once(':') {
            Some((kind, title)) => (kind.trim(), title.trim()),
            None => (rest.trim(), ""),
        };
        let near_miss = match (kind, title) {
            ("sample", _) => false,
            ("near miss", "") => return self.fail(at, "a near miss without a reason"),
            ("near miss", _) => true,
            _ => return self.fail(at, "expected '--- sample' or '--- near miss: REASON'"),
        };
        let template = Template {
            title: title.to_string(),
            file: self.file.to_string(),
            line: at,
            holes: self.shared.clone(),
            text: String::new(),
        };
        self.open = Some((template, near_miss));
        Ok(())
    }

    /// The holes of a line `let NAME, .. = CHOICE | ..`.
    fn holes(&self, at: usize, command: &str) -> Result<Vec<Hole>, SampleError> {
        let Some(rest) = command.strip_prefix("let ") else {
            let word = command.split_whitespace().next().unwrap_or("");
            return self.fail(at, &format!("unknown word '{word}'; known is 'let'"));
        };
        let Some((left, right)) = rest.split_once(" = ") else {
            return self.fail(at, "expected 'let NAME, .. = CHOICE | ..'");
        };
        let choices: Vec<String> = right.split(" | ").map(|c| c.trim().to_string()).collect();
        if choices.iter().any(String::is_empty) {
            return self.fail(at, "an empty choice");
        }
        let mut holes = Vec::new();
        for name in left.split(',').map(str::trim) {
            if !is_name(name) {
                return self.fail(at, &format!("'{name}' is no name of a hole"));
            }
            holes.push(Hole {
                name: name.to_string(),
                choices: choices.clone(),
                line: at,
            });
        }
        Ok(holes)
    }

    /// Ends the program that is being read.
    fn close(&mut self) -> Result<(), SampleError> {
        let Some((mut template, near_miss)) = self.open.take() else {
            return Ok(());
        };
        // From the last hole to the first: what stands in a used hole is used.
        let mut used: Vec<String> = names(&template.text)
            .iter()
            .map(|n| n.to_string())
            .collect();
        let mut kept = Vec::new();
        for (i, hole) in std::mem::take(&mut template.holes)
            .into_iter()
            .enumerate()
            .rev()
        {
            if used.contains(&hole.name) {
                // What stands further up under this name is hidden by it.
                used.retain(|n| *n != hole.name);
                used.extend(
                    hole.choices
                        .iter()
                        .flat_map(|c| names(c))
                        .map(str::to_string),
                );
                if i < self.shared.len() {
                    self.used.push(hole.name.clone());
                }
                kept.push(hole);
            } else if i >= self.shared.len() {
                return self.fail(hole.line, &format!("no program uses '{}'", hole.name));
            }
        }
        kept.reverse();
        template.holes = kept;
        let list = if near_miss {
            &mut self.done.near_misses
        } else {
            &mut self.done.samples
        };
        list.push(template);
        Ok(())
    }

    fn finish(mut self) -> Result<Samples, SampleError> {
        self.close()?;
        if self.done.samples.is_empty() {
            return self.fail(0, "no sample");
        }
        if let Some(hole) = self.shared.iter().find(|h| !self.used.contains(&h.name)) {
            return self.fail(hole.line, &format!("no program uses '{}'", hole.name));
        }
        Ok(self.done)
    }
}
