//! Rendering a chat template as transformers does, in this process.
//!
//! transformers runs templates in Jinja2's sandbox with `trim_blocks` and `lstrip_blocks`, loop controls,
//! a `tojson` that does not escape HTML, `raise_exception` and `strftime_now`. minijinja gives the
//! language, its pycompat module Python's methods on strings, lists and dictionaries.
//!
//! Fuel bounds the instructions of a template, and nothing bounds the memory, the time and the stack that one of them
//! takes. So a template of unknown origin is rendered here only in a process of its own, see
//! [`sandbox`](super::sandbox).
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::time::SystemTime;

use minijinja::value::{Kwargs, Value, ViaDeserialize};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};

use super::bounds;
use super::guard::{guarded, one_line};
use super::message::ChatMessage;
use super::strftime::format_utc;

/// Instructions that one rendering may take; real templates need some thousands a message.
pub const FUEL: u64 = 1_000_000;
/// Bytes that a template may have; real ones have at most some ten thousand. A chain of operators is read in the square
/// of its length: seconds at this one.
pub(super) const MAX_SOURCE: usize = 64 << 10;
const TEMPLATE: &str = "chat_template";

/// A template with all that it may mention.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rendering {
    /// Its text.
    pub source: String,
    /// The conversation.
    pub messages: Vec<ChatMessage>,
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Text of the beginning-of-sequence token.
    pub bos_token: Option<String>,
    /// Text of the end-of-sequence token.
    pub eos_token: Option<String>,
    /// Text of the padding token.
    pub pad_token: Option<String>,
    /// Text of the unknown token.
    pub unk_token: Option<String>,
}

/// Why a template gives no text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The line of the template, where one is known.
    pub line: Option<usize>,
    /// The reason, in one line.
    pub reason: String,
}

impl Refusal {
    /// A reason that no line of the template stands for.
    pub(super) fn new(reason: String) -> Refusal {
        let line = None;
        Refusal { line, reason }
    }
}

impl Rendering {
    /// The text, if it takes at most `fuel` instructions. Some templates end the process: [`ChatTemplate`] is for those
    /// that nobody has looked at.
    ///
    /// # Errors
    /// It is no template, raises an exception, or takes too many instructions.
    ///
    /// [`ChatTemplate`]: super::ChatTemplate
    pub fn render_here(&self, fuel: u64) -> Result<String, Refusal> {
        guarded(|| self.run(fuel)).unwrap_or_else(|reason| Err(Refusal::new(reason)))
    }

    fn run(&self, fuel: u64) -> Result<String, Refusal> {
        check_length(&self.source)?;
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(fuel));
        bounds::bound(&mut environment);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        let text = |token: &Option<String>| token.clone().unwrap_or_default();
        let variables = context! {
            messages => &self.messages,
            add_generation_prompt => self.add_generation_prompt,
            tools => Value::from(()),
            documents => Value::from(()),
            bos_token => text(&self.bos_token),
            eos_token => text(&self.eos_token),
            pad_token => text(&self.pad_token),
            unk_token => text(&self.unk_token),
        };
        let source = without_generation_tags(&self.source);
        environment
            .add_template_owned(TEMPLATE, source)
            .and_then(|()| environment.get_template(TEMPLATE)?.render(variables))
            .map_err(|error| refusal(&error, fuel))
    }
}

/// Refuses a source that is too long to be read.
pub(super) fn check_length(source: &str) -> Result<(), Refusal> {
    let bytes = source.len();
    if bytes <= MAX_SOURCE {
        return Ok(());
    }
    Err(Refusal::new(format!(
        "{bytes} bytes, expected at most {MAX_SOURCE} bytes"
    )))
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

fn refusal(error: &Error, fuel: u64) -> Refusal {
    let reason = match error.kind() {
        ErrorKind::OutOfFuel => format!("stopped after {fuel} steps"),
        _ => error
            .detail()
            .map_or_else(|| error.kind().to_string(), str::to_owned),
    };
    Refusal {
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
    use proptest::prelude::*;

    /// The text, or the error as a user reads it.
    fn render(template: &str, messages: &[ChatMessage]) -> Result<String, String> {
        let rendering = Rendering {
            source: template.to_owned(),
            messages: messages.to_vec(),
            add_generation_prompt: true,
            bos_token: Some("<s>".into()),
            eos_token: Some("</s>".into()),
            pad_token: None,
            unk_token: None,
        };
        rendering.render_here(FUEL).map_err(|refusal| {
            let line = refusal.line.map(|line| format!("line {line}: "));
            format!("{}{}", line.unwrap_or_default(), refusal.reason)
        })
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
        let error =
            render("\n{{ raise_exception('roles must\nalternate') }}", &hello()).unwrap_err();
        assert_eq!(error, "line 2: roles must alternate");
        let error = render("{% for x in %}", &[]).unwrap_err();
        assert!(
            error.starts_with("line 1: ") && !error.contains('\n'),
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
            let error = render(template, &hello()).unwrap_err();
            assert!(!error.contains(char::is_control), "{error:?}");
        }
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Pieces of templates in any order: rendered or refused in one line.
        #[test]
        fn damaged_templates_do_not_panic(
            pieces in prop::collection::vec(0..PIECES.len(), 0..24),
        ) {
            let template: String = pieces.into_iter().map(|i| PIECES[i]).collect();
            if let Err(error) = render(&template, &hello()) {
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
