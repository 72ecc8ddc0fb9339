//! Chat templates: the Jinja text of a checkpoint and the conversation that it makes a prompt of.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::path::{Path, PathBuf};

use lathe_ir::foreign::Kind;

use super::message::ChatMessage;
use super::sandbox::Sandbox;
use super::template::{Refusal, Rendering, check_length};
use super::{SpecialTokens, TextError, read_json, read_text, shorten};

/// A chat template with the special tokens that it may mention and the sandbox that it is rendered in.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
    special: SpecialTokens,
    path: PathBuf,
    sandbox: Sandbox,
}

impl ChatTemplate {
    /// The template of a checkpoint folder: chat_template.jinja, else `chat_template` of
    /// tokenizer_config.json (a string, or a list of named templates of which `default` is taken).
    /// `None` when the checkpoint has none.
    ///
    /// # Errors
    /// A file cannot be read, has no template where one should stand, or one that is too long.
    pub fn load(
        folder: &Path,
        special: &SpecialTokens,
        sandbox: &Sandbox,
    ) -> Result<Option<Self>, TextError> {
        let Some((source, path)) = source(folder)? else {
            return Ok(None);
        };
        check_length(&source).map_err(|refusal| refused(&path, refusal))?;
        Ok(Some(Self {
            source,
            special: special.clone(),
            path,
            sandbox: sandbox.clone(),
        }))
    }

    /// The prompt text of a conversation. With `add_generation_prompt` it ends where the assistant's
    /// answer begins.
    ///
    /// # Errors
    /// The template does not compile, raises an exception, or takes more than the sandbox allows.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let special = self.special.clone();
        let rendering = Rendering {
            source: self.source.clone(),
            messages: messages.to_vec(),
            add_generation_prompt,
            bos_token: special.bos_token,
            eos_token: special.eos_token,
            pad_token: special.pad_token,
            unk_token: special.unk_token,
        };
        self.sandbox
            .render(&rendering)
            .map_err(|refusal| refused(&self.path, refusal))
    }
}

/// The text of a folder's template, with the file that holds it.
fn source(folder: &Path) -> Result<Option<(String, PathBuf)>, TextError> {
    let path = folder.join("chat_template.jinja");
    if let Some(source) = read_text(&path, Kind::Template)? {
        return Ok(Some((source, path)));
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
    Ok(Some((source, path)))
}

fn refused(path: &Path, refusal: Refusal) -> TextError {
    TextError::Template {
        path: path.to_path_buf(),
        line: refusal.line,
        reason: refusal.reason,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::test_folder::TestFolder;

    #[test]
    fn where_the_template_comes_from() {
        let folder = TestFolder::empty();
        assert_eq!(source(folder.path()).unwrap(), None);
        folder.write("tokenizer_config.json", r#"{"chat_template": [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]}"#);
        assert_eq!(source(folder.path()).unwrap().unwrap().0, "D");
        folder.write("chat_template.jinja", "J");
        assert_eq!(source(folder.path()).unwrap().unwrap().0, "J");
        folder.write("tokenizer_config.json", r#"{"chat_template": 7}"#);
        std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
        let error = source(folder.path()).unwrap_err().to_string();
        assert!(error.contains("chat_template is 7, expected"), "{error}");
    }

    #[test]
    fn a_template_that_is_too_long() {
        let folder = TestFolder::empty();
        folder.write("chat_template.jinja", &" ".repeat(65537));
        let sandbox = Sandbox::of("/no/such/program");
        let load = ChatTemplate::load(folder.path(), &SpecialTokens::default(), &sandbox);
        let error = load.unwrap_err().to_string();
        assert!(error.ends_with("expected at most 65536 bytes"), "{error}");
    }
}
