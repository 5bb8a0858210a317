//! AVX2: 8 blocks at a time for the scales, 32 values at a time for the codes.
//!
//! `vcvtps2dq` rounds half to even, saturating packs narrow. bfloat16 is split into even and odd
//! values by a shift and a mask and merged by a shift and a blend, without widening shuffles.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::quantize_int8::{scalar, SMALLEST};
use crate::values::{Element, Stores, Values};
use crate::x86::avx2::{
    all_finite, bf16_lanes, f16_lanes, lanes, load_bf16, load_f16, load_f32, magnitudes_16_bit,
    magnitudes_f32, max_of_each, write,
};
use crate::x86::{end_stream, prefetch_l2, Plain};

/// Blocks whose scales are computed together.
const GROUP: usize = 8;
/// Values that are packed together: the smallest block.
pub(crate) const STRIP: usize = 32;
/// How far ahead values are fetched, in bytes: hardware prefetch stops at each page.
pub(crate) const AHEAD: usize = 16384;

/// The input and the outputs of one call.
struct Task<'a, T> {
    values: &'a [T],
    blocksize: usize,
    stores: Stores,
    codes: &'a mut [i8],
    absmax: &'a mut [f32],
}

/// Quantizes whole blocks; tells whether all values were finite.
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn quantize(
    values: Values<'_>,
    blocksize: usize,
    stores: Stores,
    codes: &mut [i8],
    absmax: &mut [f32],
) -> bool {
    let finite = match values {
        Values::F32(values) => blocks(
            Task { values, blocksize, stores, codes, absmax },
            |block| magnitudes_f32(block),
            |bits| _mm256_castsi256_ps(bits),
            |strip| strip_f32(strip),
            |codes| pack_in_order(codes),
        ),
        Values::F16(values) => blocks(
            Task { values, blocksize, stores, codes, absmax },
            |block| magnitudes_16_bit(block),
            |bits| f16_lanes(bits),
            |strip| strip_f16(strip),
            |codes| pack_in_order(codes),
        ),
        Values::Bf16(values) => blocks(
            Task { values, blocksize, stores, codes, absmax },
            |block| magnitudes_16_bit(block),
            |bits| bf16_lanes(bits),
            |strip| strip_bf16(strip),
            |codes| pack_even_odd(codes),
        ),
    };
    if stores == Stores::Streaming {
        end_stream();
    }
    finite
}

/// Quantizes groups of blocks.
///
/// What depends on the dtype: `magnitudes` reduces a block to 8 lanes of magnitudes that compare
/// as integers, `widen` makes them floats, `load` reads a strip, `pack` narrows what was loaded.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn blocks<T: Element + Plain>(
    task: Task<'_, T>,
    magnitudes: impl Fn(&[T]) -> __m256i,
    widen: impl Fn(__m256i) -> __m256,
    load: impl Fn(&[T; STRIP]) -> [__m256; 4],
    pack: impl Fn([__m256i; 4]) -> __m256i,
) -> bool {
    let Task { values, blocksize, stores, codes, absmax } = task;
    let mut finite = true;
    let outputs = codes.chunks_mut(GROUP * blocksize).zip(absmax.chunks_mut(GROUP));
    for (values, (codes, absmax)) in values.chunks(GROUP * blocksize).zip(outputs) {
        let mut maxima = [_mm256_setzero_si256(); GROUP];
        for (maximum, block) in maxima.iter_mut().zip(values.chunks_exact(blocksize)) {
            *maximum = magnitudes(block);
        }
        let largest = widen(max_of_each(&maxima));
        absmax.copy_from_slice(&lanes(largest)[..absmax.len()]);
        let nonzero = _mm256_cmp_ps::<_CMP_GE_OQ>(largest, _mm256_set1_ps(SMALLEST));
        let quotients = _mm256_div_ps(_mm256_set1_ps(127.0), largest);
        let factors = lanes(_mm256_and_ps(nonzero, quotients));

        let strips = values.as_chunks::<STRIP>().0.chunks_exact(blocksize / STRIP);
        let bytes = codes.as_chunks_mut::<STRIP>().0.chunks_exact_mut(blocksize / STRIP);
        for ((strips, bytes), factor) in strips.zip(bytes).zip(factors) {
            let factor = _mm256_set1_ps(factor);
            for (strip, bytes) in strips.iter().zip(bytes) {
                for line in 0..size_of_val(strip) / 64 {
                    prefetch_l2(strip, AHEAD + 64 * line);
                }
                let codes = load(strip).map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, factor)));
                match stores {
                    Stores::Cached => write::<false, _, _>(bytes, pack(codes)),
                    Stores::Streaming => write::<true, _, _>(bytes, pack(codes)),
                }
            }
        }
        if !all_finite(largest) {
            finite = false;
            scalar::repair(values, blocksize, codes, absmax);
        }
    }
    finite
}

/// Reads a strip as four vectors, in order.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn strip_f32(strip: &[f32; STRIP]) -> [__m256; 4] {
    core::array::from_fn(|i| load_f32(&strip.as_chunks().0[i]))
}

/// Reads a strip as four vectors, in order.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn strip_f16(strip: &[f16; STRIP]) -> [__m256; 4] {
    core::array::from_fn(|i| load_f16(&strip.as_chunks().0[i]))
}

/// Reads a strip as two pairs of vectors, of even and odd values.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn strip_bf16(strip: &[bf16; STRIP]) -> [__m256; 4] {
    let halves = strip.as_chunks::<16>().0;
    let ([a, b], [c, d]) = (load_bf16(&halves[0]), load_bf16(&halves[1]));
    [a, b, c, d]
}

/// Packs four vectors of codes, in order, to bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn pack_in_order([a, b, c, d]: [__m256i; 4]) -> __m256i {
    let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    // Each 128-bit lane now holds its half of every vector, four bytes at a time.
    _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

/// Packs two pairs of vectors of codes, of even and odd values, to bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn pack_even_odd([a, b, c, d]: [__m256i; 4]) -> __m256i {
    let merge = |even, odd| _mm256_blend_epi16::<0xaa>(even, _mm256_slli_epi32::<16>(odd));
    let bytes = _mm256_packs_epi16(merge(a, b), merge(c, d));
    // Each 128-bit lane now holds its half of both vectors, eight bytes at a time.
    _mm256_permute4x64_epi64::<0b11_01_10_00>(bytes)
}
