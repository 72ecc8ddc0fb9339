//! tokenizer.json and the special tokens around it.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::path::Path;

use lathe_ir::foreign::{self, Kind};
use serde_json::Value;
use tokenizers::Tokenizer;

use super::guard::{guarded, one_line};
use super::{TextError, read_json, shorten};

/// Special tokens of a checkpoint, as text (for chat templates) and as ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Text of the beginning-of-sequence token.
    pub bos_token: Option<String>,
    /// Text of the end-of-sequence token.
    pub eos_token: Option<String>,
    /// Text of the padding token.
    pub pad_token: Option<String>,
    /// Text of the unknown token.
    pub unk_token: Option<String>,
    /// Id of the beginning-of-sequence token.
    pub bos_id: Option<u32>,
    /// Every id that ends a generation, ascending: those of generation_config.json and config.json and
    /// the id of `eos_token`.
    pub eos_ids: Vec<u32>,
}

/// The tokenizer of a checkpoint folder.
#[derive(Debug)]
pub struct TextTokenizer {
    inner: Tokenizer,
    special: SpecialTokens,
    add_bos: bool,
}

impl TextTokenizer {
    /// Reads tokenizer.json and, where present, tokenizer_config.json, special_tokens_map.json,
    /// generation_config.json and config.json.
    ///
    /// Truncation and padding that tokenizer.json may ask for are switched off, as transformers does.
    pub fn load(folder: &Path) -> Result<Self, TextError> {
        let path = folder.join("tokenizer.json");
        let bytes = match foreign::read(&path, Kind::Tokenizer) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(TextError::NoTokenizer {
                    folder: folder.to_path_buf(),
                });
            }
            Err(source) => return Err(TextError::Io { path, source }),
        };
        let read = || {
            // `from_bytes` would compile the reader of every kind of tokenizer into this crate, too.
            let mut inner: Tokenizer = std::str::from_utf8(&bytes)?.parse()?;
            inner.with_padding(None);
            inner.with_truncation(None)?;
            Ok(inner)
        };
        let inner: Tokenizer =
            call(read).map_err(|reason| TextError::Tokenizer { path, reason })?;

        let config = read_json(folder, "tokenizer_config.json")?;
        let map = read_json(folder, "special_tokens_map.json")?;
        let text = |key| token_text(config.as_ref(), key).or_else(|| token_text(map.as_ref(), key));
        let mut special = SpecialTokens {
            bos_token: text("bos_token"),
            eos_token: text("eos_token"),
            pad_token: text("pad_token"),
            unk_token: text("unk_token"),
            bos_id: None,
            eos_ids: eos_token_ids(folder)?,
        };
        special.bos_id = special
            .bos_token
            .as_deref()
            .and_then(|token| inner.token_to_id(token));
        if let Some(id) = special
            .eos_token
            .as_deref()
            .and_then(|token| inner.token_to_id(token))
        {
            special.eos_ids.push(id);
        }
        special.eos_ids.sort_unstable();
        special.eos_ids.dedup();
        let add_bos = config
            .as_ref()
            .and_then(|config| config.get("add_bos_token")?.as_bool())
            .unwrap_or(false);
        Ok(Self {
            inner,
            special,
            add_bos,
        })
    }

    /// The special tokens.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// Number of token ids, added tokens included (the model's embedding may be padded beyond it).
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Token ids of `text`. With `add_special` the post-processor adds what the checkpoint asks for (a
    /// BOS in most families); give `false` for text that a chat template made.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encode = || self.inner.encode_fast(text, add_special);
        let encoding = call(encode).map_err(TextError::Encode)?;
        let mut ids = encoding.get_ids().to_vec();
        // Some folders ask for a BOS only in tokenizer_config.json.
        if let Some(bos) = self.special.bos_id
            && add_special
            && self.add_bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Text of the token ids; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        call(|| self.inner.decode(ids, skip_special)).map_err(TextError::Decode)
    }

    /// A decoder that turns a growing token sequence into text piece by piece.
    pub fn stream(&self, skip_special: bool) -> StreamDecoder<'_> {
        StreamDecoder {
            tokenizer: self,
            skip_special,
            ids: Vec::new(),
            context: 0,
            emitted: 0,
        }
    }
}

/// A call of the library, which panics on some files that it could refuse (a bad `precompiled_charsmap`, a template
/// with a special token that it does not define).
fn call<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match guarded(work)? {
        Ok(value) => Ok(value),
        Err(error) => Err(one_line(&error.to_string())),
    }
}

/// Turns a growing token sequence into text, never splitting a character that spans several tokens.
///
/// Decoders treat the first token specially (leading space) and a character may need up to four byte
/// tokens. So a piece is the difference between the decoded window `ids[context..]` with and without its
/// new tokens, and it is held back while the text ends in an incomplete character.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a TextTokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    /// Start of the window: tokens before `emitted` that give the new ones their context.
    context: usize,
    /// Tokens whose text has been returned.
    emitted: usize,
}

impl StreamDecoder<'_> {
    /// Tokens that are held back at most; a character needs no more than four, so a longer run of
    /// undecodable bytes is not going to become one.
    const MAX_HELD: usize = 8;

    /// Appends a token; returns the text that it completes (empty while a character is incomplete).
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        self.ids.push(id);
        let held = self.ids.len() - self.emitted;
        self.advance(held > Self::MAX_HELD)
    }

    /// The text still held back, when the sequence ends.
    pub fn finish(&mut self) -> Result<String, TextError> {
        self.advance(true)
    }

    fn advance(&mut self, force: bool) -> Result<String, TextError> {
        let window = self.ids.get(self.context..).unwrap_or_default();
        let known = window.len().min(self.emitted - self.context);
        let (old, _) = window.split_at(known);
        let before = self.tokenizer.decode(old, self.skip_special)?;
        let after = self.tokenizer.decode(window, self.skip_special)?;
        if after.len() <= before.len() || (!force && after.ends_with('\u{fffd}')) {
            return Ok(String::new());
        }
        let common = before
            .bytes()
            .zip(after.bytes())
            .take_while(|(a, b)| a == b)
            .count();
        let start = (0..=common)
            .rev()
            .find(|&at| after.is_char_boundary(at))
            .unwrap_or(0);
        self.context = self.emitted;
        self.emitted = self.ids.len();
        Ok(after.get(start..).unwrap_or_default().to_string())
    }
}

/// The ids that end a generation according to generation_config.json and config.json (a number, a list or
/// null in each), ascending. Empty when neither names one.
pub fn eos_token_ids(folder: &Path) -> Result<Vec<u32>, TextError> {
    const FIELD: &str = "eos_token_id";
    let mut ids = Vec::new();
    for name in ["generation_config.json", "config.json"] {
        let Some(config) = read_json(folder, name)? else {
            continue;
        };
        let nested = config.get("text_config").and_then(|text| text.get(FIELD));
        let Some(value) = config.get(FIELD).or(nested) else {
            continue;
        };
        let values = match value {
            Value::Null => &[],
            Value::Array(values) => values.as_slice(),
            single => std::slice::from_ref(single),
        };
        for value in values {
            let id = value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| TextError::Field {
                    path: folder.join(name),
                    field: FIELD,
                    found: shorten(value),
                    expected: "a token id or a list of token ids",
                })?;
            ids.push(id);
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// A special token's text: a string, or an object with `content` (the serialised AddedToken).
fn token_text(file: Option<&Value>, key: &str) -> Option<String> {
    let value = file?.get(key)?;
    value
        .as_str()
        .or_else(|| value.get("content")?.as_str())
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::test_folder::TestFolder;
    use proptest::prelude::*;
    use proptest::sample::Index;
    use serde_json::json;

    /// Values for any place of a file.
    fn odd_values() -> Vec<Value> {
        vec![
            Value::Null,
            json!(true),
            json!(-1),
            json!(u64::MAX),
            json!(1e300),
            json!(""),
            json!("\u{1b}[2J\n"),
            json!("("),
            json!([]),
            json!([[]]),
            json!({}),
            json!({"type": "Precompiled", "precompiled_charsmap": "AAA="}),
            json!({"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
            json!({"type": "Strip", "content": "", "start": 9, "stop": 9}),
            json!({"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}),
            json!({"type": "WordPiece", "unk_token": "?", "vocab": {"a": 4294967295u32}}),
        ]
    }

    /// Puts `new` at the `at`-th place of a value, its own place being the 0th; how many places there are.
    fn put(value: &mut Value, at: usize, new: &Value) -> usize {
        if at == 0 {
            *value = new.clone();
            return 1;
        }
        let mut seen = 1;
        let inner: Vec<&mut Value> = match value {
            Value::Array(items) => items.iter_mut().collect(),
            Value::Object(map) => map.values_mut().collect(),
            _ => Vec::new(),
        };
        for value in inner {
            // Places that come before are passed by.
            seen += put(value, at.wrapping_sub(seen), new);
        }
        seen
    }

    #[test]
    fn special_tokens_and_several_eos_ids() {
        let folder = TestFolder::byte_level();
        folder.write("generation_config.json", r#"{"eos_token_id": [5, 1]}"#);
        folder.write("config.json", r#"{"eos_token_id": 1}"#);
        let tokenizer = TextTokenizer::load(folder.path()).unwrap();
        assert_eq!(tokenizer.special().eos_token.as_deref(), Some("<|end|>"));
        assert_eq!(tokenizer.special().eos_ids, [1, 5]);
        assert_eq!(tokenizer.special().bos_id, Some(0));
        assert_eq!(tokenizer.vocab_size(), 258);
        assert_eq!(
            tokenizer
                .decode(&tokenizer.encode("a<|end|>b", true).unwrap(), true)
                .unwrap(),
            "ab"
        );
    }

    /// Where the library panics, `load` and `encode` have an error of one line.
    #[test]
    fn files_that_the_library_panics_on() {
        let folder = TestFolder::byte_level();
        let text = std::fs::read_to_string(folder.path().join("tokenizer.json")).unwrap();
        let intact: Value = serde_json::from_str(&text).unwrap();
        let mut file = intact.clone();
        file["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAA="});
        folder.write("tokenizer.json", &file.to_string());
        let error = TextTokenizer::load(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains("tokenizer.json: not a tokenizer: ") && !error.contains('\n'),
            "{error}"
        );
        let mut file = intact;
        let token = |id| json!({"SpecialToken": {"id": id, "type_id": 0}});
        file["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [token("<absent>"), {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {},
        });
        folder.write("tokenizer.json", &file.to_string());
        let refused = TextTokenizer::load(folder.path()).and_then(|t| t.encode("a", true));
        let error = refused.unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn bad_eos_is_named() {
        let folder = TestFolder::byte_level();
        folder.write("config.json", r#"{"eos_token_id": "two"}"#);
        let error = TextTokenizer::load(folder.path()).unwrap_err().to_string();
        assert!(error.ends_with(
            r#"config.json: eos_token_id is "two", expected a token id or a list of token ids"#
        ));
    }

    #[test]
    fn missing_and_broken_tokenizer() {
        let folder = TestFolder::empty();
        assert!(
            TextTokenizer::load(folder.path())
                .unwrap_err()
                .to_string()
                .contains("no tokenizer.json")
        );
        folder.write("tokenizer.json", "{ \"model\": 3");
        let error = TextTokenizer::load(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains("not a tokenizer") && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn add_bos_from_tokenizer_config() {
        let folder = TestFolder::byte_level();
        folder.write(
            "tokenizer_config.json",
            r#"{"bos_token": {"content": "<|begin|>"}, "add_bos_token": true}"#,
        );
        let tokenizer = TextTokenizer::load(folder.path()).unwrap();
        assert_eq!(tokenizer.encode("x", true).unwrap()[0], 0);
        assert_ne!(tokenizer.encode("x", false).unwrap()[0], 0);
    }

    #[test]
    fn a_character_of_four_tokens_comes_out_whole() {
        let folder = TestFolder::byte_level();
        let tokenizer = TextTokenizer::load(folder.path()).unwrap();
        let ids = tokenizer.encode("a😀b", false).unwrap();
        assert_eq!(ids.len(), 6);
        let mut stream = tokenizer.stream(true);
        let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(pieces, ["a", "", "", "", "😀", "b"]);
        assert_eq!(stream.finish().unwrap(), "");
    }

    #[test]
    fn an_unfinished_character_is_flushed_at_the_end() {
        let folder = TestFolder::byte_level();
        let tokenizer = TextTokenizer::load(folder.path()).unwrap();
        let ids = tokenizer.encode("é", false).unwrap();
        let mut stream = tokenizer.stream(true);
        assert_eq!(stream.push(ids[0]).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Any value anywhere in the file: it is refused in one line, or tokenises, or refuses the text.
        #[test]
        fn damaged_files_do_not_panic(
            changes in prop::collection::vec((any::<Index>(), any::<Index>()), 1..3),
        ) {
            let folder = TestFolder::byte_level();
            let text = std::fs::read_to_string(folder.path().join("tokenizer.json")).unwrap();
            let mut file: Value = serde_json::from_str(&text).unwrap();
            // 256 bytes of vocabulary would take most of the changes.
            if let Some(vocab) = file["model"]["vocab"].as_object_mut() {
                vocab.retain(|token, _| "<|begin|><|end|>abc".contains(token.as_str()));
            }
            for (at, value) in changes {
                let places = put(&mut file.clone(), usize::MAX, &Value::Null);
                let values = odd_values();
                put(&mut file, at.index(places), &values[value.index(values.len())]);
            }
            folder.write("tokenizer.json", &file.to_string());
            let outcome = TextTokenizer::load(folder.path()).and_then(|tokenizer| {
                let ids = tokenizer.encode("a b<|end|>\u{e9}", true)?;
                tokenizer.decode(&ids, true)?;
                tokenizer.decode(&[0, u32::MAX], false)
            });
            if let Err(error) = outcome {
                let error = error.to_string();
                prop_assert!(!error.contains(char::is_control), "{:?}", error);
            }
        }
    }

    proptest! {
        #[test]
        fn streamed_text_is_the_decoded_text(text in "[ -~é€😀\n]{0,40}") {
            let folder = TestFolder::byte_level();
            let tokenizer = TextTokenizer::load(folder.path()).unwrap();
            let ids = tokenizer.encode(&text, false).unwrap();
            let mut stream = tokenizer.stream(true);
            let mut streamed = String::new();
            for &id in &ids {
                streamed += &stream.push(id).unwrap();
            }
            streamed += &stream.finish().unwrap();
            prop_assert_eq!(&streamed, &tokenizer.decode(&ids, true).unwrap());
            prop_assert_eq!(streamed, text);
        }
    }
}
