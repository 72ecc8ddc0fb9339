//! The header of a safetensors file: 8 bytes of length, JSON, then the data of the tensors without holes.
//! <https://github.com/huggingface/safetensors#format>
//!
//! Parsed here rather than by the `safetensors` crate because its result is a map, in which a duplicate name
//! would silently win, and because its errors name neither tensor nor numbers.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::fmt;

use lathe_ir::printable;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::TensorInfo;

/// Longest header that is read, as in the reference implementation.
pub(super) const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Shape and dtype.
    pub info: TensorInfo,
    /// Offset of its first byte in the file.
    pub start: u64,
    /// Offset behind its last byte.
    pub end: u64,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's entries in their order, duplicates included.
struct RawHeader(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Parses and validates the header of a file of `size` bytes that begins with `start`, which has the whole header if the
/// file does: every entry that is returned lies inside the file and holds exactly as many bytes as its shape and dtype
/// ask for.
///
/// # Errors
/// The reason, in one line.
pub fn parse_header(start: &[u8], size: u64) -> Result<Vec<TensorEntry>, String> {
    parse(start, size).map_err(|reason| printable(&reason))
}

fn parse(start: &[u8], size: u64) -> Result<Vec<TensorEntry>, String> {
    let Some((prefix, rest)) = start.split_first_chunk::<8>() else {
        return Err(format!(
            "it has {size} bytes, the length of the header alone takes 8"
        ));
    };
    let length = u64::from_le_bytes(*prefix);
    let header = usize::try_from(length).ok().and_then(|n| rest.get(..n));
    let Some(header) = header.filter(|_| length <= MAX_HEADER) else {
        return Err(format!(
            "the header should have {length} bytes, the file has {size} in all"
        ));
    };
    let raw: RawHeader =
        serde_json::from_slice(header).map_err(|e| format!("malformed header: {e}"))?;
    let data_start = 8 + length;
    let data_len = size.saturating_sub(data_start);

    let mut entries = Vec::with_capacity(raw.0.len());
    for (name, tensor) in raw.0 {
        entries.push(entry(name, tensor, data_start, data_len)?);
    }
    let mut order: Vec<&TensorEntry> = entries.iter().collect();
    order.sort_by_key(|entry| (entry.start, entry.end));
    let mut at = data_start;
    for entry in order {
        let TensorEntry {
            name, start, end, ..
        } = entry;
        if *start != at {
            let (found, expected) = (start - data_start, at - data_start);
            return Err(format!(
                "tensor {name} starts at byte {found} of the data, expected {expected}"
            ));
        }
        at = *end;
    }
    if at != size {
        return Err(format!("the tensors end at byte {at}, the file has {size}"));
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let mut pairs = entries.iter().zip(entries.iter().skip(1));
    if let Some((twin, _)) = pairs.find(|(a, b)| a.name == b.name) {
        return Err(format!("tensor {} is there twice", twin.name));
    }
    Ok(entries)
}

fn entry(
    name: String,
    raw: RawTensor,
    data_start: u64,
    data_len: u64,
) -> Result<TensorEntry, String> {
    let dtype: Dtype = serde_json::from_value(serde_json::Value::String(raw.dtype.clone()))
        .map_err(|_| format!("tensor {name} has the unknown dtype {}", raw.dtype))?;
    let (start, end) = raw.data_offsets;
    if start > end || end > data_len {
        return Err(format!(
            "tensor {name} lies at bytes {start}..{end} of the data, which has {data_len}"
        ));
    }
    let bits = raw
        .shape
        .iter()
        .try_fold(dtype.bitsize() as u64, |n, &d| n.checked_mul(d));
    if bits != (end - start).checked_mul(8) {
        let (shape, bytes) = (&raw.shape, end - start);
        return Err(format!(
            "tensor {name} is {dtype} {shape:?} but has {bytes} bytes"
        ));
    }
    // Dimensions of an empty tensor may be anything; the others are bounded by the bytes of the file.
    let shape = raw
        .shape
        .iter()
        .map(|&d| usize::try_from(d))
        .collect::<Result<Vec<_>, _>>();
    let shape = shape.map_err(|_| {
        format!(
            "tensor {name} has a dimension out of range: {:?}",
            raw.shape
        )
    })?;
    let info = TensorInfo { dtype, shape };
    Ok(TensorEntry {
        name,
        info,
        start: data_start + start,
        end: data_start + end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(file: &[u8]) -> Result<Vec<TensorEntry>, String> {
        parse_header(file, file.len() as u64)
    }

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend((0..data).map(|i| i as u8));
        bytes
    }

    #[test]
    fn entries_lie_in_the_file() {
        let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
            "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
        let entries = parsed(&file(header, 16)).unwrap();
        let start = 8 + header.len() as u64;
        assert_eq!(
            (entries[0].name.as_str(), entries[0].start, entries[0].end),
            ("a", start, start + 4)
        );
        assert_eq!(
            (entries[1].info.matrix(), entries[1].start),
            ((2, 3), start + 4)
        );
    }

    #[test]
    fn lies_are_named() {
        let tensor = |shape: &str, at: &str| {
            format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":{at}}}"#)
        };
        let one = |shape: &str, at: &str| format!(r#"{{"w":{}}}"#, tensor(shape, at));
        let cases = [
            (
                file(&one("[2]", "[0,16]"), 16),
                "tensor w is F32 [2] but has 16 bytes",
            ),
            (
                file(&one("[4]", "[0,16]"), 12),
                "tensor w lies at bytes 0..16 of the data, which has 12",
            ),
            (
                file(&one("[4]", "[16,0]"), 16),
                "tensor w lies at bytes 16..0",
            ),
            (
                file(&one("[4294967296,4294967296,4]", "[0,0]"), 0),
                "but has 0 bytes",
            ),
            (
                file(&one("[2]", "[4,12]"), 12),
                "tensor w starts at byte 4 of the data, expected 0",
            ),
            (file(&one("[2]", "[0,8]"), 12), "the file has"),
            (
                file(&one("[2]", "[0,8]").replace("F32", "F31"), 8),
                "unknown dtype F31",
            ),
            (file("{\"w\":", 0), "malformed header: EOF while parsing"),
            (
                file("[1]", 0),
                "malformed header: invalid type: sequence, expected a map of tensors",
            ),
            (vec![1, 2, 3], "it has 3 bytes"),
            (
                u64::MAX.to_le_bytes().to_vec(),
                "the header should have 18446744073709551615 bytes",
            ),
        ];
        for (bytes, expected) in cases {
            let reason = parsed(&bytes).unwrap_err();
            assert!(
                reason.contains(expected),
                "{reason} does not contain {expected}"
            );
        }
        let twice = format!(
            r#"{{"w":{},"w":{}}}"#,
            tensor("[1]", "[0,4]"),
            tensor("[1]", "[4,8]")
        );
        assert_eq!(
            parsed(&file(&twice, 8)).unwrap_err(),
            "tensor w is there twice"
        );
    }

    #[test]
    fn names_do_not_break_the_line() {
        for (header, expected) in [
            (
                r#"{"a\nb\u001b[2J":{"dtype":"F32","shape":[2],"data_offsets":[0,16]}}"#,
                "tensor a\\nb\\u{1b}[2J is F32 [2] but has 16 bytes",
            ),
            (
                r#"{"w":{"dtype":"F\n\u001b32","shape":[2],"data_offsets":[0,16]}}"#,
                "tensor w has the unknown dtype F\\n\\u{1b}32",
            ),
            (
                "{\"w\":{\"dtype\":\"F32\",\"shape\":\"a\\nb\",\"data_offsets\":[0,16]}}",
                "malformed header: invalid type: string \"a\\nb\"",
            ),
        ] {
            let reason = parsed(&file(header, 16)).unwrap_err();
            assert!(reason.starts_with(expected), "{reason}");
        }
    }

    proptest! {
        #[test]
        fn damaged_files_never_point_outside(cut in 0usize..400, at in 0usize..400, byte in any::<u8>()) {
            let header = r#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"I8","shape":[9],"data_offsets":[16,25]}}"#;
            let mut bytes = file(header, 25);
            let n = bytes.len();
            bytes[at % n] = byte;
            bytes.truncate(n - cut % n);
            if let Ok(entries) = parsed(&bytes) {
                for e in entries {
                    prop_assert!(e.start <= e.end && e.end <= bytes.len() as u64);
                    let n: usize = e.info.shape.iter().product();
                    prop_assert_eq!((n * e.info.dtype.bitsize()) as u64, 8 * (e.end - e.start));
                }
            }
        }
    }
}
