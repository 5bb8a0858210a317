//! AVX-512: a table lookup per value.
//!
//! The table is scaled, and rounded to the output dtype, once a block. `vpmultishiftqb` moves the
//! nibbles of a broadcast piece of `packed` to where `vpermps` or `vpermw` takes its indices from:
//! two shuffles for 64 bytes of output. Memory sets the speed.

use std::arch::x86_64::*;

use crate::values::{plain_nan, Stores, ValuesMut};
use crate::x86::avx512::{load, load_f32, round_to_bf16, write};
use crate::x86::{end_stream, prefetch, Plain};

/// How far ahead codes are fetched, in bytes.
const AHEAD: usize = 2048;

/// Dequantizes whole blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn blocks<const STREAM: bool>(
    packed: &[u8],
    absmax: &[f32],
    table: &[f32; 16],
    blocksize: usize,
    values: ValuesMut<'_>,
) {
    let table = load_f32(table);
    let scaled = |absmax| _mm512_mul_ps(table, _mm512_set1_ps(plain_nan(absmax)));
    let inputs = packed.chunks_exact(blocksize / 2).zip(absmax);
    match values {
        ValuesMut::F32(values) => {
            for (block, (packed, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                decode_f32::<STREAM>(block, packed, scaled(absmax));
            }
        }
        ValuesMut::F16(values) => {
            for (block, (packed, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                let rounded = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(scaled(absmax));
                decode_16_bit::<STREAM, _>(block, packed, rounded);
            }
        }
        ValuesMut::Bf16(values) => {
            for (block, (packed, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                let rounded = _mm512_srli_epi32::<16>(round_to_bf16(scaled(absmax)));
                decode_16_bit::<STREAM, _>(block, packed, _mm512_cvtepi32_epi16(rounded));
            }
        }
    }
}

/// Looks up the codes of a block, 16 at a time.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn decode_f32<const STREAM: bool>(block: &mut [f32], packed: &[u8], table: __m512) {
    /// Where the code of each 32-bit lane starts in the 64 bits of 16 codes, in its lowest byte.
    const SHIFTS: [u8; 64] = {
        let mut shifts = [0; 64];
        let mut lane = 0;
        while lane < 16 {
            shifts[4 * lane] = 4 * (lane ^ 1) as u8; // the even value of a byte is the high nibble
            lane += 1;
        }
        shifts
    };
    prefetch(packed, AHEAD);
    let shifts = load(&SHIFTS);
    let (vectors, pieces) = (block.as_chunks_mut::<16>().0, packed.as_chunks::<8>().0);
    for (values, &piece) in vectors.iter_mut().zip(pieces) {
        let piece = _mm512_set1_epi64(i64::from_le_bytes(piece));
        let index = _mm512_multishift_epi64_epi8(shifts, piece); // vpermps takes the low 4 bits
        write::<STREAM, _, _>(values, _mm512_castps_si512(_mm512_permutexvar_ps(index, table)));
    }
}

/// Looks up the codes of a block in 16 rounded values, 32 at a time.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn decode_16_bit<const STREAM: bool, T: Plain>(block: &mut [T], packed: &[u8], table: __m256i) {
    /// Where the code of each 16-bit lane starts in the 64 bits of its half of 32 codes.
    const SHIFTS: [u8; 64] = {
        let mut shifts = [0; 64];
        let mut lane = 0;
        while lane < 32 {
            shifts[2 * lane] = 4 * ((lane % 16) ^ 1) as u8;
            lane += 1;
        }
        shifts
    };
    prefetch(packed, AHEAD);
    let shifts = load(&SHIFTS);
    // Twice the table, since vpermw takes 5 bits and the fifth is the next code's.
    let table = _mm512_broadcast_i64x4(table);
    let (vectors, pieces) = (block.as_chunks_mut::<32>().0, packed.as_chunks::<16>().0);
    for (values, &piece) in vectors.iter_mut().zip(pieces) {
        let piece = u128::from_le_bytes(piece);
        let low = _mm512_set1_epi64(piece as i64);
        let pieces = _mm512_mask_set1_epi64(low, 0b1111_0000, (piece >> 64) as i64);
        let index = _mm512_multishift_epi64_epi8(shifts, pieces);
        write::<STREAM, _, _>(values, _mm512_permutexvar_epi16(index, table));
    }
}
