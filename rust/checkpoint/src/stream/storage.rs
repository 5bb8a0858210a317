//! Files read and written at places, by several threads at a time.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::Path;

use crate::error::CheckpointError;

/// What a run needs of a file; of the tests, something that fails.
pub(super) trait Storage: Sync {
    /// Reads some of the bytes at `offset`.
    fn read_some(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes some of the bytes at `offset`.
    fn write_some(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;
}

impl Storage for File {
    #[cfg(unix)]
    fn read_some(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(self, bytes, offset)
    }

    #[cfg(unix)]
    fn write_some(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::write_at(self, bytes, offset)
    }

    // These move the file's own cursor, which nobody uses.
    #[cfg(windows)]
    fn read_some(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        std::os::windows::fs::FileExt::seek_read(self, bytes, offset)
    }

    #[cfg(windows)]
    fn write_some(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        std::os::windows::fs::FileExt::seek_write(self, bytes, offset)
    }
}

/// A file of a run, by its name too.
pub(super) struct Place<'a> {
    pub(super) path: &'a Path,
    pub(super) storage: &'a dyn Storage,
}

impl Place<'_> {
    /// Fills `bytes` from `offset` on.
    pub(super) fn read(&self, bytes: &mut [u8], offset: u64) -> Result<(), CheckpointError> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset.saturating_add(done as u64);
            match self.storage.read_some(&mut bytes[done..], at) {
                Ok(0) => {
                    let what = format!(
                        "ends at byte {at}, {} more are needed: it was cut off, or changed while \
                         it was read",
                        bytes.len() - done
                    );
                    return Err(CheckpointError::corrupt(self.path, what));
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(CheckpointError::io(self.path, "read")(error)),
            }
        }
        Ok(())
    }

    /// Writes all of `bytes` from `offset` on.
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> Result<(), CheckpointError> {
        let mut done = 0;
        while done < bytes.len() {
            match self.storage.write_some(&bytes[done..], offset.saturating_add(done as u64)) {
                Ok(0) => {
                    let error = io::Error::from(ErrorKind::WriteZero);
                    return Err(CheckpointError::io(self.path, "write")(error));
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(CheckpointError::io(self.path, "write")(error)),
            }
        }
        Ok(())
    }
}
