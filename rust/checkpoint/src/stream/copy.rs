//! A tensor whose bytes go over as they are, or each by itself as something else.

use std::sync::{Mutex, PoisonError};

use super::blocks::e8m0;
use super::job::{Change, Done, Span};
use super::queue::Passes;
use super::weight::combined;
use super::Files;
use crate::error::CheckpointError;

/// Bytes of a chunk.
const CHUNK: u64 = 1 << 20;

/// A copy at work.
pub(super) struct CopyRun<'a> {
    pub(super) job: usize,
    pub(super) nbytes: u64,
    pub(super) change: Change,
    pub(super) source: Span,
    pub(super) target: Span,
    pub(super) files: &'a Files<'a>,
    pub(super) crcs: Mutex<Vec<(u32, u64)>>,
}

impl Passes for CopyRun<'_> {
    fn chunks(&self, _pass: usize) -> usize {
        self.nbytes.div_ceil(CHUNK).max(1) as usize
    }
}

impl CopyRun<'_> {
    pub(super) fn bytes(&self, chunk: usize) -> u64 {
        CHUNK.min(self.nbytes - chunk as u64 * CHUNK)
    }

    pub(super) fn work(&self, chunk: usize, buffer: &mut Vec<u8>) -> Result<(), CheckpointError> {
        let start = chunk as u64 * CHUNK;
        buffer.resize(self.bytes(chunk) as usize, 0);
        self.files.inputs[self.source.file].read(buffer, self.source.offset + start)?;
        match self.change {
            Change::None => {}
            Change::SwappedNibbles => {
                for byte in buffer.iter_mut() {
                    *byte = byte.rotate_left(4);
                }
            }
            Change::E8m0ToF32 => {
                *buffer = buffer.iter().flat_map(|byte| e8m0(*byte).to_le_bytes()).collect();
            }
        }
        let offset = self.target.offset + start * self.change.growth();
        self.files.outputs[self.target.file].write(buffer, offset)?;
        let crc = (crc32fast::hash(buffer), buffer.len() as u64);
        let mut crcs = self.crcs.lock().unwrap_or_else(PoisonError::into_inner);
        if crcs.len() <= chunk {
            crcs.resize(chunk + 1, (0, 0));
        }
        crcs[chunk] = crc;
        Ok(())
    }

    pub(super) fn done(&self) -> Done {
        let crcs = self.crcs.lock().unwrap_or_else(PoisonError::into_inner);
        Done {
            job: self.job,
            double_quant: false,
            offset: 0.0,
            crc: combined(&crcs),
            crc_scales: 0,
            errors: None,
        }
    }
}
