//! NEON: 4 blocks at a time for the scales, 32 values at a time for the codes.
//!
//! `fcvtns` rounds half to even and makes 0 of NaN: where a block holds NaN or infinity the factor
//! is NaN or 0, every product is NaN or 0, and the codes are 0, as they must be.

use std::arch::aarch64::*;

use crate::neon::{
    absmax_bf16, absmax_f16, absmax_f32, prefetch, store, strip_bf16, strip_f16, strip_f32, Plain,
    STRIP,
};
use crate::quantize_int8::factor;
use crate::values::Values;

/// Blocks whose scales are computed together, so that none waits for the division of another.
const GROUP: usize = 4;
/// How far ahead values are fetched, in bytes.
const AHEAD: usize = 4096;

/// The input and the outputs of one call.
struct Task<'a, T> {
    values: &'a [T],
    blocksize: usize,
    codes: &'a mut [i8],
    absmax: &'a mut [f32],
}

/// Quantizes whole blocks; tells whether all values were finite.
#[target_feature(enable = "neon")]
pub(crate) fn quantize(
    values: Values<'_>,
    blocksize: usize,
    codes: &mut [i8],
    absmax: &mut [f32],
) -> bool {
    match values {
        Values::F32(values) => blocks(
            Task { values, blocksize, codes, absmax },
            |block| absmax_f32(block),
            |strip| strip_f32(strip),
        ),
        Values::F16(values) => blocks(
            Task { values, blocksize, codes, absmax },
            |block| absmax_f16(block),
            |strip| strip_f16(strip),
        ),
        Values::Bf16(values) => blocks(
            Task { values, blocksize, codes, absmax },
            |block| absmax_bf16(block),
            |strip| strip_bf16(strip),
        ),
    }
}

/// Quantizes groups of blocks. What depends on the dtype: the largest `magnitude` of a block,
/// `load` of a strip.
#[inline]
#[target_feature(enable = "neon")]
fn blocks<T: Plain>(
    task: Task<'_, T>,
    magnitude: impl Fn(&[T]) -> f32,
    load: impl Fn(&[T; STRIP]) -> [float32x4_t; 8],
) -> bool {
    let Task { values, blocksize, codes, absmax } = task;
    let mut finite = true;
    let outputs = codes.chunks_mut(GROUP * blocksize).zip(absmax.chunks_mut(GROUP));
    for (values, (codes, absmax)) in values.chunks(GROUP * blocksize).zip(outputs) {
        let mut factors = [0.0; GROUP];
        let blocks = values.chunks_exact(blocksize).zip(absmax);
        for (to, (block, absmax)) in factors.iter_mut().zip(blocks) {
            *absmax = magnitude(block);
            *to = factor(*absmax);
            finite &= absmax.is_finite();
        }
        let blocks = values.chunks_exact(blocksize).zip(codes.chunks_exact_mut(blocksize));
        for ((block, codes), factor) in blocks.zip(factors) {
            encode(block.as_chunks().0, factor, codes.as_chunks_mut().0, &load);
        }
    }
    finite
}

/// Codes strips.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn encode<T: Plain>(
    strips: &[[T; STRIP]],
    factor: f32,
    codes: &mut [[i8; STRIP]],
    load: impl Fn(&[T; STRIP]) -> [float32x4_t; 8],
) {
    for (strip, codes) in strips.iter().zip(codes) {
        for line in 0..size_of_val(strip) / 64 {
            prefetch(strip, AHEAD + 64 * line);
        }
        let [a, b, c, d, e, f, g, h] = load(strip).map(|x| vcvtnq_s32_f32(vmulq_n_f32(x, factor)));
        let bytes = [lowest_bytes([a, b, c, d]), lowest_bytes([e, f, g, h])];
        for (to, from) in codes.as_chunks_mut::<16>().0.iter_mut().zip(bytes) {
            store(to, from);
        }
    }
}

/// The lowest byte of each lane.
#[inline]
#[target_feature(enable = "neon")]
fn lowest_bytes([a, b, c, d]: [int32x4_t; 4]) -> uint8x16_t {
    let halves = |a, b| {
        let [a, b] = [vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b)];
        vreinterpretq_u8_u16(vuzp1q_u16(a, b))
    };
    vuzp1q_u8(halves(a, b), halves(c, d))
}
