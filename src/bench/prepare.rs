//! Making datasets: synthetic token ids by length distribution, and local text.
//!
//! The distributions are those of trtllm-bench's dataset tool; the bytes are not Python's, but the same seed
//! always gives the same file.
#![cfg_attr(
    not(test),
    // Random words are taken from a block by numbers below its length.
    deny(clippy::unwrap_used, clippy::expect_used)
)]

use std::io::{BufRead, Write};

use lathe_runtime::sampling::philox4x32_10;
use lathe_runtime::text::TextTokenizer;
use rand::{Rng, RngCore};
use rand_distr::{Distribution, Normal};
use serde::Serialize;
use serde_json::Value;

use super::dataset::Request;
use super::lines::{LONGEST, Line, Lines};

/// How lengths are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LengthDistribution {
    /// `max(1, ceil(N(mean, stdev)))`.
    Normal {
        /// Mean in tokens.
        mean: f64,
        /// Standard deviation in tokens.
        stdev: f64,
    },
    /// Each length from `min` to `max` alike.
    Uniform {
        /// Least length.
        min: u32,
        /// Greatest length.
        max: u32,
    },
}

/// Parameters that describe no dataset.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PrepareError {
    /// A normal distribution needs a finite mean and a deviation of 0 or more.
    #[error("mean {mean} with standard deviation {stdev} is no length distribution")]
    Normal {
        /// Mean.
        mean: f64,
        /// Standard deviation.
        stdev: f64,
    },
    /// A uniform distribution needs 1 <= min <= max.
    #[error("lengths from {min} to {max}: expected 1 <= min <= max")]
    Uniform {
        /// Least length.
        min: u32,
        /// Greatest length.
        max: u32,
    },
    /// A range of task ids that ends before it starts.
    #[error("task ids from {0} to {1}: the range is empty")]
    TaskIds(i64, i64),
    /// Fewer than two usable tokens.
    #[error("a vocabulary of {0} tokens is too small")]
    Vocabulary(u32),
}

type Lengths = Box<dyn Iterator<Item = u32>>;

/// Greatest length in tokens: more than any model's context, and no more than memory holds.
pub const MAX_LENGTH: u32 = 1 << 24;

impl LengthDistribution {
    /// Lengths without end, none above [`MAX_LENGTH`]; the same seed gives the same sequence of underlying variates for
    /// every distribution.
    pub fn lengths(&self, seed: u64) -> Result<impl Iterator<Item = u32> + use<>, PrepareError> {
        let mut rng = PhiloxRng::new(seed, Stream::Lengths);
        let lengths: Lengths = match *self {
            Self::Normal { mean, stdev } => {
                let error = PrepareError::Normal { mean, stdev };
                if !mean.is_finite() || !stdev.is_finite() || stdev < 0.0 {
                    return Err(error);
                }
                let normal = Normal::new(mean, stdev).map_err(|_| error)?;
                let next = move || normal.sample(&mut rng).ceil().max(1.0) as u32;
                Box::new(std::iter::repeat_with(next))
            }
            Self::Uniform { min, max } if (1..=max).contains(&min) => {
                Box::new(std::iter::repeat_with(move || rng.random_range(min..=max)))
            }
            Self::Uniform { min, max } => return Err(PrepareError::Uniform { min, max }),
        };
        Ok(lengths.map(|n| n.min(MAX_LENGTH)))
    }

    /// `n` [lengths](Self::lengths).
    pub fn sample(&self, n: usize, seed: u64) -> Result<Vec<u32>, PrepareError> {
        Ok(self.lengths(seed)?.take(n).collect())
    }
}

/// The ids that requests get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskIds {
    /// 0, 1, 2, …
    Index,
    /// All the same.
    Fixed(i64),
    /// Drawn from the first to the second, both included.
    Random(i64, i64),
}

impl TaskIds {
    /// Ids without end.
    pub fn ids(&self, seed: u64) -> Result<impl Iterator<Item = i64> + use<>, PrepareError> {
        let mut rng = PhiloxRng::new(seed, Stream::TaskIds);
        let ids = *self;
        if let Self::Random(low, high) = ids
            && low > high
        {
            return Err(PrepareError::TaskIds(low, high));
        }
        Ok((0..).map(move |index| match ids {
            Self::Index => index,
            Self::Fixed(id) => id,
            Self::Random(low, high) => rng.random_range(low..=high),
        }))
    }

    /// `n` [ids](Self::ids).
    pub fn sample(&self, n: usize, seed: u64) -> Result<Vec<i64>, PrepareError> {
        Ok(self.ids(seed)?.take(n).collect())
    }
}

/// A dataset of random tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct SyntheticDataset {
    /// Requests.
    pub num_requests: usize,
    /// Prompt lengths.
    pub input: LengthDistribution,
    /// Output lengths.
    pub output: LengthDistribution,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Ids that end a sequence; none appears in a prompt.
    pub eos_ids: Vec<u32>,
    /// Ids of the requests.
    pub task_ids: TaskIds,
    /// Seed of everything drawn.
    pub seed: u64,
}

impl SyntheticDataset {
    /// The requests, made one at a time.
    pub fn requests(&self) -> Result<impl Iterator<Item = Request>, PrepareError> {
        if (0..self.vocab_size)
            .filter(|id| !self.eos_ids.contains(id))
            .take(2)
            .count()
            < 2
        {
            return Err(PrepareError::Vocabulary(self.vocab_size));
        }
        let inputs = self.input.lengths(self.seed)?;
        let outputs = self.output.lengths(self.seed)?;
        let task_ids = self.task_ids.ids(self.seed)?;
        let mut rng = PhiloxRng::new(self.seed, Stream::Tokens);
        let lengths = inputs.zip(outputs).zip(task_ids).take(self.num_requests);
        Ok(lengths.map(move |((isl, osl), task_id)| Request {
            task_id,
            input_ids: self.tokens(isl as usize, &mut rng),
            output_tokens: osl,
        }))
    }

    /// `n` random tokens without repetition while the vocabulary lasts, an EOS replaced by the next id.
    fn tokens(&self, n: usize, rng: &mut PhiloxRng) -> Vec<u32> {
        let vocab = self.vocab_size as usize;
        let mut tokens: Vec<u32> = if n < vocab {
            rand::seq::index::sample(rng, vocab, n)
                .into_iter()
                .map(|id| id as u32)
                .collect()
        } else {
            (0..n)
                .map(|_| rng.random_range(0..self.vocab_size))
                .collect()
        };
        for token in &mut tokens {
            while self.eos_ids.contains(token) {
                *token = (*token + 1) % self.vocab_size;
            }
        }
        tokens
    }
}

/// Independent random sequences of one seed. Input and output lengths share one, as in trtllm-bench.
#[derive(Clone, Copy)]
enum Stream {
    Lengths = 0,
    Tokens = 1,
    TaskIds = 2,
}

/// Philox as a sequential generator: words of the blocks with counter `(index, stream)`.
struct PhiloxRng {
    key: [u32; 2],
    stream: u32,
    /// Words handed out so far.
    n_words: u64,
    block: [u32; 4],
}

impl PhiloxRng {
    fn new(seed: u64, stream: Stream) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            stream: stream as u32,
            n_words: 0,
            block: [0; 4],
        }
    }
}

impl RngCore for PhiloxRng {
    fn next_u32(&mut self) -> u32 {
        let (index, word) = (self.n_words / 4, (self.n_words % 4) as usize);
        if word == 0 {
            self.block = philox4x32_10(
                [index as u32, (index >> 32) as u32, self.stream, 0],
                self.key,
            );
        }
        self.n_words += 1;
        self.block[word]
    }

    fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) | u64::from(self.next_u32()) << 32
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(4) {
            chunk.copy_from_slice(&self.next_u32().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Which fields of a local dataset make a request.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TextSource {
    /// Field with the input text; a file of plain text has none, there each line is an input.
    pub input_key: Option<String>,
    /// Field with a text that goes before the input.
    pub prompt_key: Option<String>,
    /// A text that goes before every input.
    pub prompt: Option<String>,
    /// Field with the answer, whose length becomes the output length.
    pub output_key: Option<String>,
    /// Output lengths (mean, standard deviation), in place of the answers' lengths.
    pub output_lengths: Option<(f64, f64)>,
    /// Skip inputs of more tokens than this.
    pub max_input_len: Option<usize>,
    /// Stop after so many requests; `None` takes all.
    pub num_requests: Option<usize>,
}

/// Requests made of text, and how many inputs were too long.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextRequests {
    /// The requests.
    pub requests: Vec<Request>,
    /// Inputs above `max_input_len`.
    pub n_too_long: usize,
}

impl TextSource {
    /// Reads JSON lines (lines of text when `input_key` is none) and tokenises them. An error is one line
    /// that names `path` and the line.
    pub fn read(
        &self,
        path: &str,
        reader: impl BufRead,
        tokenizer: &TextTokenizer,
        task_ids: TaskIds,
        seed: u64,
    ) -> anyhow::Result<TextRequests> {
        let limit = self.num_requests.unwrap_or(usize::MAX);
        let mut made = TextRequests::default();
        let mut lines = Lines::new(reader, LONGEST);
        let mut bytes = Vec::new();
        for number in 1.. {
            if made.requests.len() >= limit {
                break;
            }
            let located = |reason: String| anyhow::anyhow!("{path}:{number}: {reason}");
            let line = match lines.next_into(&mut bytes) {
                Ok(Some(Line::Whole)) => str::from_utf8(&bytes)
                    .map_err(|_| located("not UTF-8".into()))?
                    .trim_end_matches('\r'),
                Ok(Some(Line::TooLong)) => {
                    return Err(located(format!("longer than {LONGEST} bytes")));
                }
                Ok(None) => break,
                Err(error) => return Err(located(error.to_string())),
            };
            if line.trim().is_empty() {
                continue;
            }
            let (input, answer) = self.texts(line).map_err(located)?;
            let input_ids = tokenizer
                .encode(&input, false)
                .map_err(|error| located(error.to_string()))?;
            if input_ids.is_empty() {
                continue;
            }
            if self.max_input_len.is_some_and(|max| input_ids.len() > max) {
                made.n_too_long += 1;
                continue;
            }
            let output_tokens = match answer {
                Some(answer) => {
                    let ids = tokenizer
                        .encode(&answer, false)
                        .map_err(|error| located(error.to_string()))?;
                    u32::try_from(ids.len().max(1))
                        .map_err(|_| located("the answer is too long".into()))?
                }
                None => 1,
            };
            made.requests.push(Request {
                task_id: 0,
                input_ids,
                output_tokens,
            });
        }
        let n = made.requests.len();
        for (request, id) in made.requests.iter_mut().zip(task_ids.sample(n, seed)?) {
            request.task_id = id;
        }
        if let Some((mean, stdev)) = self.output_lengths {
            let lengths = LengthDistribution::Normal { mean, stdev }.sample(n, seed)?;
            for (request, length) in made.requests.iter_mut().zip(lengths) {
                request.output_tokens = length;
            }
        }
        Ok(made)
    }

    /// Input and answer of a line.
    fn texts(&self, line: &str) -> Result<(String, Option<String>), String> {
        let fixed = self.prompt.as_deref();
        let joined = |parts: &[Option<&str>]| {
            parts
                .iter()
                .flatten()
                .copied()
                .collect::<Vec<_>>()
                .join(" ")
        };
        let Some(input_key) = &self.input_key else {
            return Ok((joined(&[fixed, Some(line)]), None));
        };
        let row: Value = serde_json::from_str(line).map_err(|error| {
            format!("not valid JSON (for plain text give a .txt file): {error}")
        })?;
        let field = |key: &str| {
            row.get(key).and_then(Value::as_str).ok_or_else(|| {
                let known = row
                    .as_object()
                    .map(|map| map.keys().cloned().collect::<Vec<_>>().join(", "));
                format!(
                    "no text field {key:?}; the line has {}",
                    known.unwrap_or_else(|| "no fields".into())
                )
            })
        };
        let before = self.prompt_key.as_deref().map(field).transpose()?;
        let answer = match (&self.output_key, self.output_lengths) {
            (Some(key), None) => Some(field(key)?.to_owned()),
            _ => None,
        };
        Ok((joined(&[fixed, before, Some(field(input_key)?)]), answer))
    }
}

#[derive(Serialize)]
struct OutputLine<'a> {
    task_id: i64,
    input_ids: &'a [u32],
    output_tokens: u32,
}

/// Writes requests as JSON lines without spaces, as trtllm-bench's tool does.
pub fn write_jsonl(
    sink: &mut dyn Write,
    requests: impl IntoIterator<Item = Request>,
) -> std::io::Result<()> {
    for Request {
        task_id,
        input_ids,
        output_tokens,
    } in requests
    {
        serde_json::to_writer(
            &mut *sink,
            &OutputLine {
                task_id,
                input_ids: &input_ids,
                output_tokens,
            },
        )?;
        sink.write_all(b"\n")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn synthetic(
        n: usize,
        input: LengthDistribution,
        output: LengthDistribution,
    ) -> SyntheticDataset {
        SyntheticDataset {
            num_requests: n,
            input,
            output,
            vocab_size: 1000,
            eos_ids: vec![2, 3, 999],
            task_ids: TaskIds::Index,
            seed: 420,
        }
    }

    #[test]
    fn normal_lengths_have_their_moments() {
        let lengths = LengthDistribution::Normal {
            mean: 100.0,
            stdev: 10.0,
        }
        .sample(20_000, 1)
        .unwrap();
        let mean = lengths.iter().map(|&n| f64::from(n)).sum::<f64>() / 20_000.0;
        let variance = lengths
            .iter()
            .map(|&n| (f64::from(n) - mean).powi(2))
            .sum::<f64>()
            / 20_000.0;
        // ceil adds one half on average; standard errors are 0.07 and 0.05.
        assert!((mean - 100.5).abs() < 0.35, "{mean}");
        assert!((variance.sqrt() - 10.0).abs() < 0.25, "{variance}");
        assert_eq!(
            LengthDistribution::Normal {
                mean: 128.0,
                stdev: 0.0
            }
            .sample(3, 1)
            .unwrap(),
            [128; 3]
        );
        assert!(
            LengthDistribution::Normal {
                mean: 1.0,
                stdev: 50.0
            }
            .sample(500, 1)
            .unwrap()
            .contains(&1)
        );
    }

    #[test]
    fn uniform_lengths_reach_both_ends() {
        let lengths = LengthDistribution::Uniform { min: 3, max: 6 }
            .sample(4000, 1)
            .unwrap();
        for length in 3..=6 {
            let count = lengths.iter().filter(|&&n| n == length).count();
            assert!((800..1200).contains(&count), "{length}: {count}");
        }
        assert!(lengths.iter().all(|n| (3..=6).contains(n)));
    }

    #[test]
    fn input_and_output_lengths_share_their_variates() {
        let normal = |mean, stdev| LengthDistribution::Normal { mean, stdev };
        let requests: Vec<_> = synthetic(50, normal(100.0, 20.0), normal(100.0, 20.0))
            .requests()
            .unwrap()
            .collect();
        assert!(
            requests
                .iter()
                .all(|request| request.input_ids.len() == request.output_tokens as usize)
        );
    }

    #[test]
    fn wrong_parameters() {
        assert!(
            LengthDistribution::Normal {
                mean: 5.0,
                stdev: -1.0
            }
            .sample(1, 0)
            .is_err()
        );
        assert!(
            LengthDistribution::Uniform { min: 0, max: 4 }
                .sample(1, 0)
                .is_err()
        );
        assert!(
            LengthDistribution::Uniform { min: 5, max: 4 }
                .sample(1, 0)
                .is_err()
        );
        assert!(TaskIds::Random(5, 4).sample(1, 0).is_err());
        let length = LengthDistribution::Uniform { min: 1, max: 1 };
        assert!(
            SyntheticDataset {
                vocab_size: 4,
                ..synthetic(1, length, length)
            }
            .requests()
            .is_ok()
        );
        assert!(
            SyntheticDataset {
                vocab_size: 1,
                ..synthetic(1, length, length)
            }
            .requests()
            .is_err()
        );
    }

    #[test]
    fn longer_than_the_vocabulary() {
        let long = LengthDistribution::Uniform {
            min: 2000,
            max: 2000,
        };
        let request = synthetic(1, long, long).requests().unwrap().next().unwrap();
        assert_eq!(request.input_ids.len(), 2000);
    }

    /// Pins the bytes: a seed must give the same file in every version.
    #[test]
    fn bytes_of_a_seed() {
        let length = LengthDistribution::Normal {
            mean: 5.0,
            stdev: 2.0,
        };
        let mut bytes = Vec::new();
        write_jsonl(&mut bytes, synthetic(3, length, length).requests().unwrap()).unwrap();
        insta::with_settings!({snapshot_path => "../../snapshots/bench", prepend_module_to_snapshot => false}, {
            insta::assert_snapshot!("prepare_dataset_bytes", String::from_utf8(bytes).unwrap());
        });
    }

    proptest! {
        #[test]
        fn prompts_are_distinct_tokens_without_eos(length in 1u32..900, seed: u64) {
            let distribution = LengthDistribution::Uniform { min: length, max: length };
            let dataset = SyntheticDataset { seed, ..synthetic(1, distribution, distribution) };
            let request = dataset.requests().unwrap().next().unwrap();
            prop_assert_eq!(request.input_ids.len(), length as usize);
            prop_assert!(request.input_ids.iter().all(|id| *id < 1000 && !dataset.eos_ids.contains(id)));
            let mut sorted = request.input_ids.clone();
            sorted.sort_unstable();
            sorted.dedup();
            // Only the three replaced EOS ids can repeat others.
            prop_assert!(sorted.len() + 3 >= request.input_ids.len());
            let again = dataset.requests().unwrap().next().unwrap();
            prop_assert_eq!(request, again);
        }
    }
}
