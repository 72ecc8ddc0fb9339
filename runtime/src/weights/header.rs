//! The header of a safetensors file: 8 bytes of length, JSON, then the data of the tensors without holes.
//! <https://github.com/huggingface/safetensors#format>
//!
//! Parsed here rather than by the `safetensors` crate because its result is a map, in which a duplicate name
//! would silently win, and because its errors name neither tensor nor numbers.

use std::fmt;

use lathe_ir::printable;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::TensorInfo;

/// Longest header that is read, as in the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Shape and dtype.
    pub info: TensorInfo,
    /// Offset of its first byte in the file.
    pub start: usize,
    /// Offset behind its last byte.
    pub end: usize,
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

/// Parses and validates the header of the file whose bytes are `file`: every entry that is returned lies inside
/// the file and holds exactly as many bytes as its shape and dtype ask for.
///
/// # Errors
/// The reason, in one line.
pub fn parse_header(file: &[u8]) -> Result<Vec<TensorEntry>, String> {
    parse(file).map_err(|reason| printable(&reason))
}

fn parse(file: &[u8]) -> Result<Vec<TensorEntry>, String> {
    let size = file.len() as u64;
    let Some((prefix, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!(
            "it has {size} bytes, the length of the header alone takes 8"
        ));
    };
    let length = u64::from_le_bytes(*prefix);
    if length > MAX_HEADER.min(rest.len() as u64) {
        return Err(format!(
            "the header should have {length} bytes, the file has {size} in all"
        ));
    }
    let (header, data) = rest.split_at(length as usize);
    let raw: RawHeader =
        serde_json::from_slice(header).map_err(|e| format!("malformed header: {e}"))?;
    let data_start = 8 + header.len();

    let mut entries = Vec::with_capacity(raw.0.len());
    for (name, tensor) in raw.0 {
        entries.push(entry(name, tensor, data_start, data.len())?);
    }
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by_key(|&i| (entries[i].start, entries[i].end));
    let mut at = data_start;
    for &i in &order {
        let TensorEntry {
            name, start, end, ..
        } = &entries[i];
        if *start != at {
            let (found, expected) = (start - data_start, at - data_start);
            return Err(format!(
                "tensor {name} starts at byte {found} of the data, expected {expected}"
            ));
        }
        at = *end;
    }
    if at != file.len() {
        return Err(format!("the tensors end at byte {at}, the file has {size}"));
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = entries.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(format!("tensor {} is there twice", pair[0].name));
    }
    Ok(entries)
}

fn entry(
    name: String,
    raw: RawTensor,
    data_start: usize,
    data_len: usize,
) -> Result<TensorEntry, String> {
    let dtype: Dtype = serde_json::from_value(serde_json::Value::String(raw.dtype.clone()))
        .map_err(|_| format!("tensor {name} has the unknown dtype {}", raw.dtype))?;
    let (start, end) = raw.data_offsets;
    if start > end || end > data_len as u64 {
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
        start: data_start + start as usize,
        end: data_start + end as usize,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        let entries = parse_header(&file(header, 16)).unwrap();
        let start = 8 + header.len();
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
            let reason = parse_header(&bytes).unwrap_err();
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
            parse_header(&file(&twice, 8)).unwrap_err(),
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
            let reason = parse_header(&file(header, 16)).unwrap_err();
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
            if let Ok(entries) = parse_header(&bytes) {
                for e in entries {
                    prop_assert!(e.start <= e.end && e.end <= bytes.len());
                    let n: usize = e.info.shape.iter().product();
                    prop_assert_eq!(n * e.info.dtype.bitsize(), 8 * (e.end - e.start));
                }
            }
        }
    }
}
