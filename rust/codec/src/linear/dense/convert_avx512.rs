//! AVX-512: matrices turned, values widened and rounded.

use std::arch::x86_64::*;

use crate::values::{Element, Values, ValuesMut};
use crate::x86::avx512::{load_f16, load_f32, round_to_bf16, store, store_half};

/// Floats in a vector.
const LANES: usize = 16;

/// Turns 16 rows of 16 floats into columns.
#[target_feature(enable = "avx512f")]
pub(crate) fn transpose(square: &mut [[f32; 16]; 16]) {
    let mut rows = [_mm512_setzero_ps(); 16];
    for (to, from) in rows.iter_mut().zip(&*square) {
        *to = load_f32(from);
    }
    // Pairs of rows by values, then by pairs of values, then by 128-bit lanes, twice.
    let pairs: [__m512d; 16] = core::array::from_fn(|i| {
        let (a, b) = (rows[i / 2 * 2], rows[i / 2 * 2 + 1]);
        let pair = if i % 2 == 0 { _mm512_unpacklo_ps(a, b) } else { _mm512_unpackhi_ps(a, b) };
        _mm512_castps_pd(pair)
    });
    // fours[4 q + c]: column c of each 128-bit lane, rows 4 q..4 q + 4.
    let fours: [__m512; 16] = core::array::from_fn(|i| {
        let (q, c) = (i / 4, i % 4);
        let (a, b) = (pairs[4 * q + c / 2], pairs[4 * q + 2 + c / 2]);
        let four = if c % 2 == 0 { _mm512_unpacklo_pd(a, b) } else { _mm512_unpackhi_pd(a, b) };
        _mm512_castpd_ps(four)
    });
    for c in 0..4 {
        let [a, b, d, e]: [__m512; 4] = core::array::from_fn(|q| fours[4 * q + c]);
        let low = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(d, e)];
        let high = [_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(d, e)];
        let columns = [
            _mm512_shuffle_f32x4::<0x88>(low[0], low[1]),
            _mm512_shuffle_f32x4::<0x88>(high[0], high[1]),
            _mm512_shuffle_f32x4::<0xdd>(low[0], low[1]),
            _mm512_shuffle_f32x4::<0xdd>(high[0], high[1]),
        ];
        for (lane, column) in columns.into_iter().enumerate() {
            store(&mut square[4 * lane + c], _mm512_castps_si512(column));
        }
    }
}

/// Writes the values as floats.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn widen(values: Values<'_>, floats: &mut [f32]) {
    assert_eq!(values.len(), floats.len());
    let (vectors, rest) = floats.as_chunks_mut::<LANES>();
    match values {
        Values::F32(values) => floats.copy_from_slice(values),
        Values::F16(values) => {
            let (values, tail) = values.as_chunks();
            for (to, from) in vectors.iter_mut().zip(values) {
                store(to, _mm512_castps_si512(load_f16(from)));
            }
            Element::widen(tail, rest);
        }
        Values::Bf16(values) => {
            let (values, tail) = values.as_chunks::<LANES>();
            for (to, from) in vectors.iter_mut().zip(values) {
                // SAFETY: the array is 32 bytes long; the load takes any alignment.
                let bits = unsafe { _mm256_loadu_si256(from.as_ptr().cast()) };
                store(to, _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)));
            }
            Element::widen(tail, rest);
        }
    }
}

/// Rounds to nearest, ties to even.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn round(floats: &[f32], values: ValuesMut<'_>) {
    assert_eq!(values.len(), floats.len());
    let (vectors, rest) = floats.as_chunks::<LANES>();
    match values {
        ValuesMut::F32(values) => values.copy_from_slice(floats),
        ValuesMut::F16(values) => {
            let (to, tail) = values.as_chunks_mut::<LANES>();
            for (to, from) in to.iter_mut().zip(vectors) {
                let rounded = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load_f32(from));
                store_half(to, rounded);
            }
            Element::narrow(rest, tail);
        }
        ValuesMut::Bf16(values) => {
            let (to, tail) = values.as_chunks_mut::<LANES>();
            for (to, from) in to.iter_mut().zip(vectors) {
                let floats = load_f32(from);
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(floats, floats);
                let quiet = _mm512_set1_epi32(0x7fc0_0000);
                let bits = _mm512_mask_mov_epi32(round_to_bf16(floats), nan, quiet);
                store_half(to, _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits)));
            }
            Element::narrow(rest, tail);
        }
    }
}
