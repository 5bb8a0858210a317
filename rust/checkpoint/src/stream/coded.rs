//! The passes of a weight that is quantized: scales, codes, errors.

use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};
use qkern_codec::{
    dequantize_absmax, encode_4bit, quantize_4bit, quantize_absmax, quantize_int8,
    quantize_int8_rows, search_scales, CodecError, NonFinite,
};

use super::job::{num_groups, Coded, Dtype, Errors};
use super::queue::Passes;
use super::values::{decode, widen};
use super::weight::{Buffers, Pass, WeightRun};
use crate::error::CheckpointError;

/// Of a tensor of several chunks, the errors of so many values at the start of each are measured.
const MEASURED: usize = 1 << 11;

impl Coded {
    pub(super) fn passes(&self) -> Vec<Pass> {
        let mut passes =
            if self.search { vec![Pass::Search, Pass::Code] } else { vec![Pass::Encode] };
        if self.measure {
            passes.push(Pass::Measure);
        }
        passes
    }
}

impl WeightRun<'_> {
    /// Codes and scales at once: a scale is its block's absmax.
    pub(super) fn encode(
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
    pub(super) fn search(
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
    pub(super) fn code(
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
    pub(super) fn measure(
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

    /// Stores the scales, in 8 bits if these hold them, and keeps what will be decoded.
    pub(super) fn settle(&self, coded: &Coded) -> Result<(), CheckpointError> {
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
