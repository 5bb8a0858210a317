//! A weight at work: chunks of values become codes and scales, or values of another dtype.
//!
//! ```text
//! dense target                      round
//! quantized, scales are absmax      encode  -> 8-bit scales -> (measure)
//! quantized, scales are searched    search  -> 8-bit scales -> code  -> (measure)
//! ```
//!
//! Each word is a pass over all chunks; what comes between is done once, by the thread that
//! finished the last chunk. Errors are measured against the scales as they will be decoded.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use qkern_codec::{Codebook, Engine};

use super::fill::ReadBuffers;
use super::job::{Done, Errors, Source, Target, Weight};
use super::queue::Passes;
use super::values::{Reader, ValueBuffer};
use super::{Files, Place};
use crate::error::CheckpointError;

/// Values of a chunk, at least: what is read and written stays in a core's cache. A multiple of
/// every block size.
pub(super) const CHUNK: usize = 1 << 18;

/// What a thread keeps from chunk to chunk.
#[derive(Default)]
pub(super) struct Buffers {
    pub(super) bytes: Vec<u8>,
    pub(super) read: ReadBuffers,
    pub(super) rounded: ValueBuffer,
    pub(super) wide: Vec<f32>,
    pub(super) again: Vec<f32>,
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<f32>,
}

/// What is done to every chunk, one after the other.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Pass {
    Round,
    Encode,
    Search,
    Code,
    Measure,
}

/// A weight at work.
pub(super) struct WeightRun<'a> {
    job: usize,
    pub(super) weight: &'a Weight,
    pub(super) files: &'a Files<'a>,
    pub(super) engine: Engine,
    passes: Vec<Pass>,
    pub(super) codebook: Option<Codebook>,
    chunk: usize,
    state: Mutex<State>,
}

/// What chunks have found so far.
pub(super) struct State {
    /// fp32 scales, as found; after the first pass, as they will be decoded.
    pub(super) scales: Vec<f32>,
    /// First place and number of values that are not finite.
    pub(super) nonfinite: Option<(usize, usize)>,
    /// CRC-32 and length of what each chunk wrote.
    crcs: Vec<(u32, u64)>,
    pub(super) errors: Vec<Errors>,
    pub(super) double_quant: bool,
    pub(super) offset: f32,
    pub(super) crc_scales: u32,
}

impl Passes for WeightRun<'_> {
    fn chunks(&self, _pass: usize) -> usize {
        self.weight.numel.div_ceil(self.chunk).max(1)
    }
}

impl<'a> WeightRun<'a> {
    pub(super) fn new(
        job: usize,
        weight: &'a Weight,
        files: &'a Files<'a>,
        engine: Engine,
    ) -> Result<Self, CheckpointError> {
        let (passes, format) = match &weight.target {
            Target::Dense { .. } => (vec![Pass::Round], None),
            Target::Quantized(coded) => (coded.passes(), Some(&coded.format)),
        };
        let mut run = Self {
            job,
            weight,
            files,
            engine,
            passes,
            codebook: None,
            chunk: CHUNK,
            state: Mutex::new(State::new()),
        };
        if let Some(format) = format {
            let table = format.code.as_ref().map(Codebook::new).transpose();
            run.codebook = table.map_err(|source| weight.refused(source))?;
            if format.per_row {
                run.chunk = (CHUNK / format.blocksize).max(1) * format.blocksize;
            }
            let blocks = format.num_blocks(weight.numel);
            run.state().scales = vec![0.0; blocks];
        }
        if let Some(rows) = weight.transposed {
            run.chunk = rows * weight.row;
        }
        let chunks = run.chunks(0);
        run.state().crcs = vec![(0, 0); chunks];
        run.state().errors = vec![Errors::default(); chunks];
        Ok(run)
    }

    /// Whether errors are measured: of what is quantized if wanted, of what is merged always.
    fn measures(&self) -> bool {
        self.passes.contains(&Pass::Measure)
            || self.weight.delta.is_some() && self.passes.contains(&Pass::Round)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The values of chunk number `chunk`.
    pub(super) fn places(&self, chunk: usize) -> Range<usize> {
        let start = chunk * self.chunk;
        start..self.weight.numel.min(start + self.chunk)
    }

    /// Bytes that are read for chunk number `chunk` of pass number `pass`, as progress counts them.
    pub(super) fn bytes(&self, pass: usize, chunk: usize) -> u64 {
        if pass > 0 {
            return 0;
        }
        let places = self.places(chunk);
        match &self.weight.source {
            Source::Dense { dtype, .. } => (places.len() * dtype.size()) as u64,
            Source::Quantized(stored) => stored.format.packed_size(places.len()) as u64,
            Source::Blocks(_) => places.len() as u64 / 2,
        }
    }

    /// Does chunk number `chunk` of pass number `pass`.
    pub(super) fn work(
        &self,
        pass: usize,
        chunk: usize,
        buffers: &mut Buffers,
    ) -> Result<(), CheckpointError> {
        let places = self.places(chunk);
        if places.is_empty() {
            return Ok(());
        }
        match (&self.weight.target, self.passes[pass]) {
            (Target::Dense { dtype, at }, _) => match self.weight.transposed {
                Some(rows) => self.transpose(*dtype, *at, rows, chunk, buffers),
                None => self.round(*dtype, *at, &places, chunk, buffers),
            },
            (Target::Quantized(coded), Pass::Encode) => self.encode(coded, places, chunk, buffers),
            (Target::Quantized(coded), Pass::Search) => self.search(coded, places, buffers),
            (Target::Quantized(coded), Pass::Code) => self.code(coded, places, chunk, buffers),
            (Target::Quantized(coded), _) => self.measure(coded, places, chunk, buffers),
        }
    }

    /// After the last chunk of pass number `pass`: the next pass, or what became of the job.
    pub(super) fn end(&self, pass: usize) -> Result<Option<Done>, CheckpointError> {
        if let (Target::Quantized(coded), 0) = (&self.weight.target, pass) {
            self.settle(coded)?;
        }
        if pass + 1 < self.passes.len() {
            return Ok(None);
        }
        let state = self.state();
        Ok(Some(Done {
            job: self.job,
            double_quant: state.double_quant,
            offset: state.offset,
            crc: combined(&state.crcs),
            crc_scales: state.crc_scales,
            errors: self.measures().then(|| Errors::sum(&state.errors)),
        }))
    }

    pub(super) fn reader(&self) -> Reader<'_> {
        Reader {
            weight: self.weight,
            inputs: &self.files.inputs,
            access: self.files.access,
            engine: self.engine,
        }
    }

    pub(super) fn write(
        &self,
        place: &Place<'_>,
        bytes: &[u8],
        offset: u64,
        chunk: usize,
    ) -> Result<(), CheckpointError> {
        place.write(bytes, offset)?;
        self.state().crcs[chunk] = (crc32fast::hash(bytes), bytes.len() as u64);
        Ok(())
    }
}

impl State {
    fn new() -> Self {
        Self {
            scales: Vec::new(),
            nonfinite: None,
            crcs: Vec::new(),
            errors: Vec::new(),
            double_quant: false,
            offset: 0.0,
            crc_scales: 0,
        }
    }
}

/// The CRC-32 of parts one behind the other.
pub(super) fn combined(parts: &[(u32, u64)]) -> u32 {
    let mut whole = crc32fast::Hasher::new();
    for (crc, len) in parts {
        whole.combine(&crc32fast::Hasher::new_with_initial_len(*crc, *len));
    }
    whole.finalize()
}
