//! Directories whose files do not fit together, or whose index leads out of them.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// A file of tensors of one byte each.
fn write(directory: &Path, name: &str, keys: &[&str]) {
    let entries: Vec<String> = keys
        .iter()
        .enumerate()
        .map(|(i, key)| {
            format!(r#""{key}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1)
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let length = (header.len() as u64).to_le_bytes();
    let bytes = [&length, header.as_bytes(), &vec![0; keys.len()]].concat();
    fs::write(directory.join(name), bytes).unwrap();
}

/// A directory with shards 0 (tensors a, b) and 1 (tensor c), and an index.
fn sharded(index: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), "0", &["a", "b"]);
    write(directory.path(), "1", &["c"]);
    fs::write(directory.path().join(INDEX_NAME), index).unwrap();
    directory
}

fn refused(index: &str) -> String {
    Checkpoint::read(sharded(index).path()).unwrap_err().to_string()
}

#[test]
fn an_index_names_the_files() {
    let directory =
        sharded(r#"{"metadata":{"total":[[3]]},"weight_map":{"a":"0","b":"0","c":"1"},"x":1}"#);
    let found = Checkpoint::read(directory.path()).unwrap();
    assert_eq!(found.files, [directory.path().join("0"), directory.path().join("1")]);
    assert_eq!(found.headers[1].tensors[0].name, "c");
    let file = Checkpoint::read(&directory.path().join("0")).unwrap();
    assert_eq!((file.files.len(), file.headers[0].tensors.len()), (1, 2));
}

#[test]
fn without_an_index_there_is_one_file() {
    let directory = tempfile::tempdir().unwrap();
    let found = Checkpoint::read(directory.path()).unwrap_err().to_string();
    assert!(found.contains("no safetensors file"), "{found}");
    write(directory.path(), "other.safetensors", &["a"]);
    let found = Checkpoint::read(directory.path()).unwrap_err().to_string();
    assert!(found.contains("name one of its files: other.safetensors"), "{found}");
    write(directory.path(), WEIGHTS_NAME, &["a"]);
    assert_eq!(Checkpoint::read(directory.path()).unwrap().headers.len(), 1);
    let found = Checkpoint::read(&directory.path().join("none")).unwrap_err();
    assert!(matches!(found, CheckpointError::Missing { .. }), "{found}");
}

#[test]
fn names_that_leave_the_directory() {
    let names = ["../0", "/0", "sub/0", "..", ".", "", r"..\\0", r"\\\\host\\0", "C:0", r"0\u0000"];
    for name in names {
        let found = refused(&format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#));
        assert!(found.contains("is not the name of a file in the directory"), "{name}: {found}");
    }
}

#[cfg(unix)]
#[test]
fn a_shard_may_be_a_link() {
    let directory = sharded(r#"{"weight_map":{"a":"linked"}}"#);
    let blobs = tempfile::tempdir().unwrap();
    write(blobs.path(), "blob", &["a"]);
    let link = directory.path().join("linked");
    std::os::unix::fs::symlink(blobs.path().join("blob"), &link).unwrap();
    assert_eq!(Checkpoint::read(directory.path()).unwrap().files, std::slice::from_ref(&link));
    fs::remove_file(blobs.path().join("blob")).unwrap();
    let found = Checkpoint::read(directory.path()).unwrap_err();
    assert!(matches!(found, CheckpointError::Missing { .. }), "{found}");
}

#[test]
fn shards_that_are_missing_are_listed() {
    let found = refused(r#"{"weight_map":{"a":"0","b":"p","c":"q"}}"#);
    assert!(found.contains("of the 3 shards in"), "{found}");
    assert!(found.contains("2 are missing: p, q"), "{found}");
}

#[test]
fn shards_that_hold_something_else() {
    for (map, text) in [
        (
            r#"{"a":"0","b":"0","c":"1","d":"1"}"#,
            "1 tensors: d is listed in 1 and found in no shard",
        ),
        (r#"{"a":"0","c":"1"}"#, "b is listed in no shard and found in 0"),
        (r#"{"a":"1","b":"0","c":"1"}"#, "a is listed in 1 and found in 0"),
        (r#"{"p":"0","q":"0","r":"0","s":"0","t":"0","u":"0"}"#, "and 3 more"),
    ] {
        let found = refused(&format!(r#"{{"weight_map":{map}}}"#));
        assert!(found.contains(text), "{found}");
    }
    let directory = sharded(r#"{"weight_map":{"a":"0","b":"0"}}"#);
    write(directory.path(), "1", &["b"]);
    fs::write(directory.path().join(INDEX_NAME), r#"{"weight_map":{"a":"0","b":"1"}}"#).unwrap();
    let found = Checkpoint::read(directory.path()).unwrap_err().to_string();
    assert!(found.contains("b is in both"), "{found}");
}

#[test]
fn an_index_that_is_none() {
    for (index, text) in [
        ("", "not a valid index: EOF"),
        ("{}", "weight_map is missing"),
        ("[]", "an object with weight_map"),
        (r#"{"weight_map":{"a":1}}"#, "expected a string"),
        (r#"{"weight_map":{"a":"0","a":"1"}}"#, "\"a\" twice in weight_map"),
        (r#"{"weight_map":{},"weight_map":{}}"#, "\"weight_map\" twice"),
        (r#"{"weight_map":{"a\u001b":"0"}}"#, "control characters"),
        (r#"{"weight_map":{}} {}"#, "trailing characters"),
        (&format!(r#"{{"x":{}"#, "[".repeat(99_999)), "not a valid index"),
    ] {
        let found = refused(index);
        assert!(found.contains(text), "{index:.40}: {found}");
    }
}

#[test]
fn an_index_is_no_larger_than_the_limit() {
    let directory = sharded("{}");
    let index = fs::File::options().write(true).open(directory.path().join(INDEX_NAME)).unwrap();
    index.set_len(MAX_HEADER + 1).unwrap(); // without content: takes no room on the disk
    let found = Checkpoint::read(directory.path()).unwrap_err().to_string();
    assert!(found.contains("100000001 bytes, 100000000 are the most"), "{found}");
}

proptest! {
    #[test]
    fn any_bytes_are_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_index(&bytes);
    }

    #[test]
    fn a_plain_name_has_one_part(name in ".{0,8}") {
        if is_plain(&name) {
            let parts: Vec<_> = Path::new(&name).components().collect();
            prop_assert_eq!(parts, [std::path::Component::Normal(name.as_ref())]);
        }
    }
}
