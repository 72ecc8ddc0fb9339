//! A Hugging Face `config.json` with typed accessors, in one spelling.
//!
//! transformers 4 writes `rope_theta`, `rope_scaling` (with `type` or `rope_type`), `torch_dtype`;
//! transformers 5 writes `rope_parameters` and `dtype`. Both are normalised to the latter when the
//! file is read, and so are the keys of overrides.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use super::error::ImportError;
use crate::DType;
use crate::foreign::{self, Kind};
use serde_json::{Map, Value};
use std::path::Path;
use std::str::FromStr;

/// A normalised model configuration.
#[derive(Clone, PartialEq, Debug)]
pub struct HfConfig {
    file: String,
    root: Map<String, Value>,
}

/// Most layers of a model.
const MAX_LAYERS: u32 = 4096;

/// Keys of `rope_parameters` that are understood; an unknown one could change the positions.
const ROPE_KEYS: [&str; 15] = [
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
    "short_factor",
    "long_factor",
];

impl FromStr for HfConfig {
    type Err = ImportError;

    fn from_str(text: &str) -> Result<HfConfig, ImportError> {
        HfConfig::parse("config.json", text)
    }
}

impl HfConfig {
    /// Reads a configuration file, or the `config.json` of a model folder.
    ///
    /// # Errors
    /// The file cannot be read, is no JSON object, or gives one option twice with different values.
    pub fn from_file(path: &Path) -> Result<HfConfig, ImportError> {
        let path = if path.is_dir() {
            path.join("config.json")
        } else {
            path.to_path_buf()
        };
        let file = path.display().to_string();
        let text = foreign::read_text(&path, Kind::Config).map_err(|source| ImportError::Read {
            file: file.clone(),
            source,
        })?;
        HfConfig::parse(&file, &text)
    }

    /// Reads configuration text; `file` names it in errors.
    ///
    /// # Errors
    /// The text is no JSON object, or gives one option twice with different values.
    pub fn parse(file: &str, text: &str) -> Result<HfConfig, ImportError> {
        let json = |reason: String| ImportError::Json {
            file: file.to_string(),
            reason,
        };
        let value: Value = serde_json::from_str(text).map_err(|e| json(e.to_string()))?;
        let Value::Object(root) = value else {
            return Err(json("expected a JSON object".to_string()));
        };
        let mut cfg = HfConfig {
            file: file.to_string(),
            root,
        };
        cfg.fold_dtype()?;
        cfg.fold_rope()?;
        Ok(cfg)
    }

    /// The same configuration with some keys replaced. Keys are dotted paths in either spelling
    /// (`num_hidden_layers`, `rope_scaling.factor`); missing objects on the way are created. A model cut to
    /// fewer layers keeps the first entries of `layer_types`.
    ///
    /// # Errors
    /// A path leads through a value that is no object, or a spelling conflicts.
    pub fn with_overrides<'a>(
        mut self,
        overrides: impl IntoIterator<Item = (&'a str, &'a Value)>,
    ) -> Result<HfConfig, ImportError> {
        let (mut cut, mut typed) = (None, false);
        for (key, value) in overrides {
            let key = canonical_key(key);
            match key.as_str() {
                "num_hidden_layers" => cut = value.as_u64(),
                "layer_types" => typed = true,
                _ => {}
            }
            match key.as_str() {
                whole @ ("rope_scaling" | "rope_parameters") => {
                    // A new scheme replaces the old one, but keeps the base.
                    let theta = self.get("rope_parameters.rope_theta").cloned();
                    self.root.shift_remove("rope_parameters");
                    self.root.insert(whole.to_string(), value.clone());
                    if let (Some(theta), None) = (theta, value.get("rope_theta")) {
                        self.root.insert("rope_theta".to_string(), theta);
                    }
                }
                key => self.set(key, value.clone())?,
            }
            self.fold_dtype()?;
            self.fold_rope()?;
        }
        if let (Some(layers), false) = (cut, typed)
            && let Some(Value::Array(types)) = self.root.get_mut("layer_types")
        {
            types.truncate(usize::try_from(layers).unwrap_or(usize::MAX));
        }
        Ok(self)
    }

    /// Where the configuration comes from, for messages.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The value of a dotted key; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let mut parts = key.split('.');
        let mut v = self.root.get(parts.next()?)?;
        for p in parts {
            v = v.get(p)?;
        }
        (!v.is_null()).then_some(v)
    }

    /// Whether a top-level key is written, even if it is null.
    pub fn is_written(&self, key: &str) -> bool {
        self.root.contains_key(key)
    }

    /// The value of a key for which the configuration class has a default: `default` where the key
    /// is absent, none where it is null.
    pub fn nullable<T>(&self, key: &str, value: Option<T>, default: T) -> Option<T> {
        match value {
            None if !self.is_written(key) => Some(default),
            v => v,
        }
    }

    /// The number of layers. Each one is imported, so a mistyped number would take all memory.
    ///
    /// # Errors
    /// Absent, or none of 1 to 4096.
    pub fn layers(&self, key: &str) -> Result<u32, ImportError> {
        match self.size(key)? {
            n @ ..=MAX_LAYERS => Ok(n),
            _ => Err(self.invalid(key, &format!("at most {MAX_LAYERS} layers"))),
        }
    }

    /// An extent: a positive integer that an index of 32 bits reaches.
    ///
    /// # Errors
    /// Absent, or something else.
    pub fn size(&self, key: &str) -> Result<u32, ImportError> {
        self.opt_size(key)?
            .ok_or_else(|| self.missing(key, "a positive integer"))
    }

    /// An extent, if written.
    ///
    /// # Errors
    /// Something else stands there.
    pub fn opt_size(&self, key: &str) -> Result<Option<u32>, ImportError> {
        // Token ids are i32, and so are extents in kernels.
        let expected = match self.get(key).and_then(Value::as_u64) {
            Some(1..) => "at most 2147483647",
            _ => "a positive integer",
        };
        self.typed(key, expected, |v| {
            let n = i32::try_from(v.as_i64()?).ok()?;
            u32::try_from(n).ok().filter(|&n| n > 0)
        })
    }

    /// A non-negative integer, if written.
    ///
    /// # Errors
    /// Something else stands there.
    pub fn opt_u32(&self, key: &str) -> Result<Option<u32>, ImportError> {
        self.typed(key, "a non-negative integer", |v| {
            v.as_u64().and_then(|n| u32::try_from(n).ok())
        })
    }

    /// A number.
    ///
    /// # Errors
    /// Absent, or something else.
    pub fn f64(&self, key: &str) -> Result<f64, ImportError> {
        self.opt_f64(key)?
            .ok_or_else(|| self.missing(key, "a number"))
    }

    /// A number, if written.
    ///
    /// # Errors
    /// Something else stands there.
    pub fn opt_f64(&self, key: &str) -> Result<Option<f64>, ImportError> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A number above zero, if written.
    ///
    /// # Errors
    /// Something else stands there.
    pub fn opt_positive(&self, key: &str) -> Result<Option<f64>, ImportError> {
        self.typed(key, "a number above 0", |v| v.as_f64().filter(|&x| x > 0.0))
    }

    /// A truth value, or the default if absent.
    ///
    /// # Errors
    /// Something else stands there.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool, ImportError> {
        Ok(self
            .typed(key, "true or false", Value::as_bool)?
            .unwrap_or(default))
    }

    /// A text, if written.
    ///
    /// # Errors
    /// Something else stands there.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>, ImportError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A list of texts, if written.
    ///
    /// # Errors
    /// Something else stands there.
    pub fn opt_strs(&self, key: &str) -> Result<Option<Vec<&str>>, ImportError> {
        self.typed(key, "a list of strings", |v| {
            v.as_array()?.iter().map(Value::as_str).collect()
        })
    }

    /// Token ids: one, a list, or none.
    ///
    /// # Errors
    /// Something else stands there.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>, ImportError> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = self.typed(key, "a token id or a list of them", |v| match v {
            Value::Array(a) => a.iter().map(id).collect(),
            v => id(v).map(|n| vec![n]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    /// The element type that the checkpoint was saved in, if written.
    ///
    /// # Errors
    /// It is none of float32, float16 and bfloat16.
    pub fn dtype(&self) -> Result<Option<DType>, ImportError> {
        let Some(name) = self.opt_str("dtype")? else {
            return Ok(None);
        };
        match name.parse::<DType>() {
            Ok(d) if d.is_float() => Ok(Some(d)),
            _ => Err(self.unsupported("dtype", "float32, float16, bfloat16")),
        }
    }

    /// An error that says that a key is absent.
    pub fn missing(&self, key: &str, expected: &str) -> ImportError {
        ImportError::Missing {
            file: self.file.clone(),
            key: key.to_string(),
            expected: expected.to_string(),
        }
    }

    /// An error that says that a key has a wrong value.
    pub fn invalid(&self, key: &str, expected: &str) -> ImportError {
        ImportError::Invalid {
            file: self.file.clone(),
            key: key.to_string(),
            found: self.found(key),
            expected: expected.to_string(),
        }
    }

    /// An error that says that a key has a value that is not implemented.
    pub fn unsupported(&self, key: &str, supported: &str) -> ImportError {
        ImportError::Unsupported {
            file: self.file.clone(),
            key: key.to_string(),
            found: self.found(key),
            supported: supported.to_string(),
        }
    }

    /// Refuses a value other than the only implemented one; absent is accepted.
    ///
    /// # Errors
    /// Another value is written.
    pub fn only(&self, key: &str, value: &Value) -> Result<(), ImportError> {
        match self.get(key) {
            None => Ok(()),
            Some(v) if v == value || (v.is_number() && v.as_f64() == value.as_f64()) => Ok(()),
            Some(_) => Err(self.unsupported(key, &value.to_string())),
        }
    }

    fn found(&self, key: &str) -> String {
        let text = self.get(key).map_or("null".to_string(), Value::to_string);
        if text.chars().count() > 120 {
            let head: String = text.chars().take(117).collect();
            format!("{head}...")
        } else {
            text
        }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ImportError> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => read(v).map(Some).ok_or_else(|| self.invalid(key, expected)),
        }
    }

    fn set(&mut self, key: &str, value: Value) -> Result<(), ImportError> {
        let (path, last) = match key.rsplit_once('.') {
            Some((path, last)) => (path.split('.').collect(), last),
            None => (Vec::new(), key),
        };
        let mut at = &mut self.root;
        for part in &path {
            let next = at.entry(*part).or_insert_with(|| Value::Object(Map::new()));
            if next.is_null() {
                *next = Value::Object(Map::new());
            }
            let found = next.to_string();
            at = next.as_object_mut().ok_or_else(|| ImportError::Invalid {
                file: self.file.clone(),
                key: path.join("."),
                found,
                expected: format!("an object, to set '{key}' in it"),
            })?;
        }
        at.insert(last.to_string(), value);
        Ok(())
    }

    fn fold_dtype(&mut self) -> Result<(), ImportError> {
        self.fold_key("torch_dtype", "dtype")
    }

    /// Moves a key to its newer name.
    fn fold_key(&mut self, old: &str, new: &str) -> Result<(), ImportError> {
        let Some(v) = self.root.shift_remove(old).filter(|v| !v.is_null()) else {
            return Ok(());
        };
        match self.get(new) {
            Some(n) if *n != v => Err(ImportError::Invalid {
                file: self.file.clone(),
                key: old.to_string(),
                found: v.to_string(),
                expected: format!("the same as '{new}', which is {n}"),
            }),
            _ => {
                self.root.insert(new.to_string(), v);
                Ok(())
            }
        }
    }

    /// Gathers `rope_theta`, `rope_scaling` and `partial_rotary_factor` into `rope_parameters`,
    /// as transformers 5 does. Without a scheme the type is `default`; values that are absent
    /// stay absent.
    fn fold_rope(&mut self) -> Result<(), ImportError> {
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(v) = self.root.get_mut(key) else {
                continue;
            };
            match v {
                Value::Null => {
                    self.root.shift_remove(key);
                }
                Value::Object(o) => normalise_rope(o),
                _ => return Err(self.invalid(key, "an object or null")),
            }
        }
        self.fold_key("rope_scaling", "rope_parameters")?;
        // GPT-NeoX has names of its own.
        self.fold_key("rotary_emb_base", "rope_theta")?;
        self.fold_key("rotary_pct", "partial_rotary_factor")?;
        for key in ["rope_theta", "partial_rotary_factor"] {
            let Some(v) = self.root.shift_remove(key).filter(|v| !v.is_null()) else {
                continue;
            };
            let inner = format!("rope_parameters.{key}");
            if let Some(n) = self.get(&inner)
                && n.as_f64() != v.as_f64()
            {
                return Err(ImportError::Invalid {
                    file: self.file.clone(),
                    key: key.to_string(),
                    found: v.to_string(),
                    expected: format!("the same as '{inner}', which is {n}"),
                });
            }
            self.set(&inner, v)?;
        }
        if let Some(Value::Object(o)) = self.root.get_mut("rope_parameters")
            && !o.values().any(Value::is_object)
        {
            o.entry("rope_type").or_insert_with(|| "default".into());
        }
        Ok(())
    }

    /// Refuses keys of the rotary parameters at `at` that no rope type knows, such as parameters
    /// per layer type in a family that has none.
    ///
    /// # Errors
    /// Such a key is written.
    pub fn check_rope_keys(&self, at: &str) -> Result<(), ImportError> {
        let Some(Value::Object(o)) = self.get(at) else {
            return Ok(());
        };
        match o.keys().find(|k| !ROPE_KEYS.contains(&k.as_str())) {
            None => Ok(()),
            Some(key) => Err(self.unsupported(
                &format!("{at}.{key}"),
                &format!("the keys {}", ROPE_KEYS.join(", ")),
            )),
        }
    }
}

/// `type` is the older name of `rope_type`; null values are as good as absent.
fn normalise_rope(o: &mut Map<String, Value>) {
    if let Some(t) = o.shift_remove("type") {
        o.entry("rope_type").or_insert(t);
    }
    o.retain(|_, v| !v.is_null());
    for v in o.values_mut() {
        if let Value::Object(inner) = v {
            normalise_rope(inner);
        }
    }
}

/// The newer spelling of a dotted key.
fn canonical_key(key: &str) -> String {
    match key {
        "torch_dtype" => "dtype".to_string(),
        "rope_theta" | "partial_rotary_factor" => format!("rope_parameters.{key}"),
        "rotary_emb_base" => "rope_parameters.rope_theta".to_string(),
        "rotary_pct" => "rope_parameters.partial_rotary_factor".to_string(),
        _ => match key.strip_prefix("rope_scaling.") {
            Some("type") => "rope_parameters.rope_type".to_string(),
            Some(rest) => format!("rope_parameters.{rest}"),
            None if key == "rope_parameters.type" => "rope_parameters.rope_type".to_string(),
            None => key.to_string(),
        },
    }
}
