//! Files opened, read and written by place. Headers are never mapped: a file that shrinks is then an
//! error, and not a signal.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use memmap2::{Mmap, MmapOptions};

use crate::CheckpointError;

/// What tells whether a file is still the one that was read before.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Stamp {
    /// Its size in bytes.
    pub size: u64,
    /// When it was last written, in nanoseconds since 1970; 0 if the system does not say.
    pub modified_ns: i128,
}

/// Opens a regular file; links are followed.
///
/// # Errors
///
/// `Missing` if there is none, or something else of that name: a pipe would be waited for.
pub(crate) fn open(path: &Path) -> Result<(File, Stamp), CheckpointError> {
    let missing = |what: String| CheckpointError::Missing { path: path.to_owned(), what };
    match fs::metadata(path) {
        Ok(found) if found.is_file() => {}
        Ok(_) => return Err(missing(format!("{} is no file", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(missing(format!("there is no {}", path.display())));
        }
        Err(error) => return Err(CheckpointError::io(path, "open")(error)),
    }
    let file = File::open(path).map_err(CheckpointError::io(path, "open"))?;
    let found = file.metadata().map_err(CheckpointError::io(path, "open"))?;
    let modified_ns = found.modified().map_or(0, nanoseconds);
    Ok((file, Stamp { size: found.len(), modified_ns }))
}

fn nanoseconds(time: SystemTime) -> i128 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => after.as_nanos().cast_signed(),
        Err(before) => -before.duration().as_nanos().cast_signed(),
    }
}

/// A file read and written by place, by several threads at a time; of the tests, one that fails.
pub(crate) trait Storage: Sync {
    /// Reads some of the bytes at `offset`; none at the end.
    fn read_some(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes some of the bytes at `offset`.
    fn write_some(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;
    /// Maps the bytes at `offset`, at least `least` and at most `most`; none where they cannot be.
    fn map(&self, _offset: u64, _least: usize, _most: usize) -> Option<Mmap> {
        None
    }
}

#[cfg(unix)]
impl Storage for File {
    fn read_some(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(self, bytes, offset)
    }

    fn write_some(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::write_at(self, bytes, offset)
    }

    fn map(&self, offset: u64, least: usize, most: usize) -> Option<Mmap> {
        map(self, offset, least, most)
    }
}

/// These move the file's own cursor, which nobody uses.
#[cfg(windows)]
impl Storage for File {
    fn read_some(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        std::os::windows::fs::FileExt::seek_read(self, bytes, offset)
    }

    fn write_some(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        std::os::windows::fs::FileExt::seek_write(self, bytes, offset)
    }

    fn map(&self, offset: u64, least: usize, most: usize) -> Option<Mmap> {
        map(self, offset, least, most)
    }
}

/// Maps bytes that the file has at this moment. Whoever cuts it while they are used ends the process
/// by a signal: that is why it is a caller's choice.
#[allow(unsafe_code)]
fn map(file: &File, offset: u64, least: usize, most: usize) -> Option<Mmap> {
    let left = usize::try_from(file.metadata().ok()?.len().checked_sub(offset)?);
    let len = most.max(least).min(left.unwrap_or(usize::MAX));
    if len == 0 || len < least {
        return None; // reading says what is wrong
    }
    let mut options = MmapOptions::new();
    options.offset(offset).len(len);
    // SAFETY: the bytes are used as numbers, of which any bits are valid. Another process may change
    // them meanwhile; then the numbers are the old ones or the new ones, as if they were read.
    let bytes = unsafe { options.map(file) }.ok()?;
    // All of it at once: page by page a disk is far slower. What is in memory costs nothing here.
    #[cfg(unix)]
    let _ = bytes.advise(memmap2::Advice::WillNeed);
    Some(bytes)
}

/// Reads `bytes` that begin at `offset`.
///
/// # Errors
///
/// `Corrupt` if the file ends before that: it has become shorter.
pub(crate) fn read_at(
    file: &dyn Storage,
    path: &Path,
    mut bytes: &mut [u8],
    mut offset: u64,
) -> Result<(), CheckpointError> {
    while !bytes.is_empty() {
        match file.read_some(bytes, offset) {
            Ok(0) => {
                let what = format!("the file ends at byte {offset}, while it is read");
                return Err(CheckpointError::corrupt(path, what));
            }
            Ok(count) => {
                bytes = &mut bytes[count..];
                offset = offset.saturating_add(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(CheckpointError::io(path, "read")(error)),
        }
    }
    Ok(())
}

/// Writes `bytes` from `offset` on.
///
/// # Errors
///
/// `Io`, also of a system that takes no byte and gives no reason.
pub(crate) fn write_at(
    file: &dyn Storage,
    path: &Path,
    mut bytes: &[u8],
    mut offset: u64,
) -> Result<(), CheckpointError> {
    while !bytes.is_empty() {
        match file.write_some(bytes, offset) {
            Ok(0) => {
                let error = io::Error::from(io::ErrorKind::WriteZero);
                return Err(CheckpointError::io(path, "write")(error));
            }
            Ok(count) => {
                bytes = &bytes[count..];
                offset = offset.saturating_add(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(CheckpointError::io(path, "write")(error)),
        }
    }
    Ok(())
}
