//! AVX2: a table lookup per value.
//!
//! The table is scaled, and rounded to the output dtype, once a block. fp32 values come from two
//! `vpermps` of eight entries each, 16-bit values from `vpshufb` lookups of low and high bytes.
//! Memory sets the speed.

use std::arch::x86_64::*;

use crate::values::{plain_nan, Stores, ValuesMut};
use crate::x86::avx2::{load_f32, load_half, round_to_bf16, write};
use crate::x86::{end_stream, prefetch, Plain};

/// How far ahead codes are fetched, in bytes.
const AHEAD: usize = 2048;

/// Dequantizes whole blocks.
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn dequantize(
    packed: &[u8],
    absmax: &[f32],
    table: &[f32; 16],
    blocksize: usize,
    stores: Stores,
    values: ValuesMut<'_>,
) {
    match stores {
        Stores::Cached => blocks::<false>(packed, absmax, table, blocksize, values),
        Stores::Streaming => {
            blocks::<true>(packed, absmax, table, blocksize, values);
            end_stream();
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn blocks<const STREAM: bool>(
    packed: &[u8],
    absmax: &[f32],
    table: &[f32; 16],
    blocksize: usize,
    values: ValuesMut<'_>,
) {
    let halves = table.as_chunks::<8>().0;
    let table = [load_f32(&halves[0]), load_f32(&halves[1])];
    let scaled = |absmax| table.map(|t| _mm256_mul_ps(t, _mm256_set1_ps(plain_nan(absmax))));
    let inputs = packed.chunks_exact(blocksize / 2).zip(absmax);
    match values {
        ValuesMut::F32(values) => {
            for (block, (packed, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                decode_f32::<STREAM>(block, packed, scaled(absmax));
            }
        }
        ValuesMut::F16(values) => {
            for (block, (packed, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                let [low, high] =
                    scaled(absmax).map(|t| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(t));
                decode_16_bit::<STREAM, _>(block, packed, _mm256_set_m128i(high, low));
            }
        }
        ValuesMut::Bf16(values) => {
            for (block, (packed, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                let [low, high] = scaled(absmax).map(|t| _mm256_srli_epi32::<16>(round_to_bf16(t)));
                let words = _mm256_packus_epi32(low, high); // by halves of 128 bits
                decode_16_bit::<STREAM, _>(
                    block,
                    packed,
                    _mm256_permute4x64_epi64::<0b11_01_10_00>(words),
                );
            }
        }
    }
}

/// Looks up the codes of a block, 8 at a time.
#[inline]
#[target_feature(enable = "avx2")]
fn decode_f32<const STREAM: bool>(block: &mut [f32], packed: &[u8], [low, high]: [__m256; 2]) {
    prefetch(packed, AHEAD);
    // The even value of a byte is the high nibble.
    let shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    let (vectors, pieces) = (block.as_chunks_mut::<8>().0, packed.as_chunks::<4>().0);
    for (values, &piece) in vectors.iter_mut().zip(pieces) {
        let piece = _mm256_set1_epi32(i32::from_le_bytes(piece));
        let index = _mm256_srlv_epi32(piece, shifts); // vpermps takes the low 3 bits
        let bit_3 = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
        let below = _mm256_permutevar8x32_ps(low, index);
        let above = _mm256_permutevar8x32_ps(high, index);
        write::<STREAM, _, _>(values, _mm256_castps_si256(_mm256_blendv_ps(below, above, bit_3)));
    }
}

/// Looks up the codes of a block in 16 rounded values, 32 at a time.
#[inline]
#[target_feature(enable = "avx2")]
fn decode_16_bit<const STREAM: bool, T: Plain>(block: &mut [T], packed: &[u8], table: __m256i) {
    prefetch(packed, AHEAD);
    // The low bytes of the 16 values, and the high bytes, each in both 128-bit lanes.
    let low_bytes = _mm256_and_si256(table, _mm256_set1_epi16(0xff));
    let bytes = _mm256_packus_epi16(low_bytes, _mm256_srli_epi16::<8>(table));
    let low_table = _mm256_permute4x64_epi64::<0b10_00_10_00>(bytes);
    let high_table = _mm256_permute4x64_epi64::<0b11_01_11_01>(bytes);

    let nibble = _mm_set1_epi8(15);
    let (vectors, pieces) = (block.as_chunks_mut::<32>().0, packed.as_chunks::<16>().0);
    for (values, piece) in vectors.iter_mut().zip(pieces) {
        let piece = load_half(piece);
        let even = _mm_and_si128(_mm_srli_epi16::<4>(piece), nibble);
        let odd = _mm_and_si128(piece, nibble);
        // Codes 0..16 and 16..32 in order.
        let codes = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
        let low = _mm256_shuffle_epi8(low_table, codes);
        let high = _mm256_shuffle_epi8(high_table, codes);
        // Values 0..8 and 16..24; 8..16 and 24..32.
        let (front, back) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
        if let [first, second] = values.as_chunks_mut::<16>().0 {
            write::<STREAM, _, _>(first, _mm256_permute2x128_si256::<0x20>(front, back));
            write::<STREAM, _, _>(second, _mm256_permute2x128_si256::<0x31>(front, back));
        }
    }
}
