//! The header of a safetensors file, checked in every part before anything is believed.
//!
//! Eight bytes of length (little-endian), JSON of that length, then the data:
//! <https://github.com/huggingface/safetensors>. What is accepted here, that crate accepts with the
//! same result; refused are also duplicate keys, fields that it would ignore, and names that cannot
//! be printed.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::Path;

use safetensors::Dtype;
use serde::de::value::{Error as ValueError, StrDeserializer};
use serde::de::{
    DeserializeSeed, Deserializer, Error, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};
use serde::Deserialize;

use crate::files::{self, Stamp};
use crate::CheckpointError;

/// The longest header that is read: the limit of the `safetensors` crate.
pub const MAX_HEADER: u64 = 100_000_000;
/// The most dimensions of a tensor: the limit of `NumPy`, and of most of torch's operators.
pub const MAX_DIMENSIONS: usize = 64;

/// Bytes of the length before the header.
const LENGTH: u64 = 8;
const METADATA: &str = "__metadata__";

/// What a header says of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its key.
    pub name: String,
    /// Type of a value.
    pub dtype: Dtype,
    /// Sizes; none for a scalar, 0 among them for an empty tensor.
    pub shape: Vec<u64>,
    /// Its first byte, from the start of the file.
    pub begin: u64,
    /// Where it ends.
    pub end: u64,
}

/// A header whose tensors cover the data of its file without gap or overlap.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// In the order of their places in the file.
    pub tensors: Vec<Tensor>,
    /// What stands under `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// Size and time of the file that was read.
    pub stamp: Stamp,
}

impl Header {
    /// Reads and checks the header of the file at `path`; nothing else of it is read.
    ///
    /// # Errors
    ///
    /// `Missing` if there is no such file, `Corrupt` if any part of its header is not as it must
    /// be, `Io` if it cannot be read.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        let (file, stamp) = files::open(path)?;
        let bytes = read_bytes(&file, path, stamp.size)?;
        let (tensors, metadata) = parse(&bytes, stamp.size).map_err(|what| refuse(path, &what))?;
        Ok(Self { tensors, metadata, stamp })
    }
}

fn refuse(path: &Path, what: &str) -> CheckpointError {
    CheckpointError::corrupt(path, format!("not a readable safetensors file: {}", shortened(what)))
}

/// What an error shows of a text that a file may have made as long as it likes.
pub(crate) fn shortened(text: &str) -> String {
    const MOST: usize = 600;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The JSON; its length is checked before there is memory for it.
fn read_bytes(file: &File, path: &Path, size: u64) -> Result<Vec<u8>, CheckpointError> {
    if size < LENGTH {
        return Err(refuse(
            path,
            &format!("it has {size} bytes, the length of a header is {LENGTH}"),
        ));
    }
    let mut length = [0; LENGTH as usize];
    files::read_at(file, path, &mut length, 0)?;
    let length =
        check_length(u64::from_le_bytes(length), size).map_err(|what| refuse(path, &what))?;
    let mut bytes = vec![0; length];
    files::read_at(file, path, &mut bytes, LENGTH)?;
    Ok(bytes)
}

/// The length of the header, if a file of `size` bytes can have it.
fn check_length(length: u64, size: u64) -> Result<usize, String> {
    if length > MAX_HEADER {
        return Err(format!("its header would have {length} bytes, {MAX_HEADER} are the most"));
    }
    if length > size.saturating_sub(LENGTH) {
        return Err(format!("its header would have {length} bytes, the file has {size} in all"));
    }
    usize::try_from(length).map_err(|_| format!("its header has {length} bytes"))
}

type Parsed = (Vec<Tensor>, BTreeMap<String, String>);

/// The tensors and the metadata of a header in a file of `size` bytes.
///
/// # Errors
///
/// What is wrong, in words.
pub fn parse(bytes: &[u8], size: u64) -> Result<Parsed, String> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| format!("its header is not UTF-8 at byte {}", error.valid_up_to()))?;
    if !text.starts_with('{') {
        return Err("its header does not begin with {".to_owned());
    }
    let fields: Fields = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let mut tensors = fields.tensors;
    tensors.sort_by_key(|tensor| (tensor.begin, tensor.end));
    check_places(&mut tensors, LENGTH + bytes.len() as u64, size)?;
    Ok((tensors, fields.metadata))
}

/// Checks sizes and places, and makes the places those in the file, whose data begin at `data`.
fn check_places(tensors: &mut [Tensor], data: u64, size: u64) -> Result<(), String> {
    let mut covered = 0;
    let mut before = "the header".to_owned();
    let length = size.checked_sub(data).ok_or("its header is longer than the file")?;
    for tensor in tensors {
        let Tensor { name, dtype, shape, begin, end } = tensor;
        let at = format!("tensor {name:?}: data_offsets [{begin}, {end}]");
        if end < begin {
            return Err(format!("{at}: it ends before it begins"));
        }
        if *begin != covered {
            let how = if *begin < covered { "overlaps" } else { "leaves a gap after" };
            return Err(format!("{at}: it {how} {before}, which ends at {covered}"));
        }
        if *end > length {
            return Err(format!("{at}: the file has {length} bytes of data"));
        }
        let wanted = byte_size(*dtype, shape).ok_or_else(|| {
            format!("tensor {name:?}: {dtype} of shape {shape:?} is no whole number of bytes, or too many")
        })?;
        if *end - *begin != wanted {
            return Err(format!(
                "{at} are {} bytes, {dtype} of shape {shape:?} has {wanted}",
                *end - *begin
            ));
        }
        covered = *end;
        before = format!("{name:?}");
        (*begin, *end) = (data + *begin, data + *end);
    }
    if covered != length {
        return Err(format!(
            "its tensors end at byte {covered} of the data, the file has {length}"
        ));
    }
    Ok(())
}

/// Bytes of a tensor; `None` if they are not whole, or more than 64 bits can count.
fn byte_size(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    let values = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size))?;
    let bits = values.checked_mul(dtype.bitsize() as u64)?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// Whether a name can be shown as it is: nothing in it moves the cursor, hides or turns text.
pub(crate) fn is_printable(name: &str) -> bool {
    !name.chars().any(|c| {
        c.is_control()
            || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}')
            || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
            || matches!(c, '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
    })
}

/// The JSON object, as it stands.
struct Fields {
    tensors: Vec<Tensor>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Found;
        impl<'de> Visitor<'de> for Found {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let (mut tensors, mut metadata) = (Vec::new(), None);
                let mut seen = std::collections::HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        let found: Option<Metadata> = map.next_value()?;
                        if metadata.replace(found.map_or_else(BTreeMap::new, |m| m.0)).is_some() {
                            return Err(A::Error::custom(format!("the key {METADATA} twice")));
                        }
                        continue;
                    }
                    if !is_printable(&name) {
                        let what =
                            format!("the name {name:?} of a tensor holds control characters");
                        return Err(A::Error::custom(what));
                    }
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("the key {name:?} twice")));
                    }
                    tensors.push(map.next_value_seed(Entry { name })?);
                }
                Ok(Fields { tensors, metadata: metadata.unwrap_or_default() })
            }
        }
        from.deserialize_map(Found)
    }
}

/// `__metadata__`: strings by name, each name once.
struct Metadata(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(Strings { of: METADATA }).map(Self)
    }
}

/// An object of strings by name, each name once.
pub(crate) struct Strings {
    /// Where it stands.
    pub(crate) of: &'static str,
}

impl<'de> Visitor<'de> for Strings {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as an object of strings", self.of)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            if found.contains_key(&key) {
                return Err(A::Error::custom(format!("the key {key:?} twice in {}", self.of)));
            }
            found.insert(key, value);
        }
        Ok(found)
    }
}

impl<'de> DeserializeSeed<'de> for Strings {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_map(self)
    }
}

/// One tensor: an object of exactly three fields.
struct Entry {
    name: String,
}

impl<'de> DeserializeSeed<'de> for Entry {
    type Value = Tensor;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Tensor, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entry {
    type Value = Tensor;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tensor {:?} as an object of dtype, shape and data_offsets", self.name)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tensor, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        let name = self.name;
        while let Some(field) = map.next_key::<String>()? {
            let twice = match field.as_str() {
                "dtype" => dtype.replace(dtype_of(&name, &map.next_value::<String>()?)?).is_some(),
                "shape" => shape.replace(map.next_value::<Sizes>()?.0).is_some(),
                "data_offsets" => offsets.replace(map.next_value::<(u64, u64)>()?).is_some(),
                _ => {
                    let what = format!(
                        "tensor {name:?}: field {field:?}, allowed are dtype, shape, data_offsets"
                    );
                    return Err(A::Error::custom(what));
                }
            };
            if twice {
                return Err(A::Error::custom(format!("tensor {name:?}: field {field:?} twice")));
            }
        }
        let (Some(dtype), Some(shape), Some((begin, end))) = (dtype, shape, offsets) else {
            let what = format!("tensor {name:?} needs dtype, shape and data_offsets");
            return Err(A::Error::custom(what));
        };
        Ok(Tensor { name, dtype, shape, begin, end })
    }
}

fn dtype_of<E: Error>(name: &str, dtype: &str) -> Result<Dtype, E> {
    let shown = shortened(&dtype.escape_debug().to_string()); // of a dtype that exists: itself
    let from: StrDeserializer<'_, ValueError> = shown.as_str().into_deserializer();
    Dtype::deserialize(from).map_err(|error| E::custom(format!("tensor {name:?}: dtype: {error}")))
}

/// A shape: no more sizes than a tensor can have, however long the list is.
struct Sizes(Vec<u64>);

impl<'de> Deserialize<'de> for Sizes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Sizes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Sizes, A::Error> {
                let mut sizes = Vec::new();
                while let Some(size) = list.next_element()? {
                    if sizes.len() == MAX_DIMENSIONS {
                        let what = format!("a shape of more than {MAX_DIMENSIONS} dimensions");
                        return Err(A::Error::custom(what));
                    }
                    sizes.push(size);
                }
                Ok(Sizes(sizes))
            }
        }
        from.deserialize_seq(List)
    }
}

#[cfg(test)]
mod tests;
