//! Chat templates: the Jinja text of a checkpoint, rendered as transformers renders it.
//!
//! transformers runs templates in Jinja2's sandbox with `trim_blocks` and `lstrip_blocks`, loop controls,
//! a `tojson` that does not escape HTML, `raise_exception` and `strftime_now`. minijinja gives the
//! language, its pycompat module Python's methods on strings, lists and dictionaries. Fuel bounds the
//! work, so that no template can run for ever. It does not bound memory: a loop that doubles a text
//! takes few steps, and minijinja has no hook for the text that operators make.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use minijinja::value::{Kwargs, Value, ViaDeserialize};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::Serialize;

use super::bounds;
use super::guard::{guarded_apart, one_line};
use super::strftime::format_utc;
use super::{SpecialTokens, TextError, read_json, read_text, shorten};

/// Instructions that one rendering may take; real templates need some thousands a message. No more, because
/// values nest with each, and are dropped recursively.
const FUEL: u64 = 1_000_000;
/// Bytes that a template may have; it nests no deeper. Real ones have at most some ten thousand. A
/// chain of operators is read in the square of its length: seconds at this one.
const MAX_SOURCE: usize = 64 << 10;
const TEMPLATE: &str = "chat_template";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

impl ChatMessage {
    /// A message of the given role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// A compiled chat template with the special tokens that it may mention.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
    path: PathBuf,
}

impl ChatTemplate {
    /// The template of a checkpoint folder: chat_template.jinja, else `chat_template` of
    /// tokenizer_config.json (a string, or a list of named templates of which `default` is taken).
    /// `None` when the checkpoint has none.
    pub fn load(folder: &Path, special: &SpecialTokens) -> Result<Option<Self>, TextError> {
        let path = folder.join("chat_template.jinja");
        if let Some(source) = read_text(&path)? {
            return Self::compile(source, path, special.clone()).map(Some);
        }
        let path = folder.join("tokenizer_config.json");
        let Some(config) = read_json(folder, "tokenizer_config.json")? else {
            return Ok(None);
        };
        let source = match config.get("chat_template") {
            None | Some(serde_json::Value::Null) => return Ok(None),
            Some(serde_json::Value::String(source)) => source.clone(),
            Some(value) => default_of(value).ok_or_else(|| TextError::Field {
                path: path.clone(),
                field: "chat_template",
                found: shorten(value),
                expected: "a string, or a list of {name, template} with one named default",
            })?,
        };
        Self::compile(source, path, special.clone()).map(Some)
    }

    fn compile(source: String, path: PathBuf, special: SpecialTokens) -> Result<Self, TextError> {
        if source.len() > MAX_SOURCE {
            return Err(TextError::Template {
                path,
                line: None,
                reason: format!(
                    "{} bytes, expected at most {MAX_SOURCE} bytes",
                    source.len()
                ),
            });
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        bounds::bound(&mut environment);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        let source = without_generation_tags(&source);
        match guarded_apart(|| environment.add_template_owned(TEMPLATE, source)) {
            Ok(Ok(())) => Ok(Self {
                environment,
                special,
                path,
            }),
            Ok(Err(error)) => Err(template_error(&path, &error)),
            Err(reason) => Err(TextError::Template {
                path,
                line: None,
                reason,
            }),
        }
    }

    /// The prompt text of a conversation. With `add_generation_prompt` it ends where the assistant's
    /// answer begins.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let text = |token: &Option<String>| token.clone().unwrap_or_default();
        let variables = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            tools => Value::from(()),
            documents => Value::from(()),
            bos_token => text(&self.special.bos_token),
            eos_token => text(&self.special.eos_token),
            pad_token => text(&self.special.pad_token),
            unk_token => text(&self.special.unk_token),
        };
        let render = || {
            self.environment
                .get_template(TEMPLATE)
                .and_then(|template| template.render(variables))
                .map_err(|error| template_error(&self.path, &error))
        };
        guarded_apart(render).unwrap_or_else(|reason| {
            Err(TextError::Template {
                path: self.path.clone(),
                line: None,
                reason,
            })
        })
    }
}

/// The template named `default` in a list of named templates; also the only one of a list of one.
fn default_of(value: &serde_json::Value) -> Option<String> {
    let list = value.as_array()?;
    let named = list
        .iter()
        .find(|entry| entry.get("name").and_then(|name| name.as_str()) == Some("default"));
    let entry = named.or(if list.len() == 1 { list.first() } else { None })?;
    entry.get("template")?.as_str().map(str::to_owned)
}

/// Drops `{% generation %}` and `{% endgeneration %}`, which mark the assistant's tokens for training and
/// have no effect on the text.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        // Behind the opening: `{%}` opens a tag and ends none.
        let Some(length) = rest[start + 2..].find("%}").map(|end| end + 4) else {
            break;
        };
        let tag = &rest[start..start + length];
        let inner = tag[2..length - 2].trim_matches(['-', '+']).trim();
        out += &rest[..start];
        if matches!(inner, "generation" | "endgeneration") {
            // A comment keeps the whitespace control that the tag carries.
            out += &tag.replace("{%", "{#").replace("%}", "#}");
        } else {
            out += tag;
        }
        rest = &rest[start + length..];
    }
    out + rest
}

fn template_error(path: &Path, error: &Error) -> TextError {
    let reason = match error.kind() {
        ErrorKind::OutOfFuel => format!("stopped after {FUEL} steps"),
        _ => error
            .detail()
            .map_or_else(|| error.kind().to_string(), str::to_owned),
    };
    TextError::Template {
        path: path.to_path_buf(),
        line: error.line(),
        reason: one_line(&reason),
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: String) -> Result<String, Error> {
    format_utc(&format, SystemTime::now())
        .map_err(|reason| Error::new(ErrorKind::InvalidOperation, reason))
}

/// `tojson` as transformers defines it: Python's `json.dumps` with its separators (`", "`, `": "`), text
/// kept as it is unless `ensure_ascii`; `indent`, `separators` and `sort_keys` are json.dumps's too.
fn tojson(value: ViaDeserialize<serde_json::Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<Value> = kwargs.get("indent")?;
    if let Some(indent) = &indent {
        bounds::check("tojson: indent", indent)?;
    }
    let indent: Option<usize> = indent.map(usize::try_from).transpose()?;
    let ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    kwargs.assert_all_used()?;
    let (comma, colon) = match separators.as_deref() {
        Some([comma, colon]) => (comma.as_str(), colon.as_str()),
        Some(_) => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators must be a pair",
            ));
        }
        None if indent.is_some() => (",", ": "),
        None => (", ", ": "),
    };
    let style = JsonStyle {
        indent,
        comma,
        colon,
        sort_keys: sort_keys.unwrap_or(false),
    };
    let mut text = String::new();
    style.write(&value.0, 0, &mut text);
    if ensure_ascii.unwrap_or(false) {
        text = escape_non_ascii(&text);
    }
    Ok(Value::from_safe_string(text))
}

struct JsonStyle<'a> {
    indent: Option<usize>,
    comma: &'a str,
    colon: &'a str,
    sort_keys: bool,
}

impl JsonStyle<'_> {
    fn write(&self, value: &serde_json::Value, depth: usize, out: &mut String) {
        match value {
            serde_json::Value::Array(items) => {
                self.items(items, '[', ']', depth, out, |item, out| {
                    self.write(item, depth + 1, out);
                })
            }
            serde_json::Value::Object(map) => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.items(&entries, '{', '}', depth, out, |(key, item), out| {
                    *out += &serde_json::Value::from(key.as_str()).to_string();
                    *out += self.colon;
                    self.write(item, depth + 1, out);
                });
            }
            scalar => *out += &scalar.to_string(),
        }
    }

    fn items<T>(
        &self,
        items: &[T],
        open: char,
        close: char,
        depth: usize,
        out: &mut String,
        mut write_item: impl FnMut(&T, &mut String),
    ) {
        out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                *out += self.comma;
            }
            self.new_line(depth + 1, out);
            write_item(item, out);
        }
        if !items.is_empty() {
            self.new_line(depth, out);
        }
        out.push(close);
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }
}

fn escape_non_ascii(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut units = [0; 2];
    for character in text.chars() {
        if character.is_ascii() {
            out.push(character);
        } else {
            for unit in character.encode_utf16(&mut units) {
                out += &format!("\\u{unit:04x}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::test_folder::TestFolder;
    use proptest::prelude::*;

    fn special() -> SpecialTokens {
        SpecialTokens {
            bos_token: Some("<s>".into()),
            eos_token: Some("</s>".into()),
            ..SpecialTokens::default()
        }
    }

    fn render(template: &str, messages: &[ChatMessage]) -> Result<String, TextError> {
        let folder = TestFolder::empty();
        folder.write("chat_template.jinja", template);
        ChatTemplate::load(folder.path(), &special())?
            .unwrap()
            .render(messages, true)
    }

    fn hello() -> Vec<ChatMessage> {
        vec![ChatMessage::new("user", " Hello ")]
    }

    #[test]
    fn blocks_are_trimmed_and_python_methods_work() {
        let template = "{{ bos_token }}{% for message in messages %}\n  {% if message.role == 'user' %}\n\
                        [{{ message['content'].strip().upper() }}]\n  {% endif %}\n{% endfor %}\n\
                        {% if add_generation_prompt and tools is none %}A:{% endif %}";
        assert_eq!(render(template, &hello()).unwrap(), "<s>[HELLO]\nA:");
    }

    #[test]
    fn tojson_is_pythons() {
        let template = "{{ messages | tojson }}|{{ {'b': [1, 2.5, none], 'a': '<é>'} | tojson(indent=1) }}|\
                        {{ {'b': 1, 'a': true} | tojson(sort_keys=true, separators=(',', ':')) }}";
        let expected = "[{\"role\": \"user\", \"content\": \" Hello \"}]|\
                        {\n \"b\": [\n  1,\n  2.5,\n  null\n ],\n \"a\": \"<é>\"\n}|{\"a\":true,\"b\":1}";
        assert_eq!(render(template, &hello()).unwrap(), expected);
        assert_eq!(
            render("{{ 'é😀' | tojson(ensure_ascii=true) }}", &[]).unwrap(),
            "\"\\u00e9\\ud83d\\ude00\""
        );
    }

    #[test]
    fn raised_exceptions_are_one_line_with_place() {
        let error = render("\n{{ raise_exception('roles must\nalternate') }}", &hello())
            .unwrap_err()
            .to_string();
        assert!(
            error.ends_with("chat_template.jinja: chat template, line 2: roles must alternate"),
            "{error}"
        );
        let error = render("{% for x in %}", &[]).unwrap_err().to_string();
        assert!(
            error.contains("chat template, line 1") && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn endless_templates_are_stopped() {
        let template =
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        assert!(
            render(template, &[])
                .unwrap_err()
                .to_string()
                .contains("stopped after 1000000 steps")
        );
    }

    /// What a file of a checkpoint says is refused, in one line, whatever it asks for.
    #[test]
    fn hostile_templates_are_refused() {
        for template in [
            "{%}",
            "{%}{%",
            "{% %}{%}",
            "{{ [1] | tojson(indent=1000000000000) }}",
            "{{ [1] | tojson(indent=-1) }}",
            "{{ 'a' | indent(1000000000000) }}",
            "{{ 'a' | indent(width=1000000000000) }}",
            "{{ [1] | slice(18446744073709551615) }}",
            "{{ [1] | slice(1000000000000) }}",
            "{{ [1] | batch(1000000000000, 1) }}",
            "{{ '%999999999999d' | format(1) }}",
            "{{ '{:999999999999}'.format(1) }}",
            "{{ 'a' * 1000000000000 }}",
            "{{ range(1000000000000) | list }}",
            "{{ 1 // 0 }}{{ 1 % 0 }}",
            "{{ strftime_now('%') }}",
        ] {
            let error = render(template, &hello()).unwrap_err().to_string();
            assert!(!error.contains(char::is_control), "{error:?}");
        }
        // Deep nesting; some of it is folded away. Reading takes the square of the depth for some.
        const LEN: usize = 16 << 10;
        let deep = "{% set n = namespace(x=[]) %}{% for a in range(999) %}{% for b in range(999) %}\
                    {% set n.x = [n.x] %}{% endfor %}{% endfor %}";
        let nested = |open: &str, close: &str, unit: &str| {
            let n = (LEN - open.len() - close.len()) / unit.len();
            format!("{open}{}{close}", unit.repeat(n))
        };
        for template in [
            deep,
            &nested("", "", "{%"),
            &nested("", "", "{{"),
            &nested("{{ ", "1 }}", "("),
            &nested("{{ ", "1 }}", "-"),
            &nested("{{ ", "1 }}", "not "),
            &nested("{{ x", " }}", ".y"),
            &nested("{{ x", " }}", "+x"),
            &nested("{{ x", " }}", "|e"),
            &nested("", "", "{%if 1%}"),
        ] {
            if let Err(error) = render(template, &hello()) {
                assert!(!error.to_string().contains(char::is_control), "{error:?}");
            }
        }
        let long = " ".repeat(MAX_SOURCE + 1);
        let error = render(&long, &hello()).unwrap_err().to_string();
        assert!(error.ends_with("expected at most 65536 bytes"), "{error}");
        assert_eq!(render("{{ 'a\nb' | indent(2) }}", &[]).unwrap(), "a\n  b");
        assert_eq!(render("{{ '%03d' | format(7) }}", &[]).unwrap(), "007");
        assert_eq!(render("{{ 'a{}'.format(7) }}", &[]).unwrap(), "a7");
        assert_eq!(
            render("{{ [1, 2, 3] | batch(2) | list | length }}", &[]).unwrap(),
            "2"
        );
    }

    #[test]
    fn generation_tags_and_dates() {
        let template = "a {%- generation -%} b {%- endgeneration %}{% break_free %}";
        assert_eq!(
            without_generation_tags(template),
            "a {#- generation -#} b {#- endgeneration #}{% break_free %}"
        );
        assert_eq!(
            render("a {%- generation -%} b{% endgeneration %}", &[]).unwrap(),
            "ab"
        );
        let year: u32 = render("{{ strftime_now('%Y') }}", &[])
            .unwrap()
            .parse()
            .unwrap();
        assert!(year >= 2025);
    }

    #[test]
    fn where_the_template_comes_from() {
        let folder = TestFolder::empty();
        assert!(
            ChatTemplate::load(folder.path(), &special())
                .unwrap()
                .is_none()
        );
        folder.write("tokenizer_config.json", r#"{"chat_template": [{"name": "tool", "template": "T"}, {"name": "default", "template": "D{{ eos_token }}"}]}"#);
        let template = ChatTemplate::load(folder.path(), &special())
            .unwrap()
            .unwrap();
        assert_eq!(template.render(&[], false).unwrap(), "D</s>");
        folder.write("tokenizer_config.json", r#"{"chat_template": 7}"#);
        let error = ChatTemplate::load(folder.path(), &special())
            .unwrap_err()
            .to_string();
        assert!(error.contains("chat_template is 7, expected"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Pieces of templates in any order: rendered or refused in one line.
        #[test]
        fn damaged_templates_do_not_panic(
            pieces in prop::collection::vec(0..PIECES.len(), 0..24),
        ) {
            let template: String = pieces.into_iter().map(|i| PIECES[i]).collect();
            if let Err(error) = render(&template, &hello()) {
                let error = error.to_string();
                prop_assert!(!error.contains(char::is_control), "{:?}", error);
            }
        }
    }

    const PIECES: [&str; 30] = [
        "{%",
        "%}",
        "{{",
        "}}",
        "{#",
        "#}",
        "-",
        "+",
        " ",
        "\n",
        "\u{1b}",
        "é",
        "x",
        "'",
        "messages",
        "[0]",
        "[::0]",
        "[9:-9:-1]",
        ".content",
        " | tojson",
        " | indent(9)",
        "(",
        ")",
        "99999999999999999999",
        " * ",
        " ** ",
        "for m in messages",
        "endfor",
        "generation",
        "set x = x ~ messages",
    ];
}
