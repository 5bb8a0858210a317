//! Files in memory, which can fail; runs on them.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use qkern_codec::Engine;

use crate::files::Storage;
use crate::stream::*;

/// A file in memory; reads and writes at most `most` bytes at a time, fails at byte `fails_at`, and
/// is interrupted now and then.
pub(super) struct Memory {
    pub(super) bytes: Mutex<Vec<u8>>,
    pub(super) most: usize,
    pub(super) fails_at: u64,
    pub(super) calls: AtomicUsize,
}

impl Memory {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            most: usize::MAX,
            fails_at: u64::MAX,
            calls: AtomicUsize::new(0),
        }
    }

    /// An output, of bytes that are no result.
    pub(super) fn room(len: usize) -> Self {
        Self::new(vec![0xa5; len])
    }

    pub(super) fn take(self) -> Vec<u8> {
        self.bytes.into_inner().unwrap()
    }

    fn some(&self, len: usize) -> io::Result<usize> {
        if self.most < usize::MAX && self.calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(3) {
            return Err(ErrorKind::Interrupted.into());
        }
        Ok(len.min(self.most))
    }
}

impl Storage for Memory {
    fn read_some(&self, to: &mut [u8], offset: u64) -> io::Result<usize> {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = bytes.get(offset as usize..).unwrap_or_default();
        let count = self.some(to.len().min(rest.len()))?;
        to[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn write_some(&self, from: &[u8], offset: u64) -> io::Result<usize> {
        let count = self.some(from.len())?;
        if offset + count as u64 > self.fails_at {
            return Err(ErrorKind::StorageFull.into());
        }
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        bytes[offset as usize..][..count].copy_from_slice(&from[..count]);
        Ok(count)
    }
}

/// Keeps what it is told, and stops after so many jobs.
pub(super) struct Keeper {
    pub(super) done: Vec<Done>,
    pub(super) bytes: u64,
    pub(super) most: usize,
}

impl Observer for Keeper {
    fn done(&mut self, done: Done) -> Continue {
        self.done.push(done);
        if self.done.len() < self.most {
            Continue::Yes
        } else {
            Continue::No
        }
    }

    fn progress(&mut self, bytes: u64) -> Continue {
        self.bytes += bytes;
        Continue::Yes
    }
}

pub(super) type Outcome = (Result<(), CheckpointError>, Vec<Done>, u64);

pub(super) fn stream_until(
    most: usize,
    jobs: &[Job],
    input: &Memory,
    output: &Memory,
    threads: usize,
) -> Outcome {
    let place = |name, storage| vec![Place { path: Path::new(name), storage }];
    let access = Access::Mapped;
    let files = Files { inputs: place("in", input), outputs: place("out", output), access };
    let mut keeper = Keeper { done: Vec::new(), bytes: 0, most };
    let engine = Engine { threads, ..Engine::detect().unwrap() };
    let result = run_on(jobs, &files, engine, &mut keeper);
    keeper.done.sort_by_key(|done| done.job);
    (result, keeper.done, keeper.bytes)
}

pub(super) fn stream(jobs: &[Job], input: &Memory, output: &Memory, threads: usize) -> Outcome {
    stream_until(usize::MAX, jobs, input, output, threads)
}
