//! Reading the YAML file. Every problem is reported, with file, line and column.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use super::keys::{KEYS, nearest};
use super::locate::{self, Keys};
use super::options::{Given, Options, Source, Switch};
use super::text::{self, ConfigError};
use super::transforms;
use crate::errors::printable;
use serde::de::DeserializeOwned;
use serde_yaml::Value;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

/// Reads a configuration file.
///
/// # Errors
/// It cannot be read, is malformed, or has unknown keys or bad values.
pub fn read(path: &Path) -> Result<Options, ConfigError> {
    let file = path.display().to_string();
    parse(&file, &text::of_file(path)?)
}

/// Reads a YAML file that holds a `T` and nothing else.
///
/// # Errors
/// It cannot be read or is none.
pub fn read_as<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    text::value(&path.display().to_string(), &text::of_file(path)?)
}

/// Reads configuration text; `file` names it in messages.
///
/// # Errors
/// It is malformed, or has unknown keys or bad values.
pub fn parse(file: &str, text: &str) -> Result<Options, ConfigError> {
    let root: Value = text::value(file, text)?;
    let mut reader = Reader {
        file: file.into(),
        text,
        keys: Keys::read(text),
        problems: Vec::new(),
        n_unlisted: 0,
        options: Options::default(),
    };
    match &root {
        // An empty file gives nothing.
        Value::Null => {}
        Value::Mapping(entries) => {
            for (key, value) in entries {
                let key = spelling(key);
                reader.entry(&key, &[&key], value);
            }
        }
        other => reader.problems.push(format!(
            "{file}:1:1: expected a mapping of keys to values, found {}",
            shown(other)
        )),
    }
    if reader.n_unlisted > 0 {
        let more = format!("{file}: {} more problems", reader.n_unlisted);
        reader.problems.push(more);
    }
    if reader.problems.is_empty() {
        Ok(reader.options)
    } else {
        Err(ConfigError::Invalid(reader.problems))
    }
}

/// At most so many problems are printed; the rest is counted. Some cost reading the text again.
const MAX_LISTED: usize = 100;

struct Reader<'a> {
    file: Arc<str>,
    text: &'a str,
    keys: Keys,
    problems: Vec<String>,
    /// Problems above [`MAX_LISTED`].
    n_unlisted: usize,
    options: Options,
}

impl Reader<'_> {
    /// Reads a key; `path` is where it stands (`key` itself, or under `transforms`).
    fn entry(&mut self, key: &str, path: &[&str], v: &Value) {
        let o = std::mem::take(&mut self.options);
        let mut o = o;
        match key {
            "compile_backend" => o.compile_backend = self.word(path, v),
            "runtime" => o.runtime = self.word(path, v),
            "free_mem_ratio" => {
                o.free_mem_ratio = self.checked(path, v, "a number from 0.0 to 1.0", |v| {
                    v.as_f64().filter(|r| (0.0..=1.0).contains(r))
                });
            }
            "skip_loading_weights" => o.skip_loading_weights = self.flag(path, v),
            "cuda_graph_batch_sizes" => {
                let expected = "a list of positive integers, or null";
                o.cuda_graph_batch_sizes = self.checked(path, v, expected, |v| match v {
                    Value::Null => Some(None),
                    Value::Sequence(items) => {
                        let sizes: Option<Vec<u32>> = items.iter().map(count).collect();
                        sizes.filter(|s| !s.is_empty()).map(Some)
                    }
                    _ => None,
                });
            }
            "attn_backend" => o.attn_backend = self.word(path, v),
            "max_batch_size" => o.max_batch_size = self.opt_count(path, v),
            "max_seq_len" => o.max_seq_len = self.opt_count(path, v),
            "max_num_tokens" => o.max_num_tokens = self.opt_count(path, v),
            "attn_page_size" => o.attn_page_size = self.count(path, v),
            "kv_cache_dtype" => o.kv_cache_dtype = self.word(path, v),
            "model_kwargs" => self.model_kwargs(&mut o, v),
            "simple_shard_only" => o.simple_shard_only = self.flag(path, v),
            "enable_chunked_prefill" => o.enable_chunked_prefill = self.flag(path, v),
            "transforms" => {
                self.options = o;
                self.transforms(v);
                return;
            }
            _ => self.unknown("key", key, path, KEYS.iter().map(|k| k.0)),
        }
        self.options = o;
    }

    fn transforms(&mut self, v: &Value) {
        let entries = match v {
            Value::Null => return,
            Value::Mapping(entries) => entries,
            other => {
                let expected = "a mapping such as {fuse: {enabled: false}}";
                self.bad(&["transforms"], other, expected);
                return;
            }
        };
        for (name, v) in entries {
            let name = spelling(name);
            let path = ["transforms", name.as_str()];
            if !transforms::names().contains(&name.as_str()) {
                self.unknown("stage or rule", &name, &path, transforms::names());
                continue;
            }
            let Value::Mapping(parameters) = v else {
                self.bad(&path, v, "a mapping such as {enabled: false}");
                continue;
            };
            for (parameter, v) in parameters {
                let parameter = spelling(parameter);
                self.parameter(&name, &parameter, v);
            }
        }
    }

    fn parameter(&mut self, name: &str, parameter: &str, v: &Value) {
        let path = ["transforms", name, parameter];
        let switches = !transforms::switches(name).is_empty();
        let alias = transforms::PARAMETERS
            .iter()
            .find(|p| p.0 == name && p.1 == parameter);
        if let Some((.., key)) = alias {
            // The top-level key wins over its spelling here, wherever it stands.
            let before = self.options.clone();
            self.entry(key, &path, v);
            self.options.keep_top_level(before);
        } else if name == "extract" && transforms::EXTRACT.contains(&parameter) {
            let given = self.count(&path, v);
            match parameter {
                "decode_batch" => self.options.decode_batch = given,
                "decode_context" => self.options.decode_context = given,
                _ => self.options.prefill_tokens = given,
            }
        } else if name == "autotune" && transforms::AUTOTUNE.contains(&parameter) {
            let given = self.flag(&path, v);
            match parameter {
                "enabled" => self.options.autotune = given,
                _ => self.options.cublaslt = given,
            }
        } else if parameter == "enabled" && switches {
            if let Some(given) = self.flag(&path, v) {
                self.options.switches.push(Given {
                    value: Switch {
                        name: name.to_string(),
                        enabled: given.value,
                    },
                    source: given.source,
                });
            }
        } else {
            let mut known = transforms::parameters(name);
            if switches {
                known.push("enabled");
            }
            self.unknown(&format!("parameter of {name}"), parameter, &path, known);
        }
    }

    fn model_kwargs(&mut self, o: &mut Options, v: &Value) {
        match v {
            Value::Null => {}
            Value::Mapping(entries) => {
                for (key, value) in entries {
                    let key = spelling(key);
                    let path = ["model_kwargs", key.as_str()];
                    let json = |v: &Value| serde_json::to_value(v).ok();
                    if let Some(g) = self.checked(&path, value, "a value that JSON has", json) {
                        o.model_kwargs.insert(key, g);
                    }
                }
            }
            other => self.bad(
                &["model_kwargs"],
                other,
                "a mapping of config.json keys, such as {num_hidden_layers: 2}",
            ),
        }
    }

    fn word<T: FromStr<Err = String>>(&mut self, path: &[&str], v: &Value) -> Option<Given<T>> {
        let parsed = v.as_str().map_or_else(
            || Err(T::from_str("").err().unwrap_or_default()),
            T::from_str,
        );
        match parsed {
            Ok(value) => Some(self.given(path, value)),
            Err(expected) => {
                self.bad(path, v, expected.trim_start_matches("expected "));
                None
            }
        }
    }

    fn flag(&mut self, path: &[&str], v: &Value) -> Option<Given<bool>> {
        self.checked(path, v, "true or false", Value::as_bool)
    }

    fn count(&mut self, path: &[&str], v: &Value) -> Option<Given<u32>> {
        self.checked(path, v, "a positive integer", count)
    }

    fn opt_count(&mut self, path: &[&str], v: &Value) -> Option<Given<Option<u32>>> {
        self.checked(path, v, "a positive integer, or null", |v| match v {
            Value::Null => Some(None),
            v => count(v).map(Some),
        })
    }

    fn checked<T>(
        &mut self,
        path: &[&str],
        v: &Value,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Option<Given<T>> {
        match read(v) {
            Some(value) => Some(self.given(path, value)),
            None => {
                self.bad(path, v, expected);
                None
            }
        }
    }

    fn given<T>(&self, path: &[&str], value: T) -> Given<T> {
        Given {
            value,
            source: Source::Yaml {
                file: self.file.clone(),
                line: self.keys.key(path).map_or(0, |p| p.line),
            },
        }
    }

    /// Whether one more problem is printed; otherwise it is counted.
    fn may_list(&mut self) -> bool {
        let fits = self.problems.len() < MAX_LISTED;
        self.n_unlisted += usize::from(!fits);
        fits
    }

    fn bad(&mut self, path: &[&str], found: &Value, expected: &str) {
        if !self.may_list() {
            return;
        }
        let at = locate::value(self.text, path).unwrap_or_default();
        self.problems.push(printable(&format!(
            "{}:{at}: {} is {}, expected {expected}",
            self.file,
            path.join("."),
            shown(found)
        )));
    }

    fn unknown<'k>(
        &mut self,
        what: &str,
        word: &str,
        path: &[&str],
        known: impl IntoIterator<Item = &'k str> + Clone,
    ) {
        if !self.may_list() {
            return;
        }
        let at = self.keys.key(path).unwrap_or_default();
        let hint = match nearest(word, known.clone()) {
            Some(k) => format!("did you mean '{k}'?"),
            None => {
                let known: Vec<&str> = known.into_iter().collect();
                format!("known: {}", known.join(", "))
            }
        };
        self.problems.push(printable(&format!(
            "{}:{at}: unknown {what} '{word}'; {hint}",
            self.file
        )));
    }
}

impl Options {
    /// After a parameter of a transform was read as another spelling of a top-level key: what
    /// the top level gave stays.
    fn keep_top_level(&mut self, before: Options) {
        macro_rules! keep {
            ($($field:ident),*) => {
                $(if before.$field.is_some() { self.$field = before.$field; })*
            };
        }
        keep!(
            compile_backend,
            cuda_graph_batch_sizes,
            attn_backend,
            free_mem_ratio,
            simple_shard_only
        );
    }
}

fn count(v: &Value) -> Option<u32> {
    v.as_u64()
        .and_then(|n| u32::try_from(n).ok())
        .filter(|&n| n > 0)
}

/// A key as text.
fn spelling(key: &Value) -> String {
    match key {
        Value::String(s) => s.clone(),
        other => shown(other),
    }
}

/// A value in a message, on one line and not too long.
fn shown(v: &Value) -> String {
    let text = match v {
        Value::String(s) => format!("'{s}'"),
        v => serde_json::to_string(v).unwrap_or_else(|_| "a value with a tag".to_string()),
    };
    if text.chars().count() > 60 {
        let head: String = text.chars().take(57).collect();
        format!("{head}...")
    } else {
        text
    }
}
