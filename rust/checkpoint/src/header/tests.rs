//! Headers that lie, each refused with its reason; and the `safetensors` crate as the oracle.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::fields::METADATA;
use super::*;

/// A file of a header and so many bytes of data.
fn file(header: &[u8], data: usize) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length, header, &vec![1; data]].concat()
}

/// What `Header::read` makes of a file with these bytes.
fn read(bytes: &[u8]) -> Result<Header, CheckpointError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.safetensors");
    fs::write(&path, bytes).unwrap();
    Header::read(&path)
}

/// The reason why a header before so many bytes of data is refused.
fn reason(header: &str, data: usize) -> String {
    match read(&file(header.as_bytes(), data)) {
        Err(CheckpointError::Corrupt { what, .. }) => what,
        other => panic!("{header}: {other:?}"),
    }
}

fn entry(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

#[test]
fn what_a_header_says() {
    let header = format!(
        r#"{{"b":{},"__metadata__":{{"format":"pt"}},"e":{},"a":{},"s":{}}}   "#,
        entry("BF16", "[2,1]", "[4,8]"),
        entry("F32", "[0,7]", "[8,8]"),
        entry("F4", "[2,4]", "[0,4]"),
        entry("I64", "[]", "[8,16]"),
    );
    let found = read(&file(header.as_bytes(), 16)).unwrap();
    let data = 8 + header.len() as u64;
    let places: Vec<_> = found
        .tensors
        .iter()
        .map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice(), t.begin - data, t.end - data))
        .collect();
    let expected: [(&str, Dtype, &[u64], u64, u64); 4] = [
        ("a", Dtype::F4, &[2, 4], 0, 4),
        ("b", Dtype::BF16, &[2, 1], 4, 8),
        ("e", Dtype::F32, &[0, 7], 8, 8),
        ("s", Dtype::I64, &[], 8, 16),
    ];
    assert_eq!(places, expected);
    assert_eq!(found.metadata["format"], "pt");
    assert_eq!(found.stamp.size, data + 16);
    assert!(found.stamp.modified_ns > 0);
}

#[test]
fn a_header_without_tensors() {
    for header in ["{}", "{}  ", r#"{"__metadata__":null}"#, r#"{"__metadata__":{}}"#] {
        assert!(read(&file(header.as_bytes(), 0)).unwrap().tensors.is_empty(), "{header}");
    }
}

#[test]
fn lengths_are_checked_before_there_is_memory() {
    for (bytes, text) in [
        (vec![], "0 bytes"),
        (vec![1; 7], "7 bytes"),
        (u64::MAX.to_le_bytes().to_vec(), "18446744073709551615 bytes, 100000000 are the most"),
        (100_000_001u64.to_le_bytes().to_vec(), "100000001 bytes, 100000000"),
        (100_000_000u64.to_le_bytes().to_vec(), "100000000 bytes, the file has 8"),
        (3u64.to_le_bytes().iter().chain(b"{}").copied().collect(), "3 bytes, the file has 10"),
    ] {
        let error = read(&bytes).unwrap_err().to_string();
        assert!(error.contains("not a readable safetensors file"), "{error}");
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn places_and_sizes_that_lie() {
    let one = |shape: &str, offsets: &str| format!(r#"{{"a":{}}}"#, entry("F32", shape, offsets));
    let two = |a: &str, b: &str| {
        format!(r#"{{"a":{},"b":{}}}"#, entry("U8", "[4]", a), entry("U8", "[4]", b))
    };
    for (header, data, text) in [
        (one("[1]", "[4,0]"), 4, "ends before it begins"),
        (one("[1]", "[-4,0]"), 4, "invalid value: integer `-4`"),
        (one("[-1]", "[0,4]"), 4, "invalid value: integer `-1`"),
        (one("[1.0]", "[0,4]"), 4, "floating point `1.0`"),
        (one("[1]", "[0,4,4]"), 4, "trailing characters"),
        (one("[1]", "[0]"), 4, "invalid length 1"),
        (one("1", "[0,4]"), 4, "expected a list of sizes"),
        (one("[1]", "[4,8]"), 8, "leaves a gap after the header"),
        (one("[2]", "[0,8]"), 4, "the file has 4 bytes of data"),
        (one("[1]", "[0,4]"), 5, "end at byte 4 of the data, the file has 5"),
        (one("[1]", "[0,4]"), 3, "the file has 3 bytes of data"),
        (one("[2]", "[0,4]"), 4, "are 4 bytes, F32 of shape [2] has 8"),
        (one("[1]", "[0,18446744073709551615]"), 4, "the file has 4"),
        (one("[1]", "[0,18446744073709551616]"), 4, "invalid type: floating point"),
        (one("[18446744073709551615]", "[0,4]"), 4, "or too many"),
        (one("[4294967296,4294967296]", "[0,4]"), 4, "or too many"),
        (one("[9223372036854775808,2,0]", "[0,0]"), 0, "or too many"),
        (two("[0,4]", "[2,6]"), 6, "overlaps \"a\", which ends at 4"),
        (two("[0,4]", "[5,9]"), 9, "leaves a gap after \"a\""),
        (two("[0,4]", "[0,4]"), 4, "overlaps"),
        (format!(r#"{{"a":{}}}"#, entry("F4", "[3]", "[0,2]")), 2, "no whole number of bytes"),
    ] {
        let found = reason(&header, data);
        assert!(found.contains(text), "{header}: {found}");
    }
}

#[test]
fn json_that_lies() {
    let good = entry("U8", "[1]", "[0,1]");
    let long = format!("[{}1]", "1,".repeat(64));
    for (header, text) in [
        (format!(r#"{{"a":{good},"a":{good}}}"#), "the key \"a\" twice"),
        (format!(r#"{{"a":{good},"\u0061":{good}}}"#), "the key \"a\" twice"),
        (r#"{"__metadata__":{},"__metadata__":{}}"#.to_owned(), "__metadata__ twice"),
        (r#"{"__metadata__":{"k":"1","k":"2"}}"#.to_owned(), "\"k\" twice in __metadata__"),
        (r#"{"__metadata__":{"k":1}}"#.to_owned(), "expected a string"),
        (r#"{"__metadata__":[]}"#.to_owned(), "object of strings"),
        (r#"{"a":{"dtype":"U8","dtype":"U8"}}"#.to_owned(), "\"dtype\" twice"),
        (r#"{"a":{"shape":[],"shape":[]}}"#.to_owned(), "\"shape\" twice"),
        (r#"{"a":{"data_offsets":[0,0],"data_offsets":[0,0]}}"#.to_owned(), "twice"),
        (r#"{"a":{"dtype":"U8","shape":[1]}}"#.to_owned(), "needs dtype, shape and data_offsets"),
        (r#"{"a":{"scale":2}}"#.to_owned(), "field \"scale\", allowed are"),
        (r#"{"a":["U8",[1],[0,1]]}"#.to_owned(), "as an object of dtype"),
        (r#"{"a":null}"#.to_owned(), "as an object of dtype"),
        (format!(r#"{{"a":{}}}"#, entry("F99", "[1]", "[0,1]")), "\"a\": dtype: unknown variant"),
        (format!(r#"{{"a":{}}}"#, entry("u8", "[1]", "[0,1]")), "unknown variant `u8`"),
        (format!(r#"{{"a":{}}}"#, entry(r"\u001b[2J", "[1]", "[0,1]")), r"`\u{1b}[2J`"),
        (format!(r#"{{"a":{}}}"#, entry("U8", &long, "[0,1]")), "more than 64 dimensions"),
        (format!(r#"{{"a\u0000":{good}}}"#), "control characters"),
        (format!(r#"{{"a\u202e":{good}}}"#), "control characters"),
        (format!(r#"{{"a\u200b":{good}}}"#), "control characters"),
        (format!(r#"{{"a\ud800":{good}}}"#), "hex escape"),
        (format!("{{\"a\0\":{good}}}"), "control character"),
        (format!(r#" {{"a":{good}}}"#), "does not begin with {"),
        (format!(r#"{{"a":{good}}} x"#), "trailing characters"),
        (format!(r#"{{"a":{good}"#), "EOF"),
        (String::new(), "does not begin with {"),
        (r#"{"a":"#.repeat(99_999), "field \"a\", allowed are"),
        (format!(r#"{{"a":{}"#, "[".repeat(99_999)), "as an object of dtype"),
    ] {
        let found = reason(&header, 1);
        assert!(found.contains(text), "{}: {found}", shortened(&header));
    }
    let found = read(&file(b"{\"a\xff\":1}", 0)).unwrap_err().to_string();
    assert!(found.contains("not UTF-8 at byte 3"), "{found}");
}

#[test]
fn an_error_is_short_whatever_the_file_holds() {
    let name = "é".repeat(100_000);
    let found = reason(&format!(r#"{{"{name}":{}}}"#, entry("U8", "[1]", "[0,9]")), 1);
    assert!(found.chars().count() < 700, "{}", found.len());
}

#[test]
fn other_scripts_are_names_too() {
    for name in ["größe", "层.0", "e\u{301}", "a b", "", "__metadata", "a\\\"'"] {
        assert!(is_printable(name), "{name}");
        let key = serde_json::to_string(name).unwrap();
        let header = format!("{{{key}:{}}}", entry("U8", "[1]", "[0,1]"));
        assert_eq!(read(&file(header.as_bytes(), 1)).unwrap().tensors[0].name, name);
    }
}

#[test]
fn only_files_are_opened() {
    let directory = tempfile::tempdir().unwrap();
    let found = Header::read(directory.path()).unwrap_err();
    assert!(matches!(found, CheckpointError::Missing { .. }), "{found:?}");
    let found = Header::read(&directory.path().join("none")).unwrap_err();
    assert!(matches!(found, CheckpointError::Missing { .. }), "{found:?}");
}

/// What is accepted, `safetensors` accepts with the same result.
fn assert_agrees(bytes: &[u8]) {
    let ours = read(bytes);
    let Ok(ours) = ours else { return };
    let (length, theirs) = SafeTensors::read_metadata(bytes).unwrap();
    let data = 8 + length as u64;
    assert_eq!(ours.tensors.len(), theirs.tensors().len());
    for tensor in &ours.tensors {
        let info = theirs.info(&tensor.name).unwrap();
        assert_eq!(info.dtype, tensor.dtype);
        assert!(info.shape.iter().map(|&size| size as u64).eq(tensor.shape.iter().copied()));
        let (begin, end) = info.data_offsets;
        assert_eq!((data + begin as u64, data + end as u64), (tensor.begin, tensor.end));
    }
    let metadata = theirs.metadata().clone().unwrap_or_default();
    assert_eq!(ours.metadata, metadata.into_iter().collect());
}

/// A file as it is written: tensors one after the other.
fn whole() -> impl Strategy<Value = Vec<u8>> {
    let dtypes = prop::sample::select(vec!["F32", "BF16", "U8", "F4", "I64", "BOOL"]);
    prop::collection::vec((dtypes, prop::collection::vec(0u64..5, 0..4)), 0..6).prop_map(
        |tensors| {
            let (mut header, mut end) = (serde_json::Map::new(), 0);
            for (i, (dtype, mut shape)) in tensors.into_iter().enumerate() {
                let bits = match dtype {
                    "F4" => 4,
                    "U8" | "BOOL" => 8,
                    "BF16" => 16,
                    "F32" => 32,
                    _ => 64,
                };
                shape.push(2);
                let begin = end;
                end += shape.iter().product::<u64>() * bits / 8;
                let entry = serde_json::json!(
                    {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
                );
                header.insert(format!("layer.{i}"), entry);
            }
            header.insert(METADATA.to_owned(), serde_json::json!({"format": "pt"}));
            file(serde_json::to_string(&header).unwrap().as_bytes(), end as usize)
        },
    )
}

proptest! {
    #[test]
    fn what_is_written_is_read(bytes in whole()) {
        prop_assert!(read(&bytes).is_ok());
        assert_agrees(&bytes);
    }

    #[test]
    fn a_cut_is_told(bytes in whole(), cut in any::<prop::sample::Index>()) {
        prop_assert!(read(&bytes[..cut.index(bytes.len())]).is_err());
    }

    #[test]
    fn a_change_is_told_or_read_as_safetensors_does(
        mut bytes in whole(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        assert_agrees(&bytes);
    }

    #[test]
    fn any_bytes_are_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), size: u64) {
        let _ = parse(&bytes, size);
        assert_agrees(&bytes);
    }
}
