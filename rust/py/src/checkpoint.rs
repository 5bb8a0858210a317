//! What the files of a checkpoint hold.

use std::ffi::OsString;
use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyTuple;
use qkern_checkpoint::{Checkpoint, Header};

use crate::detached::caught;
use crate::errors;

/// A tensor: name, dtype, shape, number of its file, first byte and end.
type Entry<'py> = (String, String, Bound<'py, PyTuple>, usize, u64, u64);
/// Size of a file and when it was last written, in nanoseconds.
type Stamp = (u64, i128);
type Metadata = std::collections::BTreeMap<String, String>;

/// Reads and checks index and headers of the checkpoint at `path`, a directory or a file.
#[pyfunction]
#[allow(clippy::type_complexity, clippy::needless_pass_by_value)] // the signature that Python sees
pub(crate) fn read_checkpoint(
    py: Python<'_>,
    path: PathBuf,
) -> PyResult<(Vec<OsString>, Vec<Entry<'_>>, Vec<Metadata>, Vec<Stamp>)> {
    let Checkpoint { files, headers } =
        caught(py, || Checkpoint::read(&path))?.map_err(|error| errors::checkpoint(py, &error))?;
    let stamps = headers.iter().map(|Header { stamp, .. }| (stamp.size, stamp.modified_ns));
    let stamps = stamps.collect();
    let (mut entries, mut metadata) = (Vec::new(), Vec::new());
    for (file, header) in headers.into_iter().enumerate() {
        for tensor in header.tensors {
            let shape = PyTuple::new(py, tensor.shape)?;
            let dtype = tensor.dtype.to_string();
            entries.push((tensor.name, dtype, shape, file, tensor.begin, tensor.end));
        }
        metadata.push(header.metadata);
    }
    Ok((files.into_iter().map(PathBuf::into_os_string).collect(), entries, metadata, stamps))
}
