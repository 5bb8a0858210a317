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

use bytemuck::{cast_slice, cast_slice_mut};
use qkern_codec::{
    dequantize_absmax, encode_4bit, quantize_4bit, quantize_absmax, quantize_int8,
    quantize_int8_rows, search_scales, Codebook, CodecError, Engine, NonFinite, Values,
};

use super::job::{num_groups, Coded, Done, Dtype, Errors, Source, Span, Target, Weight};
use super::queue::Passes;
use super::values::{
    bytes_of, decode, has_infinite, is, round, widen, widened, CodeBuffer, Reader, ValueBuffer,
};
use super::{Files, Place};
use crate::error::CheckpointError;

/// Values of a chunk, at least: what is read and written stays in a core's cache. A multiple of
/// every block size.
const CHUNK: usize = 1 << 18;
/// Of a tensor of several chunks, the errors of so many values at the start of each are measured.
const MEASURED: usize = 1 << 13;
/// Bytes of a cache line.
const LINE: usize = 64;

/// What a thread keeps from chunk to chunk.
#[derive(Default)]
pub(super) struct Buffers {
    pub(super) bytes: Vec<u8>,
    read: ReadBuffers,
    rounded: ValueBuffer,
    wide: Vec<f32>,
    again: Vec<f32>,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

/// Where the values of a chunk are put.
#[derive(Default)]
struct ReadBuffers {
    values: ValueBuffer,
    wide: Vec<f32>,
    scratch: CodeBuffer,
}

/// What was put there.
struct Filled {
    dtype: Dtype,
    range: Range<usize>,
    is_sum: bool,
    squared_delta: f64,
}

impl ReadBuffers {
    fn values(&self, filled: &Filled) -> Values<'_> {
        let Filled { dtype, range, is_sum, .. } = filled;
        if *is_sum {
            Values::F32(&self.wide[range.clone()])
        } else {
            self.values.values(*dtype, range.clone())
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Round,
    Encode,
    Search,
    Code,
    Measure,
}

/// A weight at work.
pub(super) struct WeightRun<'a> {
    job: usize,
    weight: &'a Weight,
    files: &'a Files<'a>,
    engine: Engine,
    passes: Vec<Pass>,
    codebook: Option<Codebook>,
    chunk: usize,
    state: Mutex<State>,
}

/// What chunks have found so far.
struct State {
    /// fp32 scales, as found; after the first pass, as they will be decoded.
    scales: Vec<f32>,
    /// First place and number of values that are not finite.
    nonfinite: Option<(usize, usize)>,
    /// CRC-32 and length of what each chunk wrote.
    crcs: Vec<(u32, u64)>,
    errors: Vec<Errors>,
    double_quant: bool,
    offset: f32,
    crc_scales: u32,
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

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The values of chunk number `chunk`.
    fn places(&self, chunk: usize) -> Range<usize> {
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

    fn reader(&self) -> Reader<'_> {
        Reader {
            weight: self.weight,
            inputs: &self.files.inputs,
            access: self.files.access,
            engine: self.engine,
        }
    }

    /// Reads values: as they are, or decoded to `dtype`, or widened with the adapter's part added.
    /// Returns the sum of that one's squares, too.
    fn read<'b>(
        &self,
        places: &Range<usize>,
        dtype: Dtype,
        read: &'b mut ReadBuffers,
    ) -> Result<(Values<'b>, f64), CheckpointError> {
        let filled = self.fill(places, dtype, read)?;
        Ok((read.values(&filled), filled.squared_delta))
    }

    /// The same, to be looked at by [`ReadBuffers::values`].
    fn fill(
        &self,
        places: &Range<usize>,
        dtype: Dtype,
        read: &mut ReadBuffers,
    ) -> Result<Filled, CheckpointError> {
        let ReadBuffers { values, wide, scratch } = read;
        let delta = self.weight.delta.as_ref();
        let dtype = delta.map_or(dtype, |delta| delta.base);
        let (dtype, range) = self.reader().read(places.clone(), dtype, values, scratch)?;
        let Some(delta) = delta else {
            return Ok(Filled { dtype, range, is_sum: false, squared_delta: 0.0 });
        };
        let sums = widened(values.values(dtype, range), wide);
        let squared_delta = delta.add(places, self.weight.row, sums);
        Ok(Filled { dtype: Dtype::F32, range: 0..places.len(), is_sum: true, squared_delta })
    }

    /// Writes values as `to`.
    fn round(
        &self,
        to: Dtype,
        at: Span,
        places: &Range<usize>,
        chunk: usize,
        buffers: &mut Buffers,
    ) -> Result<(), CheckpointError> {
        let Buffers { read, rounded, wide, again, .. } = buffers;
        let (exact, result, squared_delta) = self.rounded(to, places, read, wide, rounded)?;
        if let (Some(_), Values::F32(exact)) = (&self.weight.delta, exact) {
            let errors = Errors::between(exact, widen(result, again));
            self.state().errors[chunk] = Errors { squared_delta, ..errors };
        }
        let offset = at.offset + (places.start * to.size()) as u64;
        self.write(&self.files.outputs[at.file], bytes_of(result), offset, chunk)
    }

    /// Values as they are, the same as `to`, and the sum of squares of what was added.
    fn rounded<'b>(
        &self,
        to: Dtype,
        places: &Range<usize>,
        read: &'b mut ReadBuffers,
        wide: &'b mut Vec<f32>,
        rounded: &'b mut ValueBuffer,
    ) -> Result<(Values<'b>, Values<'b>, f64), CheckpointError> {
        let mut filled = self.fill(places, to, read)?;
        if has_infinite(read.values(&filled)) {
            // Codes were decoded to the target's dtype: where it was too small for them.
            filled = self.fill(places, Dtype::F32, read)?;
        }
        let (exact, squared_delta) = (read.values(&filled), filled.squared_delta);
        if is(exact, to) {
            return Ok((exact, exact, squared_delta));
        }
        let (values, overflow) = round(widen(exact, wide), to, rounded);
        if let Some(index) = overflow {
            let (name, index) = (self.weight.name.clone(), places.start + index);
            return Err(CheckpointError::Overflow { name, index, dtype: to.name() });
        }
        Ok((exact, values, squared_delta))
    }

    /// Writes one matrix as `to`, its columns as rows.
    fn transpose(
        &self,
        to: Dtype,
        at: Span,
        rows: usize,
        chunk: usize,
        buffers: &mut Buffers,
    ) -> Result<(), CheckpointError> {
        let Buffers { bytes, read, rounded, wide, .. } = buffers;
        let (row, size, places) = (self.weight.row, to.size(), self.places(chunk));
        bytes.resize(places.len() * size, 0);
        // As many rows at a time as fill a cache line of the result, or a chunk.
        let most = (CHUNK / row).clamp(1, LINE / size);
        for first in (0..rows).step_by(most) {
            let count = most.min(rows - first);
            let start = places.start + first * row;
            let part = start..start + count * row;
            let (_, values, _) = self.rounded(to, &part, read, wide, rounded)?;
            let values = bytes_of(values);
            for column in 0..row {
                let to = &mut bytes[(column * rows + first) * size..][..count * size];
                for (i, to) in to.chunks_exact_mut(size).enumerate() {
                    to.copy_from_slice(&values[(i * row + column) * size..][..size]);
                }
            }
        }
        let offset = at.offset + (places.start * size) as u64;
        self.write(&self.files.outputs[at.file], bytes, offset, chunk)
    }

    /// Codes and scales at once: a scale is its block's absmax.
    fn encode(
        &self,
        coded: &Coded,
        places: Range<usize>,
        chunk: usize,
        buffers: &mut Buffers,
    ) -> Result<(), CheckpointError> {
        let Buffers { read, codes, scales, .. } = buffers;
        let (engine, format) = (self.engine, &coded.format);
        let (values, _) = self.read(&places, Dtype::F32, read)?;
        let blocksize = format.blocksize;
        codes.resize(format.packed_size(places.len()), 0);
        scales.resize(format.num_blocks(places.len()), 0.0);
        let (signed, refuse) = (cast_slice_mut(codes), NonFinite::Error);
        let result = match &self.codebook {
            Some(code) => quantize_4bit(engine, values, code, blocksize, refuse, codes, scales),
            None if format.per_row => {
                quantize_int8_rows(engine, values, blocksize, refuse, signed, scales)
            }
            None => quantize_int8(engine, values, blocksize, refuse, signed, scales),
        };
        self.keep_scales(&places, blocksize, scales, result)?;
        self.write_codes(coded, codes, &places, chunk)
    }

    /// Scales of least squared error.
    fn search(
        &self,
        coded: &Coded,
        places: Range<usize>,
        buffers: &mut Buffers,
    ) -> Result<(), CheckpointError> {
        let Buffers { read, scales, .. } = buffers;
        let Some(code) = &self.codebook else { return Ok(()) };
        let (values, _) = self.read(&places, Dtype::F32, read)?;
        let blocksize = coded.format.blocksize;
        scales.resize(coded.format.num_blocks(places.len()), 0.0);
        let refuse = NonFinite::Error;
        let result = search_scales(self.engine, values, code, blocksize, None, refuse, scales);
        self.keep_scales(&places, blocksize, scales, result)
    }

    /// Codes against the scales as they will be decoded.
    fn code(
        &self,
        coded: &Coded,
        places: Range<usize>,
        chunk: usize,
        buffers: &mut Buffers,
    ) -> Result<(), CheckpointError> {
        let Buffers { read, codes, scales, .. } = buffers;
        let Some(code) = &self.codebook else { return Ok(()) };
        let (format, (values, _)) = (&coded.format, self.read(&places, Dtype::F32, read)?);
        self.scales_of(&places, format.blocksize, scales);
        codes.resize(format.packed_size(places.len()), 0);
        encode_4bit(self.engine, values, code, format.blocksize, scales, codes)
            .map_err(|source| self.weight.refused(source))?;
        self.write_codes(coded, codes, &places, chunk)
    }

    /// How far some of the values are from what will be decoded.
    fn measure(
        &self,
        coded: &Coded,
        places: Range<usize>,
        chunk: usize,
        buffers: &mut Buffers,
    ) -> Result<(), CheckpointError> {
        let Buffers { read, rounded, wide, again, codes, scales, .. } = buffers;
        let (format, mut places) = (&coded.format, places);
        if self.chunks(0) > 1 {
            let most = (MEASURED / format.blocksize).max(1) * format.blocksize;
            places.end = places.end.min(places.start + most);
        }
        let packed = format.packed_size(places.len());
        codes.resize(packed, 0);
        let at = coded.codes.offset + format.packed_size(places.start) as u64;
        self.files.outputs[coded.codes.file].read(codes, at)?;
        self.scales_of(&places, format.blocksize, scales);
        let decoded = rounded.room(Dtype::F32, places.len());
        decode(format, self.engine, codes, scales, decoded)
            .map_err(|source| self.weight.refused(source))?;
        let (values, squared_delta) = self.read(&places, Dtype::F32, read)?;
        let decoded = rounded.values(Dtype::F32, 0..places.len());
        let errors = Errors::between(widen(values, wide), widen(decoded, again));
        self.state().errors[chunk] = Errors { squared_delta, ..errors };
        Ok(())
    }

    /// Copies the scales of a chunk out of those of the tensor.
    fn scales_of(&self, places: &Range<usize>, blocksize: usize, to: &mut Vec<f32>) {
        let blocks = places.start / blocksize..places.end.div_ceil(blocksize);
        to.clear();
        to.extend_from_slice(&self.state().scales[blocks]);
    }

    /// Keeps a chunk's scales; values that are not finite are counted to the end of the tensor.
    fn keep_scales(
        &self,
        places: &Range<usize>,
        blocksize: usize,
        scales: &[f32],
        result: Result<(), CodecError>,
    ) -> Result<(), CheckpointError> {
        let mut state = self.state();
        match result {
            Ok(()) => {
                let first = places.start / blocksize;
                state.scales[first..first + scales.len()].copy_from_slice(scales);
                Ok(())
            }
            Err(CodecError::NonFinite { index, count }) => {
                let index = places.start + index;
                let (first, before) = state.nonfinite.unwrap_or((index, 0));
                state.nonfinite = Some((first.min(index), before + count));
                Ok(())
            }
            Err(source) => Err(self.weight.refused(source)),
        }
    }

    fn write_codes(
        &self,
        coded: &Coded,
        codes: &[u8],
        places: &Range<usize>,
        chunk: usize,
    ) -> Result<(), CheckpointError> {
        let offset = coded.codes.offset + coded.format.packed_size(places.start) as u64;
        self.write(&self.files.outputs[coded.codes.file], codes, offset, chunk)
    }

    fn write(
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

    /// Stores the scales, in 8 bits if these hold them, and keeps what will be decoded.
    fn settle(&self, coded: &Coded) -> Result<(), CheckpointError> {
        let mut state = self.state();
        if let Some((index, count)) = state.nonfinite {
            return Err(self.weight.refused(CodecError::NonFinite { index, count }));
        }
        let place = &self.files.outputs[coded.scales.file];
        if let Some(table) = &coded.format.nested_code {
            let blocks = state.scales.len();
            let (mut codes, mut nested) = (vec![0; blocks], vec![0.0; num_groups(blocks)]);
            let coding =
                quantize_absmax(self.engine, &state.scales, table, &mut codes, &mut nested)
                    .map_err(|source| self.weight.refused(source))?;
            if coding.safe {
                let offset = coding.offset;
                dequantize_absmax(self.engine, &codes, table, &nested, offset, &mut state.scales)
                    .map_err(|source| self.weight.refused(source))?;
                codes.extend_from_slice(cast_slice(&nested));
                (state.double_quant, state.offset) = (true, offset);
                state.crc_scales = crc32fast::hash(&codes);
                return place.write(&codes, coded.scales.offset);
            }
        }
        let bytes = cast_slice(&state.scales);
        let crc = crc32fast::hash(bytes);
        place.write(bytes, coded.scales.offset)?;
        state.crc_scales = crc;
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

impl Coded {
    fn passes(&self) -> Vec<Pass> {
        let mut passes =
            if self.search { vec![Pass::Search, Pass::Code] } else { vec![Pass::Encode] };
        if self.measure {
            passes.push(Pass::Measure);
        }
        passes
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
