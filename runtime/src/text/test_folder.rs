//! A checkpoint folder with a byte-level tokenizer, for the tests of this module.

use std::path::Path;

use serde_json::json;

/// A temporary folder that is removed when dropped.
pub(super) struct TestFolder(tempfile::TempDir);

impl TestFolder {
    pub(super) fn empty() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Tokens 0 `<|begin|>`, 1 `<|end|>`, then the 256 bytes; no merges.
    pub(super) fn byte_level() -> Self {
        let folder = Self::empty();
        let mut vocab = serde_json::Map::new();
        for (id, token) in ["<|begin|>", "<|end|>"].into_iter().enumerate() {
            vocab.insert(token.into(), json!(id));
        }
        for byte in byte_characters() {
            let id = vocab.len();
            vocab.insert(byte.to_string(), json!(id));
        }
        let added = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [added(0, "<|begin|>"), added(1, "<|end|>")],
            "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                      "vocab": vocab, "merges": []},
        });
        folder.write("tokenizer.json", &tokenizer.to_string());
        folder.write(
            "tokenizer_config.json",
            r#"{"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}"#,
        );
        folder
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(super) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path().join(name), text).unwrap();
    }
}

/// The characters that byte-level BPE uses for the bytes 0..=255: printable ones stand for themselves, the
/// others are moved up from U+0100.
fn byte_characters() -> impl Iterator<Item = char> {
    let mut moved = 0x100;
    (0..=255u32).map(move |byte| {
        let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable { byte } else { moved };
        moved += u32::from(!printable);
        char::from_u32(code).unwrap()
    })
}
