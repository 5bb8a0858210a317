//! Values of a chunk: read as they lie or decoded, widened, rounded.

use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use memmap2::Mmap;
use qkern_codec::{
    dequantize_4bit, dequantize_absmax, dequantize_int8, CodecError, Engine, Stores, Values,
    ValuesMut, NESTED_BLOCKSIZE,
};

use super::blocks::BlockBuffer;
use super::job::{num_groups, Dtype, Format, Source, Span, Stored, Weight};
use super::{Access, Place};
use crate::error::CheckpointError;

/// A thread's memory for the values of a chunk, of one dtype at a time.
#[derive(Default)]
pub(super) struct ValueBuffer {
    f32: Vec<f32>,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
    window: Option<Window>,
    /// The bytes of the window that stand in for a copy.
    mapped: Option<Range<usize>>,
}

/// A part of a file in memory.
struct Window {
    file: usize,
    start: u64,
    bytes: Mmap,
}

impl Window {
    /// Bytes that are mapped at a time: many chunks, since taking a mapping back stops all threads.
    const LEN: usize = if cfg!(test) { 3 << 19 } else { 1 << 26 };

    fn range(&self, file: usize, offset: u64, nbytes: usize) -> Option<Range<usize>> {
        let first = usize::try_from(offset.checked_sub(self.start)?).ok()?;
        let range = first..first.checked_add(nbytes)?;
        (file == self.file && range.end <= self.bytes.len()).then_some(range)
    }
}

impl ValueBuffer {
    /// Takes bytes of a file in place of a copy, if they lie as values do in memory.
    fn map(&mut self, place: &Place<'_>, at: Span, nbytes: usize, dtype: Dtype) -> bool {
        let covered = |window: &Window| window.range(at.file, at.offset, nbytes);
        let mut found = self.window.as_ref().and_then(covered);
        if found.is_none() {
            self.window = place.storage.map(at.offset, nbytes, Window::LEN).map(|bytes| Window {
                file: at.file,
                start: at.offset,
                bytes,
            });
            found = self.window.as_ref().and_then(covered);
        }
        let aligned = |bytes: &[u8]| bytes.as_ptr().addr().is_multiple_of(dtype.size());
        self.mapped = match (&self.window, found) {
            (Some(window), Some(range)) => aligned(&window.bytes[range.clone()]).then_some(range),
            _ => None,
        };
        self.mapped.is_some()
    }

    /// Room for `len` values; what they hold is left over.
    pub(super) fn room(&mut self, dtype: Dtype, len: usize) -> ValuesMut<'_> {
        self.mapped = None;
        match dtype {
            Dtype::F32 => ValuesMut::F32(first(&mut self.f32, len)),
            Dtype::F16 => ValuesMut::F16(first(&mut self.f16, len)),
            Dtype::Bf16 => ValuesMut::Bf16(first(&mut self.bf16, len)),
        }
    }

    /// Values that were put into this room, or mapped.
    pub(super) fn values(&self, dtype: Dtype, places: Range<usize>) -> Values<'_> {
        if let (Some(window), Some(range)) = (&self.window, &self.mapped) {
            let bytes = &window.bytes[range.clone()];
            return match dtype {
                Dtype::F32 => Values::F32(&cast_slice(bytes)[places]),
                Dtype::F16 => Values::F16(&cast_slice(bytes)[places]),
                Dtype::Bf16 => Values::Bf16(&cast_slice(bytes)[places]),
            };
        }
        match dtype {
            Dtype::F32 => Values::F32(&self.f32[places]),
            Dtype::F16 => Values::F16(&self.f16[places]),
            Dtype::Bf16 => Values::Bf16(&self.bf16[places]),
        }
    }
}

/// A thread's memory for the codes and scales of a chunk.
#[derive(Default)]
pub(super) struct CodeBuffer {
    codes: Vec<u8>,
    absmax: Vec<f32>,
    absmax_codes: Vec<u8>,
    nested: Vec<f32>,
    blocks: BlockBuffer,
}

/// The bytes of values, as they lie in memory and in files: little-endian.
pub(super) fn bytes_of(values: Values<'_>) -> &[u8] {
    match values {
        Values::F32(v) => cast_slice(v),
        Values::F16(v) => cast_slice(v),
        Values::Bf16(v) => cast_slice(v),
    }
}

fn bytes_of_mut(values: ValuesMut<'_>) -> &mut [u8] {
    match values {
        ValuesMut::F32(v) => cast_slice_mut(v),
        ValuesMut::F16(v) => cast_slice_mut(v),
        ValuesMut::Bf16(v) => cast_slice_mut(v),
    }
}

/// The `len` elements of a buffer that are there from now on.
pub(super) fn first<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}

/// Reads the values of a weight, of any range.
pub(super) struct Reader<'a> {
    pub(super) weight: &'a Weight,
    pub(super) inputs: &'a [Place<'a>],
    pub(super) access: Access,
    pub(super) engine: Engine,
}

impl Reader<'_> {
    /// Puts the values at `places` into `buffer`: as `dtype` if they are codes of ours, else as they
    /// are, fp32 for codes of others.
    /// Returns which dtype they have and where in the buffer they lie.
    pub(super) fn read(
        &self,
        places: Range<usize>,
        dtype: Dtype,
        buffer: &mut ValueBuffer,
        scratch: &mut CodeBuffer,
    ) -> Result<(Dtype, Range<usize>), CheckpointError> {
        match &self.weight.source {
            Source::Dense { dtype, at } => {
                let (file, nbytes) = (&self.inputs[at.file], places.len() * dtype.size());
                let offset = at.offset + (places.start * dtype.size()) as u64;
                let from = Span { file: at.file, offset };
                if self.access == Access::Copied || !buffer.map(file, from, nbytes, *dtype) {
                    file.read(bytes_of_mut(buffer.room(*dtype, places.len())), offset)?;
                }
                Ok((*dtype, 0..places.len()))
            }
            Source::Blocks(blocks) => {
                let whole = blocks.around(&places);
                if let ValuesMut::F32(room) = buffer.room(Dtype::F32, whole.len()) {
                    blocks.read(self.inputs, &whole, &mut scratch.blocks, room)?;
                }
                Ok((Dtype::F32, places.start - whole.start..places.end - whole.start))
            }
            Source::Quantized(stored) => {
                // Whole groups of scales, of which the last may be short.
                let group = match stored.format.nested_code {
                    Some(_) => stored.format.blocksize * NESTED_BLOCKSIZE,
                    None => stored.format.blocksize,
                };
                let start = places.start / group * group;
                let end = places.end.div_ceil(group).saturating_mul(group).min(self.weight.numel);
                let room = buffer.room(dtype, end - start);
                self.decode(stored, start..end, scratch, room)?;
                Ok((dtype, places.start - start..places.end - start))
            }
        }
    }

    /// Writes the values at `places`, which start and end with groups of scales.
    fn decode(
        &self,
        stored: &Stored,
        places: Range<usize>,
        scratch: &mut CodeBuffer,
        values: ValuesMut<'_>,
    ) -> Result<(), CheckpointError> {
        let Stored { format, codes, scales, nested, offset } = stored;
        let packed = first(&mut scratch.codes, format.packed_size(places.len()));
        let at = codes.offset + format.packed_size(places.start) as u64;
        self.inputs[codes.file].read(packed, at)?;
        let (block, blocks) = (places.start / format.blocksize, format.num_blocks(places.len()));
        let absmax = first(&mut scratch.absmax, blocks);
        if let Some(table) = &format.nested_code {
            let coded = first(&mut scratch.absmax_codes, blocks);
            self.inputs[scales.file].read(coded, scales.offset + block as u64)?;
            let groups = first(&mut scratch.nested, num_groups(blocks));
            let at = nested.offset + (block / NESTED_BLOCKSIZE * 4) as u64;
            self.inputs[nested.file].read(cast_slice_mut(groups), at)?;
            dequantize_absmax(self.engine, coded, table, groups, *offset, absmax)
                .map_err(|source| self.weight.refused(source))?;
        } else {
            let at = scales.offset + (block * 4) as u64;
            self.inputs[scales.file].read(cast_slice_mut(absmax), at)?;
        }
        decode(format, self.engine, packed, absmax, values)
            .map_err(|source| self.weight.refused(source))
    }
}

/// Writes the values of codes against their fp32 scales.
pub(super) fn decode(
    format: &Format,
    engine: Engine,
    packed: &[u8],
    absmax: &[f32],
    values: ValuesMut<'_>,
) -> Result<(), CodecError> {
    let (blocksize, stores) = (format.blocksize, Stores::Cached);
    match &format.code {
        Some(table) => dequantize_4bit(engine, packed, absmax, table, blocksize, values, stores),
        None => dequantize_int8(engine, cast_slice(packed), absmax, blocksize, values, stores),
    }
}

/// Whether `values` are of `dtype`.
pub(super) fn is(values: Values<'_>, dtype: Dtype) -> bool {
    matches!(
        (values, dtype),
        (Values::F32(_), Dtype::F32)
            | (Values::F16(_), Dtype::F16)
            | (Values::Bf16(_), Dtype::Bf16)
    )
}

/// Whether one of 16 bits is infinite.
pub(super) fn has_infinite(values: Values<'_>) -> bool {
    match values {
        Values::F32(_) => false,
        Values::F16(v) => v.iter().fold(false, |any, v| any | v.is_infinite()),
        Values::Bf16(v) => v.iter().fold(false, |any, v| any | v.is_infinite()),
    }
}

/// `values` as fp32, in memory of its own.
pub(super) fn widened<'a>(values: Values<'_>, room: &'a mut Vec<f32>) -> &'a mut [f32] {
    let to = first(room, values.len());
    match values {
        Values::F32(v) => to.copy_from_slice(v),
        Values::F16(v) => v.convert_to_f32_slice(to),
        Values::Bf16(v) => v.convert_to_f32_slice(to),
    }
    to
}

/// `values` as fp32, in `room` if they are not.
pub(super) fn widen<'a>(values: Values<'a>, room: &'a mut Vec<f32>) -> &'a [f32] {
    match values {
        Values::F32(v) => v,
        other => widened(other, room),
    }
}

/// Rounds `values` to `dtype`; the place of the first finite one that becomes infinite, if any.
pub(super) fn round<'a>(
    values: &[f32],
    dtype: Dtype,
    room: &'a mut ValueBuffer,
) -> (Values<'a>, Option<usize>) {
    let overflow = match room.room(dtype, values.len()) {
        ValuesMut::F32(to) => {
            to.copy_from_slice(values);
            None
        }
        ValuesMut::F16(to) => {
            to.convert_from_f32_slice(values);
            became_infinite(values, to, f16::is_infinite)
        }
        ValuesMut::Bf16(to) => {
            to.convert_from_f32_slice(values);
            became_infinite(values, to, bf16::is_infinite)
        }
    };
    (room.values(dtype, 0..values.len()), overflow)
}

fn became_infinite<T: Copy>(from: &[f32], to: &[T], infinite: fn(T) -> bool) -> Option<usize> {
    // Two loops: the first one has no branch.
    if to.iter().fold(false, |any, v| any | infinite(*v)) {
        from.iter().zip(to).position(|(from, to)| from.is_finite() && infinite(*to))
    } else {
        None
    }
}
