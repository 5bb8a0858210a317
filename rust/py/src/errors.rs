//! Errors as the classes of `qkern.errors`, which is imported when the first one is raised.

use std::io::ErrorKind;
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
    named(py, error, error.to_string())
}

/// The same with a text of its own.
fn named(py: Python<'_>, error: &CodecError, message: String) -> PyErr {
    let class = match error {
        CodecError::Length { .. } | CodecError::Columns { .. } => "ShapeError",
        CodecError::NonFinite { .. } => "NonFiniteError",
        CodecError::UnknownSimd { .. } | CodecError::UnavailableSimd { .. } => "NativeError",
        _ => "FormatError",
    };
    let raised = raise(py, class, message);
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
        CheckpointError::Io { path, source, .. } => io(py, path, source, error.to_string()),
        CheckpointError::Tensor { source, .. } => named(py, source, error.to_string()),
        CheckpointError::Overflow { .. } => raise(py, "NonFiniteError", error.to_string()),
        CheckpointError::Job { .. } => raise(py, "ShapeError", error.to_string()),
        _ => raise(py, "CorruptFileError", error.to_string()),
    }
}

/// The class of `OSError` that the system's number asks for, with the file's name.
fn io(py: Python<'_>, path: &Path, source: &std::io::Error, message: String) -> PyErr {
    let Some(number) = source.raw_os_error() else { return PyOSError::new_err(message) };
    let text = message.clone();
    let arguments = (number, message, path.as_os_str().to_owned());
    let full = [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge];
    if full.contains(&source.kind()) {
        instance(py, "OutOfSpaceError", arguments).unwrap_or_else(|| PyOSError::new_err(text))
    } else {
        PyOSError::new_err(arguments)
    }
}

/// A panic: `text` says what and where.
pub(crate) fn panic(py: Python<'_>, text: &str) -> PyErr {
    let advice = "this is a bug in qkern, please report it with this text; what the call wrote is \
                  unspecified, other calls are not affected";
    raise(py, "NativeError", format!("native code {text}: {advice}"))
}

fn raise(py: Python<'_>, class: &str, message: String) -> PyErr {
    let text = message.clone();
    instance(py, class, (message,)).unwrap_or_else(|| PyRuntimeError::new_err(text))
}

/// An error of a class of `qkern.errors`; none if the extension was taken out of its package.
fn instance<'py>(
    py: Python<'py>,
    class: &str,
    arguments: impl pyo3::call::PyCallArgs<'py>,
) -> Option<PyErr> {
    let class = py.import("qkern.errors").and_then(|module| module.getattr(class)).ok()?;
    Some(match class.call1(arguments) {
        Ok(error) => PyErr::from_value(error),
        Err(failed) => failed,
    })
}
