//! Samples of rules: programs with holes, one file a rule, `samples/<stage>/<rule>.ir`.
//!
//! README.md beside this crate describes the format. The files are part of the binary, so that
//! `lathe passes --explain` can show them.

mod expr;
mod read;

pub use read::SampleError;

use crate::rule::Rule;
use include_dir::{Dir, include_dir};
use lathe_ir::Graph;
use lathe_ir::text::{self, ParseError};

static FILES: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/samples");

/// The samples and near misses of one rule.
#[derive(Clone, Debug)]
pub struct Samples {
    /// Programs in which the rule must match, at least one.
    pub samples: Vec<Template>,
    /// Programs that look alike and must not match, each with its reason.
    pub near_misses: Vec<Template>,
}

/// A program with holes.
#[derive(Clone, Debug)]
pub struct Template {
    /// What the line that opens the program says: the reason of a near miss, or what a sample shows.
    pub title: String,
    /// The file's name, for messages.
    file: String,
    /// The line of the file above the first line of the text.
    line: usize,
    /// The holes, in the order in which they are filled.
    holes: Vec<Hole>,
    text: String,
}

/// A named hole and what can stand in it.
#[derive(Clone, PartialEq, Debug)]
struct Hole {
    name: String,
    /// Texts, which may name holes that were filled before.
    choices: Vec<String>,
    /// The line of the file.
    line: usize,
}

impl Samples {
    /// The samples of a rule.
    ///
    /// # Errors
    /// The rule has no file, or the file does not follow the format.
    pub fn of(rule: &Rule) -> Result<Samples, SampleError> {
        let path = path(rule);
        let file = FILES.get_file(&path).and_then(|f| f.contents_utf8());
        let Some(content) = file else {
            return Err(SampleError::new(&path, 0, "no such file"));
        };
        Samples::parse(&path, content)
    }

    /// A random program in which the rule must match, the same for the same seed on every machine.
    ///
    /// # Errors
    /// As [`Template::graph`].
    pub fn sample(&self, seed: u64) -> Result<Graph, SampleError> {
        let i = Random { state: !seed }.below(self.samples.len());
        self.samples[i].graph(seed)
    }
}

impl Template {
    /// The program with its holes filled at random, the same for the same seed on every machine.
    ///
    /// # Errors
    /// An expression has no value, or the text is not a well-typed program.
    pub fn graph(&self, seed: u64) -> Result<Graph, SampleError> {
        let text = self.fill(seed)?;
        text::parse(&text).map_err(|e| {
            let at = match &e {
                ParseError::Syntax { at, .. } => at.line,
                ParseError::Types(all) => all.first().map_or(0, |m| m.at.line),
            };
            SampleError::new(&self.file, self.line + at, &format!("{e}, in\n{text}"))
        })
    }

    /// The text with its holes filled.
    fn fill(&self, seed: u64) -> Result<String, SampleError> {
        let mut random = Random { state: seed };
        let mut values: Vec<(&str, String)> = Vec::with_capacity(self.holes.len());
        for hole in &self.holes {
            let choice = &hole.choices[random.below(hole.choices.len())];
            let value = expr::substitute(choice, &values)
                .map_err(|e| SampleError::new(&self.file, hole.line, &e))?;
            values.push((&hole.name, value));
        }
        let mut out = String::with_capacity(self.text.len());
        for (i, line) in self.text.lines().enumerate() {
            out += &expr::substitute(line, &values)
                .map_err(|e| SampleError::new(&self.file, self.line + 1 + i, &e))?;
            out.push('\n');
        }
        Ok(out)
    }
}

/// The paths of all files of samples.
pub fn files() -> Vec<String> {
    let files = FILES.dirs().flat_map(Dir::files);
    files.map(|f| f.path().display().to_string()).collect()
}

/// The path of a rule's file below `samples/`.
pub fn path(rule: &Rule) -> String {
    format!("{}/{}.ir", rule.stage.name(), rule.name)
}

/// A seeded source of choices (SplitMix64).
struct Random {
    state: u64,
}

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}
