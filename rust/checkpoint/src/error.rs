//! What can go wrong with a checkpoint.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

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
        }
    }
}

impl std::error::Error for CheckpointError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
