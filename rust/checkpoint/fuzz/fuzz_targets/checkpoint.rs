//! Headers and indices that were made of real ones: no panic, no memory before its check, and what
//! is accepted, the `safetensors` crate accepts with the same result.
//!
//! An input's first byte says what the rest is: 0, a whole file; 1, four bytes of a size and a
//! header, of a file with so many bytes of data; 2, an index over two shards.

#![no_main]

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;

use libfuzzer_sys::{fuzz_target, Corpus};
use qkern_checkpoint::header::{parse, Header};
use qkern_checkpoint::index::{parse_index, INDEX_NAME};
use qkern_checkpoint::{Checkpoint, CheckpointError};
use safetensors::SafeTensors;
use tempfile::TempDir;

/// The most bytes of data behind a header, which take no room on the disk.
const MOST_DATA: u32 = 1 << 22;

fuzz_target!(|input: &[u8]| -> Corpus {
    match input {
        [0, file @ ..] => whole_file(file),
        [1, a, b, c, d, header @ ..] => {
            let data = u32::from_le_bytes([*a, *b, *c, *d]);
            if data > MOST_DATA {
                return Corpus::Reject;
            }
            header_of(header, u64::from(data));
        }
        [2, index @ ..] => index_of(index),
        _ => return Corpus::Reject,
    }
    Corpus::Keep
});

fn whole_file(bytes: &[u8]) {
    let path = directory().join("x.safetensors");
    fs::write(&path, bytes).unwrap();
    if let Some(header) = checked(Header::read(&path)) {
        assert_agrees(&header, bytes);
    }
}

fn header_of(header: &[u8], data: u64) {
    let path = directory().join("x.safetensors");
    let mut file = File::create(&path).unwrap();
    let length = header.len() as u64;
    file.write_all(&length.to_le_bytes()).unwrap();
    file.write_all(header).unwrap();
    file.set_len(8 + length + data).unwrap();
    let found = checked(Header::read(&path));
    assert_eq!(found.is_some(), parse(header, 8 + length + data).is_ok());
    if let Some(found) = found {
        assert_agrees(&found, &fs::read(&path).unwrap());
    }
}

fn index_of(index: &[u8]) {
    let directory = directory();
    fs::write(directory.join(INDEX_NAME), index).unwrap();
    let found = checked(Checkpoint::read(directory));
    if let Some(found) = found {
        let listed = parse_index(index).unwrap();
        let held = found.headers.iter().flat_map(|header| &header.tensors);
        assert!(
            held.map(|tensor| &tensor.name).collect::<std::collections::BTreeSet<_>>()
                == listed.keys().collect()
        );
        for file in &found.files {
            assert_eq!(file.parent(), Some(directory));
        }
    }
}

/// The result; an error is short and can be printed.
fn checked<T>(result: Result<T, CheckpointError>) -> Option<T> {
    let error = match result {
        Ok(found) => return Some(found),
        Err(CheckpointError::Io { doing, source, .. }) => {
            // The name of a shard may be longer than the system allows.
            assert_eq!((doing, source.raw_os_error()), ("open", Some(36)), "{source}");
            return None;
        }
        Err(error) => error.to_string(),
    };
    assert!(error.chars().count() < 2000 && !error.contains(char::is_control), "{error}");
    None
}

fn assert_agrees(ours: &Header, bytes: &[u8]) {
    let (length, theirs) = SafeTensors::read_metadata(bytes).unwrap();
    let data = 8 + length as u64;
    assert_eq!(ours.tensors.len(), theirs.offset_keys().len());
    for tensor in &ours.tensors {
        let info = theirs.info(&tensor.name).unwrap();
        assert_eq!(info.dtype, tensor.dtype);
        assert!(info.shape.iter().map(|&size| size as u64).eq(tensor.shape.iter().copied()));
        let (begin, end) = info.data_offsets;
        assert_eq!((data + begin as u64, data + end as u64), (tensor.begin, tensor.end));
    }
    let metadata = theirs.metadata().clone().unwrap_or_default();
    assert!(ours.metadata == metadata.into_iter().collect());
}

/// A directory with two shards, made once.
fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<TempDir> = OnceLock::new();
    let made = DIRECTORY.get_or_init(|| {
        let made = tempfile::tempdir().unwrap();
        for (name, key) in
            [("model-00001-of-00002.safetensors", "a"), ("model-00002-of-00002.safetensors", "b")]
        {
            let header =
                format!(r#"{{"{key}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
            let length = (header.len() as u64).to_le_bytes();
            fs::write(made.path().join(name), [&length, header.as_bytes(), b"1"].concat()).unwrap();
        }
        made
    });
    made.path()
}
