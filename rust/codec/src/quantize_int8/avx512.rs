//! AVX-512: 16 blocks at a time for the scales, 64 values at a time for the codes.
//!
//! `vcvtps2dq` rounds half to even, saturating packs narrow. bfloat16 is split into even and odd
//! values by a shift and a mask and merged by a shift and a blend, without widening shuffles.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::quantize_int8::{scalar, SMALLEST};
use crate::values::{Element, Stores, Values};
use crate::x86::avx512::{
    all_finite, bf16_lanes, f16_lanes, lanes, load_bf16, load_f16, load_f32, magnitudes_16_bit,
    magnitudes_f32, max_of_each, write,
};
use crate::x86::{end_stream, prefetch_l2, Plain};

/// Blocks whose scales are computed together.
const GROUP: usize = 16;
/// Values that are packed together; the smallest block is half as long.
pub(crate) const STRIP: usize = 64;
const HALF: usize = STRIP / 2;
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
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
            |bits| _mm512_castsi512_ps(bits),
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
/// What depends on the dtype: `magnitudes` reduces a block to 16 lanes of magnitudes that compare
/// as integers, `widen` makes them floats, `load` reads a strip, `pack` narrows what was loaded.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn blocks<T: Element + Plain>(
    task: Task<'_, T>,
    magnitudes: impl Fn(&[T]) -> __m512i,
    widen: impl Fn(__m512i) -> __m512,
    load: impl Fn(&[T; STRIP]) -> [__m512; 4],
    pack: impl Fn([__m512i; 4]) -> __m512i,
) -> bool {
    let Task { values, blocksize, stores, codes, absmax } = task;
    let halves_per_block = (blocksize / HALF).trailing_zeros();
    let mut finite = true;
    let outputs = codes.chunks_mut(GROUP * blocksize).zip(absmax.chunks_mut(GROUP));
    for (values, (codes, absmax)) in values.chunks(GROUP * blocksize).zip(outputs) {
        let mut maxima = [_mm512_setzero_si512(); GROUP];
        for (maximum, block) in maxima.iter_mut().zip(values.chunks_exact(blocksize)) {
            *maximum = magnitudes(block);
        }
        let largest = widen(max_of_each(&maxima));
        absmax.copy_from_slice(&lanes(largest)[..absmax.len()]);
        let nonzero = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(largest, _mm512_set1_ps(SMALLEST));
        let factors = lanes(_mm512_maskz_div_ps(nonzero, _mm512_set1_ps(127.0), largest));

        let (strips, rest) = values.as_chunks::<STRIP>();
        let (bytes, rest_bytes) = codes.as_chunks_mut::<STRIP>();
        for (i, (strip, bytes)) in strips.iter().zip(bytes).enumerate() {
            for line in 0..size_of_val(strip) / 64 {
                prefetch_l2(strip, AHEAD + 64 * line);
            }
            let x = load(strip);
            let factor = |half| _mm512_set1_ps(factors[(half >> halves_per_block) % GROUP]);
            let (low, high) = (factor(2 * i), factor(2 * i + 1));
            let codes = pack([
                _mm512_cvtps_epi32(_mm512_mul_ps(x[0], low)),
                _mm512_cvtps_epi32(_mm512_mul_ps(x[1], low)),
                _mm512_cvtps_epi32(_mm512_mul_ps(x[2], high)),
                _mm512_cvtps_epi32(_mm512_mul_ps(x[3], high)),
            ]);
            match stores {
                Stores::Cached => write::<false, _, _>(bytes, codes),
                Stores::Streaming => write::<true, _, _>(bytes, codes),
            }
        }
        if let ([_, ..], [.., absmax]) = (rest, &mut *absmax) {
            scalar::quantize_block(rest, rest_bytes, absmax); // an odd block of 32
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
#[target_feature(enable = "avx512f")]
pub(crate) fn strip_f32(strip: &[f32; STRIP]) -> [__m512; 4] {
    core::array::from_fn(|i| load_f32(&strip.as_chunks().0[i]))
}

/// Reads a strip as four vectors, in order.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn strip_f16(strip: &[f16; STRIP]) -> [__m512; 4] {
    core::array::from_fn(|i| load_f16(&strip.as_chunks().0[i]))
}

/// Reads a strip as two pairs of vectors, of even and odd values.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn strip_bf16(strip: &[bf16; STRIP]) -> [__m512; 4] {
    let halves = strip.as_chunks::<HALF>().0;
    let ([a, b], [c, d]) = (load_bf16(&halves[0]), load_bf16(&halves[1]));
    [a, b, c, d]
}

/// Packs four vectors of codes, in order, to bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn pack_in_order([a, b, c, d]: [__m512i; 4]) -> __m512i {
    let bytes = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    // Each 128-bit lane now holds its part of every vector, four bytes at a time.
    let order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    _mm512_permutexvar_epi32(order, bytes)
}

/// Packs two pairs of vectors of codes, of even and odd values, to bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn pack_even_odd([a, b, c, d]: [__m512i; 4]) -> __m512i {
    let merge =
        |even, odd| _mm512_mask_blend_epi16(0xaaaa_aaaa, even, _mm512_slli_epi32::<16>(odd));
    let bytes = _mm512_packs_epi16(merge(a, b), merge(c, d));
    // Each 128-bit lane now holds its part of both vectors, eight bytes at a time.
    _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), bytes)
}
