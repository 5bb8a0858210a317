//! Errors as the classes of `qkern.errors`, which is imported when the first one is raised.

use std::path::Path;

use pyo3::exceptions::{PyFileNotFoundError, PyOSError, PyRuntimeError};
use pyo3::prelude::*;
use qkern_checkpoint::CheckpointError;
use qkern_codec::CodecError;

/// A tensor whose size or place in memory does not fit the call.
pub(crate) fn shape(py: Python<'_>, message: String) -> PyErr {
    raise(py, "ShapeError", message)
}

/// A dtype that is not the one that the call takes.
pub(crate) fn dtype(py: Python<'_>, message: String) -> PyErr {
    raise(py, "DTypeError", message)
}

/// A setting that no format allows.
pub(crate) fn format(py: Python<'_>, message: String) -> PyErr {
    raise(py, "FormatError", message)
}

/// The error of the codec; `NonFiniteError` carries `index` and `count` as attributes too.
pub(crate) fn codec(py: Python<'_>, error: &CodecError) -> PyErr {
    let class = match error {
        CodecError::Length { .. } | CodecError::Columns { .. } => "ShapeError",
        CodecError::NonFinite { .. } => "NonFiniteError",
        CodecError::UnknownSimd { .. } | CodecError::UnavailableSimd { .. } => "NativeError",
        _ => "FormatError",
    };
    let raised = raise(py, class, error.to_string());
    if let CodecError::NonFinite { index, count } = error {
        let value = raised.value(py);
        if let Err(failed) = value.setattr("index", index).and(value.setattr("count", count)) {
            return failed;
        }
    }
    raised
}

/// The error of a checkpoint.
pub(crate) fn checkpoint(py: Python<'_>, error: &CheckpointError) -> PyErr {
    match error {
        CheckpointError::Missing { .. } => PyFileNotFoundError::new_err(error.to_string()),
        CheckpointError::Io { path, source, .. } => io(path, source, error.to_string()),
        _ => raise(py, "CorruptFileError", error.to_string()),
    }
}

/// The class of `OSError` that the system's number asks for, with the file's name.
fn io(path: &Path, source: &std::io::Error, message: String) -> PyErr {
    match source.raw_os_error() {
        Some(number) => PyOSError::new_err((number, message, path.as_os_str().to_owned())),
        None => PyOSError::new_err(message),
    }
}

/// A panic: `text` says what and where.
pub(crate) fn panic(py: Python<'_>, text: &str) -> PyErr {
    let advice = "this is a bug in qkern, please report it with this text; what the call wrote is \
                  unspecified, other calls are not affected";
    raise(py, "NativeError", format!("native code {text}: {advice}"))
}

fn raise(py: Python<'_>, class: &str, message: String) -> PyErr {
    match py.import("qkern.errors").and_then(|module| module.getattr(class)) {
        Ok(class) => match class.call1((message,)) {
            Ok(error) => PyErr::from_value(error),
            Err(failed) => failed,
        },
        Err(_) => PyRuntimeError::new_err(message), // the extension was taken out of its package
    }
}
