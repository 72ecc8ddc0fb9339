//! Benchmark datasets: JSON lines with `task_id`, `output_tokens` and token ids or a prompt.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::io::BufRead;
use std::path::Path;

use lathe_ir::foreign::{self, Kind};
use lathe_ir::printable;
use lathe_runtime::text::TextTokenizer;
use serde::{Deserialize, Serialize};

use super::dataset_error::MAX_LISTED;
pub use super::dataset_error::{DatasetError, LineProblem};
use super::lines::{self, LONGEST, Lines};
use super::metrics::PercentileStats;

/// One request of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The request's id in the dataset; need not be unique.
    pub task_id: i64,
    /// Prompt tokens.
    pub input_ids: Vec<u32>,
    /// Tokens to generate.
    pub output_tokens: u32,
}

/// The requests of a dataset in file order.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Where it came from, for reports and messages: a file, or `stdin`.
    pub path: String,
    /// The requests.
    pub requests: Vec<Request>,
}

/// How to read a dataset.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReadOptions<'a> {
    /// Read only so many requests; 0 reads all.
    pub num_requests: usize,
    /// Refuse token ids of this value or above.
    pub vocab_size: Option<usize>,
    /// Tokenizer for lines with text in `prompt`.
    pub tokenizer: Option<&'a TextTokenizer>,
}

/// A line as it is written; which fields may go together is checked afterwards.
#[derive(Deserialize)]
struct Line {
    task_id: Option<i64>,
    /// `logits` is the name that an old dataset tool used.
    #[serde(alias = "logits")]
    input_ids: Option<Vec<i64>>,
    prompt: Option<String>,
    output_tokens: Option<i64>,
    lora_request: Option<serde_json::Value>,
    media_paths: Option<serde_json::Value>,
    turns: Option<Vec<String>>,
}

impl Dataset {
    /// Reads a JSONL file, or stdin when `path` is `-`. Reports every bad line.
    pub fn read(path: &Path, options: ReadOptions<'_>) -> Result<Self, DatasetError> {
        let name = path.display().to_string();
        if name == "-" {
            return Self::from_reader("stdin", std::io::stdin().lock(), options);
        }
        let io_error = |source| DatasetError::Io {
            path: name.clone(),
            source,
        };
        let file = foreign::open(path, Kind::Dataset).map_err(io_error)?;
        Self::from_reader(&name, std::io::BufReader::new(file), options)
    }

    /// Reads JSON lines; `path` is only the name used in messages.
    pub fn from_reader(
        path: &str,
        reader: impl BufRead,
        options: ReadOptions<'_>,
    ) -> Result<Self, DatasetError> {
        Self::from_lines(path, reader, options, LONGEST)
    }

    /// Reads lines of at most `max_line` bytes; a longer one ends the reading.
    fn from_lines(
        path: &str,
        reader: impl BufRead,
        options: ReadOptions<'_>,
        max_line: usize,
    ) -> Result<Self, DatasetError> {
        let mut requests = Vec::new();
        let mut problems = Vec::new();
        let mut n_more = 0;
        let mut bytes = Vec::new();
        let mut lines = Lines::new(reader, max_line);
        for line in 1.. {
            let io_error = |source| DatasetError::Io {
                path: path.into(),
                source,
            };
            let Some(found) = lines.next_into(&mut bytes).map_err(io_error)? else {
                break;
            };
            let too_long = found == lines::Line::TooLong;
            if !too_long && bytes.trim_ascii().is_empty() {
                continue;
            }
            let request = if too_long {
                Err(format!("longer than {max_line} bytes"))
            } else {
                parse_line(bytes.trim_ascii(), options)
            };
            match request {
                Ok(request) => requests.push(request),
                Err(_) if problems.len() == MAX_LISTED => n_more += 1,
                Err(reason) => problems.push(LineProblem {
                    line,
                    reason: shortened(&reason),
                }),
            }
            let n_read = requests.len() + problems.len() + n_more;
            if too_long || (options.num_requests > 0 && n_read >= options.num_requests) {
                break;
            }
        }
        if !problems.is_empty() {
            return Err(DatasetError::Lines {
                path: path.into(),
                problems,
                n_more,
            });
        }
        if requests.is_empty() {
            return Err(DatasetError::Empty { path: path.into() });
        }
        Ok(Self {
            path: path.into(),
            requests,
        })
    }

    /// Checks that every request fits into `max_seq_len` tokens, which is the value of `limit`; lists those that
    /// do not.
    pub fn check_lengths(
        &self,
        limit: &'static str,
        max_seq_len: usize,
    ) -> Result<(), DatasetError> {
        let requests: Vec<_> = self
            .requests
            .iter()
            .enumerate()
            .filter(|(_, request)| request.total_tokens() > max_seq_len)
            .map(|(index, request)| {
                (
                    index,
                    request.input_ids.len(),
                    request.output_tokens as usize,
                )
            })
            .collect();
        if requests.is_empty() {
            return Ok(());
        }
        Err(DatasetError::TooLong {
            path: self.path.clone(),
            limit,
            max_seq_len,
            requests,
        })
    }

    /// Length statistics, as the report prints them.
    pub fn stats(&self) -> DatasetStats {
        let of = |length: fn(&Request) -> usize| {
            let lengths: Vec<f64> = self
                .requests
                .iter()
                .map(|request| length(request) as f64)
                .collect();
            PercentileStats::of(&lengths)
        };
        let isl_stats = of(|request| request.input_ids.len());
        let osl_stats = of(|request| request.output_tokens as usize);
        let seq_len_stats = of(Request::total_tokens);
        DatasetStats {
            isl_stats,
            osl_stats,
            seq_len_stats,
            num_requests: self.requests.len(),
            dataset_path: self.path.clone(),
            max_isl: isl_stats.maximum as usize,
            max_osl: osl_stats.maximum as usize,
            max_sequence_length: seq_len_stats.maximum as usize,
            avg_isl: isl_stats.average,
            avg_osl: osl_stats.average,
            avg_sequence_length: seq_len_stats.average,
        }
    }
}

impl Request {
    /// Prompt and generated tokens together.
    pub fn total_tokens(&self) -> usize {
        self.input_ids.len() + self.output_tokens as usize
    }
}

/// Length statistics of a dataset; the keys are trtllm-bench's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DatasetStats {
    /// Prompt tokens.
    pub isl_stats: PercentileStats,
    /// Tokens to generate.
    pub osl_stats: PercentileStats,
    /// Their sum.
    pub seq_len_stats: PercentileStats,
    /// Requests.
    pub num_requests: usize,
    /// The file.
    pub dataset_path: String,
    /// Longest prompt.
    pub max_isl: usize,
    /// Longest output.
    pub max_osl: usize,
    /// Longest sum of both.
    pub max_sequence_length: usize,
    /// Mean prompt length.
    pub avg_isl: f64,
    /// Mean output length.
    pub avg_osl: f64,
    /// Mean of the sum.
    pub avg_sequence_length: f64,
}

fn parse_line(bytes: &[u8], options: ReadOptions<'_>) -> Result<Request, String> {
    let line: Line = serde_json::from_slice(bytes).map_err(|error| json_reason(bytes, error))?;
    let missing: Vec<&str> = [
        ("task_id", line.task_id.is_none()),
        ("output_tokens", line.output_tokens.is_none()),
    ]
    .into_iter()
    .filter_map(|(field, is_missing)| is_missing.then_some(field))
    .collect();
    let (Some(task_id), Some(output_tokens)) = (line.task_id, line.output_tokens) else {
        return Err(format!("{} missing", missing.join(" and ")));
    };
    let is_set = |value: &Option<serde_json::Value>| {
        value.as_ref().is_some_and(|value| {
            !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty())
        })
    };
    if is_set(&line.lora_request) {
        return Err("lora_request is not supported".into());
    }
    if is_set(&line.media_paths) {
        return Err("media_paths is not supported (text only)".into());
    }
    let output_tokens = u32::try_from(output_tokens)
        .ok()
        .filter(|&n| n > 0)
        .ok_or_else(|| format!("output_tokens is {output_tokens}, expected 1 or more"))?;
    let input_ids = match (line.input_ids, line.prompt) {
        (Some(ids), _) => check_ids(&ids, options.vocab_size)?,
        (None, Some(prompt)) => {
            let tokenizer = options.tokenizer.ok_or("prompt is text, but no tokenizer is loaded (the model folder needs tokenizer.json)")?;
            tokenizer
                .encode(&prompt, true)
                .map_err(|error| error.to_string())?
        }
        (None, None) if line.turns.is_some() => {
            return Err("turns (multi-turn requests) is not supported".into());
        }
        (None, None) => return Err("neither input_ids nor prompt is given".into()),
    };
    if input_ids.is_empty() {
        return Err("the prompt has no tokens".into());
    }
    Ok(Request {
        task_id,
        input_ids,
        output_tokens,
    })
}

fn check_ids(ids: &[i64], vocab_size: Option<usize>) -> Result<Vec<u32>, String> {
    let limit = vocab_size.map_or(i64::from(u32::MAX), |size| {
        i64::try_from(size).unwrap_or(i64::MAX)
    });
    let mut numbered = ids.iter().enumerate();
    match numbered.find(|(_, id)| !(0..limit).contains(*id)) {
        Some((at, id)) => Err(match vocab_size {
            Some(size) => {
                format!("token id {id} at index {at} is outside the vocabulary of {size}")
            }
            None => format!("token id {id} at index {at} is no token id"),
        }),
        None => Ok(ids.iter().map(|&id| id as u32).collect()),
    }
}

/// A reason on one line, without the end of a long text of the file in it.
fn shortened(reason: &str) -> String {
    const LONGEST: usize = 300;
    let shown = printable(reason);
    match shown.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &shown[..end]),
        None => shown,
    }
}

/// Why a line is no [`Line`].
fn json_reason(bytes: &[u8], error: serde_json::Error) -> String {
    let value = match serde_json::from_slice(bytes) {
        Ok(serde_json::Value::Object(fields)) => fields,
        Ok(_) => return "expected an object with task_id, input_ids and output_tokens".into(),
        Err(_) => {
            return format!(
                "not valid JSON: {} (column {})",
                reason(&error),
                error.column()
            );
        }
    };
    // Fields of their own say which of them is wrong.
    let wrong = value.into_iter().find_map(|(name, field)| {
        let alone = serde_json::Map::from_iter([(name.clone(), field)]);
        let error = serde_json::from_value::<Line>(alone.into()).err()?;
        Some(format!("{name}: {}", reason(&error)))
    });
    wrong.unwrap_or_else(|| reason(&error))
}

/// What serde_json says, without its line number, which is always 1 here.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str, options: ReadOptions<'_>) -> Result<Dataset, DatasetError> {
        Dataset::from_reader("d.jsonl", text.as_bytes(), options)
    }

    #[test]
    fn fields_and_aliases() {
        let text = "{\"task_id\":4,\"input_ids\":[1,2,3],\"output_tokens\":2}\n\n\
                    {\"task_id\":5,\"logits\":[7],\"output_tokens\":9,\"category\":\"x\",\"lora_request\":null}\r\n";
        let dataset = read(text, ReadOptions::default()).unwrap();
        let expected = [
            Request {
                task_id: 4,
                input_ids: vec![1, 2, 3],
                output_tokens: 2,
            },
            Request {
                task_id: 5,
                input_ids: vec![7],
                output_tokens: 9,
            },
        ];
        assert_eq!(dataset.requests, expected);
        let stats = dataset.stats();
        assert_eq!(
            (stats.max_isl, stats.max_osl, stats.max_sequence_length),
            (3, 9, 10)
        );
        assert_eq!(
            (stats.avg_isl, stats.avg_osl, stats.avg_sequence_length),
            (2.0, 5.5, 7.5)
        );
    }

    #[test]
    fn every_bad_line_is_listed() {
        let text = "{\"task_id\":0,\"input_ids\":[1],\"output_tokens\":1}\n\
                    {\"input_ids\":[1]}\n\
                    {\"task_id\":1,\n\
                    {\"task_id\":1,\"output_tokens\":1}\n\
                    {\"task_id\":1,\"input_ids\":[50],\"output_tokens\":1}\n\
                    {\"task_id\":1,\"input_ids\":[-1],\"output_tokens\":1}\n\
                    {\"task_id\":1,\"prompt\":\"hi\",\"output_tokens\":1}\n\
                    {\"task_id\":1,\"input_ids\":[],\"output_tokens\":1}\n\
                    {\"task_id\":1,\"input_ids\":[1],\"output_tokens\":0}\n\
                    {\"task_id\":1,\"input_ids\":[1],\"output_tokens\":1,\"lora_request\":{\"lora_name\":\"a\"}}\n\
                    {\"task_id\":1,\"input_ids\":\"x\",\"output_tokens\":1}\n";
        let error = read(
            text,
            ReadOptions {
                vocab_size: Some(50),
                ..ReadOptions::default()
            },
        )
        .unwrap_err();
        let expected = "d.jsonl:2: task_id and output_tokens missing
d.jsonl:3: not valid JSON: EOF while parsing an object (column 13)
d.jsonl:4: neither input_ids nor prompt is given
d.jsonl:5: token id 50 at index 0 is outside the vocabulary of 50
d.jsonl:6: token id -1 at index 0 is outside the vocabulary of 50
d.jsonl:7: prompt is text, but no tokenizer is loaded (the model folder needs tokenizer.json)
d.jsonl:8: the prompt has no tokens
d.jsonl:9: output_tokens is 0, expected 1 or more
d.jsonl:10: lora_request is not supported
d.jsonl:11: input_ids: invalid type: string \"x\", expected a sequence";
        // serde_json's wording of the third is its own; the rest is ours.
        let found = error.to_string();
        for (found, expected) in found.lines().zip(expected.lines()) {
            let same_place = found.split(": ").take(2).eq(expected.split(": ").take(2));
            assert!(
                found == expected || (found.starts_with("d.jsonl:3") && same_place),
                "{found}\n{expected}"
            );
        }
        assert_eq!(found.lines().count(), 10);
    }

    #[test]
    fn a_line_that_is_no_object_is_called_so() {
        let error = read("[1]\n", ReadOptions::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "d.jsonl:1: expected an object with task_id, input_ids and output_tokens"
        );
    }

    #[test]
    fn many_bad_lines_are_counted() {
        let error = read(&"x\n".repeat(25), ReadOptions::default())
            .unwrap_err()
            .to_string();
        assert_eq!(error.lines().count(), 11);
        assert!(error.ends_with("d.jsonl: 15 more bad lines"));
    }

    #[test]
    fn num_requests_stops_before_later_lines() {
        let text = "{\"task_id\":0,\"input_ids\":[1],\"output_tokens\":1}\nbad\n";
        let options = ReadOptions {
            num_requests: 1,
            ..ReadOptions::default()
        };
        assert_eq!(read(text, options).unwrap().requests.len(), 1);
    }

    /// One token a letter; the file is written as the model folder's tokenizer.json.
    #[test]
    fn text_prompts_are_tokenised() {
        let folder = tempfile::tempdir().unwrap();
        let byte_level =
            r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}"#;
        let tokenizer = format!(
            r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{byte_level},"post_processor":null,"decoder":{byte_level},
            "model":{{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,
            "end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"vocab":{{"a":0,"b":1}},"merges":[]}}}}"#
        );
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
        let tokenizer = TextTokenizer::load(folder.path()).unwrap();
        let options = ReadOptions {
            tokenizer: Some(&tokenizer),
            ..ReadOptions::default()
        };
        let text = "{\"task_id\":0,\"prompt\":\"abba\",\"output_tokens\":1}";
        assert_eq!(
            read(text, options).unwrap().requests[0].input_ids,
            [0, 1, 1, 0]
        );
    }

    #[test]
    fn requests_that_are_too_long() {
        let text = "{\"task_id\":0,\"input_ids\":[1,2],\"output_tokens\":2}\n{\"task_id\":1,\"input_ids\":[1,2],\"output_tokens\":3}\n";
        let dataset = read(text, ReadOptions::default()).unwrap();
        assert!(dataset.check_lengths("max_seq_len", 5).is_ok());
        let error = dataset
            .check_lengths("max_seq_len", 4)
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "d.jsonl: request 1: 2 input + 3 output tokens are 5, max_seq_len is 4"
        );
    }

    /// Texts of a line neither break the message nor fill the screen.
    #[test]
    fn texts_of_a_line_stay_on_the_line() {
        let fails = |line: &str| {
            let error = read(line, ReadOptions::default()).unwrap_err().to_string();
            assert!(!error.contains(char::is_control), "{error:?}");
            error
        };
        assert_eq!(
            fails(r#"{"task_id":"a\n\u001b[2Jb","input_ids":[1],"output_tokens":1}"#),
            r#"d.jsonl:1: task_id: invalid type: string "a\n\u{1b}[2Jb", expected i64"#
        );
        fails("{\"task_id\":\"a\u{1b}[2J\"");
        let long = format!("{{\"task_id\":\"{}\"}}", "x".repeat(1 << 20));
        assert!(fails(&long).len() < 400);
    }

    #[test]
    fn lines_without_end_are_not_read_to_it() {
        let line = r#"{"task_id":0,"input_ids":[1],"output_tokens":1}"#;
        let first = format!("{line}\n");
        let read = |reader: &mut dyn BufRead, max_line| {
            Dataset::from_lines("d.jsonl", reader, ReadOptions::default(), max_line)
        };
        let whole = read(&mut first.as_bytes(), line.len()).unwrap();
        assert_eq!(whole.requests.len(), 1);
        assert!(read(&mut first.as_bytes(), line.len() - 1).is_err());
        let endless = std::io::Read::chain(first.as_bytes(), std::io::repeat(b' '));
        let error = read(&mut std::io::BufReader::new(endless), 1 << 16).unwrap_err();
        assert_eq!(error.to_string(), "d.jsonl:2: longer than 65536 bytes");
    }

    const VALID: [&str; 5] = [
        r#"{"task_id":0,"input_ids":[1,2,3],"output_tokens":4}"#,
        r#"{"task_id":-7,"logits":[7],"output_tokens":9,"category":"x","lora_request":null}"#,
        r#"{"task_id":9223372036854775807,"input_ids":[4294967294,0],"output_tokens":4294967295}"#,
        r#"{"task_id":1,"prompt":"a\u00e9\n\ud83d\ude00","output_tokens":1,"turns":["a"]}"#,
        r#"{"task_id":1,"input_ids":[1],"output_tokens":1,"media_paths":[],"lora_request":{"a":[1e9]}}"#,
    ];

    /// What takes the place of a byte, or goes before it.
    const PIECES: [&[u8]; 16] = [
        b"",
        b"\"",
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"-",
        b"1e999",
        b"\0",
        b"\x1b",
        b"\xff",
        b"null",
        b"99999999999999999999",
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Valid lines with some of their bytes changed: requests, or one line that names the bad one.
        #[test]
        fn mutated_lines_are_named(
            before in 0usize..3,
            which in 0..VALID.len(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), 0..PIECES.len(), any::<bool>()), 1..6),
            vocab_size in prop::option::of(1usize..100),
        ) {
            let mut line = VALID[which].as_bytes().to_vec();
            for (at, piece, insert) in changes {
                let at = at.index(line.len().max(1)).min(line.len());
                let end = (at + usize::from(!insert)).min(line.len());
                line.splice(at..end, PIECES[piece].iter().copied());
            }
            let intact = r#"{"task_id":0,"input_ids":[0],"output_tokens":4}"#;
            let mut text = format!("{intact}\n").repeat(before).into_bytes();
            text.extend_from_slice(&line);
            let options = ReadOptions { vocab_size, ..ReadOptions::default() };
            match Dataset::from_reader("d.jsonl", &text[..], options) {
                Ok(dataset) => prop_assert_eq!(dataset.requests.len(), before + 1),
                Err(error) => {
                    let error = error.to_string();
                    let start = format!("d.jsonl:{}: ", before + 1);
                    prop_assert!(error.starts_with(&start), "{}", error);
                    prop_assert!(!error.contains(char::is_control), "{:?}", error);
                    prop_assert!(error.chars().count() < 400, "{}", error);
                }
            }
        }
    }

    #[test]
    fn empty_and_absent_files() {
        assert_eq!(
            read("\n", ReadOptions::default()).unwrap_err().to_string(),
            "d.jsonl: no requests in this dataset"
        );
        let error = Dataset::read(Path::new("/no/such.jsonl"), ReadOptions::default()).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("/no/such.jsonl: No such file")
        );
    }
}
