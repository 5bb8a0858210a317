//! The reference body: plain Rust, any machine.

use crate::codebook::Codebook;
use crate::quantize::SMALLEST;
use crate::values::{with_slice, Element, Values};

/// Values that are widened and coded together: divides every block.
const STRIP: usize = 32;

/// Quantizes whole blocks; tells whether all values were finite.
pub(crate) fn quantize(
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> bool {
    with_slice!(values, Values, v => {
        let outputs = packed.chunks_exact_mut(blocksize / 2).zip(absmax);
        v.chunks_exact(blocksize).zip(outputs).fold(true, |finite, (block, (packed, absmax))| {
            quantize_block(block, code, packed, absmax);
            finite && absmax.is_finite()
        })
    })
}

/// Codes whole blocks against the scales given.
pub(crate) fn encode(
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    scales: &[f32],
    packed: &mut [u8],
) {
    with_slice!(values, Values, v => {
        let blocks = v.chunks_exact(blocksize).zip(packed.chunks_exact_mut(blocksize / 2));
        for ((block, packed), &scale) in blocks.zip(scales) {
            encode_block(block, code, scale, packed);
        }
    });
}

/// Quantizes one whole block.
pub(crate) fn quantize_block<T: Element>(
    block: &[T],
    code: &Codebook,
    packed: &mut [u8],
    absmax: &mut f32,
) {
    *absmax = block_absmax(block);
    encode_block(block, code, *absmax, packed);
}

/// Codes one whole block against its scale, the scaled values by a multiplication.
pub(crate) fn encode_block<T: Element>(
    block: &[T],
    code: &Codebook,
    scale: f32,
    packed: &mut [u8],
) {
    let inverse = 1.0 / at_least_smallest(scale);
    pack_codes(block, code, packed, |x| (x * inverse).clamp(-1.0, 1.0));
}

/// Codes the ragged last block against its scale, the scaled values by a division.
pub(crate) fn encode_tail<T: Element>(block: &[T], code: &Codebook, scale: f32, packed: &mut [u8]) {
    let divisor = at_least_smallest(scale);
    pack_codes(block, code, packed, |x| (x / divisor).clamp(-1.0, 1.0));
}

/// Quantizes the blocks that hold NaN or infinity again, by the rules for those.
#[cold]
pub(crate) fn repair<T: Element>(
    values: &[T],
    code: &Codebook,
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let outputs = packed.chunks_exact_mut(blocksize / 2).zip(absmax);
    for (block, (packed, absmax)) in values.chunks_exact(blocksize).zip(outputs) {
        if !absmax.is_finite() {
            quantize_block(block, code, packed, absmax);
        }
    }
}

/// Codes the blocks again whose scale is NaN or infinite, by the rules for those.
#[cold]
pub(crate) fn repair_codes<T: Element>(
    values: &[T],
    code: &Codebook,
    blocksize: usize,
    scales: &[f32],
    packed: &mut [u8],
) {
    let blocks = values.chunks_exact(blocksize).zip(packed.chunks_exact_mut(blocksize / 2));
    for ((block, packed), &scale) in blocks.zip(scales) {
        if !scale.is_finite() {
            encode_block(block, code, scale, packed);
        }
    }
}

/// Quantizes the ragged last block.
pub(crate) fn quantize_tail<T: Element>(
    block: &[T],
    code: &Codebook,
    packed: &mut [u8],
    absmax: &mut f32,
) {
    *absmax = at_least_smallest(block_absmax(block));
    encode_tail(block, code, *absmax, packed);
}

/// The largest magnitude; NaN if there is one.
///
/// Magnitudes are compared as integers, where NaN is larger than infinity and cannot hide.
pub(crate) fn block_absmax<T: Element>(block: &[T]) -> f32 {
    let mut largest = [0_i32; STRIP];
    for_each_strip(block, |_, strip| {
        for (largest, x) in largest.iter_mut().zip(strip) {
            *largest = (*largest).max((x.to_bits() & 0x7fff_ffff) as i32);
        }
    });
    absmax_from_bits(largest.into_iter().fold(0, i32::max) as u32)
}

/// Calls `work` on each `STRIP` values, widened; the last are filled up with zeros.
fn for_each_strip<T: Element>(block: &[T], mut work: impl FnMut(usize, &[f32; STRIP])) {
    let (strips, rest) = block.as_chunks::<STRIP>();
    let mut wide = [0.0; STRIP];
    for (i, strip) in strips.iter().enumerate() {
        T::widen(strip, &mut wide);
        work(i, &wide);
    }
    if !rest.is_empty() {
        wide.fill(0.0);
        T::widen(rest, &mut wide[..rest.len()]);
        work(strips.len(), &wide);
    }
}

/// The float with these bits; any NaN becomes the canonical one.
pub(crate) fn absmax_from_bits(bits: u32) -> f32 {
    let absmax = f32::from_bits(bits);
    if absmax.is_nan() {
        f32::NAN
    } else {
        absmax
    }
}

/// A scale of magnitude 1e-38 or more; its sign, and NaN, stay.
pub(crate) fn at_least_smallest(scale: f32) -> f32 {
    if scale.abs() < SMALLEST {
        SMALLEST.copysign(scale)
    } else {
        scale
    }
}

/// Codes and packs the scaled values of one block.
fn pack_codes<T: Element>(
    block: &[T],
    code: &Codebook,
    packed: &mut [u8],
    scale: impl Fn(f32) -> f32,
) {
    for_each_strip(block, |i, strip| {
        let codes = indices(&strip.map(&scale), code.bounds())
            .map(|index| code.order()[usize::from(index % 16)]);
        let pairs = codes.as_chunks::<2>().0;
        let bytes: [u8; STRIP / 2] = core::array::from_fn(|j| pairs[j][0] << 4 | pairs[j][1]);
        let packed = &mut packed[i * bytes.len()..];
        let count = packed.len().min(bytes.len());
        packed[..count].copy_from_slice(&bytes[..count]);
    });
    if let (1, Some(last)) = (block.len() % 2, packed.last_mut()) {
        *last = *last & 0xf0 | code.zero_code();
    }
}

/// How many bounds lie below each value; a NaN is above all of them.
///
/// It counts down the bounds that do not, for the sake of NaN. Compilers make SIMD code of it.
fn indices(scaled: &[f32; STRIP], bounds: &[f32; 15]) -> [u8; STRIP] {
    let mut counts = [15_i32; STRIP];
    for bound in bounds {
        for (count, s) in counts.iter_mut().zip(scaled) {
            *count -= i32::from(s <= bound);
        }
    }
    counts.map(|count| count as u8)
}
