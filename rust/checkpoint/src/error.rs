//! What can go wrong with a checkpoint.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use qkern_codec::CodecError;

/// An error that names the file it is about.
#[derive(Debug)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file whose content contradicts itself, its size, or another file.
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found, and what is allowed.
        what: String,
    },
    /// A file that is needed and is not there.
    Missing {
        /// The file or directory.
        path: PathBuf,
        /// What is missing, `path` included, and what is there.
        what: String,
    },
    /// The system refused.
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried, as a verb: "open", "read".
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Values of a tensor that the codec refuses.
    Tensor {
        /// Its name.
        name: String,
        /// What the codec says.
        source: CodecError,
    },
    /// A finite value that a dtype cannot hold.
    Overflow {
        /// Name of the tensor.
        name: String,
        /// Place of the value in the flat tensor.
        index: usize,
        /// The dtype.
        dtype: &'static str,
    },
    /// A job that cannot be done as it is described.
    Job {
        /// Name of its tensor.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// Whoever watches the run ended it.
    Stopped,
}

impl CheckpointError {
    /// `Corrupt`.
    pub(crate) fn corrupt(path: &Path, what: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), what: what.into() }
    }

    /// For `map_err` of something that was tried with the file at `path`.
    pub(crate) fn io(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, doing, source }
    }
}

impl fmt::Display for CheckpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Corrupt { path, what } => write!(f, "{}: {what}", path.display()),
            Self::Missing { what, .. } => f.write_str(what),
            Self::Io { path, doing, source } => {
                write!(f, "cannot {doing} {}: {source}", path.display())
            }
            Self::Tensor { name, source } => write!(f, "{name}: {source}"),
            Self::Overflow { name, index, dtype } => write!(
                f,
                "{name}: the value at index {index} is too large for {dtype}: write the tensor as \
                 float32 or bfloat16"
            ),
            Self::Job { name, what } => write!(f, "{name}: {what}"),
            Self::Stopped => write!(f, "stopped; what was written is incomplete"),
        }
    }
}

impl std::error::Error for CheckpointError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::Tensor { source, .. } => Some(source),
            _ => None,
        }
    }
}
