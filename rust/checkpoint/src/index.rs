//! A checkpoint's files: one, or shards that an index names; each tensor in one of them.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde::Deserialize;

use crate::files;
use crate::header::fields::Strings;
use crate::header::{is_printable, shortened, Header, MAX_HEADER};
use crate::CheckpointError;

/// The file of a checkpoint that is one file.
pub const WEIGHTS_NAME: &str = "model.safetensors";
/// The index of one that is sharded.
pub const INDEX_NAME: &str = "model.safetensors.index.json";

/// How many names an error lists.
const LISTED: usize = 5;

/// Files and their headers, which hold what the index says and no tensor twice.
#[derive(Debug)]
pub struct Checkpoint {
    /// In the order of their names.
    pub files: Vec<PathBuf>,
    /// The header of each file.
    pub headers: Vec<Header>,
}

impl Checkpoint {
    /// Opens a directory, by its index or its single file, or one safetensors file.
    ///
    /// # Errors
    ///
    /// `Missing` if there is none, or shards of the index are missing; `Corrupt` if a header or the
    /// index is not as it must be, or they contradict each other; `Io` if one cannot be read.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        let index = path.join(INDEX_NAME);
        let is_directory = is_directory(path)?;
        let listed = if is_directory && exists(&index)? { Some(read_index(&index)?) } else { None };
        let files = match &listed {
            Some(listed) => shards(path, &index, listed)?,
            None if is_directory => vec![single_file(path)?],
            None => vec![path.to_owned()],
        };
        let headers = files.iter().map(|file| Header::read(file)).collect::<Result<Vec<_>, _>>()?;
        let places = check_once(&files, &headers)?;
        if let Some(listed) = listed {
            check_index(&index, &listed, &places, &files)?;
        }
        Ok(Self { files, headers })
    }
}

/// Whether the path is a directory; it is a file otherwise.
fn is_directory(path: &Path) -> Result<bool, CheckpointError> {
    let shown = path.display();
    let what = match fs::metadata(path) {
        Ok(found) if found.is_dir() || found.is_file() => return Ok(found.is_dir()),
        Ok(_) => format!("{shown} is neither a directory nor a file"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            format!("there is no {shown} (models are not downloaded)")
        }
        Err(error) => return Err(CheckpointError::io(path, "open")(error)),
    };
    Err(CheckpointError::Missing { path: path.to_owned(), what })
}

fn exists(path: &Path) -> Result<bool, CheckpointError> {
    path.try_exists().map_err(CheckpointError::io(path, "open"))
}

fn single_file(directory: &Path) -> Result<PathBuf, CheckpointError> {
    let file = directory.join(WEIGHTS_NAME);
    if exists(&file)? {
        return Ok(file);
    }
    let others: BTreeSet<String> = fs::read_dir(directory)
        .map_err(CheckpointError::io(directory, "list"))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    let found = if others.is_empty() {
        "no safetensors file".to_owned()
    } else {
        format!("name one of its files: {}", list(others.iter()))
    };
    let what =
        format!("{} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}: {found}", directory.display());
    Err(CheckpointError::Missing { path: file, what })
}

/// The shards' paths, in the order of their names; all of them are there.
fn shards(
    directory: &Path,
    index: &Path,
    listed: &BTreeMap<String, String>,
) -> Result<Vec<PathBuf>, CheckpointError> {
    let names: BTreeSet<&String> = listed.values().collect();
    if let Some(name) = names.iter().find(|name| !is_plain(name)) {
        let name = shortened(name);
        let what = format!("{name:?} is not the name of a file in the directory");
        return Err(CheckpointError::corrupt(index, what));
    }
    let mut absent = Vec::new();
    for name in &names {
        // By name: in a hub cache every file is a link to a blob elsewhere.
        if !exists(&directory.join(name))? {
            absent.push(*name);
        }
    }
    if let Some(first) = absent.first() {
        let path = directory.join(first);
        let what = format!(
            "there is no {}: of the {} shards in {INDEX_NAME} {} are missing: {}",
            path.display(),
            names.len(),
            absent.len(),
            list(absent.iter())
        );
        return Err(CheckpointError::Missing { path, what });
    }
    Ok(names.into_iter().map(|name| directory.join(name)).collect())
}

/// Whether a name leads to nothing but a file in its directory, on any system.
fn is_plain(name: &str) -> bool {
    let plain = !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':']);
    plain && is_printable(name)
}

/// The file of every tensor, if no two files have the same.
fn check_once<'a>(
    files: &[PathBuf],
    headers: &'a [Header],
) -> Result<BTreeMap<&'a str, usize>, CheckpointError> {
    let mut places = BTreeMap::new();
    for (file, header) in headers.iter().enumerate() {
        for tensor in &header.tensors {
            match places.entry(tensor.name.as_str()) {
                Entry::Vacant(place) => {
                    place.insert(file);
                }
                Entry::Occupied(first) => {
                    let other = files[*first.get()].display();
                    let what = format!("{} is in both {other} and this file", tensor.name);
                    return Err(CheckpointError::corrupt(&files[file], what));
                }
            }
        }
    }
    Ok(places)
}

/// Refuses shards that do not hold what the index says.
fn check_index(
    index: &Path,
    listed: &BTreeMap<String, String>,
    places: &BTreeMap<&str, usize>,
    files: &[PathBuf],
) -> Result<(), CheckpointError> {
    let found_in = |key: &str| -> Option<&str> {
        places.get(key).and_then(|&file| files[file].file_name()?.to_str())
    };
    let keys: BTreeSet<&str> =
        listed.keys().map(String::as_str).chain(places.keys().copied()).collect();
    let wrong: Vec<String> = keys
        .into_iter()
        .filter_map(|key| {
            let (said, found) = (listed.get(key).map(String::as_str), found_in(key));
            let [said_in, found_in] = [said, found].map(|file| file.unwrap_or("no shard"));
            let what = || format!("{key} is listed in {said_in} and found in {found_in}");
            (said != found).then(what)
        })
        .collect();
    if wrong.is_empty() {
        return Ok(());
    }
    let what =
        format!("it and its shards differ in {} tensors: {}", wrong.len(), list(wrong.iter()));
    Err(CheckpointError::corrupt(index, what))
}

fn list<T: fmt::Display>(names: impl ExactSizeIterator<Item = T>) -> String {
    let more = names.len().saturating_sub(LISTED);
    let mut shown: Vec<String> = names.take(LISTED).map(|name| name.to_string()).collect();
    if more > 0 {
        shown.push(format!("and {more} more"));
    }
    shown.join(", ")
}

/// The `weight_map` of an index: file by tensor.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let (file, stamp) = files::open(path)?;
    if stamp.size > MAX_HEADER {
        let what = format!("an index of {} bytes, {MAX_HEADER} are the most", stamp.size);
        return Err(CheckpointError::corrupt(path, what));
    }
    let mut bytes = vec![0; stamp.size as usize];
    files::read_at(&file, path, &mut bytes, 0)?;
    parse_index(&bytes).map_err(|what| CheckpointError::corrupt(path, shortened(&what)))
}

/// The `weight_map` in the text of an index.
///
/// # Errors
///
/// What is wrong, in words.
pub fn parse_index(bytes: &[u8]) -> Result<BTreeMap<String, String>, String> {
    let index: Index =
        serde_json::from_slice(bytes).map_err(|error| format!("not a valid index: {error}"))?;
    let weight_map = index.weight_map.ok_or("weight_map is missing")?;
    match weight_map.keys().find(|name| !is_printable(name)) {
        Some(name) => Err(format!("the name {name:?} of a tensor holds control characters")),
        None => Ok(weight_map),
    }
}

struct Index {
    weight_map: Option<BTreeMap<String, String>>,
}

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Index;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with weight_map")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
                let (mut weight_map, mut seen) = (None, HashSet::new());
                while let Some(key) = map.next_key::<String>()? {
                    if key == "weight_map" {
                        weight_map = Some(map.next_value_seed(Strings { of: "weight_map" })?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                    if let Some(key) = seen.replace(key) {
                        return Err(A::Error::custom(format!("the key {key:?} twice")));
                    }
                }
                Ok(Index { weight_map })
            }
        }
        from.deserialize_map(Object)
    }
}

#[cfg(test)]
mod tests;
