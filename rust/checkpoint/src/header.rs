//! The header of a safetensors file, checked in every part before anything is believed.
//!
//! Eight bytes of length (little-endian), JSON of that length, then the data:
//! <https://github.com/huggingface/safetensors>. What is accepted here, that crate accepts with the
//! same result; refused are also duplicate keys, fields that it would ignore, and names that cannot
//! be printed.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use safetensors::Dtype;

use self::fields::Fields;

use crate::files::{self, Stamp};
use crate::CheckpointError;

pub(crate) mod fields;

/// The longest header that is read: the limit of the `safetensors` crate.
pub const MAX_HEADER: u64 = 100_000_000;
/// The most dimensions of a tensor: the limit of `NumPy`, and of most of torch's operators.
pub const MAX_DIMENSIONS: usize = 64;

/// Bytes of the length before the header.
const LENGTH: u64 = 8;

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

#[cfg(test)]
mod tests;
